"""Trials that a study finds running when it is opened: their process is dead, or it runs on and will report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.assignment import REMOVED
from heterokd.study.budget import Spending
from heterokd.study.pruner import is_reference
from heterokd.study.schedule import Schedule
from heterokd.study.trials import TrialRecord, Trials

Finish = Callable[[int, TrialStatus, Mapping[str, float], str | None], None]
"""`Study.finish`."""


def recover(trials: Trials, folder: StudyFolder, schedule: Schedule, spending: Spending, finish: Finish) -> None:
    """End the running trials that their folder says have ended; queue the others to be resumed.

    What the budget has paused stays paused while it is spent. A trial whose method or student was removed from the
    search space ends where it is.
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
        elif not schedule.searches(record):
            _end_removed(record, trials, files, finish)
        elif spending.is_exhausted() and snapshot.status == TrialStatus.PAUSED:
            trials.set_status(record.number, TrialStatus.PAUSED)
        else:
            requeue(record, folder, schedule)


def _end_removed(record: TrialRecord, trials: Trials, files: TrialFolder, finish: Finish) -> None:
    """Stop a trial that is not searched any more, also in its folder."""
    trials.stop(record.number, record.reached, REMOVED)
    if files.path.exists():
        files.save(replace(files.snapshot, status=TrialStatus.PRUNED, reason=REMOVED))
    finish(record.number, TrialStatus.PRUNED, (files.metrics() or [{}])[-1], None)


def requeue(record: TrialRecord, folder: StudyFolder, schedule: Schedule) -> None:
    """Queue a trial to be resumed: before samples if its last process made progress, else after them.

    The latter may hang, and a search does not begin with it.
    """
    is_first = is_reference(record) or folder.trial(record.number).has_progressed
    (schedule.unfinished if is_first else schedule.stalled).append(record.number)
