"""A study as its page reads it: one entry a trial, from the trial folders, which are the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from heterokd.config.experiment import Experiment
from heterokd.domains import Scalar
from heterokd.methods import BASELINE, VANILLA_KD
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.significance import Comparison, compare_study
from heterokd.study.summary import StudySummary


@dataclass(frozen=True)
class Tried:
    """One trial.

    Attributes:
        number: of the trial.
        method: that it distils by.
        student: its network.
        status: where it stands.
        origin: how it came up: published, warm, sampled, confirm.
        confirms: number of the trial that it repeats on a fresh seed.
        sample: its values.
        seed: of weights, order and views.
        value: the metric at its end; for one that was stopped, at its last epoch. None where it has none.
        epochs: finished ones, counted from 1.
        curve: the metric after each of `epochs`.
        planned: epochs of a whole training.
        seconds: that it took; None where its files do not say.
        reason: why it was stopped.
        error: last line of a failure.
    """

    number: int
    method: str
    student: str
    status: TrialStatus
    origin: str
    confirms: int | None
    sample: Mapping[str, Scalar]
    seed: int
    value: float | None
    epochs: tuple[int, ...]
    curve: tuple[float, ...]
    planned: int
    seconds: float | None
    reason: str
    error: str

    @property
    def is_complete(self) -> bool:
        """Whether it was trained to the end and has a value."""
        return self.status == TrialStatus.COMPLETE and self.value is not None

    @property
    def is_search(self) -> bool:
        """Whether it is one of the search, not a repetition."""
        return self.confirms is None


@dataclass(frozen=True)
class Studied:
    """A study's question, its summary and its trials.

    Attributes:
        experiment: the question.
        summary: what it has found.
        trials: by number.
        comparisons: of every pair of configurations that were trained on fresh seeds.
    """

    experiment: Experiment
    summary: StudySummary
    trials: tuple[Tried, ...] = ()
    comparisons: tuple[Comparison, ...] = ()

    @property
    def search(self) -> list[Tried]:
        """Trials of the search, repetitions apart."""
        return [one for one in self.trials if one.is_search]

    def find(self, number: int) -> Tried | None:
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
    def default(self) -> Tried | None:
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


def read_study(folder: StudyFolder, experiment: Experiment, summary: StudySummary) -> Studied:
    """Read every trial of a study; one whose files are damaged is left out."""
    found = []
    for trial in folder.trials():
        if (trial.path / "recipe.yaml").exists():
            found.append(_tried(trial, experiment.metric))
    comparisons = compare_study(folder, summary.metric, maximise=summary.maximise)
    return Studied(experiment, summary, tuple(found), tuple(comparisons))


def _tried(trial: TrialFolder, metric: str) -> Tried:
    snapshot, recipe, error = trial.snapshot, trial.recipe, trial.error
    reports = [one for one in trial.metrics() if math.isfinite(one.get(metric, math.nan))]
    ended = snapshot.metrics.get(metric)
    value = reports[-1][metric] if reports and ended is None else ended
    return Tried(
        number=trial.number,
        method=recipe.method,
        student=recipe.student.network,
        status=snapshot.status,
        origin=snapshot.origin,
        confirms=snapshot.confirms,
        sample=snapshot.sample or {"method": recipe.method},
        seed=recipe.training.seed,
        value=value if value is not None and math.isfinite(value) else None,
        epochs=tuple(int(one["epoch"]) for one in reports),
        curve=tuple(float(one[metric]) for one in reports),
        planned=recipe.training.epochs,
        seconds=snapshot.seconds,
        reason=snapshot.reason or "",
        error=error.strip().splitlines()[-1] if error and error.strip() else "",
    )
