"""The sections of an experiment: one class a section, one sentence a key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

from heterokd.datasets import DATASETS
from heterokd.datasets.views.policy import POLICIES, AugmentPolicy
from heterokd.domains import Scalar
from heterokd.errors import did_you_mean, without_password
from heterokd.networks.optimizer_names import optimizer_names
from heterokd.tasks import TASKS, TaskName

Sample = Mapping[str, Scalar]
Metric = Literal["val/top1", "val/top5", "val/miou", "val/pixel_accuracy", "val/agreement", "val/loss"]
# YAML has names for neither: a path is written as a text, a tuple as a list.
PathName = Annotated[Path, Strict(False)]
LARGEST_SEED = 2**63 - 1
"""Of torch's generators."""
MOST_EPOCHS = 100_000
MOST = 1_000_000
"""Of trials and of images in a batch: what is above is a slip of the pen, and ends in hours of nothing."""
Side = Annotated[int, Field(ge=8, le=4096)]
Names = Annotated[tuple[str, ...], Strict(False)]
Count = Annotated[int, Field(ge=1), Strict()]


MOST_TRIALS = 10_000
"""Trials of a search that ends with its budget."""


LEADERS = 3
"""Leaders that are repeated where only the seeds of each are given."""


class Settings(BaseModel):
    """One section of an experiment: frozen, unknown keys are errors, and `true` or "3" is not taken for a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataSettings(Settings):
    """Which images."""

    dataset: str = Field(description="a name of `heterokd datasets`")
    root: PathName | None = Field(None, description="folder of the data set, for those that are not embedded")
    image_size: int = Field(32, ge=8, le=2048, description="height = width of a view, in pixels")
    crop: tuple[Side, Side] | None = Field(
        None, strict=False, description="segmentation: height and width of a view; image_size twice when left out"
    )
    evaluation: Literal["whole", "sliding"] = Field(
        "whole", description="segmentation: images as a whole, or by windows of the views' size"
    )
    labels_per_class: int | None = Field(None, ge=1, description="keep this many training images of each class")
    train_images: int | None = Field(None, ge=1, description="keep this many training images, whatever they show")
    augment: str | AugmentPolicy | None = Field(None, description="a policy's name, its settings, or the data set's")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="of the train / val / test split")

    @field_validator("dataset")
    @classmethod
    def _known_dataset(cls, name: str) -> str:
        if name not in DATASETS:
            raise ValueError(f"there is no data set {name!r}; {did_you_mean(name, DATASETS)}")
        return name

    @model_validator(mode="after")
    def _root_when_needed(self) -> DataSettings:
        if DATASETS[self.dataset].needs_root and self.root is None:
            raise ValueError(f"data set {self.dataset!r} is read from a folder: set data.root to it")
        return self

    @model_validator(mode="after")
    def _fits_the_task(self) -> DataSettings:
        changed = [key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default]
        mixes = self.policy.mixes or bool(self.policy.operations)
        reason = TASKS[self.task].refusal(self.dataset, changed, mixes=mixes)
        if reason is not None:
            raise ValueError(reason)
        return self

    @field_validator("augment")
    @classmethod
    def _known_policy(cls, policy: str | AugmentPolicy | None) -> str | AugmentPolicy | None:
        if isinstance(policy, str) and policy not in POLICIES:
            raise ValueError(f"there is no augmentation policy {policy!r}; {did_you_mean(policy, POLICIES)}")
        return policy

    @property
    def task(self) -> TaskName:
        """What the data set's labels are."""
        return DATASETS[self.dataset].tasks

    @property
    def view_size(self) -> tuple[int, int]:
        """Height and width of a training view, in pixels."""
        return self.crop or (self.image_size, self.image_size)

    @property
    def view_crop(self) -> tuple[int, int] | None:
        """Height and width of the crops that training views are; None where a view shows the whole image."""
        return TASKS[self.task].crop(self.view_size)

    @property
    def window(self) -> tuple[int, int] | None:
        """Height and width of the windows that slide over images in evaluation; None where they do not."""
        return self.view_size if self.evaluation == "sliding" else None

    @property
    def policy(self) -> AugmentPolicy:
        """The augmentation policy in full."""
        if isinstance(self.augment, AugmentPolicy):
            return self.augment
        if self.augment is None:
            return DATASETS[self.dataset].policy_at(self.image_size)
        return POLICIES[self.augment]


