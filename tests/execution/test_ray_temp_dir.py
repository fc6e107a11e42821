"""A temporary folder of any length: Ray's sockets get a short one, or the search is refused before work."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from heterokd.errors import ConfigError
from heterokd.execution.ray_temp_dir import SESSION_BYTES, SHORT, SOCKET_BYTES, ray_temp_dir

LONGEST = SOCKET_BYTES - SESSION_BYTES - len("/ray")


def folder_of(length: int) -> str:
    return "/tmp/" + "x" * (length - len("/tmp/"))


def test_the_default_is_kept_while_it_is_short_enough() -> None:
    assert ray_temp_dir({}) is None
    assert ray_temp_dir({"TMPDIR": folder_of(LONGEST)}) is None
    assert ray_temp_dir({"TMPDIR": folder_of(200), "RAY_TMPDIR": "/tmp"}) is None, "Ray reads RAY_TMPDIR first"


@pytest.mark.parametrize(
    "folder", [folder_of(LONGEST + 1), "/tmp/" + "ä" * LONGEST, folder_of(250), "", "relative", "/dev/null", "/proc/x"]
)
def test_another_folder_is_taken_instead(folder: str, tmp_path: Path) -> None:
    assert ray_temp_dir({"TMPDIR": folder}) in SHORT
    assert ray_temp_dir({"RAY_TMPDIR": folder, "TMPDIR": "/tmp"}) in SHORT
    assert ray_temp_dir({"TMPDIR": folder}, ("/proc/ray", "/tmp/ray")) == "/tmp/ray"


def test_without_any_folder_it_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match="TMPDIR: Ray needs a writable folder of at most 32 bytes") as caught:
        ray_temp_dir({"TMPDIR": folder_of(60)}, ("/proc/ray", folder_of(80)))
    assert len(str(caught.value).splitlines()) == 1


def test_the_longest_socket_is_that_of_the_installed_ray() -> None:
    ray = Path(next(iter(importlib.util.find_spec("ray").submodule_search_locations)))
    sources = (file.read_text() for file in (ray / "dashboard/modules").rglob("*.py"))
    names = [name for text in sources for name in re.findall(r"^class (\w+)\(SubprocessModule\)", text, re.MULTILINE)]
    longest = max(["plasma_store", "raylet", *(f"dash_{name}" for name in names)], key=len)
    session = f"/session_2026-01-31_23-59-59_999999_{2**22}/sockets/"
    assert len(session + longest) <= SESSION_BYTES
    assert 'f"session_{date_str}_{os.getpid()}"' in (ray / "_private/node.py").read_text()
    assert os.path.isabs(SHORT[0])


@pytest.mark.ray
@pytest.mark.thorough
def test_ray_starts_in_a_temporary_folder_of_any_length(tmp_path: Path) -> None:
    folder = tmp_path / ("t" * 60) / ("ä %" * 20)
    folder.mkdir(parents=True)
    script = (
        "from heterokd.execution.ray_connection import connected\n"
        "from heterokd.execution.ray_settings import ray\n"
        "with connected(None, cores=1):\n"
        "    print(ray.get(ray.remote(lambda: 'it runs').remote()))\n"
    )
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "it runs"
