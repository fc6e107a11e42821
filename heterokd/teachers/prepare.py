"""Fit, verify or open the teachers of an experiment."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

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
from heterokd.networks.network import AnyNetwork
from heterokd.networks.weights import weights_hash
from heterokd.storage.files import read_json, write_text
from heterokd.storage.teacher_card import TeacherCard
from heterokd.storage.typed_json import parse
from heterokd.storage.workspace import CHECKPOINTS, Workspace
from heterokd.teachers.diagnosis import diagnose
from heterokd.teachers.fit import FIT_FILES, fit_teacher
from heterokd.teachers.given import GivenWeights, given_weights, with_local_weights
from heterokd.training.data import open_splits, training_splits
from heterokd.training.evaluation import evaluate
from heterokd.training.precision import default_device
from heterokd.training.student import save_student
from heterokd.training.task_modules import build_task
from heterokd.training.teacher import FIRST_FIT, LiveTeacher, open_teacher, teacher_hash
from heterokd.training.teacher_views import TeacherViews, teacher_views
from heterokd.training.train import Metrics, Report

CARD = "teacher.json"
"""File in a teacher's folder, written last."""

logger = logging.getLogger(__name__)

TeacherReport = Callable[[Metrics, str], bool]
"""Called with the metrics of an epoch of a teacher's fit (epoch 0: its solved classifier, only the score) and the
teacher's network; False ends the fit."""


@dataclass(frozen=True)
class PreparedTeacher:
    """A teacher with weights that every worker can open.

    Attributes:
        settings: network of the teacher.
        weights: safetensors file with the network's names; None for timm's published weights.
        card: network, weights hash and score.
        fitted: whether this call trained it.
    """

    settings: TeacherSettings
    weights: Path | None
    card: TeacherCard
    fitted: bool = False


def prepare_teachers(
    experiment: Experiment, root: Workspace, progress: TeacherReport | None = None
) -> dict[str, PreparedTeacher]:
    """Fit or verify every teacher of an experiment, see `prepare_teacher`; by network, in the experiment's order.

    Raises:
        CheckpointError: see `prepare_teacher`.
    """

    def prepared(network: str) -> PreparedTeacher:
        report = None if progress is None else lambda metrics: progress(metrics, network)
        return prepare_teacher(experiment.for_teacher(network), root, report)

    return {network: prepared(network) for network in experiment.teacher.networks}


def prepare_teacher(experiment: Experiment, root: Workspace, progress: Report | None = None) -> PreparedTeacher:
    """Fit the (first) teacher of an experiment, or verify a given teacher; on a GPU if there is one.

    A fitted teacher is stored under `teachers/` and reused by hash. The fit uses all training images, whatever
    `data.labels_per_class` is.

    Args:
        experiment: experiment with the `teacher` section.
        root: workspace.
        progress: called with the metrics of each epoch of the fit; False ends it.

    Raises:
        CheckpointError: the weights are missing, damaged, of another network or number of classes, or worse than
            `teacher.min_score`.
    """
    recipe = teacher_recipe(experiment)
    asked, splits = recipe.teacher, open_splits(recipe.data)
    recipe, sentence = with_local_weights(recipe, splits, root)
    settings = recipe.teacher
    if sentence is not None:
        logger.warning(sentence)
    if asked.checkpoint is not None and settings.checkpoint is not None:
        given = given_weights(recipe, splits, root, asked.checkpoint)
        prepared = PreparedTeacher(asked, given.file, _verify(recipe, splits, given))
    elif _is_given(settings, splits):
        prepared = PreparedTeacher(asked, None, _verify(recipe, splits))
    else:
        prepared = _fitted_teacher(recipe, splits, root, progress)
    card = prepared.card
    for remark in card.remarks():
        logger.warning("teacher %s: %s", card.network, remark)
    if settings.min_score is not None and card.val_score < settings.min_score:
        raise CheckpointError(
            f"teacher: {card.source} reaches {card.metric} {card.val_score:.4f}, teacher.min_score requires "
            f"{settings.min_score:.4f}; raise teacher.training.epochs or lower teacher.min_score"
        )
    return prepared


