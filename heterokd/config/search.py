"""The section `search`: search space, budget, sampler, pruner and confirmation."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from operator import not_
from typing import Annotated, Literal, cast, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from heterokd.config.costs import STUDENT, CostSettings, check_cost
from heterokd.config.extension import Extension, is_reference, read_extension
from heterokd.config.quantities import PERIODS, parse_quantity
from heterokd.config.settings import LARGEST_SEED, MOST, Names, PathName, Settings
from heterokd.domains import Scalar
from heterokd.errors import ConfigError
from heterokd.methods import METHODS, PLUS, members_of
from heterokd.tasks import TASKS, TaskName

Metric = Literal[
    "val/top1",
    "val/top5",
    "val/balanced_accuracy",
    "val/macro_f1",
    "val/auroc",
    "val/miou",
    "val/dice",
    "val/mean_accuracy",
    "val/pixel_accuracy",
    "val/agreement",
    "val/loss",
]

MOST_TRIALS = 10_000
"""Number of trials of a search that only its budget ends."""
LEADERS = 3
"""Number of confirmed leaders if only `confirm_seeds` is set."""


def score_of(task: TaskName) -> Metric:
    """Return the default metric on val that selects students of a task."""
    return cast(Metric, f"val/{TASKS[task].score}")


class SpaceSettings(Settings):
    """Content of a search space file."""

    methods: Literal["all"] | Names = Field("all", description="all, or a list; FILE.py:Class for a user's method")
    shared: dict[str, object] = Field(
        default_factory=dict, description="domains of training.*, searched with every method"
    )
    overrides: dict[str, object] = Field(
        default_factory=dict, description="narrower domains, or fixed values, of METHOD.PARAMETER"
    )
    defaults: dict[str, Scalar] = Field(
        default_factory=dict,
        exclude_if=not_,
        description="values of METHOD.PARAMETER that a sample leaves out; filled in for files of an older schema",
    )
    extensions: dict[str, Extension] = Field(
        default_factory=dict, exclude_if=not_, description="files of methods, by name; filled in from `methods`"
    )

    @model_validator(mode="before")
    @classmethod
    def _with_files(cls, content: object) -> object:
        """Read the files of a user's methods, whose names are then those of their classes."""
        if not isinstance(content, Mapping):
            return content
        methods = content.get("methods")
        if not isinstance(methods, (list, tuple)) or not any(map(is_reference, methods)):
            return content
        with suppress(ConfigError):  # `_readable` raises it again, for the key `methods`
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

    def overrides_of(self, method: str) -> dict[str, tuple[str, object]]:
        """Return key and value of the overrides of a method by parameter; a combination has those of its members."""
        found = {
            f"{member}_{name}": (f"{member}.{name}", value)
            for member in (members_of(method) if PLUS in method else ())
            for name, (_, value) in self.overrides_of(member).items()
        }
        for key, value in self.overrides.items():
            owner, _, name = key.partition(".")
            if owner == method:
                found[name] = key, value
        return found

    def defaults_of(self, method: str) -> dict[str, Scalar]:
        """Return the parameters whose default the search space replaces; a combination has those of its members."""
        if PLUS in method:
            return {
                f"{member}_{name}": value
                for member in members_of(method)
                for name, value in self.defaults_of(member).items()
            }
        prefix = f"{method}."
        found = self.defaults.items()
        return {key.removeprefix(prefix): value for key, value in found if key.startswith(prefix)}


class BudgetSettings(Settings):
    """Limits of a whole search, confirmation included; a limit that is left out does not apply."""

    trials: int | None = Field(None, ge=1, description="number of trainings that start")
    trainings: float | None = Field(None, gt=0, description="epochs of all trainings, in units of a full training")
    hours: float | None = Field(None, gt=0, description="wall-clock time, to the end of the last training")
    gpu_hours: float | None = Field(None, gt=0, description="GPU hours of trainings; without a GPU, hours of trainings")
    money: float | None = Field(None, gt=0, description="maximum price, in the currency of `price`")
    price: float | None = Field(None, gt=0, description="price of a GPU hour")

    @model_validator(mode="after")
    def _money_has_a_price(self) -> BudgetSettings:
        if self.money is not None and self.price is None:
            raise ValueError("money: needs the price of a GPU hour; set search.budget.price")
        return self

    @property
    def is_limited(self) -> bool:
        """Whether any limit is set."""
        return any(getattr(self, key) is not None for key in type(self).model_fields if key != "price")

    def limits(self) -> str:
        """Format all limits."""
        limits = {key: value for key, value in self.model_dump(exclude={"price"}).items() if value is not None}
        return " and ".join(f"{value:g} {key.replace('_', ' ')}" for key, value in limits.items())

    @property
    def is_timed(self) -> bool:
        """Whether a limit depends on time."""
        return any(value is not None for value in (self.hours, self.gpu_hours, self.money))


class ClassSettings(Settings):
    """A class by name, and the keyword arguments of its constructor."""

    name: str = Field(description="package.module:Name")
    options: dict[str, object] = Field(default_factory=dict, description="keyword arguments of the class")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, content: object) -> object:
        return {"name": content} if isinstance(content, str) else content

    @field_validator("name")
    @classmethod
    def _has_module_and_class(cls, name: str) -> str:
        module, _, attribute = name.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), attribute)):
            raise ValueError(f"expected package.module:Name, such as optuna.pruners:MedianPruner, got {name!r}")
        return name


