"""Experiment: data, networks, training budget and search space of a study; its samples become recipes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, get_args

from pydantic import Field, ValidationError, model_validator

from heterokd.config.data import DataSettings, task_named
from heterokd.config.domain_values import nearest
from heterokd.config.methods import method_class, method_params, methods_of
from heterokd.config.networks import StudentSettings, TeachersSettings
from heterokd.config.recipe import Recipe
from heterokd.config.search import Metric, SearchSettings, SpaceSettings, score_of
from heterokd.config.sentences import sentences
from heterokd.config.services import CachingSettings, ClusterSettings, PromotionSettings, TrackingSettings
from heterokd.config.settings import Sample, Settings
from heterokd.config.task_faults import task_fault
from heterokd.config.training import UNLABELLED_SHARE, TrainingSettings
from heterokd.domains import Choice, Domain, Scalar, domains, read_domain
from heterokd.errors import ConfigError, did_you_mean
from heterokd.methods import METHODS, pairs_of
from heterokd.outputs import Signal
from heterokd.tasks import TASKS

if TYPE_CHECKING:
    from heterokd.method import Method

TEACHER = "teacher.network"
"""Key of a sample that names the teacher, if several are searched."""


class Experiment(Settings):
    """Settings of a study: data, teachers, students, training budget, search, cluster, logging, promotion."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="letters, digits, '.', '_' and '-'")
    data: DataSettings
    teacher: TeachersSettings
    student: StudentSettings
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    cache: CachingSettings = Field(default_factory=CachingSettings)
    search: SearchSettings = Field(default_factory=SearchSettings)
    tracking: TrackingSettings = Field(default_factory=TrackingSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)
    promotion: PromotionSettings = Field(default_factory=PromotionSettings)

    @model_validator(mode="before")
    @classmethod
    def _metric_named(cls, content: object) -> object:
        """Fill in the metric, so that a study's file names the metric that selects students."""
        if not isinstance(content, Mapping) or not isinstance(content.get("data"), Mapping):
            return content
        search, task = content.get("search", {}), task_named(content["data"])
        if not isinstance(search, Mapping) or task is None or search.get("metric") is not None:
            return content
        objectives = search.get("objectives")
        metric = objectives[0] if isinstance(objectives, (list, tuple)) and objectives else score_of(task)
        if metric not in get_args(Metric):  # the check of the objectives names it
            return content
        return {**content, "search": {**search, "metric": metric}}

    @model_validator(mode="after")
    def _metric_fits(self) -> Experiment:
        names = [f"val/{name}" for name in TASKS[self.data.task].metric_names]
        if self.metric not in names:
            raise ValueError(
                f"search.metric: {self.metric!r} is not measured in {self.data.task}; choose {' or '.join(names)}"
            )
        objectives = self.search.objectives
        if objectives and objectives[0] != self.metric:
            raise ValueError(
                f"search.objectives: begins with {objectives[0]!r}, but search.metric is {self.metric!r}; "
                "leave search.metric out"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_task(self) -> Experiment:
        fault = task_fault(self.data, self.teacher, self.training, self.promotion)
        if fault is not None:
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _share_has_images(self) -> Experiment:
        default = TrainingSettings.model_fields[UNLABELLED_SHARE].default
        if self.data.unlabelled is None and self.training.unlabelled_share != default:
            raise ValueError("training.unlabelled_share: needs data.unlabelled; set it, or remove the share")
        if self.teacher.training.unlabelled_share != default:
            raise ValueError("teacher.training.unlabelled_share: a teacher is fitted on labelled images; remove it")
        return self

    @property
    def teacher_size(self) -> int:
        """Height = width of what the teacher sees, in pixels."""
        return self.teacher.image_size or self.data.image_size

    @property
    def space(self) -> SpaceSettings:
        """The search space, after `load_experiment` has read its file and resolved `methods`."""
        if isinstance(self.search.space, Path):
            raise ConfigError(f"search.space: {self.search.space} has not been read; use load_experiment")
        return self.search.space

    @property
    def listed_methods(self) -> tuple[str, ...]:
        """Names of the methods in the search space, `all` resolved."""
        return methods_of(self.data.task) if self.space.methods == "all" else self.space.methods

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the searched methods: those listed, and with `search.combine: 2` all pairs of them."""
        listed = self.listed_methods
        if self.search.combine == 1:
            return listed
        own = [method for method in listed if method not in self.space.extensions]
        return tuple(dict.fromkeys((*listed, *pairs_of(own))))

    def knows(self, method: str) -> bool:
        """Whether a method of this name exists in heterokd, an installed package or a file of the search space."""
        return method in METHODS or method in self.space.extensions

    def method_class(self, method: str) -> type[Method]:
        """Look up a method by name, see `heterokd.config.methods.method_class`."""
        return method_class(method, self.space.extensions.get(method))

    def reads_teacher(self, method: str) -> bool:
        """Whether a method reads any output of the teacher; otherwise its training is the same for every teacher."""
        return self.method_class(method).teacher_needs != Signal.NONE

    @property
    def metric(self) -> Metric:
        """The metric that selects students."""
        return self.search.metric or score_of(self.data.task)

    @property
    def registered_model(self) -> str:
        """Name in the model registry."""
        return self.tracking.registered_model or f"{self.name}-student"

    @property
    def experiment_name(self) -> str:
        """Name of the MLflow experiment."""
        return self.tracking.experiment or self.name

    @property
    def maximise(self) -> bool:
        """Whether a larger metric is better."""
        return self.metric != "val/loss"

    @property
    def cost_conditions(self) -> dict[str, str]:
        """Where the values of costs with a limit or among the objectives come from, by cost; none if that is clear."""
        search, size = self.search, self.data.view_size
        names = dict.fromkeys((*search.cost_objectives, *search.cost_limits))
        texts = {name: search.cost_conditions(name, size) for name in names}
        return {name: text for name, text in texts.items() if text}

    @property
    def by_student(self) -> bool:
        """Whether trials are compared within each student only, because costs are objectives, too."""
        return len(self.student.networks) > 1 and bool(self.search.cost_objectives)

    def without(self, networks: Collection[str]) -> Experiment:
        """Return the experiment without some of its students."""
        left = tuple(network for network in self.student.networks if network not in networks)
        if left == self.student.networks:
            return self
        return self.model_copy(update={"student": self.student.model_copy(update={"network": left})})

    def with_methods(self, methods: Sequence[str]) -> Experiment:
        """Return the experiment with other methods.

        Args:
            methods: names, or `FILE.py:Class`.

        Raises:
            ConfigError: unknown method.
        """
        try:
            space = SpaceSettings.model_validate({**self.space.model_dump(), "methods": list(methods)})
        except ValidationError as error:
            raise ConfigError(sentences(error, SpaceSettings, "search.space")) from None
        return self.with_space(space)

    def with_overrides(self, overrides: Mapping[str, object]) -> Experiment:
        """Return the experiment with other overrides in its search space."""
        return self.with_space(self.space.model_copy(update={"overrides": dict(overrides)}))

    def with_space(self, space: SpaceSettings) -> Experiment:
        """Return the experiment with another search space."""
        return self.model_copy(update={"search": self.search.model_copy(update={"space": space})})

    @property
    def member_experiments(self) -> tuple[Experiment, ...]:
        """The experiment with each member of the (first) teacher as its teacher, see `TeacherSettings.members`."""
        each = map(TeachersSettings.of, self.teacher.settings_of().members)
        return tuple(self.model_copy(update={"teacher": teacher}) for teacher in each)

    def for_teacher(self, teacher: str) -> Experiment:
        """Return the experiment with a single teacher; its recipes equal those of samples that name this teacher."""
        return self.model_copy(update={"teacher": self.teacher.only(teacher)})

    def shared_domains(self) -> dict[str, Domain]:
        """Return the shared domains: `training.*`, and `student.network` and `teacher.network` if they are lists."""
        found = {key: read_domain(value, f"search space: shared.{key}") for key, value in self.space.shared.items()}
        if len(self.student.networks) > 1:
            found["student.network"] = Choice(*self.student.networks)
        if len(self.teacher.networks) > 1:
            found[TEACHER] = Choice(*self.teacher.networks)
        return found

    def domains(self, method: str) -> dict[str, Domain]:
        """Return all domains of a method's samples, without keys that change nothing of its training."""
        found = self.method_domains(method) | self.shared_domains()
        if not self.reads_teacher(method):
            found.pop(TEACHER, None)
        if not self.method_class(method).learns_unlabelled():
            found.pop(f"training.{UNLABELLED_SHARE}", None)
        return found

    def method_domains(self, method: str) -> dict[str, Domain]:
        """Return a method's domains by `method.parameter`, after the search space's overrides."""
        found = {f"{method}.{name}": domain for name, domain in domains(self.method_class(method).Params).items()}
        for name, (key, value) in self.space.overrides_of(method).items():
            own = f"{method}.{name}"
            found[own] = read_domain(value, f"search space: overrides.{key}", found.get(own))
        return found

    def published(self, method: str, settings: Sample = MappingProxyType({})) -> dict[str, Scalar]:
        """Return a method's first sample: its defaults and the experiment's training settings.

        A value outside of a narrowed domain is replaced by the nearest value of the domain.

        Args:
            method: its name.
            settings: values that replace defaults, with the keys of a sample. They may name parameters and training
                settings that are not searched, unless the search space pins them.
        """
        defaults: dict[str, Scalar] = {
            **{f"{method}.{name}": value for name, value in self.method_class(method).Params()},
            **{f"{method}.{name}": value for name, value in self.space.defaults_of(method).items()},
            **{f"training.{name}": value for name, value in self.training},
            "student.network": self.student.networks[0],
            TEACHER: self.teacher.networks[0],
        }
        sample = {
            key: nearest(settings.get(key, defaults[key]), domain) for key, domain in self.domains(method).items()
        }
        return {**settings, "method": method, **sample}

    def recipe(self, sample: Sample, *, seed: int | None = None) -> Recipe:
        """Return the training that a sample describes.

        Args:
            sample: `method`, that method's `method.parameter` values, `training.*`, `student.network`,
                `teacher.network`; a key that is left out has its default, a network is then the first of its list.
            seed: of weights, order and views; default: the experiment's.

        Raises:
            ConfigError: an unknown key, method or value.
        """
        method = sample.get("method")
        if not isinstance(method, str) or not self.knows(method):
            raise ConfigError(f"sample: there is no method {method!r}; {did_you_mean(str(method), METHODS)}")
        extension = self.space.extensions.get(method)
        params = self.space.defaults_of(method) | self._pinned(method)
        training: dict[str, Scalar] = {}
        networks = {"student": self.student.networks[0], "teacher": self.teacher.networks[0]}
        for key, value in sample.items():
            section, _, name = key.partition(".")
            if key == "method":
                continue
            if section == method:
                params[name] = value
            elif section == "training":
                training[name] = value
            elif key in ("student.network", TEACHER):
                networks[section] = self._network(method, key, value)
            else:
                raise ConfigError(
                    f"sample: key {key!r} belongs neither to {method!r} nor to training, student or teacher"
                )
        if seed is not None:
            training["seed"] = seed
        return Recipe(
            name=self.name,
            data=self.data,
            teacher=self.teacher.settings_of(networks["teacher"]),
            student=self.student.settings_of(networks["student"]),
            method=method,
            params=method_params(method, params, "sample", extension).model_dump(mode="json"),
            training=revised(self.training, training),
            cache=self.cache,
            extension=extension,
        )

    def _pinned(self, method: str) -> dict[str, Scalar]:
        """Return the parameters that the search space pins to a value, and those that `training.gather` sets."""
        params: dict[str, Scalar] = {}
        if self.training.gather:
            params |= self.method_class(method).gather_settings()
        for name, (key, value) in self.space.overrides_of(method).items():
            domain = read_domain(value, f"search space: overrides.{key}")
            if isinstance(domain, Choice) and len(domain.options) == 1:
                params[name] = domain.options[0]
        return params

    def _network(self, method: str, key: str, value: Scalar) -> str:
        """Check a sample's student or teacher."""
        known = self.teacher.networks if key == TEACHER else self.student.networks
        if value not in known:
            raise ConfigError(f"sample: {key}: {value!r} is not in the experiment; known: {', '.join(known)}")
        if key == TEACHER and not self.reads_teacher(method):
            raise ConfigError(f"sample: {TEACHER}: {method!r} reads no teacher; leave it out")
        return str(value)


def methods_line(experiment: Experiment) -> str:
    """Return the names of the searched methods as text, pairs counted."""
    listed = experiment.listed_methods
    pairs = len(experiment.methods) - len(listed)
    count = f"{pairs} pair{'s' if pairs > 1 else ''}"
    return ", ".join(listed) + (f", and combinations of the best ({count})" if pairs else "")


def revised(training: TrainingSettings, changes: Mapping[str, Scalar]) -> TrainingSettings:
    """Replace some training settings and validate the result."""
    try:
        return TrainingSettings.model_validate({**training.model_dump(), **changes})
    except ValidationError as error:
        raise ConfigError(sentences(error, TrainingSettings, "sample", prefix="training")) from None
