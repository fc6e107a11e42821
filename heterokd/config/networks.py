"""The sections `teacher` and `student`: a network by name, or a list of names to search."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, Strict, field_validator, model_validator

from heterokd.config.combined_teachers import with_folds, with_members
from heterokd.config.modules import with_module_files
from heterokd.config.settings import Names, PathName, Settings
from heterokd.config.training import TeacherTraining
from heterokd.errors import did_you_mean
from heterokd.networks.combined_options import CROSS_FIT

Score = Annotated[
    float | None,
    Field(ge=0, le=1, description="refuse a teacher that scores less (val/top1; in segmentation val/miou)"),
]

TeacherSize = Annotated[
    int | None,
    Field(
        ge=8,
        le=2048,
        description="height = width of what the teacher sees, in pixels: the student's view, rendered at this size; "
        "default: data.image_size",
    ),
]

Fit = Literal["auto", "head", "head_then_all", "all"]
FitOfTeacher = Annotated[
    Fit,
    Field(
        description="head: solve the classifier on frozen features; head_then_all: also fine-tune from there and keep "
        "the better; all: train all weights for teacher.training.epochs; auto: head_then_all from pretrained weights, "
        "otherwise all, until the score on val stops improving"
    ),
]


StartFrom = Annotated[
    PathName | None,
    Field(description="file of weights that its training starts from; a classifier of other classes starts at random"),
]
CHECKPOINT = (
    "file of its weights in any format, folder of a trial or a study, or models:/NAME@ALIAS; with it, the teacher is "
    "verified instead of fitted"
)
STARTS = ("pretrained", "start_from")
GIVEN_FOLDS = "cross_fit fits teachers, teacher.checkpoint is fitted already: give it as teacher.start_from"


class NetworkSettings(Settings):
    """A network: a name of timm's, `torchvision:NAME`, or a user's module.

    The file of a user's module is read when the settings are read: `network: ./nets.py:make` becomes `network: make`
    with the file's text as `options.module`, so that every node, resumed study, checkpoint and export has it.
    """

    network: str = Field(
        description="name of a timm network, torchvision:NAME, FILE.py:FUNCTION or package.module:callable"
    )
    options: dict[str, object] = Field(default_factory=dict, description="passed to timm.create_model")
    pretrained: bool = Field(False, description="start from timm's published weights")
    start_from: StartFrom = None

    @property
    def has_start(self) -> bool:
        """Whether it starts from published or given weights."""
        return self.pretrained or self.start_from is not None

    @model_validator(mode="before")
    @classmethod
    def _with_files(cls, content: object) -> object:
        """Read the files of users' modules, and move `taps` into the options."""
        return with_module_files(content) if isinstance(content, Mapping) else content

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict[str, object]) -> dict[str, object]:
        if "num_classes" in options:
            raise ValueError("num_classes follows from the data set; remove it from the options")
        if "pretrained" in options:
            raise ValueError("pretrained is no option but a key next to `options`; set it there")
        if "checkpoint_path" in options:
            raise ValueError("checkpoint_path is not supported; set teacher.checkpoint instead")
        for key, value in options.items():
            if value is None:  # timm ignores it silently; `{depth:6}`, without the space, is read like this
                raise ValueError(f"{key!r} has no value; write `name: value`, with a space after the colon")
        return options


