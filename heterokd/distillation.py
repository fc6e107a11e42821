"""One training from files to files: open data and teacher, train, leave weights, metrics and checkpoint in a folder.

Between `train` (pure) and those who run it (`heterokd distill`, the trials of a search). Data and teachers are kept
for the life of the process: the next trial of the same process starts at once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import yaml
from filelock import FileLock

from heterokd import group
from heterokd.caching import CacheUse, training_teacher
from heterokd.config import (
    CachingSettings,
    DataSettings,
    Experiment,
    NetworkSettings,
    Recipe,
    TeacherSettings,
    TrainingSettings,
    ends,
    methods_of,
    pairing,
    score_of,
)
from heterokd.dataset import Splits
from heterokd.datasets import load_dataset
from heterokd.decoded import share_splits
from heterokd.disk import when_writable
from heterokd.errors import CheckpointError, ConfigError, NetworkError, PairError
from heterokd.evaluation import evaluate
from heterokd.latency import Candidates, weigh_students
from heterokd.loaders import Loaders, make_loaders, open_split
from heterokd.methods import METHODS
from heterokd.networks import build_network, predict_spec, published_classes, save_weights, weights_hash
from heterokd.outputs import Outputs, OutputSpec
from heterokd.precision import Precision, resolve_precision, time_step
from heterokd.root import Root, TrialFolder, read_json, write_text
from heterokd.task_modules import build_task
from heterokd.tasks import TASKS
from heterokd.teachers import LiveTeacher, Teacher, TeacherCard, open_teacher, teacher_hash
from heterokd.training import Metrics, Report, Trained, build_distiller, train
from heterokd.updates import split_batch

logger = logging.getLogger(__name__)

TeacherReport = Callable[[Metrics, str], bool]
"""Told the metrics of an epoch of a teacher's fit, and its network; False ends the fit."""

WARM_UP = 2  # steps before a precision is timed


@dataclass(frozen=True)
class PreparedTeacher:
    """A teacher whose weights lie in a file that every worker can open.

    Attributes:
        settings: the network.
        weights: its safetensors file; None: timm's published weights.
        card: what is known of it.
        fitted: whether this call trained it.
    """

    settings: TeacherSettings
    weights: Path | None
    card: TeacherCard
    fitted: bool = False


@lru_cache(maxsize=4)
def _splits(data: str) -> Splits:
    settings = DataSettings.model_validate_json(data)
    return load_dataset(
        settings.dataset,
        root=settings.root,
        image_size=settings.image_size,
        seed=settings.seed,
        labels_per_class=settings.labels_per_class,
        train_images=settings.train_images,
    )


def open_splits(settings: DataSettings) -> Splits:
    """The splits that `settings` describe, opened once per process.

    Raises:
        DataError: missing or damaged files; a class with too few images.
    """
    return _splits(settings.model_dump_json(exclude={"augment", "crop", "evaluation"}))


@lru_cache(maxsize=4)
def training_splits(splits: Splits, root: Root) -> Splits:
    """The same splits as trainings read them: images that lie in files are decoded once for all of this machine.

    Raises:
        DataError: an image is damaged or has gone.
    """
    return share_splits(root.pixels, splits)


@lru_cache(maxsize=8)
def _teacher(settings: str, num_classes: int, image_size: int, weights: Path | None) -> LiveTeacher:
    return open_teacher(TeacherSettings.model_validate_json(settings), num_classes, image_size, weights)


