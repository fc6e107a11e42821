"""Recipe: an answer, one training with no freedom left."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from heterokd.config.data import DataSettings
from heterokd.config.extension import UNIDENTIFIED, Extension, is_none
from heterokd.config.methods import method_class, method_params
from heterokd.config.networks import NetworkSettings, TeacherSettings
from heterokd.config.schema import METHODS_SECTION, SCHEMA
from heterokd.config.services import CachingSettings
from heterokd.config.settings import Settings
from heterokd.config.training import TrainingSettings
from heterokd.config.yaml_files import dump_yaml
from heterokd.tasks import TaskName

if TYPE_CHECKING:
    from heterokd.method import Method, MethodParams


class Recipe(Settings):
    """An answer: one training with no freedom left; hashable, logged as recipe.yaml, and can be run alone."""

    name: str
    data: DataSettings
    teacher: TeacherSettings
    student: NetworkSettings
    method: str
    params: dict[str, Any] = Field(description="every parameter of the method")
    training: TrainingSettings
    cache: CachingSettings = Field(default_factory=CachingSettings)
    extension: Extension | None = Field(
        None, exclude_if=is_none, description="the file that defines the method, if it is a user's own"
    )

    @model_validator(mode="after")
    def _known_method(self) -> Recipe:
        if self.extension is None:  # a file is run when it is needed, not when its recipe is read
            method_params(self.method, self.params, "params")
        return self

    @property
    def hash(self) -> str:
        """First 16 hexadecimal digits of SHA-256 over everything that decides the result; see `Schema.identity`."""
        workers = {"workers", "gpus_per_worker"}  # who computes, not what
        content = SCHEMA.identity(
            self,
            "recipe",
            exclude={
                "name": True,
                "data": {"extension": UNIDENTIFIED},
                "extension": UNIDENTIFIED,
                "teacher": {"min_score": True, "training": workers},
                "training": workers,
                "cache": {"max_gb"},
            },
        )
        stable = SCHEMA.identity(self.method_params, f"{METHODS_SECTION}.{self.method}")
        content["params"] = {name: value for name, value in self.params.items() if name in stable}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def task(self) -> TaskName:
        """The data set's task."""
        return self.data.task

    @property
    def views(self) -> int | None:
        """Number of views of each image; None: a new view every epoch."""
        return min(self.training.epochs, self.cache.views) if self.cache.enabled else None

    def __hash__(self) -> int:
        return int(self.hash, 16)

    @property
    def method_params(self) -> MethodParams:
        """The method's parameters as an instance of its `Params`."""
        return method_params(self.method, self.params, extension=self.extension)

    @property
    def method_class(self) -> type[Method]:
        """The method."""
        return method_class(self.method, self.extension)

    def to_yaml(self) -> str:
        """The text of recipe.yaml."""
        content = SCHEMA.mark() | self.model_dump(mode="json")
        return dump_yaml(content)
