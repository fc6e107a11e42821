"""Where the teachers of an experiment lie: their recipes, and the folders that are named by hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from heterokd.config.data_sizes import data_at
from heterokd.config.experiment import Experiment
from heterokd.config.networks import NetworkSettings, TeacherSettings
from heterokd.config.recipe import Recipe
from heterokd.config.services import CachingSettings
from heterokd.config.training import TrainingSettings
from heterokd.datasets.io.split import Splits
from heterokd.methods import BASELINE
from heterokd.networks.bodies import published_classes
from heterokd.networks.weights import file_digest
from heterokd.storage.files import read_derived
from heterokd.storage.workspace import CHECKPOINTS, Workspace
from heterokd.teachers.given import with_local_weights
from heterokd.training.data import ALL_LABELS, open_splits
from heterokd.training.teacher import FIRST_FIT, teacher_hash

CARD = "teacher.json"
"""File in a teacher's folder, written last."""
WEIGHTS = "teacher.safetensors"


def teacher_recipe(experiment: Experiment) -> Recipe:
    """Return the recipe that fits an experiment's (first) teacher on all training images."""
    settings = experiment.teacher.settings_of()
    return Recipe(
        name=f"{experiment.name}-teacher",
        data=data_at(experiment.data, experiment.teacher_size).model_copy(update=ALL_LABELS),
        teacher=settings,
        student=NetworkSettings.model_validate(settings.model_dump(include=set(NetworkSettings.model_fields))),
        method=BASELINE,
        params={},
        training=TrainingSettings.model_validate(settings.training.model_dump()),
        cache=CachingSettings(enabled=False),
    )


def is_given(settings: TeacherSettings, splits: Splits) -> bool:
    """Whether the teacher has weights already: a checkpoint, or timm's weights for as many classes as the data has."""
    return settings.checkpoint is not None or (
        settings.pretrained and published_classes(settings.network) == splits.num_classes
    )


def teacher_folder(recipe: Recipe, splits: Splits, root: Workspace) -> Path:
    """Return a teacher's folder; with `fit: auto`, that of a version without the key `teacher.fit` if it exists."""
    folder = root.teachers / teacher_hash(recipe.teacher, recipe, splits.fingerprint)
    if recipe.teacher.fit == "auto" and not (folder / CARD).exists():
        whole = recipe.teacher.model_copy(update={"fit": FIRST_FIT})
        older = root.teachers / teacher_hash(whole, recipe, splits.fingerprint)
        root.mirror(older).fetch(without=CHECKPOINTS)
        if (older / CARD).exists() and "reason" not in read_derived(older / CARD):
            return older
    return folder


def fold_recipe(experiment: Experiment, root: Workspace) -> tuple[Recipe, range]:
    """Return the recipe that fits a cross-fitted teacher without a fold, and the numbers of the folds."""
    (member,), count = experiment.member_experiments, experiment.teacher.cross_fit
    assert count is not None  # see `TeacherSettings.members`
    recipe = teacher_recipe(member)
    return with_local_weights(recipe, open_splits(recipe.data), root)[0], range(count)


def missing_folds(experiment: Experiment, root: Workspace) -> int:
    """Return the number of folds of a cross-fitted teacher that are not fitted yet."""
    recipe, folds = fold_recipe(experiment, root)
    splits, seed = open_splits(recipe.data), recipe.teacher.training.seed
    parts = [splits.without_fold(fold, len(folds), seed) for fold in folds]
    return sum(not (teacher_folder(recipe, part, root) / CARD).exists() for part in parts)


def combined_folder(experiment: Experiment, root: Workspace) -> Path:
    """Return the folder of an ensemble or a cross-fitted teacher: 16 digits over everything that decides its members.

    Raises:
        CheckpointError: a file of weights is missing, damaged or of another network.
    """
    settings = experiment.teacher.settings_of()
    members: list[object] = []
    for member in experiment.member_experiments:
        recipe = teacher_recipe(member)
        splits = open_splits(recipe.data)
        recipe, _ = with_local_weights(recipe, splits, root)
        single = recipe.teacher
        if single.checkpoint is not None:
            members.append([single.network, single.options, file_digest(single.checkpoint)])
        elif is_given(single, splits) and settings.cross_fit is None:
            members.append([single.network, single.options, "published"])
        else:
            members.append(teacher_hash(single, recipe, splits.fingerprint))
    content = [settings.options, settings.average, members]
    text = json.dumps(content, sort_keys=True, default=str)
    return root.teachers / f"combined-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
