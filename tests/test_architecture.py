"""The shape of the code: rooms import one way, heavy libraries have one door, everything public says what it is."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import heterokd
from heterokd.methods import METHODS
from heterokd.tasks import TASKS

PACKAGE = Path(heterokd.__file__).parent

# A room is a folder or a file of the package. Each imports from rooms above it only; the order is that of
# docs/architecture.md.
ROOMS = (
    "errors",
    "domains",
    "extensions",
    "formatting",
    "outputs",
    "method",
    "tasks",
    "distributed",
    "networks",
    "datasets",
    "methods",
    "config",
    "storage",
    "training",
    "teachers",
    "study",
    "tracking",
    "students",
    "report",
    "execution",
    "api",
    "cli",
    "__main__",
)
# What a room must not import although it stands above: a method sees outputs, never networks or data.
NEVER = {"methods": {"networks", "datasets"}}
# The longest matching name counts: timm's networks have one door, its optimizers and its schedules another.
DOORS = {
    "timm": {"networks"},
    "timm.optim": {"training", "networks"},
    "timm.scheduler": {"training"},
    "timm.utils": {"training"},
    "segmentation_models_pytorch": {"networks"},
    "pyarrow": {"storage", "teachers", "datasets"},
    "optuna": {"study"},
    "mlflow": {"tracking", "students"},
    "matplotlib": {"report"},
    "onnx": {"networks"},
    "onnxruntime": {"networks"},
    "onnxscript": {"networks"},
    "torch.onnx": {"networks"},
    "ray": {"execution"},
}
WITHOUT_SERVICES = "teachers"  # up to this room, everything also runs where ray, optuna and mlflow are not installed

# Names of methods that mean something else in some file ("*": in all).
OTHER_MEANINGS = {
    "*": {"at"},
    "datasets/views/policy.py": {"ofa"},  # an augmentation policy
    "storage/workspace.py": {"scratch"},  # a key of summary.json
}
# Where the names of tasks may decide something: a task is a class, everybody else asks it.
OF_TASKS = {"tasks", "networks", "datasets", "report", "heterokd.training.task_modules"}

MOST_ARROWS = 142  # and 18 from benchmarks/ and experiments/
LONGEST_FILE = 350
MOST_LINES_WITH_ANY = 59
MOST_PARAMETERS = 6
FILE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base"}
CLASS_NAMES = ("Manager", "Handler", "Engine", "Wrapper", "Box", "Zoo", "Component", "Registry")

FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())


@functools.cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def room_of(file: Path) -> str:
    """The name that `ROOMS` uses; "" for the package itself."""
    first = file.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that is imported, inside functions too: `from a.b import c` gives `a.b.c`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write `from heterokd.x import y`"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(file: Path) -> set[str]:
    names = {name.split(".")[1] for name in imported(parse(file)) if name.startswith("heterokd.")}
    return {name for name in names if not name.startswith("__")} - {room_of(file)}


def floor_of(room: str) -> int:
    assert room in ROOMS, f"heterokd/{room} is not in ROOMS: say there what it may import"
    return ROOMS.index(room)


@every_file
def test_rooms_import_one_way(file: Path) -> None:
    room, names = room_of(file), rooms_imported(file)
    if not room:
        return
    below = {name for name in names if floor_of(name) > floor_of(room)}
    assert not below, f"{room} imports {sorted(below)}, which stand below it in ROOMS"
    assert not names & NEVER.get(room, set())


def test_arrows_between_rooms_are_few() -> None:
    assert len({(room_of(file), name) for file in FILES for name in rooms_imported(file)}) <= MOST_ARROWS


def test_modules_make_no_circle() -> None:
    modules = {module_of(file) for file in FILES}
    graph: dict[str, set[str]] = {}
    for file in FILES:
        found = set()
        for name in imported(parse(file)):
            if name.startswith("heterokd."):
                found.add(name if name in modules else name.rpartition(".")[0])
        graph[module_of(file)] = (found & modules) - {module_of(file), "heterokd"}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@every_file
def test_heavy_libraries_have_one_door(file: Path) -> None:
    room = room_of(file)
    for name in imported(parse(file)):
        libraries = [library for library in DOORS if f"{name}.".startswith(f"{library}.")]
        if libraries:
            doors = DOORS[max(libraries, key=len)]
            assert room in doors, f"{room} imports {name}; only {sorted(doors)} may"


def test_training_runs_without_ray_optuna_and_mlflow() -> None:
    allowed = ROOMS[: floor_of(WITHOUT_SERVICES) + 1]
    modules = [module_of(file) for file in FILES if room_of(file) in allowed]
    assert {"heterokd.errors", "heterokd.training.train", "heterokd.teachers.prepare"} <= set(modules)
    code = (
        "import importlib, sys\n"
        "for library in ('ray', 'optuna', 'mlflow'): sys.modules[library] = None  # importing it raises\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@every_file
def test_no_driver_knows_a_method(file: Path) -> None:
    if room_of(file) == "methods":
        return
    path = file.relative_to(PACKAGE).as_posix()
    known = {name for name in METHODS.builtin if name not in OTHER_MEANINGS.get(path, set()) | OTHER_MEANINGS["*"]}
    tree = parse(file)
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not [text for text in strings if text.partition(".")[0] in known], "ask the method, see heterokd.method"
    modules = {name for name in imported(tree) if name.startswith("heterokd.methods.")}
    assert not [name for name in modules if name.split(".")[2] in METHODS.builtin]


@every_file
def test_no_branch_on_a_task(file: Path) -> None:
    if room_of(file) in OF_TASKS or module_of(file) in OF_TASKS:
        return
    compared = [
        value.value
        for node in ast.walk(parse(file))
        if isinstance(node, ast.Compare)
        for value in (node.left, *node.comparators)
        if isinstance(value, ast.Constant)
    ]
    assert not set(compared) & set(TASKS), "ask the task, see heterokd.tasks"


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
def test_files_are_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def test_any_is_rare() -> None:
    """Only where a library forces it."""
    lines = [
        line for file in FILES for line in file.read_text(encoding="utf-8").splitlines() if re.search(r"\bAny\b", line)
    ]
    assert len(lines) <= MOST_LINES_WITH_ANY


@every_file
def test_many_parameters_have_a_reason(file: Path) -> None:
    """A comment over the function says why, next to its decorators."""
    lines, tree = file.read_text(encoding="utf-8").splitlines(), parse(file)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            if len([name for name in names if name not in ("self", "cls")]) > MOST_PARAMETERS:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                assert lines[first - 2].lstrip().startswith("# "), f"{node.name} takes too many parameters"


@every_file
def test_names_say_something(file: Path) -> None:
    assert not FILE_NAMES & set(file.relative_to(PACKAGE).with_suffix("").parts)
    classes = [node.name for node in ast.walk(parse(file)) if isinstance(node, ast.ClassDef)]
    assert not [name for name in classes if name.endswith(CLASS_NAMES)]
