"""Fit, verify or open the teachers of an experiment."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import cast

from filelock import FileLock

from heterokd.config.experiment import Experiment
from heterokd.config.networks import TeacherSettings
from heterokd.config.recipe import Recipe
from heterokd.datasets.io.loaders import open_split
from heterokd.datasets.io.split import Splits
from heterokd.errors import CheckpointError, StudyError
from heterokd.networks.combined import CombinedNetwork
from heterokd.networks.network import AnyNetwork
from heterokd.networks.weights import weights_hash
from heterokd.storage.files import read_json, write_text
from heterokd.storage.teacher_card import TeacherCard
from heterokd.storage.typed_json import parse
from heterokd.storage.workspace import Workspace
from heterokd.teachers.fit_into import TEMPORARY, FitInto, Fold, describe_teacher, fit_into
from heterokd.teachers.folders import (
    CARD,
    WEIGHTS,
    combined_folder,
    fold_recipe,
    is_given,
    teacher_folder,
    teacher_recipe,
)
from heterokd.teachers.given import GivenWeights, given_weights, with_local_weights
from heterokd.training.data import open_splits, training_splits
from heterokd.training.evaluation import evaluate
from heterokd.training.folds import Folds, folds_of
from heterokd.training.precision import default_device
from heterokd.training.student import build_configured, save_student
from heterokd.training.task_modules import build_task
from heterokd.training.teacher import LiveTeacher, open_teacher
from heterokd.training.teacher_views import TeacherViews, teacher_views
from heterokd.training.train import Metrics, Report

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
    experiment: Experiment, root: Workspace, progress: TeacherReport | None = None, fit: FitInto = fit_into
) -> dict[str, PreparedTeacher]:
    """Fit or verify every teacher of an experiment, see `prepare_teacher`; by network, in the experiment's order.

    Raises:
        CheckpointError: see `prepare_teacher`.
    """

    return {
        network: _prepared(experiment.for_teacher(network), root, progress, fit)
        for network in experiment.teacher.networks
    }


def prepare_teacher(
    experiment: Experiment, root: Workspace, progress: Report | None = None, fit: FitInto = fit_into
) -> PreparedTeacher:
    """Fit the (first) teacher of an experiment, or verify a given teacher; on a GPU if available.

    A fitted teacher is stored under `teachers/` and reused by hash. The fit uses all training images, whatever
    `data.labels_per_class` is. The members of an ensemble and the folds of a cross-fitted teacher are prepared in turn,
    each stored as a single teacher, and then written to a file together.

    Args:
        experiment: experiment with the `teacher` section.
        root: workspace.
        progress: called with the metrics of each epoch of the fit; False ends it.
        fit: function that fits a teacher.

    Raises:
        CheckpointError: the weights are missing, damaged, of another network or number of classes, or worse than
            `teacher.min_score`.
        DataError: there are fewer images than folds.
    """
    return _prepared(experiment, root, None if progress is None else lambda metrics, network: progress(metrics), fit)


def _prepared(experiment: Experiment, root: Workspace, progress: TeacherReport | None, fit: FitInto) -> PreparedTeacher:
    settings = experiment.teacher.settings_of()
    prepare = _combined_teacher if settings.is_combined else _single_teacher
    prepared = prepare(experiment, root, progress, fit)
    card = prepared.card
    for remark in card.remarks():
        logger.warning("teacher %s: %s", card.network, remark)
    if settings.min_score is not None and card.val_score < settings.min_score:
        raise CheckpointError(
            f"teacher: {card.source} reaches {card.metric} {card.val_score:.4f}, teacher.min_score requires "
            f"{settings.min_score:.4f}; raise teacher.training.epochs or lower teacher.min_score"
        )
    return prepared


def _single_teacher(
    experiment: Experiment, root: Workspace, progress: TeacherReport | None, fit: FitInto
) -> PreparedTeacher:
    recipe = teacher_recipe(experiment)
    asked, splits = recipe.teacher, open_splits(recipe.data)
    recipe, sentence = with_local_weights(recipe, splits, root)
    settings = recipe.teacher
    if sentence is not None:
        logger.warning(sentence)
    if asked.checkpoint is not None and settings.checkpoint is not None:
        given = given_weights(recipe, splits, root, asked.checkpoint)
        return PreparedTeacher(asked, given.file, _verify(recipe, splits, given))
    if is_given(settings, splits):
        return PreparedTeacher(asked, None, _verify(recipe, splits))
    return _fitted_teacher(recipe, splits, root, _report_of(progress, settings.network), fit)


def _report_of(progress: TeacherReport | None, name: str) -> Report:
    return lambda metrics: progress is None or progress(metrics, name)


def ready_teacher(experiment: Experiment, root: Workspace) -> tuple[bool, Path | None]:
    """Return whether the (first) teacher exists, and its weights' file (None: timm's weights, or not fitted yet).

    Raises:
        OSError: the store of the workspace does not answer.
    """
    if experiment.teacher.settings_of().is_combined:
        folder = combined_folder(experiment, root)
        root.mirror(folder).fetch(without=TEMPORARY)
        is_fitted = (folder / CARD).exists()
        return is_fitted, folder / WEIGHTS if is_fitted else None
    recipe = teacher_recipe(experiment)
    asked, splits = recipe.teacher.checkpoint, open_splits(recipe.data)
    recipe, _ = with_local_weights(recipe, splits, root)
    if asked is not None and recipe.teacher.checkpoint is not None:
        return True, given_weights(recipe, splits, root, asked).file
    if is_given(recipe.teacher, splits):
        return True, None
    folder = teacher_folder(recipe, splits, root)
    root.mirror(folder).fetch(without=TEMPORARY)
    is_fitted = (folder / CARD).exists()
    return is_fitted, folder / WEIGHTS if is_fitted else None


def open_prepared(
    recipe: Recipe, prepared_weights: Path | None, num_classes: int, root: Workspace | None = None
) -> LiveTeacher:
    """Open the teacher of a recipe, once per process; `root`: see `teacher_views`."""
    live = _teacher(recipe.teacher.model_dump_json(), num_classes, recipe.teacher_size, prepared_weights)
    views, folds = teacher_views(recipe, root), folds_of(recipe)
    return live if views is None and folds is None else _with_views(live, views, folds)


@lru_cache(maxsize=8)
def _with_views(live: LiveTeacher, views: TeacherViews | None, folds: Folds | None) -> LiveTeacher:
    """Return the teacher with its views; the network is shared, because confirmations have views of several seeds."""
    return LiveTeacher(live.network, views, folds)


@lru_cache(maxsize=8)
def _teacher(settings: str, num_classes: int, image_size: int, weights: Path | None) -> LiveTeacher:
    return open_teacher(TeacherSettings.model_validate_json(settings), num_classes, image_size, weights)


def _verify(recipe: Recipe, splits: Splits, given: GivenWeights | None = None) -> TeacherCard:
    """Open a given or published teacher and measure it on val."""
    source = "timm's published weights" if given is None else given.source
    card = _measured(recipe, splits, None if given is None else given.file, source)
    return card if given is None else replace(card, notes=given.notes)


def _measured(recipe: Recipe, splits: Splits, weights: Path | None, source: str) -> TeacherCard:
    """Measure a teacher on val; `weights` and `source`: its file and its origin.

    Raises:
        CheckpointError: the weights are damaged or of another network.
    """
    device = default_device()
    network = open_prepared(recipe, weights, splits.num_classes).network
    task = build_task(recipe.task, splits.num_classes, inference=recipe.data.inference)
    val = open_split(splits.val, splits.num_classes)
    metrics = _on_val(evaluate(network.to(device), val, task, device=device))
    return describe_teacher(recipe, network, splits, metrics, source, device)


def _on_val(metrics: Iterable[tuple[str, float]]) -> dict[str, float]:
    return {f"val/{name}": value for name, value in metrics}


def _stored_teacher(recipe: Recipe, splits: Splits, folder: Path, source: str) -> PreparedTeacher:
    """Open a teacher that is in its folder; a damaged teacher.json is measured again.

    Raises:
        CheckpointError: the weights are damaged.
    """
    weights, file = folder / WEIGHTS, folder / CARD
    try:
        card = parse(TeacherCard, read_json(file))
    except (StudyError, ValueError):
        logger.warning("%s: is damaged; the teacher is measured, and the file is written again", file)
        card = _measured(recipe, splits, weights, source)
        write_text(file, card.to_json())
    if weights_hash(open_prepared(recipe, weights, splits.num_classes).network) != card.weights:
        raise CheckpointError(
            f"{weights}: is damaged (its content does not match teacher.json); move {folder} away, and the teacher is "
            "fitted again"
        )
    return PreparedTeacher(recipe.teacher, weights, card)


def _fitted_teacher(recipe: Recipe, splits: Splits, root: Workspace, report: Report, fit: FitInto) -> PreparedTeacher:
    settings, folder = recipe.teacher, teacher_folder(recipe, splits, root)
    folder.mkdir(parents=True, exist_ok=True)
    mirror = root.mirror(folder)
    weights, card_file = folder / WEIGHTS, folder / CARD
    source = f"fitted {settings.network}" + ("" if settings.start_from is None else f" from {settings.start_from}")
    # Of two concurrent searches with the same teacher, the second waits and reuses it.
    with FileLock(folder / ".lock"):
        mirror.fetch(without=TEMPORARY)
        if not card_file.exists():
            mirror.fetch()  # of a fit that was interrupted, perhaps on another node
            try:
                mirror.push()
                mirror.follow()
                fit(recipe, folder, root, report)
            except BaseException:
                mirror.pause()
                raise
            mirror.close(skip=TEMPORARY)
            mirror.remove(TEMPORARY)
            return PreparedTeacher(settings, weights, parse(TeacherCard, read_json(card_file)), fitted=True)
    return _stored_teacher(recipe, splits, folder, source)


def _combined_teacher(
    experiment: Experiment, root: Workspace, progress: TeacherReport | None, fit: FitInto
) -> PreparedTeacher:
    """Prepare the members of an ensemble, or the folds of a cross-fitted teacher, and write them to a file."""
    recipe = teacher_recipe(experiment)
    settings, splits, device = recipe.teacher, open_splits(recipe.data), default_device()
    folder = combined_folder(experiment, root)
    folder.mkdir(parents=True, exist_ok=True)
    mirror = root.mirror(folder)
    mirror.fetch(without=TEMPORARY)
    weights, card_file = folder / WEIGHTS, folder / CARD
    source, reason = _combination(settings)
    with FileLock(folder / ".lock"):
        if not card_file.exists():
            splits = training_splits(splits, root, recipe.data.pixels_max_gb)
            if settings.cross_fit is not None:
                parts = _prepared_folds(experiment, root, progress, fit)
            else:
                parts = [_prepared(member, root, progress, fit) for member in experiment.member_experiments]
            whole = build_configured(settings, splits.num_classes, recipe.data.image_size)
            assert isinstance(whole, CombinedNetwork)
            for member, part in zip(whole.members, parts, strict=True):
                part_of = recipe.model_copy(update={"teacher": part.settings})
                opened = open_prepared(part_of, part.weights, splits.num_classes).network
                cast(AnyNetwork, member).body.load_state_dict(opened.body.state_dict())
            save_student(whole, weights)
            task = build_task(recipe.task, splits.num_classes, inference=recipe.data.inference)
            val = open_split(splits.val, splits.num_classes)
            metrics = _on_val(evaluate(whole.eval().to(device), val, task, device=device))
            card = describe_teacher(recipe, whole, splits, metrics, source, device)
            members = tuple(f"{part.card.network} {part.card.val_score:.4f}" for part in parts)
            write_text(card_file, replace(card, reason=reason, members=members).to_json())
            mirror.close()
            return PreparedTeacher(settings, weights, card=parse(TeacherCard, read_json(card_file)), fitted=True)
    return _stored_teacher(recipe, splits, folder, source)


def _combination(settings: TeacherSettings) -> tuple[str, str]:
    """Say what answers together, and how."""
    if settings.cross_fit is None:
        return (
            f"{len(settings.ensemble)} networks",
            f"the mean of {len(settings.ensemble)} networks' {settings.average}",
        )
    return (
        f"cross-fitted {settings.network}",
        f"{settings.cross_fit} teachers, each fitted without a part of the training images, which it answers; others "
        "get the mean of their probabilities",
    )


def _prepared_folds(
    experiment: Experiment, root: Workspace, progress: TeacherReport | None, fit: FitInto
) -> list[PreparedTeacher]:
    """Fit a teacher without each fold, or reuse it: an interrupted search goes on with the fold that it was in."""
    recipe, folds = fold_recipe(experiment, root)
    splits, count, network = (
        training_splits(open_splits(recipe.data), root, recipe.data.pixels_max_gb),
        len(folds),
        recipe.teacher.network,
    )
    seed = recipe.teacher.training.seed
    return [
        _fitted_teacher(
            recipe,
            splits.without_fold(fold, count, seed),
            root,
            _report_of(progress, f"{network}, fold {fold + 1} of {count}"),
            partial(fit, fold=Fold(fold, count, seed)),
        )
        for fold in folds
    ]
