"""Temporary folders of killed searches are removed by the next one, and no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from heterokd.execution.abandoned import MARK, mark, remove_abandoned, scratch_folder

KILLED = """
import os, signal
from pathlib import Path
from heterokd.execution.abandoned import scratch_folder
with scratch_folder("heterokd-tune-") as folder:
    (folder / "snapshot").write_text("")
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_folder_of_a_killed_search_is_removed_by_the_next(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", KILLED], env=environment, capture_output=True, text=True, check=False)
    left = Path(done.stdout.strip())
    assert left.is_dir()
    with scratch_folder("heterokd-tune-", tmp_path) as first, scratch_folder("heterokd-tune-", tmp_path) as second:
        assert not left.exists()
        assert first.exists()
        assert second.exists()
    assert list(tmp_path.iterdir()) == []


def test_only_marked_folders_of_dead_processes_are_removed(tmp_path: Path) -> None:
    for name in ("running", "unmarked", "damaged", "elsewhere", "reused", "other"):
        (tmp_path / f"session_{name}").mkdir()
    mark(tmp_path / "session_running")
    owner = json.loads((tmp_path / "session_running" / MARK).read_text())
    (tmp_path / "session_damaged" / MARK).write_text("{half")
    (tmp_path / "session_elsewhere" / MARK).write_text(json.dumps({**owner, "host": "elsewhere", "pid": 2**22 + 1}))
    (tmp_path / "session_reused" / MARK).write_text(json.dumps({**owner, "began": owner["began"] - 3600}))
    (tmp_path / "session_latest").symlink_to(tmp_path / "session_reused")
    (tmp_path / "session_other").rename(tmp_path / "other")
    (tmp_path / "other" / MARK).write_text(json.dumps({**owner, "pid": 2**22 + 1}))
    assert remove_abandoned(tmp_path, "session_*") == [tmp_path / "session_reused"]
    assert (tmp_path / "other").exists()
