"""Check an experiment before work begins: data, networks, weights, and which methods exist for each pair."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from heterokd.config.data import DataSettings
from heterokd.config.data_sizes import data_at
from heterokd.config.domain_values import ends
from heterokd.config.experiment import Experiment
from heterokd.config.given_files import given_files
from heterokd.config.methods import methods_of, pairing
from heterokd.config.networks import NetworkSettings
from heterokd.config.recipe import Recipe
from heterokd.config.search import score_of
from heterokd.datasets.io.describe import describe_images
from heterokd.datasets.io.draws import check_class_names
from heterokd.datasets.io.split import Splits
from heterokd.datasets.masks.class_pixels import check_classes, describe_classes
from heterokd.errors import CheckpointError, ConfigError, NetworkError, PairError
from heterokd.networks.network import predict_spec
from heterokd.outputs import OutputSpec
from heterokd.storage.workspace import Workspace
from heterokd.tasks import TASKS
from heterokd.teachers.given import is_stored, local_file, read_given
from heterokd.tracking.tracker import check_trackers
from heterokd.training.data import open_splits
from heterokd.training.macro_metrics import AUROC_CLASSES
from heterokd.training.student import build_configured
from heterokd.training.student_costs import Candidates, measure_students


def check_experiment(experiment: Experiment) -> dict[str, str]:
    """Check trackers, data, networks, and whether each method exists for each pair of teacher and student.

    Returns:
        Reasons by excluded method, with `methods: all`; a method that the experiment names raises an error instead. A
        method that exists for only some of several teachers is excluded for the others, as `pairing(method, teacher)`.

    Raises:
        UserError: names the file or key.
    """
    check_trackers(experiment)
    for given in given_files(experiment):
        if not is_stored(given.file) and not given.file.is_file():
            raise CheckpointError(
                f"{given.key}: there is no file {given.file}; relative paths start from the working directory"
            )
    splits = open_splits(experiment.data)
    fewest, most = {"val/top5": (5, math.inf), "val/auroc": (2, AUROC_CLASSES)}.get(experiment.metric, (0, math.inf))
    if not fewest <= splits.num_classes <= most:
        raise ConfigError(
            f"search.metric: {experiment.metric} is not measured for {splits.num_classes} classes; choose "
            f"{score_of(experiment.data.task)}"
        )
    _check_classes(experiment, splits)
    teachers, students = (
        {
            network: _spec(section, searched.settings_of(network), data, splits.num_classes)
            for network in searched.networks
        }
        for section, searched, data in (
            ("teacher", experiment.teacher, _data_of_teacher(experiment)),
            ("student", experiment.student, experiment.data),
        )
    )
    _check_stages(experiment, teachers, students)
    found = {network: _excluded(experiment.for_teacher(network), spec, students) for network, spec in teachers.items()}
    excluded: dict[str, str] = {}
    for method in experiment.methods:
        reasons = {network: found[network][method] for network in teachers if method in found[network]}
        if len(reasons) == len(teachers):
            excluded[method] = "; ".join(reasons.values())
        else:
            excluded |= {pairing(method, network): reason for network, reason in reasons.items()}
    gone = [method for method in experiment.listed_methods if method in excluded]
    if gone and set(experiment.listed_methods) != set(methods_of(experiment.data.task)):
        raise ConfigError(f"search space: methods: {excluded[gone[0]]}; take {gone[0]!r} off the list")
    return excluded


def _check_classes(experiment: Experiment, splits: Splits) -> None:
    """Raise DataError if a setting names a class that the data set does not have."""
    named = (
        ("training.class_weights", experiment.training.class_weights),
        ("teacher.training.class_weights", experiment.teacher.training.class_weights),
        ("promotion.min_recall", experiment.promotion.min_recall),
        ("promotion.min_iou", experiment.promotion.min_iou),
    )
    for key, by_class in named:
        if not isinstance(by_class, str):
            check_class_names(by_class, splits.class_names, key)


def _check_stages(
    experiment: Experiment, teachers: Mapping[str, OutputSpec], students: Mapping[str, OutputSpec]
) -> None:
    """Raise ConfigError if a training has an auxiliary head, but a network gives no stage for it."""
    sides = (
        ("teacher.training", experiment.teacher.training, teachers),
        ("training", experiment.training, students),
    )
    for section, training, specs in sides:
        searched = section == "training" and "training.auxiliary_weight" in experiment.space.shared
        lacking = [name for name, spec in specs.items() if not spec.stages]
        if lacking and (training.auxiliary_weight or searched):
            raise ConfigError(
                f"{section}.auxiliary_weight: {lacking[0]} gives no stages; name them (taps.stages), or remove it"
            )


def _data_of_teacher(experiment: Experiment) -> DataSettings:
    """Return the section `data` as the teacher sees it."""
    return data_at(experiment.data, experiment.teacher_size)


def _excluded(experiment: Experiment, teacher: OutputSpec, students: Mapping[str, OutputSpec]) -> dict[str, str]:
    """Return the methods that cannot exist for a teacher and some student, with the reasons.

    Raises:
        ConfigError: a value of the search space is impossible.
    """
    excluded: dict[str, str] = {}
    # Without the overrides first: if the method exists without a pinned value, the pinned value is the error.
    space = experiment.space.model_copy(update={"overrides": {}})
    plain = experiment.model_copy(update={"search": experiment.search.model_copy(update={"space": space})})
    role = "teacher" if experiment.teacher.cross_fit is None else "cross-fitted teacher"
    for network, student in students.items():
        pair = f"{experiment.teacher.network} ({role}) and {network} (student)"
        for method in experiment.methods:
            published = plain.published(method)
            reason = _refusal(plain.recipe(published), student, teacher)
            if reason is not None:
                excluded[method] = f"{method} does not exist for {pair}: {reason}"
                continue
            for key, domain in experiment.method_domains(method).items():
                for value in ends(domain) if key in experiment.space.overrides else ():
                    reason = _refusal(plain.recipe({**published, key: value}), student, teacher)
                    if reason is not None:
                        raise ConfigError(
                            f"search space: overrides.{key}: {value!r} is impossible for {pair}: {reason}"
                        )
            reason = _refusal(experiment.recipe(experiment.published(method)), student, teacher)
            if reason is not None:
                raise ConfigError(f"search space: overrides: together they are impossible for {pair}: {reason}")
    return excluded


def within_limits(experiment: Experiment, root: Workspace) -> tuple[Experiment, Candidates]:
    """Drop students that exceed `search.max_params_m` or `search.max_latency_ms`; also return the students' costs.

    Raises:
        NetworkError: a student that cannot be built.
        ConfigError: every student exceeds a limit.
    """
    try:
        candidates = measure_students(experiment, root, open_splits(experiment.data).num_classes)
    except NetworkError as error:
        raise NetworkError(with_key("student", error)) from None
    return experiment.without(candidates.left_out), candidates


def check_files(experiment: Experiment, root: Workspace) -> None:
    """Open weights and images of train and val, so that damaged files are found before work begins.

    Raises:
        UserError: names the file or key.
    """
    splits = open_splits(experiment.data)
    splits.check_images()
    check_classes(splits)
    kept, most = experiment.cache.top_k, splits.num_classes
    if experiment.cache.enabled and kept is not None and kept > most:
        raise ConfigError(f"cache.top_k: {kept} logits of a view cannot be kept, there are {most}; lower it")
    sizes = {"teacher": experiment.teacher_size, "student": experiment.data.image_size}
    for given in given_files(experiment):
        size = sizes[given.key.partition(".")[0]]
        read_given(given.network, local_file(given.file, root), splits.num_classes, size, given.key)
    teachers = [experiment.teacher.settings_of(network) for network in experiment.teacher.networks]
    students = [experiment.student.settings_of(network) for network in experiment.student.networks]
    networks: list[tuple[str, NetworkSettings]] = [
        *(("teacher", member) for teacher in teachers for member in teacher.members),
        *(("student", student) for student in students),
    ]
    for section, settings in networks:
        if not settings.pretrained:
            continue
        try:
            build_configured(settings, splits.num_classes, sizes[section], pretrained=True)
        except NetworkError as error:
            raise NetworkError(with_key(section, error)) from None


def describe_data(experiment: Experiment) -> list[str]:
    """Describe how the data set was read, its images or label maps, and what looks wrong; a sentence or row per line.

    Raises:
        DataError: a label map is damaged, or a file is missing.
    """
    splits = open_splits(experiment.data)
    return [*splits.notes, *describe_images(splits), *describe_classes(splits)]


def with_key(section: str, error: NetworkError) -> str:
    """Prefix an error message about a network (`network 'x' ...`) with its section's key."""
    text = str(error)
    return f"{section}.{text}" if text.startswith("network ") else f"{section}: {text}"


def _spec(section: str, settings: NetworkSettings, data: DataSettings, num_classes: int) -> OutputSpec:
    network = settings.network
    try:
        spec = predict_spec(network, num_classes, settings.options, data.image_size)
    except NetworkError as error:
        raise NetworkError(with_key(section, error)) from None
    task = TASKS[data.task]
    if not task.fits(spec):
        raise NetworkError(
            f"{section}.network: {network!r} does not fit data set {data.dataset!r}, which has {task.network_hint}"
        )
    return spec


def _refusal(recipe: Recipe, student: OutputSpec, teacher: OutputSpec) -> str | None:
    """Return why a method cannot exist for a pair, or None. On the meta device this costs no memory."""
    try:
        with torch.device("meta"):
            recipe.method_class(recipe.method_params, student, teacher)
    except PairError as error:
        return str(error)
    except Exception as error:
        extension = recipe.extension
        if extension is None:
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(
            f"{extension.file}: {extension.class_name} cannot be built for this pair ({reason}); "
            f"`heterokd methods {extension.file}:{extension.class_name} --check` tries it on others"
        ) from error
    return None
