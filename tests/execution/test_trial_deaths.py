"""What becomes of a trial whose processes died; `test_search_faults.py` kills real ones."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RaySystemError, RayTaskError

from heterokd.execution.callbacks import TuneCallback
from heterokd.execution.crash_file import CRASH_FILE, HEAD, crash_recorded
from heterokd.execution.failure_limit import FailureLimit
from heterokd.execution.trial_deaths import MOST_DEATHS, TrialDeaths
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


def judging(folder: StudyFolder, max_failures: int = 0, kills: Callable[[], int] = lambda: 0) -> TrialDeaths:
    deaths = TrialDeaths(folder, max_failures, kills)
    deaths.begin(0)
    return deaths


@pytest.mark.parametrize(
    ("error", "without", "with_progress"),
    [
        (KILLED, "interrupted", "resumed"),
        (None, "interrupted", "resumed"),
        (DISK, "interrupted", "resumed"),
        (RAY, "interrupted", "resumed"),
        (OWN, "failed", "failed"),
    ],
    ids=["killed", "unknown", "disk", "Ray", "exception"],
)
def test_a_trial_that_makes_progress_is_resumed_and_only_its_own_exceptions_fail_it(
    folder: StudyFolder, error: Exception | None, without: str, with_progress: str
) -> None:
    report(folder, 1)
    deaths = judging(folder)
    assert deaths.judge(0, error).kind == without
    report(folder, 2)
    assert deaths.judge(0, error).kind == with_progress
    assert deaths.judge(0, error).kind == without  # what it did before proves nothing
    report(folder, 3)
    deaths.begin(0)
    assert deaths.judge(0, error).kind == without


def test_only_deaths_in_a_row_without_a_new_epoch_count(folder: StudyFolder) -> None:
    deaths = judging(folder, max_failures=2)
    deaths.restarted(0)
    deaths.restarted(0)
    report(folder, 1)
    deaths.restarted(0)  # not counted, and those before do not count any more
    assert deaths.judge(0, KILLED).kind == "resumed"
    deaths.begin(0)  # as its next process begins
    deaths.restarted(0)
    ending = deaths.judge(0, KILLED)
    assert ending.kind == "interrupted"
    assert ending.reason == (
        "its process died (killed, a crash, or out of memory) 3 times in a row, without a new epoch"
    )


def test_a_trial_whose_processes_are_killed_without_end_is_interrupted(folder: StudyFolder) -> None:
    deaths = judging(folder)
    for epoch in range(1, MOST_DEATHS):
        report(folder, epoch)
        assert deaths.judge(0, KILLED).kind == "resumed"
    report(folder, MOST_DEATHS)
    ending = deaths.judge(0, KILLED)
    assert (ending.kind, f", {MOST_DEATHS} times" in ending.reason) == ("interrupted", True)


def test_a_crash_of_its_own_code_is_a_failure_that_names_the_signal(folder: StudyFolder) -> None:
    trial = folder.trial(0).path
    trial.mkdir(parents=True)
    (trial / CRASH_FILE).write_text(f"{HEAD}Aborted\n\nCurrent thread 0x1\n")
    deaths = judging(folder)
    assert deaths.judge(0, KILLED).kind == "interrupted"  # that crash was in an earlier search
    code = (
        "import ctypes\nfrom pathlib import Path\nfrom heterokd.execution.crash_file import crash_recorded\n"
        f"with crash_recorded(Path({str(trial)!r})): ctypes.string_at(0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGSEGV
    ending = deaths.judge(0, KILLED)
    assert ending.kind == "failed"
    assert ending.reason == "the trial's process crashed (Segmentation fault); its stack is in crash.txt"
    assert "ctypes" in (trial / CRASH_FILE).read_text()


def test_a_training_that_ends_leaves_no_file_of_crashes(tmp_path: Path) -> None:
    with crash_recorded(tmp_path):
        assert (tmp_path / CRASH_FILE).exists()
    with crash_recorded(tmp_path / "missing"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_process_that_the_kernel_or_ray_killed_for_its_memory_is_a_failure(folder: StudyFolder) -> None:
    kills = iter([0, 0, 1, 2, 2, 2])
    deaths = judging(folder, kills=lambda: next(kills))
    report(folder, 1)
    assert deaths.judge(0, KILLED).kind == "resumed"
    ending = deaths.judge(0, KILLED)
    assert ending.kind == "failed"
    assert ending.reason.startswith("out of memory: the trial's process was killed; free memory")
    deaths.restarted(0)  # the kernel's second kill
    assert deaths.judge(0, KILLED).kind == "interrupted"
    low = ActorDiedError()
    low.error_msg = "Task was killed due to the node running low on memory."
    assert deaths.judge(0, low).reason.startswith("out of memory")


def test_reasons_are_a_line(folder: StudyFolder) -> None:
    deaths = judging(folder)
    assert deaths.judge(0, DISK).reason == "OSError: [Errno 5] Input/output error, without a new epoch"
    assert deaths.judge(0, OWN).reason == "KeyError: 'weight'"
    assert "process died" in deaths.judge(0, KILLED).reason


def test_the_terminal_gets_a_sentence_for_each_death_but_not_of_a_process_that_the_driver_ended(
    folder: StudyFolder, caplog: pytest.LogCaptureFixture
) -> None:
    searcher: Any = SimpleNamespace(actor=None, deaths=judging(folder), failures=FailureLimit(folder, 1))
    nothing: Any = None
    callback = TuneCallback(folder, searcher, nothing, nothing, [], nothing)
    trial: Any = SimpleNamespace(
        config={"number": 0}, trial_id="a", num_failures=1, pickled_error_file="", run_metadata=SimpleNamespace()
    )
    trial.run_metadata.last_result = {}
    callback.on_trial_recover(0, [], trial)
    callback.on_trial_recover(0, [], trial)  # of a node that was preempted: Tune does not count it
    assert caplog.messages == [
        "trial 0: its process died (killed, a crash, or out of memory); it continues from its last checkpoint"
    ]
    searcher.failures.excuse(0)
    trial.num_failures = 2
    callback.on_trial_recover(0, [], trial)
    assert len(caplog.messages) == 1
