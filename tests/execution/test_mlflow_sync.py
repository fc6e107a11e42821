"""The thread that syncs trials to MLflow outlives whatever a tracker raises."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from heterokd.execution.callbacks import MlflowSync
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.study.summary import StudySummary


class FailingTracker:
    """A tracker that raises at its first calls."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.synced: list[int] = []

    def sync(self, trial: TrialFolder) -> bool:
        if self.failures:
            self.failures -= 1
            raise KeyError("run_id")
        self.synced.append(trial.number)
        return True

    def finish(self, summary: StudySummary | None, status: str = "FINISHED") -> bool:
        return True


def test_the_thread_goes_on_after_exceptions_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, tracker = StudyFolder(tmp_path), FailingTracker(failures=3)
    sync = MlflowSync(tracker, folder, interval=0.02)
    for number in range(3):
        sync.put(folder.trial(number))
    ends = time.monotonic() + 30
    while len(set(tracker.synced)) < 3 and time.monotonic() < ends:
        time.sleep(0.01)
    assert sync.thread.is_alive()
    sync.close()
    assert set(tracker.synced) == {0, 1, 2}
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "tracking failed (KeyError: 'run_id'); it is tried again"
    ]


def test_a_tracker_that_always_raises_does_not_delay_the_end(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    sync = MlflowSync(FailingTracker(failures=10**6), folder)
    sync.put(folder.trial(0))
    began = time.monotonic()
    sync.close()
    assert time.monotonic() - began < 20
