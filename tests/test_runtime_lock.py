"""requirements-runtime.lock: a part of requirements.lock, without development tools, with all that heterokd imports."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOP = Path(__file__).parents[1]
sys.path.insert(0, str(TOP / "deploy"))

import runtime_lock  # noqa: E402

RUNTIME = TOP / "requirements-runtime.lock"
DISTRIBUTIONS = packages_distributions()


def imported(folder: Path) -> set[str]:
    """Top-level names of all imports in a folder's modules, those inside functions included."""
    names: set[str] = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"heterokd", "__future__"}


def test_the_file_is_what_its_command_writes() -> None:
    assert RUNTIME.read_text(encoding="utf-8").splitlines() == runtime_lock.runtime_lines()


def test_it_is_a_part_of_the_whole_lock() -> None:
    assert set(runtime_lock.locked(RUNTIME).items()) < set(runtime_lock.locked().items())


def test_it_holds_no_development_tool() -> None:
    extras = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    tools = {canonicalize_name(Requirement(line).name) for extra in ("dev", "docs") for line in extras[extra]}
    # A runtime package itself needs jsonschema.
    assert runtime_lock.locked(RUNTIME).keys() & tools == {"jsonschema"}


def test_every_pinned_version_satisfies_pyproject() -> None:
    for requirement in runtime_lock.project():
        pinned = Requirement(runtime_lock.locked(RUNTIME)[canonicalize_name(requirement.name)])
        (version,) = pinned.specifier
        assert requirement.specifier.contains(version.version), requirement


def test_it_covers_every_import() -> None:
    names = runtime_lock.locked(RUNTIME).keys()
    # Trackers and samplers of a user's choice are in no distribution that is installed here.
    third_party = {name for name in imported(TOP / "heterokd") if name in DISTRIBUTIONS}
    provided = {name for name, found in DISTRIBUTIONS.items() if {canonicalize_name(each) for each in found} & names}
    assert {"torch", "ray", "yaml"} <= third_party <= provided


def test_a_missing_package_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        "import os\ndef test():\n    from hypothesis import given\n    import numpy.linalg\n"
    )
    assert imported(tmp_path) == {"hypothesis", "numpy"}
    assert "hypothesis" not in runtime_lock.locked(RUNTIME)


BLOCK = """
import sys
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions
from sysconfig import get_path
from packaging.utils import canonicalize_name
names = {*sys.argv[1].split(","), "heterokd"}
found = packages_distributions()
absent = {name for name, of in found.items() if not {canonicalize_name(each) for each in of} & names}
class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in absent and path is None:
            path = [entry for entry in sys.path if entry != get_path("purelib")]  # Ray brings some packages itself
        return super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
for module in sys.argv[2:]:
    __import__(module)
"""


@pytest.mark.thorough
def test_heterokd_works_without_other_packages() -> None:
    """Imports of the packages' own, too: every module is imported where only the file's packages can be."""
    modules = [
        ".".join(file.relative_to(TOP).with_suffix("").parts).removesuffix(".__init__")
        for file in sorted((TOP / "heterokd").rglob("*.py"))
        if file.stem != "__main__"
    ]
    names = ",".join(runtime_lock.locked(RUNTIME))
    done = subprocess.run(
        [sys.executable, "-c", BLOCK, names, *modules], capture_output=True, text=True, check=False, cwd=TOP
    )
    assert done.returncode == 0, done.stderr
