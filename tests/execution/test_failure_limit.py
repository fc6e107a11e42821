"""When deaths of trials' processes end a search, and when they do not; `test_search_faults.py` kills real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from heterokd.execution.failure_limit import EACH, FEWEST, FailureLimit
from heterokd.storage.study_dir import StudyFolder


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path / "study")


def report(folder: StudyFolder, number: int, epoch: int) -> None:
    trial = folder.trial(number)
    trial.path.mkdir(parents=True, exist_ok=True)
    trial.append({"epoch": epoch, "val/top1": 0.5})


@pytest.mark.parametrize("parallel", [1, 2, 8])
def test_enough_deaths_without_an_epoch_end_the_search(folder: StudyFolder, parallel: int) -> None:
    deaths = FailureLimit(folder, parallel)
    for number in range(parallel):
        deaths.begin(number)
    for _ in range(max(FEWEST, EACH * parallel)):
        assert not deaths.stop_all()
        deaths.add(0)
    assert deaths.stop_all()
    assert "before any trial had reported an epoch" in deaths.sentence
    assert "--resume" in deaths.sentence


def test_one_epoch_of_one_trial_shows_that_trials_can_run(folder: StudyFolder) -> None:
    deaths = FailureLimit(folder, 1)
    deaths.begin(0)
    deaths.begin(1)
    deaths.add(0)
    report(folder, 1, 1)
    for _ in range(10 * FEWEST):
        deaths.add(0)
    assert not deaths.stop_all()


def test_what_an_earlier_search_reported_proves_nothing_of_this_one(folder: StudyFolder) -> None:
    for epoch in (1, 2, 3):
        report(folder, 0, epoch)
    report(folder, 1, 1)
    deaths = FailureLimit(folder, 1)
    deaths.begin(0)  # goes on from its rung
    for _ in range(FEWEST):
        deaths.add(0)
    assert deaths.stop_all()


def test_processes_that_the_driver_ends_do_not_count(folder: StudyFolder) -> None:
    deaths = FailureLimit(folder, 1)
    for number in range(5):
        deaths.begin(number)
        deaths.excuse(number)
        deaths.add(number)
    assert not deaths.is_reached
