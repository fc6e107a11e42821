"""metrics.jsonl after a crash, files under a umask, and checkpoints of a trial that has ended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from heterokd.storage.files import read_derived, write_text
from heterokd.storage.filesystem import open_folder
from heterokd.storage.study_dir import TrialFolder, previous_checkpoint
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus

NO_REPORTS = {
    "half a line": b'{"epoch": 2.0, "val/to',
    "an empty object": b"{}\n",
    "a number": b"3\n",
    "null": b"null\n",
    "a list": b"[1, 2]\n",
    "bytes that are no text": b"\xff\xfe\x00\x01\n",
    "zeros": bytes(4096),
    "an epoch that is text": b'{"epoch": "2", "val/top1": 0.5}\n',
    "an epoch that is not whole": b'{"epoch": 1.5, "val/top1": 0.5}\n',
    "an epoch that is not finite": b'{"epoch": Infinity, "val/top1": 0.5}\n',
    "epoch 0": b'{"epoch": 0, "val/top1": 0.5}\n',
    "a metric that is text": b'{"epoch": 2, "val/top1": "0.5"}\n',
    "a deep list": b"[" * 100_000 + b"\n",
    "a huge number": b'{"epoch": 1' + b"0" * 5000 + b"}\n",
    "a number beyond floats": b'{"epoch": 2, "val/top1": 1' + b"0" * 400 + b"}\n",
    "half a line, ended": b'{"epoch": 2.0, "val/to\r\n\n',
}


@pytest.mark.parametrize("content", NO_REPORTS.values(), ids=NO_REPORTS)
def test_a_line_that_is_no_report_is_skipped_and_its_epoch_reported_again(content: bytes, tmp_path: Path) -> None:
    trial = TrialFolder(tmp_path / "0000")
    trial.append({"epoch": 1.0, "val/top1": 0.1})
    with (trial.path / "metrics.jsonl").open("ab") as file:
        file.write(content)
    assert (trial.metrics(), trial.reported_epochs()) == ([{"epoch": 1.0, "val/top1": 0.1}], 1)
    for epoch in (2.0, 3.0):
        trial.append({"epoch": epoch, "val/top1": epoch / 10})
    assert [report["epoch"] for report in trial.metrics()] == [1.0, 2.0, 3.0]
    assert trial.reported_epochs() == 3


def test_an_epoch_that_was_lost_between_others_is_inserted(tmp_path: Path) -> None:
    trial = TrialFolder(tmp_path / "0000")
    assert (trial.metrics(), trial.reported_epochs()) == ([], 0)
    for epoch in (1.0, 2.0, 3.0):
        trial.append({"epoch": epoch, "val/top1": epoch / 10})
    file = trial.path / "metrics.jsonl"
    file.write_bytes(file.read_bytes().replace(b'{"epoch": 2.0', b'{"epoch" 2.0'))
    assert trial.reported_epochs() == 1
    trial.append({"epoch": 2.0, "val/top1": 0.2})
    trial.append({"epoch": 3.0, "val/top1": 0.9})  # trained again: the first report stays
    assert [report["val/top1"] for report in trial.metrics()] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("content", [None, b"", b"{half", b"3", b"null", b"\xff\xfe", bytes(512)])
def test_a_damaged_file_that_can_be_computed_again_counts_as_missing(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "captions.json").write_bytes(content)
    assert read_derived(tmp_path / "captions.json") == {}


@pytest.fixture(params=[0o077, 0o027, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_the_umask_is_kept_by_every_write(umask: int, tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "new")
    write_text(tmp_path / "new" / "text", "first")
    (tmp_path / "new" / "text").chmod(0o666)
    write_text(tmp_path / "new" / "text", "replaced")
    folder.write("bytes", b"content")
    folder.copy_from(tmp_path / "new" / "text", "copy")
    TrialFolder(tmp_path / "new" / "0000").append({"epoch": 1.0})
    for path in (tmp_path / "new").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_trial_that_has_ended_keeps_a_single_checkpoint(tmp_path: Path) -> None:
    trial = TrialFolder(tmp_path / "0000")
    for status, is_kept in ((TrialStatus.RUNNING, True), (TrialStatus.PAUSED, True), (TrialStatus.PRUNED, False)):
        write_text(trial.checkpoint, "")
        write_text(previous_checkpoint(trial.checkpoint), "")
        trial.save(TrialSnapshot(status=status))
        assert (trial.checkpoint.exists(), previous_checkpoint(trial.checkpoint).exists()) == (True, is_kept)