def check_experiment(experiment: Experiment) -> dict[str, str]:
    """Everything that can be known before work begins: data, networks, and whether each method exists for each pair.

    Returns:
        By method, why it cannot exist: left out when the experiment says `methods: all`, and an error when it names
        them. Of several teachers, a method that exists for some is left out with the others alone, whoever named it,
        and stands here as `pairing(method, teacher)`.

    Raises:
        UserError: one sentence naming file or key.
    """
    for network in experiment.teacher.networks:
        checkpoint = experiment.teacher.checkpoint_of(network)
        if checkpoint is not None and not checkpoint.is_file():
            key = f"teacher.checkpoint{f'.{network}' if isinstance(experiment.teacher.checkpoint, Mapping) else ''}"
            raise CheckpointError(f"{key}: there is no file {checkpoint}; paths begin where heterokd is run")
    splits = open_splits(experiment.data)
    teachers, students = (
        {
            network: _spec(section, searched.one(network), experiment.data, splits.num_classes)
            for network in searched.networks
        }
        for section, searched in (("teacher", experiment.teacher), ("student", experiment.student))
    )
    found = {network: _excluded(experiment.following(network), spec, students) for network, spec in teachers.items()}
    excluded: dict[str, str] = {}
    for method in experiment.methods:
        reasons = {network: found[network][method] for network in teachers if method in found[network]}
        if len(reasons) == len(teachers):
            excluded[method] = "; ".join(reasons.values())
        else:
            excluded |= {pairing(method, network): reason for network, reason in reasons.items()}
    gone = [method for method in experiment.methods if method in excluded]
    if gone and set(experiment.methods) != set(methods_of(experiment.data.task)):
        raise ConfigError(f"search space: methods: {excluded[gone[0]]}; take {gone[0]!r} off the list")
    return excluded


def _excluded(experiment: Experiment, teacher: OutputSpec, students: Mapping[str, OutputSpec]) -> dict[str, str]:
    """The methods that cannot exist for one teacher and every student, with the reason.

    Raises:
        ConfigError: a value of the search space is impossible.
    """
    excluded: dict[str, str] = {}
    # Without the overrides: a method that exists for the pair until a value is pinned is the pin's fault.
    space = experiment.space.model_copy(update={"overrides": {}})
    plain = experiment.model_copy(update={"search": experiment.search.model_copy(update={"space": space})})
    for network, student in students.items():
        pair = f"{experiment.teacher.network} (teacher) and {network} (student)"
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


def within_limits(experiment: Experiment, root: Root) -> tuple[Experiment, Candidates]:
    """The question about the students that keep `search.max_params_m` and `search.max_latency_ms`, and what each costs.

    Raises:
        NetworkError: a student that cannot be built.
        ConfigError: no student is left.
    """
    try:
        candidates = weigh_students(experiment, root, open_splits(experiment.data).num_classes)
    except NetworkError as error:
        raise NetworkError(with_key("student", error)) from None
    return experiment.without(candidates.left_out), candidates


def check_files(experiment: Experiment) -> None:
    """Open what work begins with, so that damage is found before it: weights, and images of train and val.

    Raises:
        UserError: one sentence naming file or key.
    """
    splits = open_splits(experiment.data)
    splits.look()
    kept, most = experiment.cache.top_k, splits.num_classes
    if experiment.cache.enabled and kept is not None and kept > most:
        raise ConfigError(f"cache.top_k: {kept} logits of a view cannot be kept, there are {most}; lower it")
    size = experiment.data.image_size
    for teacher in map(experiment.teacher.one, experiment.teacher.networks):
        if teacher.checkpoint is not None:
            _given_teacher(teacher, splits.num_classes, size)
    starting: list[tuple[str, NetworkSettings]] = []
    for section, searched in (("teacher", experiment.teacher), ("student", experiment.student)):
        starting += [(section, searched.one(network)) for network in searched.networks if searched.pretrained]
    for section, settings in starting:
        try:
            build_network(settings.network, splits.num_classes, settings.options, pretrained=True, image_size=size)
        except NetworkError as error:
            raise NetworkError(with_key(section, error)) from None


def _given_teacher(settings: TeacherSettings, num_classes: int, image_size: int) -> LiveTeacher:
    """The teacher whose weights are given, or published: opened once.

    Raises:
        CheckpointError: they are missing, damaged or of another network or number of classes.
    """
    try:
        return _teacher(settings.model_dump_json(), num_classes, image_size, settings.checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"teacher.checkpoint: {error}" if settings.checkpoint else str(error)) from None


