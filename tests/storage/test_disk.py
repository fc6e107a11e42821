"""Disks that cannot be written for a while, for real: a file system that is full, or read-only by a mount on top."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fabricated
import pytest
from mounts import fill, small_disk

from heterokd.storage.disk import obstacle, when_writable
from heterokd.storage.files import write_text
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.study import Study

SHUT_SECONDS = 1.5


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    with small_disk(tmp_path / "shared", "2m") as place:
        yield place


def shut(place: Path) -> Callable[[], None]:
    """Lay a read-only mount over a place, as a server does that turns read-only; what opens it again."""
    subprocess.run(["mount", "--bind", place, place], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
    return lambda: subprocess.run(["umount", place], check=True) and None


def while_shut(place: Path, write: Callable[[], object]) -> float:
    """Seconds that a write took to a disk that is opened again after `SHUT_SECONDS`."""
    opening = threading.Timer(SHUT_SECONDS, shut(place))
    started = time.monotonic()
    opening.start()
    try:
        write()
        return time.monotonic() - started
    finally:
        opening.join()


def test_files_are_written_once_the_disk_is_back(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, trial = shared / "summary.json", TrialFolder(shared / "trials" / "0000")
    trial.append({"epoch": 1.0, "val/top1": 0.5})
    assert while_shut(shared, lambda: write_text(file, "whole")) > SHUT_SECONDS
    assert file.read_text() == "whole"
    assert while_shut(shared, lambda: trial.append({"epoch": 2.0, "val/top1": 0.6})) > SHUT_SECONDS
    assert [report["epoch"] for report in trial.metrics()] == [1.0, 2.0]
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{place}: cannot be written (Read-only file system); waiting for the disk, no data is lost"
        for place in (file, trial.path)
    ]


@pytest.mark.thorough
def test_a_study_decides_once_the_disk_is_back(shared: Path) -> None:
    question = fabricated.experiment()
    study = Study.open(question, Workspace(shared).study("waiting"))
    first = study.next()
    assert not isinstance(first, str | None)
    finishing = while_shut(shared, lambda: study.finish(first.number, "complete", {question.metric: 0.5}))
    assert finishing > SHUT_SECONDS
    asking = while_shut(shared, study.next)
    assert asking > SHUT_SECONDS
    standing = Study.open(question, Workspace(shared).study("waiting")).progress()
    assert (standing.complete, standing.running) == (1, 1)


def test_a_full_disk_keeps_whole_lines_and_is_waited_for(shared: Path) -> None:
    trial = TrialFolder(shared / "trials" / "0000")
    report = {f"val/{number}": 0.123456789 for number in range(2000)}
    trial.append({"epoch": 1.0, **report})
    ballast = fill(shared)
    assert obstacle(shared) == "No space left on device"
    freeing = threading.Timer(SHUT_SECONDS, ballast.unlink)
    freeing.start()
    trial.append({"epoch": 2.0, **report})
    freeing.join()
    assert [len(found) for found in trial.metrics()] == [2001, 2001]
    assert len((trial.path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_disk_that_does_not_come_back_is_an_error(shared: Path) -> None:
    open_again = shut(shared)
    file = shared / "summary.json"
    with pytest.raises(OSError, match="Read-only file system"):
        when_writable(file, lambda: file.write_text("whole"), patience=0.5)
    open_again()


def test_what_the_disk_has_no_part_in_is_not_waited_for(tmp_path: Path) -> None:
    calls: list[int] = []

    def write() -> None:
        calls.append(1)
        raise ValueError("of another kind")

    with pytest.raises(ValueError, match="of another kind"):
        when_writable(tmp_path / "file", write)
    assert calls == [1]
    assert obstacle(tmp_path / "no" / "such" / "folder") is None
