"""Names of implementations come from a folder and from entry points; classes are imported when they are asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from heterokd.errors import ConfigError
from heterokd.extensions import Implementations

BASE = "heterokd.method:Method"
SOURCE = "from heterokd.methods.kd import KD\n\n\nclass Other(KD):\n    pass\n\n\nclass Unrelated:\n    pass\n"


def install(folder: Path, entries: str, name: str = "plug") -> None:
    """A package with entry points, as pip leaves it."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)
    (folder / f"{name}_module.py").write_text(SOURCE)


@pytest.fixture
def methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Implementations[object]:
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = ("[heterokd.methods]", "other = plug_module:Other", "kd = plug_module:Other", "gone = nowhere:X")
    install(tmp_path, "\n".join((*lines, "unrelated = plug_module:Unrelated\n")))
    return Implementations("heterokd.methods", BASE, "heterokd.methods")


def test_installed_packages_add_names_and_take_none_away(methods: Implementations[object]) -> None:
    assert list(methods)[-3:] == ["gone", "other", "unrelated"]
    assert {"kd", "scratch"} <= set(methods.builtin) <= set(methods)
    assert len(methods) == len(list(methods)) == len(methods.builtin) + 3
    assert methods["other"].__name__ == "Other"
    assert methods["dkd"].__name__ == "DKD"
    assert "nothing" not in methods
    assert methods.get("nothing") is None


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("kd", "heterokd and plug both define 'kd'; uninstall plug, or rename its entry point"),
        ("gone", r"'gone' of plug cannot be imported \(ModuleNotFoundError: No module named 'nowhere'\)"),
        ("unrelated", r"'unrelated' of plug \(plug_module:Unrelated\) is not a subclass of heterokd.method.Method"),
    ],
)
def test_an_entry_point_that_is_wrong(methods: Implementations[object], name: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        methods[name]
    assert "\n" not in str(caught.value)


def test_names_are_found_without_importing_anything() -> None:
    code = (
        "import sys\n"
        "from heterokd.extensions import Implementations\n"
        f"methods = Implementations('heterokd.methods', {BASE!r}, 'heterokd.methods')\n"
        "assert 'kd' in methods and len(list(methods)) > 20\n"
        "print(sorted({'torch', 'pydantic', 'heterokd.methods'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_methods_and_data_sets_of_an_installed_package_are_searched(
    tiny_file: Callable[..., Path], tmp_path: Path
) -> None:
    """In a process that finds the package, by the names of its entry points; `methods: all` does not change."""
    install(tmp_path, "[heterokd.methods]\nother = plug_module:Other\n[heterokd.datasets]\nmine = plug_module:Mine\n")
    with (tmp_path / "plug_module.py").open("a") as module:
        module.write("from heterokd.datasets.digits import Digits\n\n\nclass Mine(Digits):\n    pass\n")
    file = tiny_file(data={"dataset": "mine"}, search={"space": {"methods": ["kd", "other"]}})
    code = (
        "import sys\n"
        "from heterokd.config.reading import load_experiment\n"
        "experiment = load_experiment(sys.argv[1])\n"
        "recipe = experiment.recipe({'method': 'other', 'other.temperature': 2.0})\n"
        "print(recipe.method_class.__module__, recipe.data.dataset_class.__module__, recipe.extension)\n"
        "print('other' in load_experiment(sys.argv[1], ['search.space.methods=all']).methods)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.splitlines() == ["plug_module plug_module None", "False"], done.stderr
