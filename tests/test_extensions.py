"""Names of implementations come from a folder and from entry points; classes are imported when they are asked for."""

from __future__ import annotations

import subprocess
import sys
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
        ("kd", "heterokd and plug both define 'kd'; uninstall plug, or ask its authors for another name"),
        ("gone", r"'gone' of plug cannot be imported \(ModuleNotFoundError: No module named 'nowhere'\)"),
        ("unrelated", r"'unrelated' of plug \(plug_module:Unrelated\) is no subclass of heterokd.method.Method"),
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
