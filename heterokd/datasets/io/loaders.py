"""Loaders of augmented and plain images, in a seeded order, sharded over workers.

The order of an epoch and the view of every image are pure functions of (seed, epoch). So resuming needs no stored
state, and the global batches are the same for any number of workers; each worker takes a slice of each batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heterokd.datasets.io.device_pixels import Chosen, SplitPixels
from heterokd.datasets.io.draws import Draws, make_draws
from heterokd.datasets.io.image_files import are_photos
from heterokd.datasets.io.images import image_shape
from heterokd.datasets.io.split import Split, Splits
from heterokd.datasets.views.color import plain_images
from heterokd.datasets.views.geometry import photo_crops
from heterokd.datasets.views.mixing import draw_mix, mix_labels, mix_views
from heterokd.datasets.views.padding import beyond_images, pixel_bounds, without_colour
from heterokd.datasets.views.policy import ViewSpec
from heterokd.datasets.views.random import STREAM_TURN, philox_key, random_words, view_draws
from heterokd.datasets.views.render import view_images, view_scenes
from heterokd.errors import DataError
from heterokd.outputs import Batch

# Default number of images of an evaluation step: without gradients, memory is no limit.
EVAL_BATCH = 256
# Maximum number of scores of an evaluation step in segmentation, which has a score for every class and pixel.
EVAL_SCORES = 2**26


@dataclass(frozen=True)
class Worker:
    """Rank of a worker, from 0, and the number of workers of a sharded training."""

    rank: int = 0
    world_size: int = 1


SINGLE = Worker()


class TrainLoader:
    """Views of a split's images, in a new order every epoch.

    An epoch has only full batches; a split smaller than `batch_size` is a single batch. The t-th draw of an image, see
    `heterokd.datasets.io.draws`, shows view t. With `views.views=K`, each run of K draws shows the K views of an image
    once: in the first run views 0 to K - 1, later each image starts at another view number, so that an epoch mixes view
    numbers.

    Args:
        split: images; `Batch.index` is the position in this split.
        views: augmentation policy, seed of order and views, number of views, crop.
        batch_size: number of images of a step over all workers, which share them nearly equally.
        num_classes: K of the data set; needed only if the policy mixes images.
        worker: the worker whose slices are loaded.
        device: device of the batches.
        draws: images that an epoch draws, and their weights; None: each once, with equal weights.

    Raises:
        DataError: the split has too few images for one step, `batch_size` is smaller than the number of workers, or the
            policy mixes images and the number of classes is unknown.
    """

    # What an epoch is, and where it goes: a parameter object would be read here alone.
    def __init__(
        self,
        split: Split,
        views: ViewSpec,
        batch_size: int,
        *,
        num_classes: int | None = None,
        worker: Worker = SINGLE,
        device: torch.device | str = "cpu",
        draws: Draws | None = None,
    ) -> None:
        if batch_size < worker.world_size:
            raise DataError(f"training.batch_size: {batch_size} images are too few for {worker.world_size} workers")
        if views.views is not None and views.views < 1:
            raise DataError(f"an image needs at least one view, got views={views.views}")
        if views.policy.mixes and (num_classes is None or split.label_maps is not None):
            raise DataError(
                "mixup and cutmix make shares of classes: they need the number of classes (num_classes) "
                "and images without label maps"
            )
        if len(split) < worker.world_size:  # a worker without an image would stop the others
            raise DataError(
                f"the {split.name} split has {len(split)} images, too few for one batch of {batch_size} over "
                f"{worker.world_size} worker(s); lower training.batch_size or training.workers"
            )
        self.split, self.views, self.batch_size = split, views, batch_size
        self.num_classes, self.worker = num_classes, worker
        self.draws = Draws(split.labels) if draws is None else draws
        self._weights, mixture = self.draws.batch_weights, self.draws.mixture
        self._share_with_labels = 1.0 if mixture is None else 1 - mixture.part / mixture.batch
        self._pixels = SplitPixels(split, device)
        self._cuts_photos = are_photos(split.images) and views.policy.warps

    def __len__(self) -> int:
        return max(1, len(self.split) // self.batch_size)

    @property
    def images_per_epoch(self) -> int:
        """Number of images of an epoch, over all workers."""
        return len(self) * self.images(0)

    def images(self, step: int) -> int:
        """Return the number of images of a step, over all workers."""
        return min(self.batch_size, len(self.split) - step * self.batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield this worker's batches of an epoch, counted from 0."""
        drawn = np.stack(self.draws.epoch(epoch, self.views.seed))
        shares = [self._share(drawn[:, step * self.batch_size :][:, : self.batch_size]) for step in range(len(self))]
        chosen = (self._chosen(index, self.view_numbers(index, turn)) for index, turn in shares)
        for views, pixels, maps in self._pixels.batches(chosen):
            yield self._batch(views, pixels, maps)

    def views_of(self, index: NDArray[np.int64], view: NDArray[np.int64]) -> Batch:
        """Build a batch of the given images [B] with the given view numbers [B]."""
        views = self._chosen(index, view)
        return self._batch(views, *self._pixels.at(views))

    def view_numbers(self, index: NDArray[np.int64], turn: NDArray[np.int64] | int) -> NDArray[np.int64]:
        """Return the view number [B] of each image at its turn, the number of its earlier draws."""
        turns = np.broadcast_to(np.asarray(turn, np.int64), len(index))
        count = self.views.views
        if count is None or (turns < count).all():
            return turns.copy()
        words = random_words(philox_key("turn", self.views.seed), STREAM_TURN, index, turns // count)
        return np.where(turns < count, turns, (words[:, 0].astype(np.int64) + turns) % count)

    def _share(self, drawn: NDArray[np.int64]) -> NDArray[np.int64]:
        rank, world_size, count = self.worker.rank, self.worker.world_size, drawn.shape[1]
        return drawn[:, count * rank // world_size : count * (rank + 1) // world_size]

    def _chosen(self, index: NDArray[np.int64], view: NDArray[np.int64]) -> Chosen:
        policy, seed = self.views.policy, self.views.seed
        mix = draw_mix(policy, index, view, len(self.split), seed, self.split.unlabelled) if policy.mixes else None
        if not self._cuts_photos:
            return Chosen(index, view, mix)
        # The partners' crops are drawn with those of the views.
        both = (index, view) if mix is None else (np.append(index, mix.index), np.append(view, mix.view))
        return Chosen(index, view, mix, photo_crops(policy, view_draws(policy, seed, *both)))

    def _batch(self, chosen: Chosen, pixels: Tensor, maps: Tensor | None) -> Batch:
        index, view, mix = chosen.index, chosen.view, chosen.mix
        policy, seed, weights = self.views.policy, self.views.seed, self._weights
        assert view is not None  # set by `_chosen`
        if maps is not None:
            size = self.views.crop or (maps.shape[1], maps.shape[2])
            extents = None if self.split.extents is None else self.split.extents.read(index)
            images, maps = view_scenes(pixels, maps, index, view, policy, size, seed, self.views.fill, extents)
            return self._pixels.batch(images, index, view, maps)
        if mix is None:
            images = view_images(pixels, index, view, policy, seed, is_cropped=self._cuts_photos)
            return self._marked(
                self._pixels.batch(images, index, view, weights=None if weights is None else weights[index])
            )
        # The views and their partners are rendered together.
        numbers = np.concatenate((view, mix.view))
        both = view_images(pixels, chosen.positions, numbers, policy, seed, is_cropped=self._cuts_photos)
        images, share = mix_views(both[: len(index)], both[len(index) :], mix)
        labels = self.split.labels
        if weights is not None:
            weights = (share * weights[index] + (1 - share) * weights[mix.index]).astype(np.float32)
        assert self.num_classes is not None  # checked by `__init__`
        shares = mix_labels(labels[index], labels[mix.index], share, self.num_classes)
        return self._marked(self._pixels.batch(images, index, view, shares, weights))

    def _marked(self, batch: Batch) -> Batch:
        """Mark the images that have a label, if others have none."""
        if self._share_with_labels == 1.0 or batch.shown is None:
            return batch
        labelled = batch.shown[:, 0] < len(self.split) - self.split.unlabelled
        return replace(batch, labelled=labelled, labelled_share=self._share_with_labels)


class EvalLoader:
    """Plain images of a split, in order, each once.

    Args:
        split: images; `Batch.index` is the position in this split.
        batch_size: number of images of a step; the last step may have fewer.
        device: device of the batches.
        counted: whether the batches hold label maps at their own sizes, if the split has them.
    """

    def __init__(
        self, split: Split, batch_size: int, *, device: torch.device | str = "cpu", counted: bool = False
    ) -> None:
        self.split, self.batch_size = split, batch_size
        self._own_labels = split.own_labels if counted else None
        self._pixels = SplitPixels(split, device)

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        everything = np.arange(len(self.split))
        steps = (Chosen(everything[step * self.batch_size :][: self.batch_size]) for step in range(len(self)))
        for chosen, pixels, maps in self._pixels.batches(steps):
            images, extents = plain_images(pixels), None
            if self.split.extents is not None:
                height, width = images.shape[2:]
                extents = self.split.extents.read(chosen.index)
                bounds = pixel_bounds(extents, width, np.zeros(0, np.int64))
                images = without_colour(images, beyond_images(bounds, (height, width), images.device))
            batch = self._pixels.batch(images, chosen.index, None, maps)
            if extents is not None:
                batch = replace(batch, extents=torch.from_numpy(extents))
            if self._own_labels is not None:
                own = (self._own_labels.read(position) for position in chosen.index.tolist())
                batch = replace(batch, own_labels=tuple(map(torch.from_numpy, own)))
            yield batch


@dataclass(frozen=True, eq=False)
class Loaders:
    """Loaders of a training: views of the training images, plain validation images, never test.

    Attributes:
        train: views of the training images.
        val: validation images.
        num_classes: K.
        class_names: name of each class number; empty: unknown.
        pixel_weights: [K] weights of the classes of label maps in the task loss; None: all are 1.
    """

    train: TrainLoader
    val: EvalLoader
    num_classes: int
    class_names: tuple[str, ...] = ()
    pixel_weights: NDArray[np.float32] | None = None


def make_loaders(
    splits: Splits,
    views: ViewSpec,
    batch_size: int,
    *,
    worker: Worker = SINGLE,
    device: torch.device | str = "cpu",
    draws: Draws | None = None,
) -> Loaders:
    """Create loaders of train and val; see `TrainLoader`. Every worker gets all of val.

    Raises:
        DataError: train has too few images for one step, or `batch_size` is smaller than the number of workers.
    """
    classes = splits.num_classes
    draws = make_draws(splits.train, splits.class_names) if draws is None else draws
    train = TrainLoader(splits.seen, views, batch_size, num_classes=classes, worker=worker, device=device, draws=draws)
    val = open_split(splits.val, classes, max(batch_size, EVAL_BATCH), device=device)
    return Loaders(train, val, classes, splits.class_names)


def open_split(
    split: Split, num_classes: int, batch_size: int = EVAL_BATCH, *, device: torch.device | str = "cpu"
) -> EvalLoader:
    """Create a loader of plain images, with small steps in segmentation, whose scores take much memory."""
    if split.label_maps is not None and len(split):
        pixels = math.prod(image_shape(split.label_maps))
        batch_size = max(1, min(batch_size, EVAL_SCORES // (num_classes * pixels)))
    return EvalLoader(split, batch_size, device=device, counted=True)


def open_test(splits: Splits) -> EvalLoader:
    """Create the loader of the test split, for promotion only."""
    return open_split(splits.test, splits.num_classes)
