"""TeacherViews: what a teacher sees if its image size differs from the student's.

A view is a pure function of (policy, seed, index, view), in shares of the image. So it is drawn once, and rendered for
the teacher from the same file, decoded at the teacher's size: the same crop, flip and colours at another resolution. In
segmentation, images cover the same part of the canvas, so small ones are enlarged for a larger teacher.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from heterokd.config.data import DataSettings
from heterokd.config.data_sizes import data_at
from heterokd.config.recipe import Recipe
from heterokd.datasets.io.loaders import EvalLoader, TrainLoader, open_split
from heterokd.datasets.io.split import Splits
from heterokd.datasets.views.policy import AugmentPolicy, ViewSpec
from heterokd.errors import DataError
from heterokd.outputs import Batch
from heterokd.storage.workspace import Workspace
from heterokd.training.data import open_splits, training_splits


class TeacherViews:
    """Views and plain images at the teacher's size.

    Args:
        splits: the data set at the teacher's size, with the same images in the same order as the student's.
        views: policy and seed of the views.
    """

    def __init__(self, splits: Splits, views: ViewSpec) -> None:
        self.splits, self.views = splits, views
        self._loaders: dict[torch.device, TrainLoader] = {}

    def of(self, batch: Batch) -> Tensor:
        """Return the views of a batch of training images, [B, 3, S, S] or crops, on the batch's device.

        Raises:
            DataError: the batch does not say which views it holds.
        """
        if batch.shown is None:
            raise DataError("a teacher with teacher.image_size needs the index and view of each image (Batch.shown)")
        device = batch.images.device
        if device not in self._loaders:
            classes = self.splits.num_classes
            self._loaders[device] = TrainLoader(self.splits.seen, self.views, 1, num_classes=classes, device=device)
        index, view = batch.shown.numpy().T
        return self._loaders[device].views_of(index, view).images

    def plain(self, loader: EvalLoader, device: torch.device | str) -> EvalLoader:
        """Return a loader of the same plain images at the teacher's size."""
        split = {each.name: each for each in (self.splits.train, self.splits.val, self.splits.test)}[loader.split.name]
        return open_split(split, self.splits.num_classes, loader.batch_size, device=device)


def teacher_views(recipe: Recipe, root: Workspace | None = None) -> TeacherViews | None:
    """Return the views of a recipe's teacher, once per process; None if it sees those of the student.

    Args:
        recipe: the training.
        root: workspace in which decoded images are shared by processes; None: they are decoded in this process.
    """
    if recipe.teacher_size == recipe.data.image_size:
        return None
    data = data_at(recipe.data, recipe.teacher_size)
    return _views(data.model_dump_json(), recipe.data.policy, recipe.training.seed, root)


@lru_cache(maxsize=8)
def _views(data: str, policy: AugmentPolicy, seed: int, root: Workspace | None) -> TeacherViews:
    settings = DataSettings.model_validate_json(data)
    splits = open_splits(settings)
    views = ViewSpec(policy, seed, crop=settings.view_crop, fill=settings.fill)
    return TeacherViews(splits if root is None else training_splits(splits, root, settings.pixels_max_gb), views)