class TrainingSettings(Settings):
    """How a student (or a teacher) is trained."""

    epochs: int = Field(30, ge=1, le=MOST_EPOCHS, description="passes over the training images")
    batch_size: int = Field(64, ge=1, le=MOST, description="images per optimizer update, over all workers")
    optimizer: str = Field("sgd", description="a name of timm.optim")
    learning_rate: float = Field(0.05, gt=0, description="at its peak, after warm-up")
    min_learning_rate: float = Field(0.0, ge=0, description="at the end of the schedule")
    momentum: float = Field(0.9, ge=0, lt=1, description="of optimizers that have one")
    weight_decay: float = Field(5e-4, ge=0, description="not applied to norms and biases")
    schedule: Literal["cosine", "step", "poly", "tanh", "constant"] = Field("cosine", description="timm.scheduler's")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs over which the learning rate rises from near zero")
    task_weight: float = Field(1.0, ge=0, description="multiplies the cross-entropy with the labels")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the label spread over all classes")
    clip_grad: float | None = Field(None, gt=0, description="largest gradient norm; larger ones are scaled down")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of an average of the weights, evaluated and kept")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto measures once per device and shape")
    channels_last: bool | Literal["auto"] = Field("auto", description="memory format of the student's maps")
    accumulate: int = Field(
        1,
        ge=1,
        description="an update in this many parts, to save memory; batch norms, and methods that compare images, "
        "see one part at a time",
    )
    compile: bool = Field(False, description="torch.compile the student; pays off in long trainings on a GPU")
    trainable: Literal["all", "head"] = Field("all", description="head: a linear classifier on the frozen encoder")
    workers: Count | Annotated[tuple[Count, Count], Strict(False)] = Field(
        1,
        description="data-parallel workers that share one training; [least, most] takes what the cluster has",
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="GPUs, or a share of one, for each of several workers; auto: one, where there are GPUs"
    )
    sync_batch_norm: bool = Field(False, description="batch norms take their statistics over the images of all workers")
    gather: bool = Field(
        False, description="methods that compare the images of a batch compare those of all workers, where they can"
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="of weights, order and views")

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        names = optimizer_names()
        if name not in names:
            raise ValueError(f"timm has no optimizer {name!r}; {did_you_mean(name, names)}")
        return name

    @model_validator(mode="after")
    def _parts_are_even(self) -> TrainingSettings:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: {self.batch_size} images (batch_size) cannot be split into {self.accumulate} equal parts"
            )
        return self

    @model_validator(mode="after")
    def _falls(self) -> TrainingSettings:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate: {self.min_learning_rate:g} is above learning_rate ({self.learning_rate:g}), from "
                "which it falls; lower it"
            )
        return self

    @model_validator(mode="after")
    def _workers_fit(self) -> TrainingSettings:
        if self.least_workers > self.most_workers:
            raise ValueError(f"workers: expected [least, most], got {list(self.worker_range)}")
        if self.batch_size < self.most_workers * self.accumulate:
            raise ValueError(
                f"workers: {self.batch_size} images (batch_size) are too few for {self.most_workers} workers with "
                f"{self.accumulate} part(s) each (accumulate)"
            )
        if self.gpus_per_worker != "auto" and self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(
                f"gpus_per_worker: expected a share of one GPU or a whole number of them, got {self.gpus_per_worker:g}"
            )
        if self.sync_batch_norm and self.compile:
            raise ValueError("sync_batch_norm: workers cannot exchange statistics inside compiled code; leave compile")
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """The least and the most workers."""
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers

    @property
    def least_workers(self) -> int:
        """Fewer do not start."""
        return self.worker_range[0]

    @property
    def most_workers(self) -> int:
        """More are not asked for."""
        return self.worker_range[1]

    @property
    def is_shared(self) -> bool:
        """Whether several workers may share the training."""
        return self.most_workers > 1

    @model_validator(mode="after")
    def _warmup_fits(self) -> TrainingSettings:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs: {self.warmup_epochs:g} epochs of warm-up do not fit into {self.epochs}; lower it"
            )
        return self


