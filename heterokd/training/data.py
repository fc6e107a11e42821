"""Data sets and loaders of a training, opened once per process."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

import heterokd.distributed as distributed
from heterokd.config.data import DataSettings
from heterokd.config.recipe import Recipe
from heterokd.config.training import TrainingSettings
from heterokd.datasets import load_dataset
from heterokd.datasets.io.draws import Draws, check_class_names, make_draws
from heterokd.datasets.io.images import ChosenImages, read_pieces
from heterokd.datasets.io.loaders import Loaders, Worker, make_loaders
from heterokd.datasets.io.shared_pixels import share_splits
from heterokd.datasets.io.split import Split, Splits
from heterokd.datasets.io.stored_files import StoredFiles, stored_source
from heterokd.datasets.views.policy import ViewSpec
from heterokd.errors import ConfigError, DataError, HeterokdError
from heterokd.storage.stored_data.open_data import is_pushed, is_sharded, open_data
from heterokd.storage.workspace import Workspace
from heterokd.training.pixel_losses import pixel_weights

MEASURED = 512
"""Images of a split that a plan fetches from a store to time trainings."""


def open_splits(settings: DataSettings) -> Splits:
    """Open the splits that `settings` describe, once per process.

    Raises:
        DataError: missing or damaged files; a class with too few images.
    """
    return _splits(settings.model_dump_json(exclude={"augment", "crop", "evaluation", "test_time", "pixels_max_gb"}))


@lru_cache(maxsize=8)
def _splits(data: str) -> Splits:
    settings = DataSettings.model_validate_json(data)
    root = _root(settings)
    try:
        splits = load_dataset(
            settings.dataset_class,
            root=root,
            image_size=settings.image_size,
            seed=settings.seed,
            labels_per_class=settings.labels_per_class,
            train_images=settings.train_images,
            options=settings.options,
        )
        if settings.evaluation_size == "label":
            return splits
        val, test = (replace(split, own_labels=None) for split in (splits.val, splits.test))
        return replace(splits, val=val, test=test)
    except Exception as error:
        if settings.extension is None or isinstance(error, HeterokdError):
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        extension = settings.extension
        raise DataError(f"{extension.file}: {extension.class_name} cannot load its images ({reason})") from error


def _root(settings: DataSettings) -> Path | StoredFiles | None:
    """Return the folder of the data set, or its files in a store or in shards."""
    root, kind = settings.root, settings.dataset_class
    if root is None or not kind.needs_root:
        return root if isinstance(root, Path) else None
    if isinstance(root, str):
        return _stored(root, kind.reads_shards)
    if settings.options.table is None and root.is_dir() and (kind.reads_shards or is_pushed(root)) and is_sharded(root):
        return _stored(str(root.absolute()), kind.reads_shards)
    return root


# Kept while the process lives, as the splits are: the copy on this node is then not deleted.
@lru_cache(maxsize=8)
def _stored(url: str, may_be_shards: bool) -> StoredFiles:
    return open_data(url, may_be_shards)


def stored_data(settings: DataSettings) -> StoredFiles | None:
    """Return the files of a data set in a store or in shards; None for a folder of files.

    Raises:
        DataError: the store refuses or does not answer, or a shard is damaged.
    """
    root = _root(settings)
    return root if isinstance(root, StoredFiles) else None


def fetch_files(splits: Splits) -> None:
    """Fetch all files of a data set in a store to this node, once for all of its processes.

    Raises:
        DataError: the store refuses, a file there is damaged, or the disk is too small.
    """
    stored = stored_source(splits.train.images)
    if stored is not None:
        stored.fetch()


@lru_cache(maxsize=4)
def training_splits(splits: Splits, root: Workspace, pixels_max_gb: float = 0.0) -> Splits:
    """Return the splits with all files on this node, and their images decoded once per machine for its processes.

    `pixels_max_gb` is the key of the section `data`.

    Raises:
        DataError: an image is damaged or missing, or the files cannot be fetched.
    """
    fetch_files(splits)
    return share_splits(root.pixels, splits, pixels_max_gb * 1e9)


def measured_splits(splits: Splits, root: Workspace, pixels_max_gb: float = 0.0) -> Splits:
    """Return splits to time trainings on: of files that are still in a store, some are fetched, and read repeatedly."""
    stored = stored_source(splits.train.images)
    if stored is None or not stored.missing_bytes:
        return training_splits(splits, root, pixels_max_gb)
    return replace(splits, train=_repeated(splits.train), val=_repeated(splits.val))


def _repeated(split: Split) -> Split:
    index = np.arange(len(split)) % MEASURED
    for _ in read_pieces(split.images, np.unique(index)):
        pass
    return replace(split, images=ChosenImages(split.images, index))


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
    loaders = make_loaders(
        splits, views, training.batch_size, worker=worker, device=device, draws=recipe_draws(training, splits)
    )
    if splits.train.label_maps is None:
        return loaders
    if isinstance(training.class_weights, dict):
        check_class_names(training.class_weights, splits.class_names, "training.class_weights")
    weights = pixel_weights(splits.train, splits.class_names, training.class_weights)
    return replace(loaders, pixel_weights=weights)


def recipe_draws(training: TrainingSettings, splits: Splits) -> Draws:
    """Return the images that each epoch of a training draws, and their weights.

    Raises:
        DataError: `class_weights` names a class that does not exist, or gives every training image the weight 0.
    """
    if splits.train.label_maps is not None or training.class_weights == "median":  # see `pixel_weights`
        return make_draws(splits.train, splits.class_names, training.sampling)
    return make_draws(splits.train, splits.class_names, training.sampling, training.class_weights)
