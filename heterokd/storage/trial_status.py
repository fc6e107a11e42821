"""TrialStatus: where a trial stands, by the same name in its folder, the database, MLflow, the page and the terminal.

`TrialSnapshot` is the content of a trial's trial.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Final

from heterokd.domains import Scalar

NOT_FINITE: Final = "not finite"
"""Why a training was stopped whose loss or metric is no number."""


class TrialStatus(StrEnum):
    """Where a trial stands."""

    RUNNING = "running"
    """Handed out and not ended, or interrupted: it goes on when the study does."""
    COMPLETE = "complete"
    """Trained to its last epoch."""
    PRUNED = "pruned"
    """Stopped at a rung."""
    PAUSED = "paused"
    """Stopped by the search's budget: a larger one goes on with it."""
    DIVERGED = "diverged"
    """Ended by a loss that is no number."""
    FAILED = "failed"
    """Ended by an error."""

    @property
    def is_final(self) -> bool:
        """Whether no later run of the study goes on with the trial."""
        return self not in (TrialStatus.RUNNING, TrialStatus.PAUSED)

    @property
    def is_failure(self) -> bool:
        """Whether the trial ended by an error, divergence included."""
        return self in (TrialStatus.DIVERGED, TrialStatus.FAILED)


def read_status(name: str, reason: str | None) -> TrialStatus:
    """Read a written status, also of studies of older versions, where a diverged trial is a failed one with a reason.

    Args:
        name: as it was written.
        reason: why the trial was stopped.

    Raises:
        ValueError: there is no such status.
    """
    status = TrialStatus(name)
    return TrialStatus.DIVERGED if status == TrialStatus.FAILED and reason == NOT_FINITE else status


@dataclass(frozen=True)
class TrialSnapshot:
    """What trial.json says of a trial.

    Attributes:
        status: where it stands.
        origin: how it came up: published, warm, sampled, confirm.
        confirms: number of the trial that it repeats on a fresh seed.
        sample: what was proposed.
        reason: why it was stopped: behind, negative transfer, not finite, budget.
        metrics: of its end; empty before.
        student: what is known of a trained student: `params_m`, `latency_ms`.
        pid: its process; None where a search did not start it.
        began: when that process took it up, in seconds since 1970.
        ended: when it ended.
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

    @property
    def seconds(self) -> float | None:
        """How long its last process had it; None where the file does not say."""
        return None if self.began is None or self.ended is None else self.ended - self.began

    def to_json(self) -> dict[str, Any]:
        """The content of trial.json, without what is not known."""
        content = {"state": str(self.status)} | {key: value for key, value in vars(self).items() if key != "status"}
        return {key: value for key, value in content.items() if value or key in _ALWAYS}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TrialSnapshot:
        """Read the content of trial.json; keys that this version does not know are left out.

        Raises:
            ValueError: the status is none of those there are.
        """
        known = {one.name for one in fields(cls)} & {key for key, value in content.items() if value is not None}
        status = read_status(content.get("state", TrialStatus.RUNNING), content.get("reason"))
        return cls(status=status, **{key: content[key] for key in known - {"status"}})


_ALWAYS = ("origin", "confirms", "sample", "reason", "metrics")
"""Keys that are written also where they are empty."""
