"""Status of a trial, with the same names in its folder, the database, MLflow, the report and the terminal.

`TrialSnapshot` is the content of trial.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from heterokd.domains import Scalar
from heterokd.storage.typed_json import parse

NOT_FINITE: Final = "not finite"
"""Reason of a diverged trial: its loss or a metric is NaN or infinite."""


TIMED_OUT: Final = "timeout"
"""Reason of a failed trial that exceeded `search.trial_timeout`."""

OUT_OF_MEMORY: Final = "out of memory"
"""Reason of a failed trial for which the memory of its device or machine did not suffice."""


class TrialStatus(StrEnum):
    """Status of a trial."""

    RUNNING = "running"
    """Running, or interrupted: `--resume` continues it."""
    COMPLETE = "complete"
    """Trained to its last epoch."""
    PRUNED = "pruned"
    """Stopped at a rung."""
    PAUSED = "paused"
    """Stopped by the search's budget: a larger budget continues it."""
    DIVERGED = "diverged"
    """Stopped by a loss or metric that is not finite."""
    FAILED = "failed"
    """Stopped by an error."""

    @property
    def is_final(self) -> bool:
        """Whether no later run of the study continues the trial."""
        return self not in (TrialStatus.RUNNING, TrialStatus.PAUSED)

    @property
    def is_failure(self) -> bool:
        """Whether the trial diverged or stopped by an error."""
        return self in (TrialStatus.DIVERGED, TrialStatus.FAILED)


def read_status(name: str, reason: str | None) -> TrialStatus:
    """Parse a stored status; older versions store a diverged trial as a failed trial with a reason.

    Args:
        name: stored status.
        reason: reason why the trial was stopped, or None.

    Raises:
        ValueError: unknown status.
    """
    status = TrialStatus(name)
    return TrialStatus.DIVERGED if status == TrialStatus.FAILED and reason == NOT_FINITE else status


@dataclass(frozen=True)
class RecipeFacts:
    """What tables and charts show of a trial's recipe, so that a study of many trials is read without its recipes.

    Attributes:
        method: name of the method.
        student: name of the student's network.
        seed: seed of weights, order and views.
        epochs: epochs of a complete training.
        configuration: see `Recipe.configuration`.
    """

    method: str
    student: str
    seed: int
    epochs: int
    configuration: str


@dataclass(frozen=True)
class TrialSnapshot:
    """Content of trial.json.

    Attributes:
        status: status of the trial.
        origin: source of the sample: published, warm, sampled, confirm.
        confirms: number of the trial that it repeats with another seed.
        sample: sampled parameters.
        reason: reason why it was stopped: behind, negative transfer, removed, not finite, budget, timeout, out
            of memory.
        metrics: final metrics; empty before the end.
        student: costs of a trained student: `params_m`, `latency_ms`.
        pid: id of its process; None if no search started it.
        began: start time of that process, in seconds since 1970.
        ended: end time.
        price: price of an hour of its resources, in the experiment's currency; None without prices.
        paid: cost of its earlier processes.
        recipe: of its recipe.yaml; None if an earlier version wrote the file.
    """

    status: TrialStatus = TrialStatus.RUNNING
    origin: str = ""
    confirms: int | None = None
    sample: Mapping[str, Scalar] = field(default_factory=dict)
    reason: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    student: Mapping[str, float] = field(default_factory=dict)
    pid: int | None = None
    began: float | None = None
    ended: float | None = None
    price: float | None = None
    paid: float = 0.0
    recipe: RecipeFacts | None = None

    @property
    def seconds(self) -> float | None:
        """Duration of its last process; None if unknown."""
        return None if self.began is None or self.ended is None else self.ended - self.began

    def to_json(self) -> dict[str, object]:
        """Convert to the content of trial.json, without empty values."""
        content: dict[str, object] = {"state": str(self.status), **vars(self)}
        del content["status"]
        content["recipe"] = None if self.recipe is None else vars(self.recipe)
        return {key: value for key, value in content.items() if value or key in _ALWAYS}

    @classmethod
    def from_json(cls, content: Mapping[str, object]) -> TrialSnapshot:
        """Parse the content of trial.json, ignoring unknown keys.

        Raises:
            ValueError: unknown status, or a value of another type.
        """
        known = {key: value for key, value in content.items() if value is not None}
        status = read_status(str(known.get("state", TrialStatus.RUNNING)), str(known.get("reason")))
        return parse(cls, {**known, "status": status})


_ALWAYS = ("origin", "confirms", "sample", "reason", "metrics")
"""Keys that are written even if empty."""
