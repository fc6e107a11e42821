"""What a search hands out: one training, and what the database keeps of it to hand it out again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from heterokd.config import Experiment, Recipe
from heterokd.space import Domain, Scalar

Origin = Literal["published", "warm", "sampled", "confirm"]
State = Literal["complete", "pruned", "diverged", "failed"]

Stop = Literal["behind", "negative transfer", "not finite", "budget"]
"""Why a trial was told to stop: behind at a rung, clearly below its scratch twin, a metric that is no number, or the
search's budget. After the last one it is paused, not pruned: a search with a larger budget goes on with it."""

BASELINE = "scratch"
"""The method that all others are compared with: it starts first and its best is confirmed."""

SEED_STEP = 1000
"""Distance between the seeds of a configuration's confirmations, far from any seed that a person would choose next."""


@dataclass(frozen=True)
class Assignment:
    """One training to run.

    Attributes:
        number: of the trial, in Optuna and as its folder.
        recipe: the training.
        sample: what was proposed; keys as in the search space.
        origin: a method's published setting, what led in another study, a sample, or a leader on a fresh seed.
        confirms: number of the trial that this one repeats on a fresh seed.
        rungs: finished epochs (counted from 1) after which a checkpoint is written and `Study.report` is asked.
        is_timed: whether `Study.report` is asked after every epoch, since time may run out between rungs.
        facts: what is known of the student: `params_m`, `latency_ms`.
    """

    number: int
    recipe: Recipe
    sample: dict[str, Scalar]
    origin: Origin
    confirms: int | None
    rungs: tuple[int, ...]
    is_timed: bool = False
    facts: Mapping[str, float] = field(default_factory=dict)


def assignment_attrs(
    sample: Mapping[str, Scalar],
    origin: Origin,
    recipe: Recipe,
    *,
    confirms: int | None = None,
    duplicate_of: int | None = None,
) -> dict[str, Any]:
    """What a trial's row holds beside Optuna's own columns: enough to make its assignment again."""
    return {
        "sample": dict(sample),
        "origin": origin,
        "seed": recipe.training.seed,
        "hash": recipe.hash,
        "epochs": recipe.training.epochs,
        "student": recipe.student.network,
        "confirms": confirms,
        "duplicate_of": duplicate_of,
    }


def method_space(experiment: Experiment, method: str) -> dict[str, Domain]:
    """Where each value of a method's sample may lie."""
    return experiment.method_domains(method) | experiment.shared_domains()