class TeacherTraining(TrainingSettings):
    """How a teacher that is neither given nor pretrained is fitted; it sees every training image."""

    epochs: int = Field(60, ge=1, le=MOST_EPOCHS)
    optimizer: str = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup_epochs: float = Field(5.0, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _one_process(self) -> TeacherTraining:
        if self.is_shared:
            raise ValueError("workers: a teacher is fitted by one process; leave it out, or give teacher.checkpoint")
        return self


class NetworkSettings(Settings):
    """A timm network."""

    network: str = Field(description="a name of timm")
    options: dict[str, Any] = Field(default_factory=dict, description="passed to timm.create_model")
    pretrained: bool = Field(False, description="start from timm's published weights")

    @field_validator("options")
    @classmethod
    def _not_ours(cls, options: dict[str, Any]) -> dict[str, Any]:
        if "num_classes" in options:
            raise ValueError("num_classes follows from the data set; take it out of the options")
        if "pretrained" in options:
            raise ValueError("pretrained is a key of its own, beside options")
        if "checkpoint_path" in options:
            raise ValueError("checkpoint_path is timm's; a teacher's weights are given as teacher.checkpoint")
        for key, value in options.items():
            if value is None:  # timm would pass over it in silence; `{depth:6}`, without the space, is read like this
                raise ValueError(f"{key!r} has no value; write `name: value`, with a space after the colon")
        return options


class SearchedNetworks(NetworkSettings):
    """One network, or a list to be searched."""

    network: str | Names = Field(description="a name of timm, or a list of names")  # type: ignore[assignment]
    options: dict[str, Any] = Field(
        default_factory=dict, description="passed to timm.create_model; of a list: for all, or {network: options}"
    )

    @field_validator("network")
    @classmethod
    def _not_empty(cls, network: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(network, tuple) and len(set(network)) != len(network):
            raise ValueError("the list names a network twice")
        if not network:
            raise ValueError("the list of networks is empty")
        return network

    @model_validator(mode="after")
    def _options_of_each(self) -> SearchedNetworks:
        named = [key for key in self.options if key in self.networks]
        for key, own in self.options.items() if named else ():
            if key not in self.networks:
                raise ValueError(f"options: {key!r} stands beside {named[0]!r}; {did_you_mean(key, self.networks)}")
            if not isinstance(own, dict):
                raise ValueError(f"options.{key}: expected the options of this network, as in {{{key}: {{depth: 6}}}}")
            self._not_ours(own)
        return self

    @property
    def networks(self) -> tuple[str, ...]:
        """All names."""
        return (self.network,) if isinstance(self.network, str) else self.network

    def options_of(self, network: str) -> dict[str, Any]:
        """The options of one of them."""
        if any(key in self.networks for key in self.options):
            own: dict[str, Any] = self.options.get(network, {})
            return own
        return self.options


class TeacherSettings(NetworkSettings):
    """The frozen network that is followed."""

    checkpoint: PathName | None = Field(None, description="safetensors file of its weights; it is verified, not fitted")
    min_score: float | None = Field(
        None, ge=0, le=1, description="refuse to distil from a worse one (val/top1; in segmentation val/miou)"
    )
    training: TeacherTraining = Field(default_factory=TeacherTraining)

    @model_validator(mode="after")
    def _one_source(self) -> TeacherSettings:
        if self.checkpoint is not None and self.pretrained:
            raise ValueError("give either teacher.checkpoint or teacher.pretrained, not both")
        return self


class TeachersSettings(SearchedNetworks):
    """The frozen network that is followed: one name, or a list to be searched."""

    checkpoint: PathName | dict[str, PathName] | None = Field(
        None, description="safetensors file of its weights; it is verified, not fitted; of a list: {network: file}"
    )
    min_score: float | None = Field(
        None, ge=0, le=1, description="refuse to distil from a worse one (val/top1; in segmentation val/miou)"
    )
    training: TeacherTraining = Field(default_factory=TeacherTraining)

    @model_validator(mode="after")
    def _one_source(self) -> TeachersSettings:
        if self.checkpoint is None:
            return self
        if self.pretrained:
            raise ValueError("give either teacher.checkpoint or teacher.pretrained, not both")
        if isinstance(self.checkpoint, Path):
            if len(self.networks) > 1:
                form = ", ".join(f"{network}: FILE" for network in self.networks)
                raise ValueError(
                    f"checkpoint: one file cannot hold {len(self.networks)} teachers; write checkpoint: {{{form}}} "
                    "(whoever is left out is fitted)"
                )
            return self
        for network in self.checkpoint:
            if network not in self.networks:
                raise ValueError(f"checkpoint: {network!r} is no teacher here; {did_you_mean(network, self.networks)}")
        return self

    def checkpoint_of(self, network: str) -> Path | None:
        """The file of one teacher's weights; None: they are fitted, or published."""
        return self.checkpoint.get(network) if isinstance(self.checkpoint, Mapping) else self.checkpoint

    def one(self, network: str | None = None) -> TeacherSettings:
        """The settings of one of them; of the first when none is named."""
        network = network or self.networks[0]
        return TeacherSettings(
            network=network,
            options=self.options_of(network),
            pretrained=self.pretrained,
            checkpoint=self.checkpoint_of(network),
            min_score=self.min_score,
            training=self.training,
        )

    def only(self, network: str) -> TeachersSettings:
        """The same with one of them alone."""
        own = {"network": network, "options": self.options_of(network), "checkpoint": self.checkpoint_of(network)}
        return self if self.network == network else self.model_copy(update=own)


class StudentSettings(SearchedNetworks):
    """The network that is trained and kept: one name, or a list to be searched."""

    def one(self, network: str | None = None) -> NetworkSettings:
        """The settings of one of them; of the first when none is named."""
        network = network or self.networks[0]
        return NetworkSettings(network=network, options=self.options_of(network), pretrained=self.pretrained)


class SpaceSettings(Settings):
    """What a search space file says."""

    methods: Literal["all"] | Names = Field("all", description="all, or a list of methods")
    shared: dict[str, Any] = Field(default_factory=dict, description="domains of training.*, searched for every method")
    overrides: dict[str, Any] = Field(default_factory=dict, description="narrow a method's domain or pin its value")


class BudgetSettings(Settings):
    """What a search may cost, confirmation included; what is left out has no limit."""

    trials: int | None = Field(None, ge=1, description="trainings that are begun")
    trainings: float | None = Field(None, gt=0, description="epochs of all trainings, in full trainings")
    hours: float | None = Field(None, gt=0, description="wall-clock time, from the start to the last training's end")
    gpu_hours: float | None = Field(None, gt=0, description="hours of GPUs that train; without any, of trainings")
    money: float | None = Field(None, gt=0, description="in the price's currency")
    price: float | None = Field(None, gt=0, description="of one GPU hour")

    @model_validator(mode="after")
    def _money_has_a_price(self) -> BudgetSettings:
        if self.money is not None and self.price is None:
            raise ValueError("money: says nothing without the price of a GPU hour; set search.budget.price")
        return self

    @property
    def is_limited(self) -> bool:
        """Whether there is any limit."""
        return any(getattr(self, key) is not None for key in type(self).model_fields if key != "price")

    def limits(self) -> str:
        """In words."""
        limits = {key: value for key, value in self.model_dump(exclude={"price"}).items() if value is not None}
        return " and ".join(f"{value:g} {key.replace('_', ' ')}" for key, value in limits.items())

    @property
    def is_timed(self) -> bool:
        """Whether a limit is reached by the passing of time."""
        return any(value is not None for value in (self.hours, self.gpu_hours, self.money))


class CostLimits(Settings):
    """Most that a student may cost; what is left out has no limit."""

    max_params_m: float | None = Field(None, gt=0, description="millions of parameters")
    max_latency_ms: float | None = Field(
        None, gt=0, description="median of a forward at batch 1 on one core, in milliseconds"
    )
    limits: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="of any other cost, as in {student/flops_g: 0.5}"
    )

    @field_validator("limits")
    @classmethod
    def _of_costs(cls, limits: dict[str, float]) -> dict[str, float]:
        for key in limits:
            _check_cost(key)
            if f"max_{key.removeprefix(STUDENT)}" in cls.model_fields:
                raise ValueError(f"{key}: is limited by max_{key.removeprefix(STUDENT)}")
        return limits

    @property
    def cost_limits(self) -> dict[str, tuple[str, float]]:
        """By cost, the key of its limit and the limit."""
        found = {key.removeprefix(STUDENT): (f"limits.{key}", limit) for key, limit in self.limits.items()}
        for name in ("params_m", "latency_ms"):
            if (limit := getattr(self, f"max_{name}")) is not None:
                found[name] = (f"max_{name}", limit)
        return found


STUDENT = "student/"
"""Of the keys of costs, among objectives and limits."""


def _check_cost(key: str) -> None:
    from heterokd.networks.student_costs import STUDENT_COSTS

    known = [f"{STUDENT}{name}" for name in STUDENT_COSTS]
    if key not in known:
        raise ValueError(f"{key}: there is no such cost of a student; {did_you_mean(key, known)}")


class SearchSettings(CostLimits):
    """How the study goes about it."""

    space: PathName | SpaceSettings = Field(SpaceSettings(), description="a file, or the space itself")
    trials: int = Field(
        24, ge=1, le=MOST, description="trainings, confirmation apart; with a budget, as many as it pays for"
    )
    budget: BudgetSettings = Field(default_factory=BudgetSettings)
    metric: Metric | None = Field(
        None, description="what the best student has most of (val/loss: least); val/top1 or val/miou when left out"
    )
    objectives: Names = Field(
        (), description="the metric and costs: student/params_m, student/latency_ms, student/flops_g; none: the metric"
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="of the sampler")
    warm_start_from: Names = Field((), description="finished studies of similar pairs: begin with what won there")
    prior_weight: float = Field(
        0.0, ge=0, le=1, description="share of the first samples whose method published tables choose; it decays"
    )
    parallel: int | None = Field(None, ge=1, description="trials at a time; one per core (or GPU) when left out")
    gpus_per_trial: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="GPUs, or a share of one, for each trial; auto shares a GPU where memory allows"
    )
    match_starts: bool = Field(
        False, description="try what `heterokd match` proposes for methods that pair stages, after published settings"
    )
    prune: bool = Field(True, description="end trials early that are behind at a rung")
    first_rung: float = Field(0.1, gt=0, le=1, description="share of the epochs before the first decision")
    reduction_factor: int = Field(4, ge=2, description="one in this many trials passes a rung; rungs grow by it")
    confirm_share: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = Field(
        "auto", description="share of all training that repeats leaders on fresh seeds; auto: up to 0.4, by the budget"
    )
    confirm_leaders: int | None = Field(
        None, ge=0, description="repeat this many leaders, each confirm_seeds times, whatever the share; 0: none"
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
                raise ValueError(f"{objective}: the list begins with the one metric, costs of the student follow")
            _check_cost(objective)
        if len(set(objectives)) != len(objectives):
            raise ValueError("the list names an objective twice")
        return objectives

    @property
    def extent(self) -> str:
        """How much is searched, in words: the trials, or what the budget pays for."""
        return self.budget.limits() if self.trials == MOST_TRIALS else f"{self.trials} trials"

    @property
    def costs(self) -> tuple[str, ...]:
        """Costs of the student that count beside the metric, by name: `params_m`."""
        return tuple(objective.removeprefix(STUDENT) for objective in self.objectives[1:])

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, content: Any) -> Any:
        """A budget without `trials` is spent, and not left after the number of trials that is usual without one.

        Fresh seeds that are counted are of a number of leaders.
        """
        if not isinstance(content, Mapping):
            return content
        if content.get("confirm_seeds") and "confirm_leaders" not in content:
            content = {**content, "confirm_leaders": LEADERS}
        if not isinstance(content.get("budget"), Mapping) or "trials" in content:
            return content
        return {**content, "trials": MOST_TRIALS} if set(content["budget"]) - {"price"} else content