def with_key(section: str, error: NetworkError) -> str:
    """A sentence about a network (`network 'x' ...`) that begins with its key."""
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
    """Why a method cannot exist for a pair; None when it can. On the meta device this costs no memory."""
    try:
        with torch.device("meta"):
            METHODS[recipe.method](recipe.method_params, student, teacher)
    except PairError as error:
        return str(error)
    return None


def prepare_teachers(
    experiment: Experiment,
    root: Root,
    *,
    device: torch.device | str | None = None,
    progress: TeacherReport | None = None,
) -> dict[str, PreparedTeacher]:
    """Fit or verify every teacher of an experiment, see `prepare_teacher`; by network, in the experiment's order.

    Args:
        experiment: `teacher` says which.
        root: fitted teachers are kept under `teachers/`.
        device: where to fit.
        progress: told the metrics of each epoch of a fit, and the network that is fitted.

    Raises:
        CheckpointError: see `prepare_teacher`.
    """
    return {
        network: prepare_teacher(
            experiment.following(network),
            root,
            device=device,
            progress=None if progress is None else partial(_report_of, progress, network),
        )
        for network in experiment.teacher.networks
    }


def _report_of(progress: TeacherReport, network: str, metrics: Metrics) -> bool:
    return progress(metrics, network)


def prepare_teacher(
    experiment: Experiment, root: Root, *, device: torch.device | str | None = None, progress: Report | None = None
) -> PreparedTeacher:
    """Fit the teacher (once; it is reused by hash), or verify the one that is given.

    Args:
        experiment: `teacher` says which, the first of several; it sees all training images, whatever
            `data.labels_per_class` says.
        root: fitted teachers are kept under `teachers/`.
        device: where to fit; a GPU when there is one, if left out.
        progress: told the metrics of each epoch of a fit.

    Raises:
        CheckpointError: weights that are missing, damaged, of another network or number of classes, or worse than
            `teacher.min_score`.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = experiment.teacher.one()
    data = experiment.data.model_copy(update={"labels_per_class": None, "train_images": None})
    splits = open_splits(data)
    published = settings.pretrained and published_classes(settings.network) == splits.num_classes
    if settings.checkpoint is not None or published:
        teacher = _given_teacher(settings, splits.num_classes, data.image_size)
        source = str(settings.checkpoint) if settings.checkpoint else "timm's published weights"
        card = _card(settings, teacher, data, splits, source, device)
        prepared = PreparedTeacher(settings, settings.checkpoint, card)
    else:
        prepared = _fitted_teacher(experiment, data, splits, root, device, progress)
    if settings.min_score is not None and prepared.card.val_score < settings.min_score:
        raise CheckpointError(
            f"teacher: {prepared.card.source} reaches {prepared.card.metric} {prepared.card.val_score:.4f}, "
            f"teacher.min_score asks for {settings.min_score:.4f}; raise teacher.training.epochs or lower it"
        )
    return prepared


def teacher_recipe(experiment: Experiment) -> Recipe:
    """The training that fits an experiment's (first) teacher: it sees all training images."""
    settings = experiment.teacher.one()
    return Recipe(
        name=f"{experiment.name}-teacher",
        data=experiment.data.model_copy(update={"labels_per_class": None, "train_images": None}),
        teacher=settings,
        student=NetworkSettings.model_validate(settings.model_dump(include={"network", "options", "pretrained"})),
        method="scratch",
        params={},
        training=TrainingSettings.model_validate(settings.training.model_dump()),
        cache=CachingSettings(enabled=False),
    )


