"""The section `data`: which images, split how, augmented how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from heterokd.config.settings import LARGEST_SEED, PathName, Settings
from heterokd.datasets import DATASETS
from heterokd.datasets.views.policy import POLICIES, AugmentPolicy
from heterokd.errors import did_you_mean
from heterokd.tasks import TASKS, TaskName

Side = Annotated[int, Field(ge=8, le=4096)]


class DataSettings(Settings):
    """The images of an experiment."""

    dataset: str = Field(description="a name that `heterokd datasets` lists")
    root: PathName | None = Field(None, description="folder of the data set, for those that are not embedded")
    image_size: int = Field(32, ge=8, le=2048, description="height = width of a view, in pixels")
    crop: tuple[Side, Side] | None = Field(
        None, strict=False, description="segmentation: height and width of a view; default: image_size twice"
    )
    evaluation: Literal["whole", "sliding"] = Field(
        "whole", description="segmentation: images as a whole, or by windows of the views' size"
    )
    labels_per_class: int | None = Field(None, ge=1, description="keep this many training images of each class")
    train_images: int | None = Field(None, ge=1, description="keep this many training images of all classes together")
    augment: str | AugmentPolicy | None = Field(
        None, description="name or settings of a policy; default: the data set's"
    )
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
        """The data set's task."""
        return DATASETS[self.dataset].tasks

    @property
    def view_size(self) -> tuple[int, int]:
        """Height and width of a training view, in pixels."""
        return self.crop or (self.image_size, self.image_size)

    @property
    def view_crop(self) -> tuple[int, int] | None:
        """Height and width of the crops that training views are; None if a view shows the whole image."""
        return TASKS[self.task].crop(self.view_size)

    @property
    def window(self) -> tuple[int, int] | None:
        """Height and width of the windows that slide over images in evaluation; None: images as a whole."""
        return self.view_size if self.evaluation == "sliding" else None

    @property
    def policy(self) -> AugmentPolicy:
        """The augmentation policy in full."""
        if isinstance(self.augment, AugmentPolicy):
            return self.augment
        if self.augment is None:
            return DATASETS[self.dataset].policy_at(self.image_size)
        return POLICIES[self.augment]