class SearchedNetworks(NetworkSettings):
    """A network, or a list of networks to search."""

    network: str | Names = Field(description="name of a timm network, or a list of names")  # type: ignore[assignment]
    options: dict[str, object] = Field(
        default_factory=dict,
        description="passed to timm.create_model; of a list: the same for all, or {network: options}",
    )
    start_from: PathName | dict[str, PathName] | None = Field(  # type: ignore[assignment]
        None,
        description="file of weights that its training starts from; a classifier of other classes starts at random; of "
        "a list: {network: file}",
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
                raise ValueError(f"options: {key!r} is not a network of the list; {did_you_mean(key, self.networks)}")
            if not isinstance(options, dict):
                raise ValueError(f"options.{key}: expected the options of this network, as in {{{key}: {{depth: 6}}}}")
            self._check_options(options)
        return self

    @model_validator(mode="after")
    def _start_of_each(self) -> SearchedNetworks:
        _check_files("start_from", self.start_from, self.networks, "that is left out starts from random weights")
        if self.start_from is not None and self.pretrained:
            raise ValueError("give either start_from or pretrained, not both")
        return self

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of all networks."""
        return (self.network,) if isinstance(self.network, str) else self.network

    def start_of(self, network: str) -> Path | None:
        """Return the file of weights that a network's training starts from, or None."""
        return _file_of(self.start_from, network)

    def options_of(self, network: str) -> dict[str, object]:
        """Return the options of a network."""
        if not any(key in self.networks for key in self.options):
            return self.options
        options = self.options.get(network)
        return options if isinstance(options, dict) else {}


def no_features(fit: Fit) -> str:
    """Return the refusal of a fit that needs pretrained weights and has none."""
    return f"fit: {fit} solves the classifier on pretrained features; set pretrained: true or start_from, or fit: all"


class MemberSettings(NetworkSettings):
    """A network that is fitted or given: of an ensemble, or the only network of a teacher."""

    checkpoint: PathName | None = Field(None, description=CHECKPOINT)
    fit: FitOfTeacher = "auto"
    training: TeacherTraining = Field(default_factory=TeacherTraining)

    @model_validator(mode="after")
    def _one_source(self) -> MemberSettings:
        for key in STARTS:
            if self.checkpoint is not None and getattr(self, key):
                raise ValueError(f"give either teacher.checkpoint or teacher.{key}, not both")
        return self

    @model_validator(mode="after")
    def _has_features(self) -> MemberSettings:
        if self.fit in ("head", "head_then_all") and not self.has_start and self.checkpoint is None and self._is_single:
            raise ValueError(no_features(self.fit))
        return self

    @property
    def _is_single(self) -> bool:
        return True


CrossFit = Annotated[
    int | None,
    Field(
        ge=2,
        le=100,
        description="fit this number of teachers, each without a part of the training images, which it answers",
    ),
]
Ensemble = Annotated[
    tuple[MemberSettings, ...],
    Strict(False),
    Field(description="networks whose answers are averaged: names, or a section such as `teacher` for each"),
]
Average = Annotated[
    Literal["probabilities", "logits"], Field(description="what is averaged over the networks of an ensemble")
]


class TeacherSettings(MemberSettings):
    """A teacher: a frozen network, or several that answer together."""

    image_size: TeacherSize = None
    min_score: Score = None
    cross_fit: CrossFit = None
    ensemble: Ensemble = ()
    average: Average = "probabilities"

    @model_validator(mode="before")
    @classmethod
    def _with_folds(cls, content: object) -> object:
        """Move `cross_fit` into the options."""
        return with_folds(with_members(content)) if isinstance(content, Mapping) else content

    @property
    def members(self) -> tuple[TeacherSettings, ...]:
        """The single teachers that are fitted or given: those of an ensemble, otherwise the teacher without folds."""
        if self.ensemble:
            return tuple(TeacherSettings(**each.model_dump(), image_size=self.image_size) for each in self.ensemble)
        if self.cross_fit is None:
            return (self,)
        plain = {key: value for key, value in self.options.items() if key != CROSS_FIT}
        return (self.model_copy(update={"options": plain, CROSS_FIT: None}),)

    @property
    def is_combined(self) -> bool:
        """Whether several networks answer together."""
        return bool(self.ensemble) or self.cross_fit is not None

    @property
    def _is_single(self) -> bool:
        return not self.ensemble


class TeachersSettings(SearchedNetworks):
    """The teacher, a frozen network, or a list of teachers to search."""

    checkpoint: PathName | dict[str, PathName] | None = Field(
        None, description=f"{CHECKPOINT}; of a list: {{network: file}}"
    )
    image_size: TeacherSize = None
    fit: FitOfTeacher = "auto"
    min_score: Score = None
    training: TeacherTraining = Field(default_factory=TeacherTraining)
    cross_fit: CrossFit = None
    ensemble: Ensemble = ()
    average: Average = "probabilities"

    @model_validator(mode="before")
    @classmethod
    def _with_members(cls, content: object) -> object:
        """Turn an ensemble into a network."""
        return with_members(content) if isinstance(content, Mapping) else content

    @model_validator(mode="after")
    def _one_source(self) -> TeachersSettings:
        if self.checkpoint is None:
            return self
        if self.cross_fit is not None:
            raise ValueError(GIVEN_FOLDS)
        if self.pretrained:
            raise ValueError("give either teacher.checkpoint or teacher.pretrained, not both")
        _check_files("checkpoint", self.checkpoint, self.networks, "that is left out is fitted")
        for network in self.networks:
            if self.checkpoint_of(network) is not None and self.start_of(network) is not None:
                raise ValueError("give either teacher.checkpoint or teacher.start_from, not both")
        return self

    @model_validator(mode="after")
    def _has_features(self) -> TeachersSettings:
        are_given = all(self.checkpoint_of(network) or self.start_of(network) for network in self.networks)
        if self.fit in ("head", "head_then_all") and not (self.pretrained or are_given or self.ensemble):
            raise ValueError(no_features(self.fit))
        return self

    @classmethod
    def of(cls, teacher: TeacherSettings) -> TeachersSettings:
        """Return the section of a single teacher."""
        return cls.model_validate(teacher.model_dump())

    def checkpoint_of(self, network: str) -> Path | None:
        """Return the file of a teacher's weights, or None."""
        return _file_of(self.checkpoint, network)

    def settings_of(self, network: str | None = None) -> TeacherSettings:
        """Return the settings of a network; default: of the first."""
        network = network or self.networks[0]
        return TeacherSettings(
            network=network,
            options=self.options_of(network),
            pretrained=self.pretrained,
            checkpoint=self.checkpoint_of(network),
            image_size=self.image_size,
            start_from=self.start_of(network),
            fit=self.fit,
            min_score=self.min_score,
            training=self.training,
            cross_fit=self.cross_fit,
            ensemble=self.ensemble,
            average=self.average,
        )

    def only(self, network: str) -> TeachersSettings:
        """Return the settings with this teacher only."""
        alone = {
            "network": network,
            "options": self.options_of(network),
            "checkpoint": self.checkpoint_of(network),
            "start_from": self.start_of(network),
        }
        return self if self.network == network else self.model_copy(update=alone)


class StudentSettings(SearchedNetworks):
    """The student, the network that is trained, or a list of students to search."""

    def settings_of(self, network: str | None = None) -> NetworkSettings:
        """Return the settings of a network; default: of the first."""
        network = network or self.networks[0]
        return NetworkSettings(
            network=network,
            options=self.options_of(network),
            pretrained=self.pretrained,
            start_from=self.start_of(network),
        )


def _file_of(given: Path | Mapping[str, Path] | None, network: str) -> Path | None:
    return given.get(network) if isinstance(given, Mapping) else given


def _check_files(key: str, given: Path | Mapping[str, Path] | None, networks: tuple[str, ...], left_out: str) -> None:
    """Check that each file belongs to a network; `left_out` says what a network without a file is."""
    if isinstance(given, Path) and len(networks) > 1:
        form = ", ".join(f"{network}: FILE" for network in networks)
        raise ValueError(
            f"{key}: one file cannot hold {len(networks)} networks; write {key}: {{{form}}} (a network {left_out})"
        )
    for network in given if isinstance(given, Mapping) else ():
        if network not in networks:
            raise ValueError(f"{key}: {network!r} is not in the list; {did_you_mean(network, networks)}")
