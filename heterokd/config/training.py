"""The sections `training`, of students, and `teacher.training`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, Strict, field_validator, model_validator

from heterokd.config.pixel_loss import read_pixel_loss
from heterokd.config.settings import LARGEST_SEED, MOST, Settings
from heterokd.errors import did_you_mean

MOST_EPOCHS = 100_000
ClassWeight = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1), Strict()]

OF_IMAGES: dict[str, tuple[object, ...]] = {"sampling": ("balanced",), "class_weights": ("effective",)}
OF_PIXELS: dict[str, tuple[object, ...]] = {"pixel_loss": (), "auxiliary_weight": (), "class_weights": ("median",)}
"""Settings, and their values, that are for images with one class, and for label maps; without values all but the
default."""
UNLABELLED_SHARE = "unlabelled_share"
"""Setting that has no effect without `data.unlabelled`."""

USUAL_OPTIMIZERS = (
    *("adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamp", "adamw", "adan", "adopt"),
    *("lamb", "laprop", "lars", "lion", "madgrad", "mars", "momentum", "nadam", "nadamw", "nesterov", "novograd"),
    *("radam", "rmsprop", "rmsproptf", "sgd", "sgdp", "sgdw"),
)
"""Optimizers of every supported version of timm, accepted without importing timm and torch."""


class TrainingSettings(Settings):
    """Settings of a training."""

    epochs: int = Field(30, ge=1, le=MOST_EPOCHS, description="passes over the training images")
    batch_size: int = Field(64, ge=1, le=MOST, description="images per optimizer update, of all workers together")
    optimizer: str = Field("sgd", description="name of an optimizer in timm.optim")
    learning_rate: float = Field(0.05, gt=0, description="maximum, after warm-up")
    min_learning_rate: float = Field(0.0, ge=0, description="at the end of the schedule")
    momentum: float = Field(0.9, ge=0, lt=1, description="of optimizers that have momentum")
    weight_decay: float = Field(5e-4, ge=0, description="not applied to norms and biases")
    schedule: Literal["cosine", "step", "poly", "tanh", "constant"] = Field("cosine", description="from timm.scheduler")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs over which the learning rate rises from near zero")
    task_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy with the labels")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the label that is spread over all classes")
    class_weights: Literal["none", "inverse", "effective", "median"] | dict[str, ClassWeight] = Field(
        "none",
        description="weights of the classes in the task loss: inverse (of the number of images, or pixels), effective "
        "(number of images, Cui et al. 2019), median (median frequency of pixels, Eigen and Fergus 2015), or "
        "CLASS: weight",
    )
    pixel_loss: str = Field(
        "cross_entropy",
        description="segmentation: task loss, a sum of cross_entropy, ohem, dice, focal and lovasz, with factors: "
        "ohem+0.5*dice",
    )
    auxiliary_weight: float = Field(
        0.0, ge=0, description="segmentation: weight of the task loss of a small head on stage 3; 0.4 in most programs"
    )
    sampling: Literal["uniform", "balanced"] = Field(
        "uniform", description="images of an epoch: each once, or as many of every class"
    )
    unlabelled_share: float = Field(
        0.5, ge=0, lt=1, description="share of each batch that has no label, with data.unlabelled"
    )
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="learning rate of a layer as a share of the next layer's; layers below 5 % are not trained",
    )
    head_lr_scale: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="factor of the learning rate outside of the encoder: decoder, classifier, projectors; often 10",
    )
    clip_grad: float | None = Field(None, gt=0, description="maximum gradient norm; larger gradients are scaled down")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of the moving average of the weights that is kept",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: the faster, measured per device and shape"
    )
    channels_last: bool | Literal["auto"] = Field("auto", description="memory format of the student's maps")
    accumulate: int = Field(
        1,
        ge=1,
        description="split each update into this many parts to save memory; batch norms, and methods that compare "
        "images, work on a single part",
    )
    compile: bool = Field(False, description="torch.compile the student; worthwhile for long trainings on a GPU")
    trainable: Literal["all", "head"] = Field("all", description="head: train only the classifier, on a frozen encoder")
    freeze_batch_norm: bool = Field(
        False,
        description="batch norms keep the running statistics that they start with; for fine-tuning with few images",
    )
    workers: Count | Annotated[tuple[Count, Count], Strict(False)] = Field(
        1,
        description="data-parallel workers of a training; [minimum, maximum] uses as many as the cluster has",
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="GPUs of each of several workers, may be a fraction; auto: 1 if there are GPUs"
    )
    sync_batch_norm: bool = Field(False, description="batch norms use statistics over the images of all workers")
    gather: bool = Field(
        False, description="methods that compare the images of a batch compare those of all workers, if they support it"
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="of initial weights, order of images and views")

    @field_validator("class_weights", mode="before")
    @classmethod
    def _names_are_text(cls, weights: object) -> object:
        return {str(name): weight for name, weight in weights.items()} if isinstance(weights, Mapping) else weights

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        if name in USUAL_OPTIMIZERS:
            return name
        from heterokd.networks.optimizer_names import optimizer_names  # imports timm and torch

        if name not in optimizer_names():
            raise ValueError(f"timm has no optimizer {name!r}; {did_you_mean(name, optimizer_names())}")
        return name

    @field_validator("pixel_loss")
    @classmethod
    def _known_losses(cls, text: str) -> str:
        read_pixel_loss(text)
        return text

    @model_validator(mode="after")
    def _scales_fit(self) -> TrainingSettings:
        if self.head_lr_scale != 1 and self.layer_decay is not None:
            raise ValueError("head_lr_scale: layer_decay sets the learning rate of every layer; remove a key")
        return self

    @model_validator(mode="after")
    def _parts_are_even(self) -> TrainingSettings:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: {self.batch_size} images (batch_size) cannot be split into {self.accumulate} equal parts"
            )
        return self

    @model_validator(mode="after")
    def _statistics_fit(self) -> TrainingSettings:
        if self.sync_batch_norm and self.freeze_batch_norm:
            raise ValueError("sync_batch_norm: has no effect if freeze_batch_norm is set; remove a key")
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> TrainingSettings:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate: {self.min_learning_rate:g} is above learning_rate ({self.learning_rate:g}), which "
                "is the maximum; lower it"
            )
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs: {self.warmup_epochs:g} epochs of warm-up do not fit into {self.epochs}; lower it"
            )
        return self

    @model_validator(mode="after")
    def _workers_fit(self) -> TrainingSettings:
        if self.least_workers > self.most_workers:
            raise ValueError(f"workers: expected [minimum, maximum], got {list(self.worker_range)}")
        if self.batch_size < self.most_workers * self.accumulate:
            raise ValueError(
                f"workers: {self.batch_size} images (batch_size) are too few for {self.most_workers} workers with "
                f"{self.accumulate} part(s) each (accumulate)"
            )
        if self.gpus_per_worker != "auto" and self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(
                f"gpus_per_worker: expected a fraction of a GPU or a whole number of GPUs, got {self.gpus_per_worker:g}"
            )
        if self.sync_batch_norm and self.compile:
            raise ValueError("sync_batch_norm: is not supported in compiled code; remove training.compile")
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """Minimum and maximum number of workers."""
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers

    @property
    def least_workers(self) -> int:
        """Minimum number of workers; a training does not start with fewer."""
        return self.worker_range[0]

    @property
    def most_workers(self) -> int:
        """Maximum number of workers."""
        return self.worker_range[1]

    @property
    def is_shared(self) -> bool:
        """Whether the training may have several workers."""
        return self.most_workers > 1


class TeacherTraining(TrainingSettings):
    """How a teacher without checkpoint is fitted, on all training images."""

    epochs: int = Field(60, ge=1, le=MOST_EPOCHS)
    optimizer: str = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup_epochs: float = Field(5.0, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