def _seconds(value: object) -> object:
    """Convert a period, such as 2h, to seconds; other values are returned as they are."""
    if not isinstance(value, str) or value == "auto":
        return value
    try:
        return parse_quantity("search.trial_timeout:", value, PERIODS, "2h")
    except ConfigError as error:
        raise ValueError(str(error).partition(": ")[2]) from None


class SearchSettings(CostSettings):
    """Settings of the study: sampling, pruning and confirmation."""

    space: PathName | SpaceSettings = Field(SpaceSettings(), description="a YAML file, or the search space itself")
    trials: int = Field(
        24, ge=1, le=MOST, description="trainings without confirmation; default with a budget: as many as it allows"
    )
    budget: BudgetSettings = Field(default_factory=BudgetSettings)
    metric: Metric | None = Field(
        None, description="metric to maximise (val/loss: to minimise); default: val/top1, in segmentation val/miou"
    )
    objectives: Names = Field(
        (), description="the metric, then costs: student/params_m, latency_ms, int8_ms, flops_g, each with student/"
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="of the sampler")
    warm_start_from: Literal["auto"] | Names = Field(
        (), description="finished studies, whose best samples are tried first; auto: the similar ones of the workspace"
    )
    prior_weight: float = Field(
        0.0, ge=0, le=1, description="share of first samples whose method published results choose; it decays"
    )
    combine: int = Field(
        1, ge=1, le=2, description="2: the sampler also adds the terms of two of the best methods, as METHOD+METHOD"
    )
    parallel: int | None = Field(
        None, ge=1, description="number of parallel trials; default: as many as fit, also on nodes that join"
    )
    gpus_per_trial: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="GPUs per trial, may be a fraction; auto: trials share a GPU if its memory suffices"
    )
    match_starts: bool = Field(
        False, description="try the settings that `heterokd match` proposes, after the published settings"
    )
    prune: bool = Field(True, description="stop trials early that are worse than others at a rung")
    first_rung: float = Field(0.1, gt=0, le=1, description="share of the epochs before the first rung")
    min_epochs: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="no trial is stopped at an earlier epoch; auto: 3, or the end of a longer warm-up"
    )
    reduction_factor: int = Field(4, ge=2, description="1 of this many trials passes a rung; ratio of successive rungs")
    evaluate: Literal["auto", "every"] = Field(
        "auto",
        description="epochs after which trials are evaluated on val; auto: every epoch where that is cheap, otherwise "
        "those that rungs compare, the last, and some between them for the curve",
    )
    pruner: ClassSettings | None = Field(
        None, description="an Optuna pruner, called at every epoch: package.module:Name, or {name: ..., options: ...}"
    )
    sampler: ClassSettings | None = Field(
        None, description="an Optuna sampler instead of TPE: package.module:Name, or {name: ..., options: ...}"
    )
    confirm_share: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = Field(
        "auto",
        description="share of all training for repetitions on fresh seeds; auto: at most 0.4, by the budget",
    )
    confirm_leaders: int | None = Field(
        None, ge=0, description="repeat this many leaders, each confirm_seeds times, instead of confirm_share; 0: none"
    )
    confirm_seeds: int = Field(2, ge=0, description="fresh seeds of each of the confirm_leaders")
    confirm_references: bool = Field(
        True,
        description="repeat scratch, plain KD and the winner's method at published settings as often as the winner",
    )
    trial_timeout: Annotated[float, Field(gt=0), BeforeValidator(_seconds)] | Literal["auto"] | None = Field(
        "auto",
        description="maximum time of a trial, as 90m, 2h or a number of seconds; null: no limit; auto: ten times the "
        "time of a training (by the plan, or a complete trial of the method) without an epoch",
    )
    max_failures: int = Field(2, ge=0, description="maximum restarts in a row of a trial without a new epoch")

    @field_validator("objectives")
    @classmethod
    def _metric_first(cls, objectives: tuple[str, ...]) -> tuple[str, ...]:
        if objectives and objectives[0] not in get_args(Metric):
            raise ValueError(f"the first objective is the metric, as in [val/top1, {objectives[0]}]; add it")
        for objective in objectives[1:]:
            if objective in get_args(Metric):
                raise ValueError(f"{objective}: only the first objective is a metric; remove it, or give a cost")
            check_cost(objective)
        if len(set(objectives)) != len(objectives):
            raise ValueError("the list names an objective twice")
        return objectives

    @model_validator(mode="after")
    def _classes_fit(self) -> SearchSettings:
        if self.pruner is not None and not self.prune:
            raise ValueError(f"pruner: {self.pruner.name} has no effect if search.prune is false; remove a key")
        if self.sampler is not None and "seed" in self.sampler.options:
            raise ValueError("sampler: its seed follows from search.seed; remove it from the options")
        return self

    @property
    def extent(self) -> str:
        """The number of trials, or the budget, as text."""
        return self.budget.limits() if self.trials == MOST_TRIALS else f"{self.trials} trials"

    @property
    def cost_objectives(self) -> tuple[str, ...]:
        """Costs of the student among the objectives, without their prefix: `params_m`."""
        return tuple(objective.removeprefix(STUDENT) for objective in self.objectives[1:])

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, content: object) -> object:
        """Lift the limit on trials if a budget is set without `trials`; set leaders if `confirm_seeds` stands alone."""
        if not isinstance(content, Mapping):
            return content
        if content.get("confirm_seeds") and "confirm_leaders" not in content:
            content = {**content, "confirm_leaders": LEADERS}
        if not isinstance(content.get("budget"), Mapping) or "trials" in content:
            return content
        return {**content, "trials": MOST_TRIALS} if set(content["budget"]) - {"price"} else content