def teacher_recipe(experiment: Experiment) -> Recipe:
    """Return the recipe that fits an experiment's (first) teacher on all training images."""
    settings = experiment.teacher.settings_of()
    return Recipe(
        name=f"{experiment.name}-teacher",
        data=experiment.data.model_copy(
            update={"labels_per_class": None, "train_images": None, "image_size": experiment.teacher_size}
        ),
        teacher=settings,
        student=NetworkSettings.model_validate(settings.model_dump(include=set(NetworkSettings.model_fields))),
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
    recipe = teacher_recipe(experiment)
    asked, splits = recipe.teacher.checkpoint, open_splits(recipe.data)
    recipe, _ = with_local_weights(recipe, splits, root)
    if asked is not None and recipe.teacher.checkpoint is not None:
        return True, given_weights(recipe, splits, root, asked).file
    if _is_given(recipe.teacher, splits):
        return True, None
    folder = _folder(recipe, splits, root)
    root.mirror(folder).fetch(without=CHECKPOINTS)
    is_fitted = (folder / CARD).exists()
    return is_fitted, folder / "teacher.safetensors" if is_fitted else None


def open_prepared(
    recipe: Recipe, prepared_weights: Path | None, num_classes: int, root: Workspace | None = None
) -> LiveTeacher:
    """Open the teacher of a recipe, once per process; `root`: see `teacher_views`."""
    live = _teacher(recipe.teacher.model_dump_json(), num_classes, recipe.teacher_size, prepared_weights)
    views = teacher_views(recipe, root)
    return live if views is None else _with_views(live, views)


@lru_cache(maxsize=8)
def _with_views(live: LiveTeacher, views: TeacherViews) -> LiveTeacher:
    """Return the teacher with its views; the network is shared, because confirmations have views of several seeds."""
    return LiveTeacher(live.network, views)


@lru_cache(maxsize=8)
def _teacher(settings: str, num_classes: int, image_size: int, weights: Path | None) -> LiveTeacher:
    return open_teacher(TeacherSettings.model_validate_json(settings), num_classes, image_size, weights)


def _is_given(settings: TeacherSettings, splits: Splits) -> bool:
    """Whether the teacher has weights already: a checkpoint, or timm's weights for as many classes as the data has."""
    return settings.checkpoint is not None or (
        settings.pretrained and published_classes(settings.network) == splits.num_classes
    )


def _folder(recipe: Recipe, splits: Splits, root: Workspace) -> Path:
    """Return a teacher's folder; with `fit: auto`, that of a version without the key `teacher.fit` if it exists."""
    folder = root.teachers / teacher_hash(recipe.teacher, recipe, splits.fingerprint)
    if recipe.teacher.fit == "auto" and not (folder / CARD).exists():
        whole = recipe.teacher.model_copy(update={"fit": FIRST_FIT})
        older = root.teachers / teacher_hash(whole, recipe, splits.fingerprint)
        root.mirror(older).fetch(without=CHECKPOINTS)
        if (older / CARD).exists() and "reason" not in read_json(older / CARD):
            return older
    return folder


def _verify(recipe: Recipe, splits: Splits, given: GivenWeights | None = None) -> TeacherCard:
    """Open a given or published teacher and measure it on val."""
    device = default_device()
    network = open_prepared(recipe, None if given is None else given.file, splits.num_classes).network
    task = build_task(recipe.task, splits.num_classes, window=recipe.data.window)
    val = open_split(splits.val, splits.num_classes)
    metrics = dict(evaluate(network.to(device), val, task, device=device))
    score, source = metrics[task.facts.score], "timm's published weights" if given is None else given.source
    card = _card(recipe, network, splits, score, source)
    return card if given is None else replace(card, notes=given.notes)


def _fitted_teacher(recipe: Recipe, splits: Splits, root: Workspace, progress: Report | None) -> PreparedTeacher:
    settings, folder, device = recipe.teacher, _folder(recipe, splits, root), default_device()
    folder.mkdir(parents=True, exist_ok=True)
    mirror = root.mirror(folder)
    mirror.fetch(without=CHECKPOINTS)
    weights, card_file = folder / "teacher.safetensors", folder / CARD
    # Of two concurrent searches with the same teacher, the second waits and reuses it.
    with FileLock(folder / ".lock"):
        if not card_file.exists():
            decoded = training_splits(splits, root)
            fitted = fit_teacher(recipe, decoded, root, folder, device, progress or (lambda metrics: True))
            save_student(fitted.network, weights)
            start = "" if settings.start_from is None else f" from {settings.start_from}"
            card = _card(recipe, fitted.network, decoded, fitted.score, f"fitted {settings.network}{start}")
            card = replace(card, reason=fitted.reason)
            write_text(folder / "recipe.yaml", recipe.to_yaml())
            write_text(card_file, card.to_json())
            for name in (*CHECKPOINTS, *FIT_FILES):
                (folder / name).unlink(missing_ok=True)
            mirror.close()
            return PreparedTeacher(settings, weights, card, fitted=True)
    card = parse(TeacherCard, read_json(card_file))
    if weights_hash(open_prepared(recipe, weights, splits.num_classes).network) != card.weights:
        raise CheckpointError(f"{weights}: is damaged (its content does not match teacher.json); delete {folder}")
    return PreparedTeacher(settings, weights, card)


def _card(recipe: Recipe, network: AnyNetwork, splits: Splits, score: float, source: str) -> TeacherCard:
    return TeacherCard(
        network=recipe.teacher.network,
        options=dict(recipe.teacher.options),
        num_classes=network.spec.num_classes,
        image_size=network.spec.image_size,
        weights=weights_hash(network),
        metric=score_of(recipe.task),
        val_score=score,
        source=source,
        **vars(diagnose(network, splits, default_device())),
    )
