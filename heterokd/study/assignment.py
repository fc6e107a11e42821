"""What a search hands out: one training, and what the database keeps of it to hand it out again."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal

from heterokd.config.experiment import TEACHER, Experiment
from heterokd.config.methods import pairing
from heterokd.config.recipe import Recipe
from heterokd.domains import Choice, Domain, Scalar
from heterokd.methods import BASELINE, VANILLA_KD

Origin = Literal["published", "warm", "sampled", "confirm"]

BEHIND: Final = "behind"
NEGATIVE_TRANSFER: Final = "negative transfer"
BUDGET: Final = "budget"
"""Why a trial is stopped: it is behind at a rung, clearly below its scratch twin, or the search's budget is spent.
After the last one it is paused, not pruned: a search with a larger budget goes on with it. Other reasons are
`NOT_FINITE` and the name of the class that `search.pruner` names."""

REFERENCES = (BASELINE, *VANILLA_KD.values())
"""Methods whose published settings are trained to the end: whoever wins is compared with them."""

SEED_STEP = 1000
"""Distance between the seeds of a configuration's confirmations, far from any seed that a person would choose next."""


@dataclass(frozen=True)
class Assignment:
    """One training to run.

    Attributes:
        number: of the trial, in Optuna and as its folder.
        experiment: the question about the students that are not left out.
        sample: what was proposed; keys as in the search space.
        origin: a method's published setting, what led in another study, a sample, or a leader on a fresh seed.
        rungs: finished epochs (counted from 1) after which a checkpoint is written and `Study.report` is asked.
        confirms: number of the trial that this one repeats on a fresh seed.
        seed: of weights, order and views; None: the sample's.
        is_timed: whether `Study.report` is asked after every epoch, since time may run out between rungs, or the pruner
            reads every epoch.
        costs: what is known of the student: `params_m`, `latency_ms`.
    """

    number: int
    experiment: Experiment
    sample: dict[str, Scalar]
    origin: Origin
    rungs: tuple[int, ...]
    confirms: int | None = None
    seed: int | None = None
    is_timed: bool = False
    costs: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def recipe(self) -> Recipe:
        """The training; made where it is read, since it needs the method's class.

        Raises:
            ConfigError: the sample's values do not go together.
        """
        return self.experiment.recipe(self.sample, seed=self.seed)


def assignment_attrs(
    experiment: Experiment,
    sample: Mapping[str, Scalar],
    origin: Origin,
    *,
    seed: int | None = None,
    confirms: int | None = None,
    duplicate_of: int | None = None,
) -> dict[str, object]:
    """What a trial's row holds beside Optuna's own columns: enough to make its assignment again."""
    training = experiment.training
    return {
        "sample": dict(sample),
        "origin": origin,
        "seed": sample.get("training.seed", training.seed) if seed is None else seed,
        "epochs": sample.get("training.epochs", training.epochs),
        "student": sample.get("student.network", experiment.student.networks[0]),
        "confirms": confirms,
        "duplicate_of": duplicate_of,
    }


def teachers_of(experiment: Experiment, method: str, excluded: Container[str]) -> tuple[str, ...]:
    """The teachers for which a method exists; none where it reads none.

    Args:
        experiment: the question.
        method: its name.
        excluded: methods, and methods with one of several teachers, that are left out; see `check_experiment`.
    """
    if method in excluded or not experiment.reads_teacher(method):
        return ()
    return tuple(network for network in experiment.teacher.networks if pairing(method, network) not in excluded)


def method_space(experiment: Experiment, method: str, excluded: Container[str] = ()) -> dict[str, Domain]:
    """Where each value of a method's sample may lie; `excluded` as in `teachers_of`."""
    space = experiment.domains(method)
    if TEACHER in space:
        space[TEACHER] = Choice(*teachers_of(experiment, method, excluded))
    return space
