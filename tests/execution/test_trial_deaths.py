"""What becomes of a trial whose processes died; `test_search_faults.py` kills real ones."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, RaySystemError, RayTaskError

from heterokd.execution.trial_deaths import TrialDeaths
from heterokd.storage.study_dir import StudyFolder

KILLED = ActorDiedError()
DISK = RayTaskError("run_trial", "", OSError(errno.EIO, "Input/output error")).as_instanceof_cause()
RAY = RayTaskError("run_trial", "", RaySystemError("gone")).as_instanceof_cause()
OWN = RayTaskError("run_trial", "", KeyError("weight")).as_instanceof_cause()


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path / "study")


def report(folder: StudyFolder, epoch: int) -> None:
    folder.trial(0).append({"epoch": epoch, "val/top1": 0.5})


@pytest.mark.parametrize(
    ("error", "without", "with_progress"),
    [
        (KILLED, "failed", "resumed"),
        (None, "failed", "resumed"),
        (DISK, "interrupted", "resumed"),
        (RAY, "interrupted", "resumed"),
        (OWN, "failed", "failed"),
    ],
    ids=["killed", "unknown", "disk", "Ray", "exception"],
)
def test_a_trial_that_makes_progress_is_resumed_and_faults_only_interrupt(
    folder: StudyFolder, error: Exception | None, without: str, with_progress: str
) -> None:
    report(folder, 1)
    deaths = TrialDeaths(folder, count_kills=lambda: 0)
    deaths.begin(0)
    assert deaths.judge(0, error).kind == without
    report(folder, 2)
    assert deaths.judge(0, error).kind == with_progress
    deaths.begin(0)  # restarted: what it did before proves nothing
    assert deaths.judge(0, error).kind == without


def test_a_process_that_the_kernel_or_ray_killed_for_its_memory_is_a_failure(folder: StudyFolder) -> None:
    kills = itertools.chain([0, 0, 1], itertools.repeat(1))
    deaths = TrialDeaths(folder, count_kills=lambda: next(kills))
    deaths.begin(0)
    report(folder, 1)
    assert deaths.judge(0, KILLED).kind == "resumed"
    ending = deaths.judge(0, KILLED)
    assert ending.kind == "failed"
    assert ending.reason.startswith("out of memory: the trial's process was killed; free memory")
    low = ActorDiedError()
    low.error_msg = "Task was killed due to the node running low on memory."
    assert deaths.judge(0, low).reason.startswith("out of memory")


def test_reasons_are_a_line(folder: StudyFolder) -> None:
    deaths = TrialDeaths(folder, count_kills=lambda: 0)
    assert deaths.judge(0, DISK).reason == "OSError: [Errno 5] Input/output error"
    assert deaths.judge(0, OWN).reason == "KeyError: 'weight'"
    assert "process died" in deaths.judge(0, KILLED).reason