def ready_teacher(experiment: Experiment, root: Root) -> tuple[bool, Path | None]:
    """Whether the (first) teacher is there and need not be fitted, and its weights' file (None: timm's, or to be).

    Raises:
        OSError: the store of the root does not answer.
    """
    settings, recipe = experiment.teacher.one(), teacher_recipe(experiment)
    splits = open_splits(recipe.data)
    if settings.checkpoint is not None:
        return True, settings.checkpoint
    if settings.pretrained and published_classes(settings.network) == splits.num_classes:
        return True, None
    folder = root.teachers / teacher_hash(settings, recipe, splits.fingerprint)
    root.mirror(folder).fetch(without=("checkpoint.pt",))
    is_fitted = (folder / "teacher.json").exists()
    return is_fitted, folder / "teacher.safetensors" if is_fitted else None


def _fitted_teacher(
    experiment: Experiment,
    data: DataSettings,
    splits: Splits,
    root: Root,
    device: torch.device | str,
    progress: Report | None,
) -> PreparedTeacher:
    settings, recipe = experiment.teacher.one(), teacher_recipe(experiment)
    folder = root.teachers / teacher_hash(settings, recipe, splits.fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    mirror = root.mirror(folder)
    mirror.fetch(without=("checkpoint.pt",))
    weights, card_file = folder / "teacher.safetensors", folder / "teacher.json"
    # Two searches that want the same teacher at once: the second waits and finds it.
    with FileLock(folder / ".lock"):
        if not card_file.exists():
            loaders = recipe_loaders(recipe, training_splits(splits, root), device)
            precision = measured_precision(recipe, None, loaders, device, root)
            trained = train(
                recipe,
                None,
                loaders,
                progress or (lambda metrics: True),
                checkpoint=folder / "checkpoint.pt",
                device=device,
                precision=precision,
            )
            when_writable(folder, lambda: save_weights(trained.student, weights))
            card = TeacherCard(
                network=settings.network,
                options=dict(settings.options),
                num_classes=splits.num_classes,
                image_size=trained.student.spec.image_size,
                weights=weights_hash(trained.student),
                metric=score_of(recipe.task),
                val_score=trained.metrics[score_of(recipe.task)],
                source=f"fitted {settings.network}",
            )
            write_text(folder / "recipe.yaml", recipe.to_yaml())
            write_text(card_file, card.to_json())
            (folder / "checkpoint.pt").unlink(missing_ok=True)
            mirror.close()
            return PreparedTeacher(settings, weights, card, fitted=True)
    card = TeacherCard(**read_json(card_file))
    teacher = _teacher(settings.model_dump_json(), splits.num_classes, data.image_size, weights)
    if weights_hash(teacher.network) != card.weights:
        raise CheckpointError(f"{weights}: is damaged (its content does not match teacher.json); remove {folder}")
    return PreparedTeacher(settings, weights, card)


def _card(
    settings: TeacherSettings,
    teacher: LiveTeacher,
    data: DataSettings,
    splits: Splits,
    source: str,
    device: torch.device | str,
) -> TeacherCard:
    task = build_task(data.task, splits.num_classes, window=data.window)
    loader = open_split(splits.val, splits.num_classes)
    metrics = dict(evaluate(teacher.network.to(device), loader, task, device=device))
    return TeacherCard(
        network=settings.network,
        options=dict(settings.options),
        num_classes=splits.num_classes,
        image_size=teacher.spec.image_size,
        weights=weights_hash(teacher.network),
        metric=score_of(data.task),
        val_score=metrics[task.facts.score],
        source=source,
    )


def open_prepared(recipe: Recipe, prepared_weights: Path | None, num_classes: int) -> LiveTeacher:
    """The teacher of a recipe in this process, opened once."""
    return _teacher(recipe.teacher.model_dump_json(), num_classes, recipe.data.image_size, prepared_weights)


def run_recipe(
    recipe: Recipe,
    folder: TrialFolder,
    root: Root,
    weights: Path | None,
    keep_going: Callable[[Metrics], bool],
    *,
    rungs: Collection[int] = (),
    save_now: Callable[[], bool] = lambda: False,
    device: torch.device | str = "cpu",
    cache: CacheUse = "found",
) -> Trained:
    """Train one recipe; its folder then holds metrics.jsonl, the checkpoint, and (if not stopped) the student.

    Where several workers share the training, each calls this; the first one writes.

    Args:
        recipe: what to train.
        folder: goes on from its checkpoint when it has one.
        root: remembers measured precisions.
        weights: the prepared teacher's weights.
        keep_going: told each epoch's metrics after they are on disk; False stops the training.
        rungs: epochs after which a checkpoint is written.
        save_now: see `train`.
        device: where to train.
        cache: see `training_teacher`.

    Raises:
        CacheError: the teacher's cache is damaged.
    """
    splits = training_splits(open_splits(recipe.data), root)
    live = open_prepared(recipe, weights, splits.num_classes)
    loaders = recipe_loaders(recipe, splits, device)
    teacher = training_teacher(recipe, splits, live, root, device, cache)
    precision = measured_precision(recipe, teacher, loaders, device, root)

    def report(metrics: Metrics) -> bool:
        folder.append(metrics)
        return keep_going(metrics)

    trained = train(
        recipe,
        teacher,
        loaders,
        report,
        checkpoint=folder.checkpoint,
        rungs=rungs,
        save_now=save_now,
        device=device,
        precision=precision,
        wrap=group.data_parallel,
    )
    if not trained.stopped and group.rank() == 0:
        when_writable(folder.path, lambda: save_weights(trained.student, folder.weights))
    return trained


def recipe_loaders(recipe: Recipe, splits: Splits, device: torch.device | str = "cpu") -> Loaders:
    """The views and the validation images of a recipe, made where they are wanted; a worker's part of the views.

    Raises:
        ConfigError: a worker would have fewer images of a step than `training.accumulate` makes parts of them.
    """
    training = recipe.training
    images = min(training.batch_size, len(splits.train)) // group.size()
    if group.size() > 1 and images < training.accumulate:
        raise ConfigError(
            f"training.accumulate: {images} images of a worker cannot be split into {training.accumulate} parts; lower "
            "it, or training.workers"
        )
    return make_loaders(
        splits,
        recipe.data.policy,
        training.batch_size,
        training.seed,
        views=recipe.views,
        crop=recipe.data.view_crop,
        rank=group.rank(),
        world_size=group.size(),
        device=device,
    )


def measured_precision(
    recipe: Recipe, teacher: Teacher | None, loaders: Loaders, device: torch.device | str, root: Root
) -> Precision:
    """The recipe's precision; when it says auto, a few steps are timed once per device and shape, by one worker."""
    steps: dict[Precision, Callable[[], object]] = {}

    def step_in(precision: Precision) -> Callable[[], object]:
        distiller = build_distiller(recipe, teacher, loaders.num_classes).to(device)
        if precision.channels_last:
            distiller.student.to(memory_format=torch.channels_last)
        whole = next(iter(loaders.train.epoch(0))).to(torch.device(device))
        batch = next(split_batch(whole, recipe.training.accumulate))
        needs = distiller.teacher_needs

        def step() -> None:
            with precision.autocast(torch.device(device)):
                outputs = Outputs() if teacher is None else teacher.outputs(batch, needs)
                loss, _ = distiller(batch, outputs, 0.5)
            loss.backward()

        for _ in range(WARM_UP):
            step()
        return step

    def seconds(precision: Precision) -> float:
        if precision not in steps:
            steps[precision] = step_in(precision)
        return time_step(steps[precision], device)

    images = recipe.training.batch_size // group.size()
    part = recipe.model_copy(update={"training": recipe.training.model_copy(update={"batch_size": images})})
    chosen: Precision | None = None
    if group.rank() == 0:
        with group.alone():
            chosen = resolve_precision(part, device, seconds, root.path / "precision.json")
    agreed = group.first_says(chosen)
    assert agreed is not None  # the first worker has one
    return agreed


def dump_experiment(experiment: Experiment) -> str:
    """The resolved experiment as YAML: what a study keeps of its question."""
    return yaml.safe_dump(json.loads(experiment.model_dump_json()), sort_keys=False, allow_unicode=True)
