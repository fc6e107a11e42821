"""The section `search`: the space, the budget, and how the study decides."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import Field, field_validator, model_validator

from heterokd.config.costs import STUDENT, CostLimits, check_cost
from heterokd.config.extension import Extension, is_empty, is_reference, read_extension
from heterokd.config.settings import LARGEST_SEED, MOST, Names, PathName, Settings
from heterokd.errors import ConfigError
from heterokd.methods import METHODS
from heterokd.tasks import TASKS, TaskName

Metric = Literal["val/top1", "val/top5", "val/miou", "val/pixel_accuracy", "val/agreement", "val/loss"]

MOST_TRIALS = 10_000
"""Trials of a search that ends with its budget."""
LEADERS = 3
"""Leaders that are repeated if only the number of seeds is given."""


def score_of(task: TaskName) -> Metric:
    """Return the metric on val that students of a task are selected by, unless an experiment names another."""
    return cast(Metric, f"val/{TASKS[task].score}")


class SpaceSettings(Settings):
    """Content of a search space file."""

    methods: Literal["all"] | Names = Field("all", description="all, or a list of methods; FILE.py:Class is the user's")
    shared: dict[str, Any] = Field(default_factory=dict, description="domains of training.*, searched for every method")
    overrides: dict[str, Any] = Field(default_factory=dict, description="narrow a method's domain or pin its value")
    extensions: dict[str, Extension] = Field(
        default_factory=dict, exclude_if=is_empty, description="files of methods, by name; filled in from `methods`"
    )

    @model_validator(mode="before")
    @classmethod
    def _with_files(cls, content: Any) -> Any:
        """Read the files of a user's methods; the names then are those of their classes."""
        methods = content.get("methods") if isinstance(content, Mapping) else None
        if not isinstance(methods, (list, tuple)) or not any(map(is_reference, methods)):
            return content
        with suppress(ConfigError):  # which `_readable` raises again, for its key
            found = {method: read_extension(method, METHODS) for method in methods if is_reference(method)}
            named = [found[method].name if method in found else method for method in methods]
            extensions = {extension.name: extension for extension in found.values()}
            return {**content, "methods": named, "extensions": {**(content.get("extensions") or {}), **extensions}}
        return content

    @field_validator("methods")
    @classmethod
    def _readable(cls, methods: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for method in filter(is_reference, methods if isinstance(methods, tuple) else ()):
            try:
                read_extension(method, METHODS)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return methods


class BudgetSettings(Settings):
    """What a search may cost, confirmation included; what is left out has no limit."""

    trials: int | None = Field(None, ge=1, description="trainings that are started")
    trainings: float | None = Field(None, gt=0, description="epochs of all trainings, in full trainings")
    hours: float | None = Field(None, gt=0, description="wall-clock time, from the start to the last training's end")
    gpu_hours: float | None = Field(None, gt=0, description="hours of GPUs that train; without any, of trainings")
    money: float | None = Field(None, gt=0, description="in the price's currency")
    price: float | None = Field(None, gt=0, description="of one GPU hour")

    @model_validator(mode="after")
    def _money_has_a_price(self) -> BudgetSettings:
        if self.money is not None and self.price is None:
            raise ValueError("money: has no meaning without the price of a GPU hour; set search.budget.price")
        return self

    @property
    def is_limited(self) -> bool:
        """Whether any limit is set."""
        return any(getattr(self, key) is not None for key in type(self).model_fields if key != "price")

    def limits(self) -> str:
        """Return all limits in words."""
        limits = {key: value for key, value in self.model_dump(exclude={"price"}).items() if value is not None}
        return " and ".join(f"{value:g} {key.replace('_', ' ')}" for key, value in limits.items())

    @property
    def is_timed(self) -> bool:
        """Whether a limit depends on time."""
        return any(value is not None for value in (self.hours, self.gpu_hours, self.money))


class ClassSettings(Settings):
    """A class given by its name, with the arguments that it is constructed with."""

    name: str = Field(description="package.module:Name")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the class")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, content: Any) -> Any:
        return {"name": content} if isinstance(content, str) else content

    @field_validator("name")
    @classmethod
    def _has_module_and_class(cls, name: str) -> str:
        module, _, attribute = name.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), attribute)):
            raise ValueError(f"expected package.module:Name, as in optuna.pruners:MedianPruner, got {name!r}")
        return name


