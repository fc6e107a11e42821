"""The shape of the code: imports point one way, heavy libraries have one door, everything public says what it is."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import heterokd

PACKAGE = Path(heterokd.__file__).parent

# A module imports from its own row and from rows above it, never from below; a folder counts as one module.
ROWS = (
    (
        "errors",
        "extensions",
        "formatting",
        "tasks",
        "ending",
        "driver_folder",
        "outputs",
        "space",
        "disk",
        "storage",
        "mirror",
    ),
    (
        "method",
        "projectors",
        "reliability",
        "discriminator",
        "group",
        "gathering",
        "batch_norms",
        "networks",
        "views",
        "dataset",
        "image_files",
        "looking",
        "decoded",
        "label_files",
        "datasets",
    ),
    ("methods",),
    ("cache", "pixels", "loaders", "paired_tests", "task_modules", "distiller", "optim", "cka"),
    ("config",),
    ("root", "timing", "precision", "evaluation", "teachers", "updates", "training", "memory", "significance"),
    ("caching", "latency"),
    ("distillation",),
    (
        "filling",
        "priors",
        "study",
        "autoscaling",
        "ray_settings",
        "cluster",
        "deaths",
        "questions",
        "workers",
        "remote",
        "trial",
        "watching",
        "search",
        "single",
        "match",
        "automatic",
        "reproduce",
        "tracking",
        "promotion",
        "export",
        "report",
        "pictures",
        "plan",
    ),
    ("catalogue", "diagnosis", "doctor", "terminal", "cache_command", "completing"),
    ("library",),
    ("cli",),
    ("__main__",),
)
# A method sees outputs, never networks or data; the distiller, which DDP wraps, never sees a teacher.
NEVER = {
    "methods": {"networks", "views", "dataset", "datasets"},
    "distiller": {"teachers", "cache", "loaders"},
}
# The longest matching name counts: timm's networks have one door, its optimizers and its weight average another.
DOORS = {
    "timm": {"networks"},
    "timm.optim": {"optim"},
    "timm.scheduler": {"optim"},
    "segmentation_models_pytorch": {"networks"},
    "pyarrow": {"storage", "cache"},
    "optuna": {"study"},
    "mlflow": {"tracking", "promotion"},
    "matplotlib": {"pictures"},
    "onnx": {"export"},
    "onnxruntime": {"export"},
    "onnxscript": {"export"},
    "torch.onnx": {"export"},
    "ray": {"cluster", "ray_settings", "workers"},
}
LAST_WITHOUT_SERVICES = "training"  # up to its row, everything also runs where ray, optuna and mlflow are not installed

FILE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base"}
CLASS_NAMES = ("Manager", "Handler", "Engine", "Wrapper", "Box", "Zoo", "Component", "Registry")

FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def module_of(file: Path) -> str:
    """The name that `ROWS` uses: the file's, or its folder's; "" for the package itself."""
    first = file.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that is imported, inside functions too: `from a.b import c` gives `a.b.c`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write `from heterokd.x import y`"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(file: Path) -> set[str]:
    names = {name.split(".")[1] for name in imported(parse(file)) if name.startswith("heterokd.")}
    return {name for name in names if not name.startswith("__")} - {module_of(file)}


def row_of(module: str) -> int:
    for row, modules in enumerate(ROWS):
        if module in modules:
            return row
    raise AssertionError(f"heterokd/{module} is in no row of ROWS: say there what it may import")


@every_file
def test_imports_point_one_way(file: Path) -> None:
    module, names = module_of(file), own_imports(file)
    if not module:
        assert not names, f"`import heterokd` must stay cheap, but it imports {sorted(names)}"
        return
    below = {name for name in names if row_of(name) > row_of(module)}
    assert not below, f"{module} imports {sorted(below)}, which stand below it in ROWS"
    assert not names & NEVER.get(module, set())


def test_imports_make_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for file in FILES:
        graph.setdefault(module_of(file), set()).update(own_imports(file))
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_rows_name_a_module_once() -> None:
    names = [name for row in ROWS for name in row]
    assert len(names) == len(set(names))


@every_file
def test_heavy_libraries_have_one_door(file: Path) -> None:
    module = module_of(file)
    for name in imported(parse(file)):
        libraries = [library for library in DOORS if f"{name}.".startswith(f"{library}.")]
        if libraries:
            doors = DOORS[max(libraries, key=len)]
            assert module in doors, f"{module} imports {name}; only {sorted(doors)} may"


def test_command_line_imports_ray_inside_commands_only() -> None:
    trees = [parse(file) for file in (PACKAGE / "cli").glob("*.py")]
    at_the_top = [node for tree in trees for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.split(".")[0] for node in at_the_top for name in imported(node)}
    assert "typer" in names
    assert not names & {"ray", "torch", "timm", "optuna", "mlflow"}


def test_training_runs_without_ray_optuna_and_mlflow() -> None:
    allowed = {name for row in ROWS[: row_of(LAST_WITHOUT_SERVICES) + 1] for name in row}
    modules = [
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for file in FILES
        if module_of(file) in allowed
    ]
    assert "heterokd.errors" in modules
    code = (
        "import importlib, sys\n"
        "for library in ('ray', 'optuna', 'mlflow'): sys.modules[library] = None  # importing it raises\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@every_file
def test_everything_public_has_a_docstring(file: Path) -> None:
    tree = parse(file)
    assert ast.get_docstring(tree), "the file itself"

    def missing(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
                if not ast.get_docstring(node):
                    yield f"{prefix}{node.name} (line {node.lineno})"
                if isinstance(node, ast.ClassDef):
                    yield from missing(node.body, f"{prefix}{node.name}.")

    assert not list(missing(tree.body))


@every_file
def test_names_say_something(file: Path) -> None:
    assert not FILE_NAMES & set(file.relative_to(PACKAGE).with_suffix("").parts)
    classes = [node.name for node in ast.walk(parse(file)) if isinstance(node, ast.ClassDef)]
    assert not [name for name in classes if name.endswith(CLASS_NAMES)]
