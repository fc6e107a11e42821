"""Fit, verify or open the teachers of an experiment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from filelock import FileLock

from heterokd.config.data import DataSettings
from heterokd.config.experiment import Experiment
from heterokd.config.networks import NetworkSettings, TeacherSettings
from heterokd.config.recipe import Recipe
from heterokd.config.search import score_of
from heterokd.config.services import CachingSettings
from heterokd.config.training import TrainingSettings
from heterokd.datasets.io.loaders import open_split
from heterokd.datasets.io.split import Splits
from heterokd.errors import CheckpointError
from heterokd.methods import BASELINE
from heterokd.networks.bodies import published_classes
from heterokd.networks.weights import save_weights, weights_hash
from heterokd.storage.disk import when_writable
from heterokd.storage.files import read_json, write_text
from heterokd.storage.teacher_card import TeacherCard
from heterokd.storage.typed_json import parse
from heterokd.storage.workspace import Workspace
from heterokd.training.data import open_splits, recipe_loaders, training_splits
from heterokd.training.evaluation import evaluate
from heterokd.training.precision import default_device
from heterokd.training.setup import measured_precision
from heterokd.training.task_modules import build_task
from heterokd.training.teacher import LiveTeacher, open_teacher, teacher_hash
from heterokd.training.train import Metrics, Report, train

TeacherReport = Callable[[Metrics, str], bool]
"""Called with the metrics of an epoch of a teacher's fit, and the teacher's network; False ends the fit."""


@dataclass(frozen=True)
class PreparedTeacher:
    """A teacher whose weights are in a file that every worker can open.

    Attributes:
        settings: network of the teacher.
        weights: its safetensors file; None: timm's published weights.
        card: network, weights hash and score.
        fitted: whether this call trained it.
    """

    settings: TeacherSettings
    weights: Path | None
    card: TeacherCard
    fitted: bool = False


@lru_cache(maxsize=8)
def _teacher(settings: str, num_classes: int, image_size: int, weights: Path | None) -> LiveTeacher:
    return open_teacher(TeacherSettings.model_validate_json(settings), num_classes, image_size, weights)


def given_teacher(settings: TeacherSettings, num_classes: int, image_size: int) -> LiveTeacher:
    """Open a teacher with given or published weights, once per process.

    Raises:
        CheckpointError: the weights are missing, damaged or of another network or number of classes.
    """
    try:
        return _teacher(settings.model_dump_json(), num_classes, image_size, settings.checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"teacher.checkpoint: {error}" if settings.checkpoint else str(error)) from None


def prepare_teachers(
    experiment: Experiment,
    root: Workspace,
    *,
    device: torch.device | str | None = None,
    progress: TeacherReport | None = None,
) -> dict[str, PreparedTeacher]:
    """Fit or verify every teacher of an experiment, see `prepare_teacher`; by network, in the experiment's order.

    Args:
        experiment: experiment with the `teacher` section.
        root: fitted teachers are stored under `teachers/`.
        device: device to fit on; None: a GPU if there is one.
        progress: called with the metrics of each epoch of a fit, and the network.

    Raises:
        CheckpointError: see `prepare_teacher`.
    """
    return {
        network: prepare_teacher(
            experiment.for_teacher(network),
            root,
            device=device,
            progress=None if progress is None else partial(_report_of, progress, network),
        )
        for network in experiment.teacher.networks
    }


def _report_of(progress: TeacherReport, network: str, metrics: Metrics) -> bool:
    return progress(metrics, network)


def prepare_teacher(
    experiment: Experiment, root: Workspace, *, device: torch.device | str | None = None, progress: Report | None = None
) -> PreparedTeacher:
    """Fit the teacher (once; it is reused by hash), or verify a given teacher.

    Args:
        experiment: experiment with the `teacher` section (the first of several teachers); the fit sees all training
            images, whatever `data.labels_per_class` says.
        root: fitted teachers are stored under `teachers/`.
        device: device to fit on; None: a GPU if there is one.
        progress: called with the metrics of each epoch of the fit.

    Raises:
        CheckpointError: the weights are missing, damaged, of another network or number of classes, or worse than
            `teacher.min_score`.
    """
    if device is None:
        device = default_device()
    settings = experiment.teacher.settings_of()
    data = experiment.data.model_copy(update={"labels_per_class": None, "train_images": None})
    splits = open_splits(data)
    published = settings.pretrained and published_classes(settings.network) == splits.num_classes
    if settings.checkpoint is not None or published:
        teacher = given_teacher(settings, splits.num_classes, data.image_size)
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
    """Return the recipe that fits an experiment's (first) teacher on all training images."""
    settings = experiment.teacher.settings_of()
    return Recipe(
        name=f"{experiment.name}-teacher",
        data=experiment.data.model_copy(update={"labels_per_class": None, "train_images": None}),
        teacher=settings,
        student=NetworkSettings.model_validate(settings.model_dump(include={"network", "options", "pretrained"})),
        method=BASELINE,
        params={},
        training=TrainingSettings.model_validate(settings.training.model_dump()),
        cache=CachingSettings(enabled=False),
    )


def ready_teacher(experiment: Experiment, root: Workspace) -> tuple[bool, Path | None]:
    """Return whether the (first) teacher exists, and its weights' file (None: timm's weights, or not fitted yet).

    Raises:
        OSError: the store of the workspace does not answer.
    """
    settings, recipe = experiment.teacher.settings_of(), teacher_recipe(experiment)
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
    root: Workspace,
    device: torch.device | str,
    progress: Report | None,
) -> PreparedTeacher:
    settings, recipe = experiment.teacher.settings_of(), teacher_recipe(experiment)
    folder = root.teachers / teacher_hash(settings, recipe, splits.fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    mirror = root.mirror(folder)
    mirror.fetch(without=("checkpoint.pt",))
    weights, card_file = folder / "teacher.safetensors", folder / "teacher.json"
    # Of two concurrent searches with the same teacher, the second waits and reuses it.
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
    card = parse(TeacherCard, read_json(card_file))
    teacher = _teacher(settings.model_dump_json(), splits.num_classes, data.image_size, weights)
    if weights_hash(teacher.network) != card.weights:
        raise CheckpointError(f"{weights}: is damaged (its content does not match teacher.json); delete {folder}")
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
    """Open the teacher of a recipe, once per process."""
    return _teacher(recipe.teacher.model_dump_json(), num_classes, recipe.data.image_size, prepared_weights)