class SearchSettings(CostLimits):
    """How the study samples, prunes and confirms."""

    space: PathName | SpaceSettings = Field(SpaceSettings(), description="a file, or the space itself")
    trials: int = Field(
        24, ge=1, le=MOST, description="trainings, confirmation apart; with a budget, as many as it pays for"
    )
    budget: BudgetSettings = Field(default_factory=BudgetSettings)
    metric: Metric | None = Field(
        None, description="metric to maximise (val/loss: to minimise); default: val/top1, in segmentation val/miou"
    )
    objectives: Names = Field(
        (), description="the metric and costs: student/params_m, student/latency_ms, student/flops_g; none: the metric"
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="of the sampler")
    warm_start_from: Names = Field((), description="finished studies of similar pairs; their best samples come first")
    prior_weight: float = Field(
        0.0, ge=0, le=1, description="share of the first samples whose method published tables choose; it decays"
    )
    parallel: int | None = Field(None, ge=1, description="trials at a time; default: 1 per core (or per GPU)")
    gpus_per_trial: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="GPUs per trial, also a fraction; auto shares a GPU where memory allows"
    )
    match_starts: bool = Field(
        False, description="try what `heterokd match` proposes for methods that pair stages, after published settings"
    )
    prune: bool = Field(True, description="stop trials early that are behind at a rung")
    first_rung: float = Field(0.1, gt=0, le=1, description="share of the epochs before the first decision")
    reduction_factor: int = Field(4, ge=2, description="1 of this many trials passes a rung; rungs grow by it")
    pruner: ClassSettings | None = Field(
        None,
        description="an Optuna pruner instead, asked every epoch: package.module:Name, or {name: ..., options: ...}",
    )
    sampler: ClassSettings | None = Field(
        None,
        description="an Optuna sampler instead of the TPE: package.module:Name, or {name: ..., options: ...}",
    )
    confirm_share: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = Field(
        "auto", description="share of all training that repeats leaders on fresh seeds; auto: up to 0.4, by the budget"
    )
    confirm_leaders: int | None = Field(
        None, ge=0, description="repeat this many leaders, each confirm_seeds times, regardless of the share; 0: none"
    )
    confirm_seeds: int = Field(2, ge=0, description="fresh seeds for each of confirm_leaders")
    max_failures: int = Field(2, ge=0, description="restarts of a trial whose process died")

    @field_validator("objectives")
    @classmethod
    def _metric_first(cls, objectives: tuple[str, ...]) -> tuple[str, ...]:
        if objectives and objectives[0] not in get_args(Metric):
            raise ValueError(f"begin with the metric, as in [val/top1, {objectives[0]}]")
        for objective in objectives[1:]:
            if objective in get_args(Metric):
                raise ValueError(f"{objective}: after the metric come costs of the student only")
            check_cost(objective)
        if len(set(objectives)) != len(objectives):
            raise ValueError("the list names an objective twice")
        return objectives

    @model_validator(mode="after")
    def _classes_fit(self) -> SearchSettings:
        if self.pruner is not None and not self.prune:
            raise ValueError(f"pruner: {self.pruner.name} is never asked while search.prune is false; leave one out")
        if self.sampler is not None and "seed" in self.sampler.options:
            raise ValueError("sampler: its seed follows from search.seed; take it out of the options")
        return self

    @property
    def extent(self) -> str:
        """The number of trials, or the budget, in words."""
        return self.budget.limits() if self.trials == MOST_TRIALS else f"{self.trials} trials"

    @property
    def costs(self) -> tuple[str, ...]:
        """Costs of the student that count beside the metric, by name: `params_m`."""
        return tuple(objective.removeprefix(STUDENT) for objective in self.objectives[1:])

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, content: Any) -> Any:
        """Spend a budget that does not name `trials`: the default number of trials does not end the search.

        A number of fresh seeds without `confirm_leaders` repeats the default number of leaders.
        """
        if not isinstance(content, Mapping):
            return content
        if content.get("confirm_seeds") and "confirm_leaders" not in content:
            content = {**content, "confirm_leaders": LEADERS}
        if not isinstance(content.get("budget"), Mapping) or "trials" in content:
            return content
        return {**content, "trials": MOST_TRIALS} if set(content["budget"]) - {"price"} else content
