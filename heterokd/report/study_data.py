"""StudyReport: a study's folder, read once; page, cards, tables and charts are made of it."""

from __future__ import annotations

from dataclasses import dataclass

from heterokd.config.experiment import Experiment
from heterokd.errors import StudyError, UserError
from heterokd.methods import BASELINE, VANILLA_KD
from heterokd.report.measured import Measured
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.plan.record import PlanRecord, planned
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.significance import Comparison, compare_trials
from heterokd.study.summary import StudySummary, read_summary
from heterokd.study.trial_view import TrialView, read_trials


@dataclass(frozen=True)
class StudyReport:
    """What a study's folder says.

    Attributes:
        folder: of the study.
        experiment: its question.
        summary: what it has found.
        trials: by number.
        comparisons: of every pair of configurations that were trained on fresh seeds.
        measured: what val says of the winner; None where it was not measured.
        plan: what the search was planned to take, and what it took; None where nobody planned it.
    """

    folder: StudyFolder
    experiment: Experiment
    summary: StudySummary
    trials: tuple[TrialView, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    measured: Measured | None = None
    plan: PlanRecord | None = None

    @property
    def search(self) -> list[TrialView]:
        """Trials of the search, repetitions apart."""
        return [one for one in self.trials if one.is_search]

    def find(self, number: int) -> TrialView | None:
        """The trial of that number; None where it has no files here."""
        return next((one for one in self.trials if one.number == number), None)

    @property
    def winner(self) -> RankedConfig | None:
        """The best configuration."""
        return self.summary.winner

    @property
    def scratch(self) -> RankedConfig | None:
        """The best student on labels alone, where it is not the winner."""
        winner, scratch = self.summary.winner, self.summary.scratch
        return None if scratch is not None and winner is not None and scratch.method == winner.method else scratch

    @property
    def default(self) -> TrialView | None:
        """Hinton's distillation at its published setting, on the winner's student where it was tried there."""
        method = VANILLA_KD[self.experiment.data.task]
        found = [one for one in self.search if one.method == method and one.origin == "published" and one.is_complete]
        wanted = "" if self.winner is None else self.winner.student
        return next((one for one in found if one.student == wanted), found[0] if found else None)

    @property
    def levels(self) -> dict[str, float]:
        """Teacher and scratch on the searched metric, where they are known on it."""
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
    return StudyReport(
        folder,
        experiment,
        summary,
        trials,
        tuple(compare_trials(trials, maximise=summary.maximise)),
        _measured(folder, summary.winner),
        planned(folder),
    )


def _measured(folder: StudyFolder, winner: RankedConfig | None) -> Measured | None:
    """What was measured of the winner; of another one, or in a damaged file, it counts as nothing."""
    try:
        found = Measured.read(folder)
    except (UserError, KeyError, TypeError, ValueError, IndexError):
        return None
    return found if found is not None and winner is not None and found.winner == winner.number else None
