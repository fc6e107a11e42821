"""Data sets and loaders of a training, opened once per process."""

from __future__ import annotations

from functools import lru_cache

import torch

import heterokd.distributed as distributed
from heterokd.config.data import DataSettings
from heterokd.config.recipe import Recipe
from heterokd.config.training import TrainingSettings
from heterokd.datasets import load_dataset
from heterokd.datasets.io.draws import Draws, make_draws
from heterokd.datasets.io.loaders import Loaders, Worker, make_loaders
from heterokd.datasets.io.shared_pixels import share_splits
from heterokd.datasets.io.split import Splits
from heterokd.datasets.views.policy import ViewSpec
from heterokd.errors import ConfigError, DataError, HeterokdError
from heterokd.storage.workspace import Workspace


def open_splits(settings: DataSettings) -> Splits:
    """Open the splits that `settings` describe, once per process.

    Raises:
        DataError: missing or damaged files; a class with too few images.
    """
    return _splits(settings.model_dump_json(exclude={"augment", "crop", "evaluation"}))


@lru_cache(maxsize=8)
def _splits(data: str) -> Splits:
    settings = DataSettings.model_validate_json(data)
    try:
        return load_dataset(
            settings.dataset_class,
            root=settings.root,
            image_size=settings.image_size,
            seed=settings.seed,
            labels_per_class=settings.labels_per_class,
            train_images=settings.train_images,
            options=settings.options,
        )
    except Exception as error:
        if settings.extension is None or isinstance(error, HeterokdError):
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        extension = settings.extension
        raise DataError(f"{extension.file}: {extension.class_name} cannot load its images ({reason})") from error


@lru_cache(maxsize=4)
def training_splits(splits: Splits, root: Workspace) -> Splits:
    """Return the splits with images in files decoded once per machine and shared by its processes.

    Raises:
        DataError: an image is damaged or missing.
    """
    return share_splits(root.pixels, splits)


def recipe_loaders(recipe: Recipe, splits: Splits, device: torch.device | str = "cpu") -> Loaders:
    """Make the loaders of a recipe on a device: this rank's shard of the training views, and the validation images.

    Raises:
        ConfigError: a rank has fewer images per step than `training.accumulate`.
    """
    training = recipe.training
    images = min(training.batch_size, len(splits.train)) // distributed.size()
    if distributed.size() > 1 and images < training.accumulate:
        raise ConfigError(
            f"training.accumulate: {images} images of a worker cannot be split into {training.accumulate} parts; lower "
            "it, or training.workers"
        )
    views = ViewSpec(recipe.data.policy, training.seed, recipe.views, recipe.data.view_crop, fill=recipe.data.fill)
    worker = Worker(distributed.rank(), distributed.size())
    return make_loaders(
        splits, views, training.batch_size, worker=worker, device=device, draws=recipe_draws(training, splits)
    )


def recipe_draws(training: TrainingSettings, splits: Splits) -> Draws:
    """Return the images that each epoch of a training draws, and their weights.

    Raises:
        DataError: `class_weights` names a class that does not exist, or gives every training image the weight 0.
    """
    return make_draws(splits.train, splits.class_names, training.sampling, training.class_weights)