class CachingSettings(Settings):
    """What the teacher says of a view is stored once and read by every training that shows the same view."""

    enabled: bool = Field(True, description="store it; methods that read more than logits and embedding run it live")
    views: int = Field(50, ge=1, description="views of each image, at most; longer trainings show them again")
    dtype: Literal["fp32", "fp16"] = Field("fp32", description="of a record; fp16 takes half the space and rounds")
    top_k: int | None = Field(None, ge=1, description="keep this many logits of a view and the mass of the rest")
    max_gb: float = Field(50.0, gt=0, description="a larger cache is not built; the teacher then runs live")


class TrackingSettings(Settings):
    """Where it is logged."""

    experiment: str | None = Field(None, description="MLflow experiment; the experiment's name when left out")
    registered_model: str | None = Field(None, description="name in the registry; NAME-student when left out")
    uri: str | None = Field(None, description="MLflow tracking URI; runs/mlflow.db when left out")
    also: Names = Field((), description="trackers beside MLflow: csv, package.module:Name or ./file.py:Name")

    @field_validator("uri")
    @classmethod
    def _holds_no_password(cls, uri: str | None) -> str | None:
        """An experiment is kept with its study, logged and shown."""
        if uri is not None and without_password(uri) != uri:
            raise ValueError(
                f"{without_password(uri)}: a user and a password do not belong into an experiment, which is kept and "
                "logged; leave them out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, "
                "or MLFLOW_TRACKING_URI for a database"
            )
        return uri

    @field_validator("registered_model")
    @classmethod
    def _fits_the_registry(cls, name: str | None) -> str | None:
        if name is not None and (not name.strip() or set(name) & {"/", ":"}):
            raise ValueError(f"MLflow takes no '/' and no ':' in the name of a model, and no empty one; got {name!r}")
        return name


class NodeSettings(Settings):
    """Nodes of one type."""

    count: int = Field(1, ge=1, description="how many the search uses")
    price_per_hour: float = Field(0.0, ge=0, description="of one of them, in cluster.currency")


class ClusterSettings(Settings):
    """What the search runs on, as far as its price goes: Ray itself knows what a cluster has."""

    nodes: dict[str, NodeSettings] = Field(default_factory=dict, description="by type, whatever you call them")
    currency: str = Field("USD", description="of all prices")

    @property
    def price_per_hour(self) -> float | None:
        """Of all nodes together; None where none is named."""
        return sum(node.count * node.price_per_hour for node in self.nodes.values()) if self.nodes else None


class PromotionSettings(CostLimits):
    """What a student must reach to become champion."""

    min_gain: float = Field(0.0, ge=-1, le=1, description="top-1 or mIoU on test above the champion (or scratch)")
    max_size_mb: float | None = Field(None, gt=0, description="size of the weights, in megabytes")
    export_parity: bool = Field(False, description="the student must export to ONNX, and the file agree with it")
