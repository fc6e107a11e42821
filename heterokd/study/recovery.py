"""Trials that a study finds running when it is opened: their process is dead, or it runs on and will report."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.budget import Spending
from heterokd.study.pruner import is_reference
from heterokd.study.schedule import Schedule
from heterokd.study.trials import TrialRecord, Trials

Finish = Callable[[int, TrialStatus, Mapping[str, float], str | None], None]
"""`Study.finish`."""


def recover(trials: Trials, folder: StudyFolder, schedule: Schedule, spending: Spending, finish: Finish) -> None:
    """End the running trials that their folder says have ended; queue the others to be resumed.

    What the budget has paused stays paused while it is spent.
    """
    for number in trials.foreign():
        # Asked for elsewhere (`study.ask` by hand): there is nothing to run.
        trials.end(number, TrialStatus.FAILED)
    for record in [record for record in trials if record.is_running]:
        files = folder.trial(record.number)
        snapshot = files.snapshot
        if snapshot.status.is_final:
            metrics = snapshot.metrics or (files.metrics() or [{}])[-1]
            finish(record.number, snapshot.status, metrics, files.error_line)
        elif spending.is_exhausted() and snapshot.status == TrialStatus.PAUSED:
            trials.set_status(record.number, TrialStatus.PAUSED)
        else:
            requeue(record, folder, schedule)


def requeue(record: TrialRecord, folder: StudyFolder, schedule: Schedule) -> None:
    """Queue a trial to be resumed: before samples if its last process made progress, else after them.

    The latter may hang, and a search does not begin with it.
    """
    is_first = is_reference(record) or folder.trial(record.number).has_progressed
    (schedule.unfinished if is_first else schedule.stalled).append(record.number)
