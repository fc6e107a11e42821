"""A trial's status has one name everywhere, and files of older versions are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heterokd.errors import StudyError
from heterokd.storage.files import write_text
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus


def written(folder: Path, content: str) -> TrialFolder:
    write_text(folder / "0003" / "trial.json", content)
    return TrialFolder(folder / "0003")


@pytest.mark.parametrize(
    ("content", "status"),
    [
        ({"state": "failed", "reason": "not finite"}, TrialStatus.DIVERGED),
        ({"state": "failed", "reason": None}, TrialStatus.FAILED),
        ({"state": "pruned", "reason": "not finite"}, TrialStatus.PRUNED),
        ({"state": "paused", "reason": "budget", "key_of_another_version": 1}, TrialStatus.PAUSED),
        ({}, TrialStatus.RUNNING),
    ],
)
def test_files_of_older_versions_are_read(content: dict[str, object], status: TrialStatus, tmp_path: Path) -> None:
    assert written(tmp_path, json.dumps(content)).status == status


def test_a_snapshot_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path / "0003")
    for status in TrialStatus:
        snapshot = TrialSnapshot(status, "sampled", 0, {"method": "kd"}, "behind", {"epoch": 3}, {"params_m": 0.4}, 7)
        folder.save(snapshot)
        assert folder.snapshot == snapshot
        assert json.loads((folder.path / "trial.json").read_text())["state"] == status.value


def test_an_unknown_status_is_refused_by_the_file(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"trial\.json: is damaged \('lost' is not a valid TrialStatus\)"):
        _ = written(tmp_path, '{"state": "lost"}').status
