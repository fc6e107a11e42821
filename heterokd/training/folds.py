"""Folds of a cross-fitted teacher: which of its members has not seen a training image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from heterokd.config.data import DataSettings
from heterokd.config.recipe import Recipe
from heterokd.training.data import ALL_LABELS, open_splits


@dataclass(frozen=True, eq=False)
class Folds:
    """The fold of each training image.

    Attributes:
        of_image: [N] fold numbers; the member with this number was fitted without the image.
    """

    of_image: NDArray[np.int64]


def folds_of(recipe: Recipe) -> Folds | None:
    """Return the folds of a recipe's training images, once per process; None if its teacher is not cross-fitted.

    Folds divide all training images, whatever `data.labels_per_class` and `data.train_images` keep of them. No member
    has seen the images of a folder without labels, which are divided evenly.
    """
    teacher = recipe.teacher
    if teacher.cross_fit is None:
        return None
    return _folds(recipe.data.model_dump_json(), teacher.cross_fit, teacher.training.seed)


@lru_cache(maxsize=8)
def _folds(data: str, count: int, seed: int) -> Folds:
    settings = DataSettings.model_validate_json(data)
    whole = open_splits(settings.model_copy(update=ALL_LABELS))
    fold_of, splits = whole.folds(count, seed), open_splits(settings)
    folds = fold_of if splits.train.kept is None else fold_of[splits.train.kept]
    if splits.unlabelled is None:
        return Folds(folds)
    kept = splits.unlabelled.kept
    others = np.arange(len(splits.unlabelled)) % count if kept is None else fold_of[kept]
    return Folds(np.concatenate((folds, others)))
