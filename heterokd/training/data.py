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
from heterokd.datasets.io.draws import Draws, check_class_names, make_draws, make_mixture
from heterokd.datasets.io.images import ChosenImages, read_pieces
from heterokd.datasets.io.loaders import Loaders, Worker, make_loaders
from heterokd.datasets.io.shared_pixels import share_splits
from heterokd.datasets.io.split import REST, Split, Splits
from heterokd.datasets.io.stored_files import StoredFiles, stored_sources
from heterokd.datasets.io.unlabelled import with_folder, with_rest
from heterokd.datasets.views.policy import NETWORK_MEAN, ViewSpec
from heterokd.errors import ConfigError, DataError, HeterokdError
from heterokd.storage.stored_data.open_data import is_pushed, is_sharded, open_data
from heterokd.storage.workspace import Workspace
from heterokd.training.pixel_losses import pixel_weights

ALL_LABELS: dict[str, object] = {"labels_per_class": None, "train_images": None, "unlabelled": None}
"""Changes of the section `data` to that of all labelled training images, which a teacher is fitted on."""

MEASURED = 512
"""Images of a split that a plan fetches from a store to time trainings."""

LEAST_LABELLED = 2
"""Minimum number of labelled images of a forward pass, where batches mix labelled and unlabelled images: batch norms of
a method's layers need two."""


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
        if settings.evaluation_size != "label":
            val, test = (replace(split, own_labels=None) for split in (splits.val, splits.test))
            splits = replace(splits, val=val, test=test)
        if settings.fill != NETWORK_MEAN and splits.train.extents is not None:
            train, val, test = (replace(split, extents=None) for split in (splits.train, splits.val, splits.test))
            splits = replace(splits, train=train, val=val, test=test)
    except Exception as error:
        if settings.extension is None or isinstance(error, HeterokdError):
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        extension = settings.extension
        raise DataError(f"{extension.file}: {extension.class_name} cannot load its images ({reason})") from error
    folder = settings.unlabelled
    if folder is None:
        return splits
    if folder == REST:
        return with_rest(splits, open_splits(settings.model_copy(update=ALL_LABELS)).train)
    return with_folder(splits, unlabelled_store(settings) or Path(folder), settings.options)


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


def unlabelled_store(settings: DataSettings) -> StoredFiles | None:
    """Return the images without labels of a store; None for a folder, `rest`, and without any.

    Raises:
        DataError: the store refuses or does not answer.
    """
    url = settings.unlabelled
    return _stored(url, False) if isinstance(url, str) and url != REST else None


def fetch_files(splits: Splits) -> None:
    """Fetch all files of a data set in a store to this node, once for all of its processes.

    Raises:
        DataError: the store refuses, a file there is damaged, or the disk is too small.
    """
    for stored in stored_sources(splits.seen.images):
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
    if not any(stored.missing_bytes for stored in stored_sources(splits.seen.images)):
        return training_splits(splits, root, pixels_max_gb)
    others = None if splits.unlabelled is None else _repeated(splits.unlabelled)
    return replace(splits, train=_repeated(splits.train), val=_repeated(splits.val), unlabelled=others)


def _repeated(split: Split) -> Split:
    index = np.arange(len(split)) % MEASURED
    for _ in read_pieces(split.images, np.unique(index)):
        pass
    extents = None if split.extents is None else split.extents.chosen(index)
    return replace(split, images=ChosenImages(split.images, index), extents=extents)


def recipe_loaders(recipe: Recipe, splits: Splits, device: torch.device | str = "cpu") -> Loaders:
    """Make the loaders of a recipe on a device: this rank's shard of the training views, and the validation images.

    Raises:
        ConfigError: a rank has fewer images per step than `training.accumulate`.
    """
    training = recipe.training
    images = min(training.batch_size, len(splits.seen)) // distributed.size()
    if distributed.size() > 1 and images < training.accumulate:
        raise ConfigError(
            f"training.accumulate: {images} images of a worker cannot be split into {training.accumulate} parts; lower "
            "it, or training.workers"
        )
    views = ViewSpec(recipe.data.policy, training.seed, recipe.views, recipe.data.view_crop, fill=recipe.data.fill)
    worker = Worker(distributed.rank(), distributed.size())
    draws = recipe_draws(training, splits, learns_unlabelled=recipe.method_class.learns_unlabelled())
    _check_labels(draws, images // training.accumulate)
    loaders = make_loaders(splits, views, training.batch_size, worker=worker, device=device, draws=draws)
    if splits.train.label_maps is None:
        return loaders
    if isinstance(training.class_weights, dict):
        check_class_names(training.class_weights, splits.class_names, "training.class_weights")
    weights = pixel_weights(splits.train, splits.class_names, training.class_weights)
    return replace(loaders, pixel_weights=weights)


def recipe_draws(training: TrainingSettings, splits: Splits, *, learns_unlabelled: bool = False) -> Draws:
    """Return the images that each epoch of a training draws, and their weights.

    Args:
        training: section `training` of a recipe.
        splits: the data set.
        learns_unlabelled: whether the method learns from images without labels; if not, all images have labels.

    Raises:
        DataError: `class_weights` names a class that does not exist, or gives every training image the weight 0.
    """
    if splits.train.label_maps is not None or training.class_weights == "median":  # see `pixel_weights`
        return make_draws(splits.train, splits.class_names, training.sampling)
    mixture = make_mixture(splits, training.batch_size, training.unlabelled_share if learns_unlabelled else 0.0)
    return make_draws(splits.train, splits.class_names, training.sampling, training.class_weights, mixture)


def _check_labels(draws: Draws, images: int) -> None:
    """Raise ConfigError if a part of a batch may have fewer labelled images than `LEAST_LABELLED`."""
    mixture = draws.mixture
    if mixture is None or not mixture.part:
        return
    least = images * (mixture.batch - mixture.part) // mixture.batch
    if least < LEAST_LABELLED:
        raise ConfigError(
            f"training.unlabelled_share: {images} images of a worker at a time have {least} with a label, "
            f"{LEAST_LABELLED} are needed; lower it, training.workers or training.accumulate, or raise "
            "training.batch_size"
        )
