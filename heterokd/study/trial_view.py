"""TrialView: one trial as its folder has it, for pages, tables and data frames."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from heterokd.config.recipe import Recipe
from heterokd.domains import Scalar
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.trial_status import TrialStatus


@dataclass(frozen=True)
class TrialView:
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
        configuration: names its recipe whatever the seed; the same for a trial and its repetitions.
        path: its folder.
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

    @property
    def is_complete(self) -> bool:
        """Whether it was trained to the end and has a value."""
        return self.status == TrialStatus.COMPLETE and self.value is not None

    @property
    def is_search(self) -> bool:
        """Whether it is one of the search, not a repetition."""
        return self.confirms is None


def read_trials(folder: StudyFolder, metric: str) -> list[TrialView]:
    """Read every trial of a study that has begun, by number.

    Args:
        folder: of the study.
        metric: that values and curves are of.
    """
    return [_view(trial, metric) for trial in folder.trials() if (trial.path / "recipe.yaml").exists()]


def _view(trial: TrialFolder, metric: str) -> TrialView:
    snapshot, recipe, error = trial.snapshot, trial.recipe, trial.error
    reports = [one for one in trial.metrics() if math.isfinite(one.get(metric, math.nan))]
    ended = snapshot.metrics.get(metric)
    value = reports[-1][metric] if reports and ended is None else ended
    return TrialView(
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
        configuration=_configuration(recipe),
        path=trial.path,
    )


def _configuration(recipe: Recipe) -> str:
    training = recipe.training.model_dump(mode="json", exclude={"seed"})
    content = recipe.model_dump(mode="json", exclude={"training", "name"}) | {"training": training}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
