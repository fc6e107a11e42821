"""Assignment: a training to run, and the attributes by which the database can resume it."""

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
REMOVED: Final = "removed"
BUDGET: Final = "budget"
"""Reasons to stop a trial: it is behind at a rung, clearly below its scratch twin, or unfinished when its method or its
student was removed from the search space; or the search's budget is spent. In the last case it is paused, not pruned:
a search with a larger budget continues it. Others are `NOT_FINITE` and the name of the class of `search.pruner`."""

REFERENCES = (BASELINE, *VANILLA_KD.values())
"""Methods whose published settings are never pruned, since the winner is compared with them."""

SEED_STEP = 1000
"""Distance between the seeds of a configuration's confirmations, larger than usual distances between chosen seeds."""


@dataclass(frozen=True)
class Assignment:
    """A training to run.

    Attributes:
        number: number of the trial, in Optuna and of its folder.
        experiment: experiment of the study, without the students that are left out.
        sample: values by the keys of the search space.
        origin: a method's published setting, a leader of another study, a sample, or a leader on a fresh seed.
        rungs: finished epochs (counted from 1) after which a checkpoint is written and `Study.report` is called.
        confirms: number of the trial that it repeats on a fresh seed.
        seed: seed of weights, order and views; None: the sample's.
        is_timed: whether `Study.report` is called after every epoch, because of a budget of time or because the pruner
            reads every epoch.
        costs: known costs of the student, by the keys of `STUDENT_COSTS`.
        evaluated: see `evaluated_epochs`.
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
    evaluated: frozenset[int] | None = None

    @cached_property
    def recipe(self) -> Recipe:
        """Recipe of the training, made on first access, since it needs the method's class.

        Raises:
            ConfigError: the combination of values is invalid.
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
    """Return the attributes of a trial in the database from which its assignment can be made again."""
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


def with_student(sample: Mapping[str, Scalar], network: str, experiment: Experiment) -> dict[str, Scalar]:
    """Return a sample that names its student, unless the experiment has no other: others may have been added since."""
    return dict(sample) if experiment.student.networks == (network,) else {**sample, "student.network": network}


def completed(sample: Mapping[str, Scalar], recipe: Recipe, experiment: Experiment) -> dict[str, Scalar]:
    """Return the sample of a trial with the values that it left out and that a later search space may change."""
    method = recipe.method
    domains = experiment.method_domains(method) if experiment.knows(method) else {}
    values = {f"{method}.{name}": value for name, value in recipe.params.items()}
    found = {key: value for key, value in values.items() if key in domains and isinstance(value, Scalar)}
    return with_student({**found, **sample}, recipe.student.network, experiment)


def method_defaults(experiment: Experiment, method: str) -> dict[str, Scalar]:
    """Return the values of a method for keys that a sample leaves out."""
    recipe = experiment.recipe({"method": method})
    params = {f"{method}.{name}": value for name, value in recipe.params.items()}
    training = {f"training.{name}": value for name, value in recipe.training.model_dump().items()}
    networks = {"student.network": recipe.student.network}
    if experiment.reads_teacher(method):
        networks[TEACHER] = recipe.teacher.network
    return {**params, **training, **networks}


def teachers_of(experiment: Experiment, method: str, excluded: Container[str]) -> tuple[str, ...]:
    """Return the teachers for which a method can be built; empty if it reads none.

    `excluded`: methods, and pairs of method and teacher, that are left out; see `check_experiment`.
    """
    if method in excluded or not experiment.reads_teacher(method):
        return ()
    return tuple(network for network in experiment.teacher.networks if pairing(method, network) not in excluded)


def method_space(experiment: Experiment, method: str, excluded: Container[str] = ()) -> dict[str, Domain]:
    """Return the domains of a method's parameters; `excluded`: see `teachers_of`."""
    space = experiment.domains(method)
    if TEACHER in space:
        space[TEACHER] = Choice(*teachers_of(experiment, method, excluded))
    return space
