"""Recipe: all settings of a single training."""

from __future__ import annotations

import hashlib
import json
from operator import not_
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from heterokd.config.data import DataSettings
from heterokd.config.extension import UNIDENTIFIED, Extension
from heterokd.config.methods import method_class, method_params
from heterokd.config.networks import NetworkSettings, TeacherSettings
from heterokd.config.schema import METHODS_SECTION, SCHEMA, keys_of_schema_1
from heterokd.config.services import CachingSettings
from heterokd.config.settings import Settings
from heterokd.config.training import TrainingSettings
from heterokd.config.yaml_files import dump_yaml
from heterokd.tasks import TaskName

if TYPE_CHECKING:
    from heterokd.method import Method, MethodParams


class Recipe(Settings):
    """All settings of a single training; hashable, and written to recipe.yaml."""

    name: str
    data: DataSettings
    teacher: TeacherSettings
    student: NetworkSettings
    method: str
    params: dict[str, object] = Field(description="every parameter of the method")
    training: TrainingSettings
    cache: CachingSettings = Field(default_factory=CachingSettings)
    extension: Extension | None = Field(None, exclude_if=not_, description="the file that defines a user's method")

    @model_validator(mode="after")
    def _known_method(self) -> Recipe:
        if self.extension is None:  # reading a recipe does not execute the file of a method
            method_params(self.method, self.params, "params")
        return self

    @property
    def hash(self) -> str:
        """First 16 hexadecimal digits of SHA-256 over everything that decides the result; see `Schema.identity`."""
        params = self.method_params
        section = f"{METHODS_SECTION}.{self.method}"
        off = params.unread - keys_of_schema_1().get(section, {}).keys()
        kept = SCHEMA.identity(params, section, params.model_dump(mode="json", exclude=set(off)))
        identity = self._identity() | {"params": {name: value for name, value in self.params.items() if name in kept}}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def configuration(self) -> str:
        """Hash without the seed, the same for a trial and its repetitions; it executes no file of a user's method."""
        recipe = self.model_copy(update={"training": self.training.model_copy(update={"seed": 0})})
        if self.extension is None:
            return recipe.hash
        return hashlib.sha256(json.dumps(recipe._identity(), sort_keys=True).encode()).hexdigest()[:16]

    def _identity(self) -> dict[str, object]:
        """Return the settings that decide the result, with all parameters of the method."""
        workers = {"workers", "gpus_per_worker"}  # they do not change the result
        content = self.model_dump(
            mode="json",
            exclude={
                "name": True,
                "data": {"extension": UNIDENTIFIED} | dict.fromkeys((*self.data.unread, "pixels_max_gb"), True),
                "extension": UNIDENTIFIED,
                "teacher": {"min_score": True, "training": workers},
                "training": workers,
                "cache": {"max_gb"},
            },
        )
        return dict(SCHEMA.identity(self, "recipe", content))

    @property
    def task(self) -> TaskName:
        """The data set's task."""
        return self.data.task

    @property
    def teacher_size(self) -> int:
        """Height = width of what the teacher sees, in pixels."""
        return self.teacher.image_size or self.data.image_size

    @property
    def views(self) -> int | None:
        """Number of views of each image; None if every epoch shows a new view."""
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
        """Return the text of recipe.yaml."""
        return dump_yaml(SCHEMA.mark() | self.model_dump(mode="json"))
