"""The sections `teacher` and `student`: networks by name, or lists of names to be searched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from heterokd.config.settings import Names, PathName, Settings
from heterokd.config.training import TeacherTraining
from heterokd.errors import did_you_mean


class NetworkSettings(Settings):
    """A timm network."""

    network: str = Field(description="name of a timm network")
    options: dict[str, Any] = Field(default_factory=dict, description="passed to timm.create_model")
    pretrained: bool = Field(False, description="start from timm's published weights")

    @field_validator("options")
    @classmethod
    def _not_ours(cls, options: dict[str, Any]) -> dict[str, Any]:
        if "num_classes" in options:
            raise ValueError("num_classes follows from the data set; take it out of the options")
        if "pretrained" in options:
            raise ValueError("pretrained is a key beside options: set it there")
        if "checkpoint_path" in options:
            raise ValueError("checkpoint_path is timm's; a teacher's weights are given as teacher.checkpoint")
        for key, value in options.items():
            if value is None:  # timm would pass over it in silence; `{depth:6}`, without the space, is read like this
                raise ValueError(f"{key!r} has no value; write `name: value`, with a space after the colon")
        return options


class SearchedNetworks(NetworkSettings):
    """A network, or a list of networks to be searched."""

    network: str | Names = Field(description="name of a timm network, or a list of names")  # type: ignore[assignment]
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
        for key, options in self.options.items() if named else ():
            if key not in self.networks:
                raise ValueError(f"options: {key!r} is listed with {named[0]!r}; {did_you_mean(key, self.networks)}")
            if not isinstance(options, dict):
                raise ValueError(f"options.{key}: expected the options of this network, as in {{{key}: {{depth: 6}}}}")
            self._not_ours(options)
        return self

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of all networks."""
        return (self.network,) if isinstance(self.network, str) else self.network

    def options_of(self, network: str) -> dict[str, Any]:
        """Return the options of one network."""
        if any(key in self.networks for key in self.options):
            options: dict[str, Any] = self.options.get(network, {})
            return options
        return self.options


class TeacherSettings(NetworkSettings):
    """The teacher: a frozen network."""

    checkpoint: PathName | None = Field(None, description="safetensors file of its weights; it is verified, not fitted")
    min_score: float | None = Field(
        None, ge=0, le=1, description="refuse a teacher that scores less (val/top1; in segmentation val/miou)"
    )
    training: TeacherTraining = Field(default_factory=TeacherTraining)

    @model_validator(mode="after")
    def _one_source(self) -> TeacherSettings:
        if self.checkpoint is not None and self.pretrained:
            raise ValueError("give either teacher.checkpoint or teacher.pretrained, not both")
        return self


class TeachersSettings(SearchedNetworks):
    """The teacher, a frozen network, or a list of teachers to be searched."""

    checkpoint: PathName | dict[str, PathName] | None = Field(
        None, description="safetensors file of its weights; it is verified, not fitted; of a list: {network: file}"
    )
    min_score: float | None = Field(
        None, ge=0, le=1, description="refuse a teacher that scores less (val/top1; in segmentation val/miou)"
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
                    "(teachers that are left out are fitted)"
                )
            return self
        for network in self.checkpoint:
            if network not in self.networks:
                raise ValueError(f"checkpoint: {network!r} is no teacher here; {did_you_mean(network, self.networks)}")
        return self

    def checkpoint_of(self, network: str) -> Path | None:
        """Return the file of a teacher's weights; None if the teacher is fitted, or has published weights."""
        return self.checkpoint.get(network) if isinstance(self.checkpoint, Mapping) else self.checkpoint

    def settings_of(self, network: str | None = None) -> TeacherSettings:
        """Return the settings of one network; default: of the first."""
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
        """Return the same settings with this teacher alone."""
        alone = {"network": network, "options": self.options_of(network), "checkpoint": self.checkpoint_of(network)}
        return self if self.network == network else self.model_copy(update=alone)


class StudentSettings(SearchedNetworks):
    """The student, the network that is trained, or a list of students to be searched."""

    def settings_of(self, network: str | None = None) -> NetworkSettings:
        """Return the settings of one network; default: of the first."""
        network = network or self.networks[0]
        return NetworkSettings(network=network, options=self.options_of(network), pretrained=self.pretrained)
