"""TrialView: a trial as read from its folder, for reports, tables and data frames."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from heterokd.domains import Scalar
from heterokd.formatting import classes_of
from heterokd.storage.study_dir import StudyFolder, TrialFolder, recipe_facts
from heterokd.storage.trial_status import TrialStatus


@dataclass(frozen=True)
class TrialView:
    """A trial.

    Attributes:
        number: number of the trial.
        method: name of the method.
        student: name of the student's network.
        status: status of the trial.
        origin: published, warm, sampled or confirm.
        confirms: number of the trial that it repeats on a fresh seed.
        sample: values of its parameters.
        seed: seed of weights, order and views.
        value: final metric, or that of the last epoch if it was stopped; None without a finite value.
        epochs: finished epochs, counted from 1.
        curve: metric after each of `epochs`.
        planned: epochs of a complete training.
        seconds: duration, or None.
        reason: reason of a stop.
        error: last line of a failure.
        iou_classes: number of classes in the mean that `value` is; empty unless it is an mIoU.
        configuration: hash of its recipe without the seed; the same for a trial and its repetitions.
        path: folder of the trial.
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
    configuration: str
    path: Path
    iou_classes: tuple[int, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether it is complete and has a value."""
        return self.status == TrialStatus.COMPLETE and self.value is not None

    @property
    def is_search(self) -> bool:
        """Whether it is a trial of the search, not a repetition."""
        return self.confirms is None


class _Trial(Protocol):
    """What `published_trial` reads of a trial."""

    @property
    def method(self) -> str: ...
    @property
    def student(self) -> str: ...
    @property
    def origin(self) -> str: ...
    @property
    def is_search(self) -> bool: ...
    @property
    def is_complete(self) -> bool: ...


Trial = TypeVar("Trial", bound=_Trial)


def published_trial(trials: Iterable[Trial], method: str, student: str = "") -> Trial | None:
    """Return a method's first complete trial with published settings, if possible of `student`, or None."""
    found = [t for t in trials if t.method == method and t.origin == "published" and t.is_search and t.is_complete]
    return next((trial for trial in found if trial.student == student), found[0] if found else None)


def read_trials(folder: StudyFolder, metric: str) -> list[TrialView]:
    """Read all trials of a study that have started, sorted by number.

    Values and curves are those of `metric`.
    """
    return [_view(trial, metric) for trial in folder.trials() if (trial.path / "recipe.yaml").exists()]


def _view(trial: TrialFolder, metric: str) -> TrialView:
    snapshot = trial.snapshot
    recipe = snapshot.recipe or recipe_facts(trial.recipe)
    reports = [report for report in trial.metrics() if math.isfinite(report.get(metric, math.nan))]
    final = snapshot.metrics.get(metric)
    value = reports[-1][metric] if reports and final is None else final
    return TrialView(
        number=trial.number,
        method=recipe.method,
        student=recipe.student,
        status=snapshot.status,
        origin=snapshot.origin,
        confirms=snapshot.confirms,
        sample=snapshot.sample or {"method": recipe.method},
        seed=recipe.seed,
        value=value if value is not None and math.isfinite(value) else None,
        epochs=tuple(int(report["epoch"]) for report in reports),
        curve=tuple(float(report[metric]) for report in reports),
        planned=recipe.epochs,
        seconds=snapshot.seconds,
        reason=snapshot.reason or "",
        error=trial.error_line or "",
        configuration=recipe.configuration,
        path=trial.path,
        iou_classes=classes_of(metric, snapshot.metrics if reports and final is not None else (reports or [{}])[-1]),
    )
