"""StudyReport: the content of a study's folder, read once; page, cards, tables and charts are made of it."""

from __future__ import annotations

from dataclasses import dataclass

from heterokd.config.experiment import Experiment
from heterokd.errors import StudyError, UserError
from heterokd.formatting import metric_name
from heterokd.methods import BASELINE
from heterokd.report.measured import Measured
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.plan.record import PlanRecord, planned
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.read_summary import read_summary
from heterokd.study.significance import Comparison, compare_trials
from heterokd.study.summary import StudySummary
from heterokd.study.trial_view import TrialView, published_trial, read_trials


@dataclass(frozen=True)
class StudyReport:
    """The content of a study's folder.

    Attributes:
        folder: folder of the study.
        experiment: its experiment.
        summary: what has been found.
        trials: all trials, sorted by number.
        comparisons: all pairs of configurations that were trained on fresh seeds.
        measured: measurements of the winner on val, or None.
        plan: estimated and actual costs of the search; None if it was not planned.
    """

    folder: StudyFolder
    experiment: Experiment
    summary: StudySummary
    trials: tuple[TrialView, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    measured: Measured | None = None
    plan: PlanRecord | None = None

    @property
    def sign(self) -> int:
        """Factor that makes larger values of the metric better."""
        return 1 if self.summary.maximise else -1

    @property
    def axis(self) -> str:
        """Label of the metric's axis."""
        return f"{metric_name(self.summary.metric)} on val"

    @property
    def search(self) -> list[TrialView]:
        """Trials of the search, without repetitions."""
        return [trial for trial in self.trials if trial.is_search]

    def find(self, number: int) -> TrialView | None:
        """Return the trial with this number, or None if it has no files here."""
        return next((trial for trial in self.trials if trial.number == number), None)

    @property
    def winner(self) -> RankedConfig | None:
        """The best configuration, or None."""
        return self.summary.winner

    @property
    def scratch(self) -> RankedConfig | None:
        """The best student without a teacher, unless it is the winner."""
        winner, scratch = self.summary.winner, self.summary.scratch
        return None if scratch is not None and winner is not None and scratch.method == winner.method else scratch

    def published(self, method: str) -> TrialView | None:
        """Return a method's complete trial at its published setting, if possible on the winner's student."""
        return published_trial(self.trials, method, "" if self.winner is None else self.winner.student)

    @property
    def levels(self) -> dict[str, float]:
        """Values of teacher and scratch on the searched metric, where they are known."""
        found = {}
        teacher = self.summary.teacher
        if teacher is not None and teacher.metric == self.summary.metric:
            found["teacher"] = teacher.val_score
        if self.scratch is not None and self.scratch.mean is not None:
            found[BASELINE] = self.scratch.mean
        return found


def read_study(folder: StudyFolder, experiment: Experiment) -> StudyReport:
    """Read a study's folder.

    Raises:
        StudyError: no trial has finished yet, or a file is damaged.
    """
    summary = read_summary(folder)
    if summary is None:
        raise StudyError(f"{folder.path}: no trial has finished yet, so there is nothing to report; try again later")
    trials = tuple(read_trials(folder, experiment.metric))
    comparisons = tuple(compare_trials(trials, maximise=summary.maximise))
    measured = _measured(folder, summary.winner)
    return StudyReport(folder, experiment, summary, trials, comparisons, measured, planned(folder))


def _measured(folder: StudyFolder, winner: RankedConfig | None) -> Measured | None:
    """Read the winner's measurements; those of another trial and a damaged file are ignored."""
    try:
        found = Measured.read(folder)
    except (UserError, KeyError, TypeError, ValueError, IndexError):
        return None
    return found if found is not None and winner is not None and found.winner == winner.number else None
