"""Loaders of augmented and plain images, in a seeded order, sharded over workers.

The order of an epoch and the view of every image are pure functions of (seed, epoch): resuming needs no stored state,
and the global batches are the same for any number of workers; worker r takes its slice of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heterokd.datasets.io.device_pixels import Chosen, SplitPixels
from heterokd.datasets.io.split import Split, Splits
from heterokd.datasets.views.color import plain_images
from heterokd.datasets.views.mixing import draw_mix, mix_labels, mix_views
from heterokd.datasets.views.policy import AugmentPolicy
from heterokd.datasets.views.random import STREAM_TURN, permutation, philox_key, random_words
from heterokd.datasets.views.render import unmixed_views, view_images, view_scenes
from heterokd.errors import DataError
from heterokd.outputs import Batch

# Images of an evaluation step unless training takes more: no gradient is kept, so memory is no matter.
EVAL_BATCH = 256
# In segmentation an evaluation step holds a score for every class and pixel: at most this many.
EVAL_SCORES = 2**26


class TrainLoader:
    """Views of a split's images, in a new order every epoch.

    Args:
        split: the images; `Batch.index` is the position in this very split.
        policy: how views differ from their image.
        batch_size: images of a step over all workers, of which each takes nearly as many as the others.
        seed: of order and views.
        views: how many views each image has; None draws a fresh one every epoch. With `views=K`, each run of K epochs
            shows each image's K views once; in the first run they are those of `views=None`, later each image starts at
            its own place, so that an epoch mixes view numbers.
        crop: height and width of a view in segmentation, in pixels; None takes the whole canvas.
        num_classes: K of the data set, where the policy mixes images.
        drop_last: leave out a last, smaller batch; None does so when there is at least one full batch.
        rank: this worker's number.
        world_size: how many workers.
        device: where the batches lie.

    Raises:
        DataError: the split has too few images for one step, `batch_size` is less than an image for each worker, or the
            policy mixes images of which the number of classes is not known.
    """

    def __init__(
        self,
        split: Split,
        policy: AugmentPolicy,
        batch_size: int,
        seed: int = 0,
        *,
        views: int | None = None,
        crop: tuple[int, int] | None = None,
        num_classes: int | None = None,
        drop_last: bool | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < world_size:
            raise DataError(f"training.batch_size: {batch_size} images are too few for {world_size} workers")
        if views is not None and views < 1:
            raise DataError(f"an image needs at least one view, got views={views}")
        self.split, self.policy, self.batch_size, self.seed, self.views = split, policy, batch_size, seed, views
        self.rank, self.world_size, self.crop, self.num_classes = rank, world_size, crop, num_classes
        if policy.mixes and (num_classes is None or split.label_maps is not None):
            raise DataError(
                "mixup and cutmix make shares of classes: they need the number of classes (num_classes) "
                "and images without label maps"
            )
        full, rest = divmod(len(split), batch_size)
        dropped = full > 0 if drop_last is None else drop_last
        # Every worker needs an image in every step, or the others would wait for it.
        self._steps = full if dropped or rest < world_size else full + 1
        if self._steps == 0:
            raise DataError(
                f"the {split.name} split has {len(split)} images, too few for one batch of {batch_size} over "
                f"{world_size} worker(s); lower training.batch_size or training.workers"
            )
        self._pixels = SplitPixels(split, device)

    def __len__(self) -> int:
        """Return the number of steps of an epoch."""
        return self._steps

    def images(self, step: int) -> int:
        """Return the number of images of a step, over all workers."""
        return min(self.batch_size, len(self.split) - step * self.batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield this worker's batches of an epoch, counted from 0."""
        order = permutation(len(self.split), epoch, self.seed)
        shares = [self._share(order[step * self.batch_size :][: self.batch_size]) for step in range(len(self))]
        chosen = (self._chosen(share, self.view_numbers(share, epoch)) for share in shares)
        for views, pixels, maps in self._pixels.batches(chosen):
            yield self._batch(views, pixels, maps)

    def views_of(self, index: NDArray[np.int64], view: NDArray[np.int64]) -> Batch:
        """Build a batch of the given images [B] with the given view numbers [B]."""
        views = self._chosen(index, view)
        return self._batch(views, *self._pixels.at(views.positions))

    def view_numbers(self, index: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Return the view number [B] of each image in an epoch."""
        if self.views is None or epoch < self.views:
            return np.full(len(index), epoch, np.int64)
        words = random_words(philox_key("turn", self.seed), STREAM_TURN, index, epoch // self.views)
        return (words[:, 0].astype(np.int64) + epoch) % self.views

    def _share(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        start, end = (len(index) * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return index[start:end]

    def _chosen(self, index: NDArray[np.int64], view: NDArray[np.int64]) -> Chosen:
        mix = draw_mix(self.policy, index, view, len(self.split), self.seed) if self.policy.mixes else None
        return Chosen(index, view, mix)

    def _batch(self, chosen: Chosen, pixels: Tensor, maps: Tensor | None) -> Batch:
        index, view, mix = chosen.index, chosen.view, chosen.mix
        assert view is not None  # given by `_chosen`
        if maps is not None:
            size = self.crop or (maps.shape[1], maps.shape[2])
            images, maps = view_scenes(pixels, maps, index, view, self.policy, size, self.seed)
            return self._pixels.batch(images, index, view, maps)
        if mix is None:
            return self._pixels.batch(view_images(pixels, index, view, self.policy, self.seed), index, view)
        # A view and its partner are made at once.
        both = unmixed_views(pixels, chosen.positions, np.concatenate((view, mix.view)), self.policy, self.seed)
        images, share = mix_views(both[: len(index)], both[len(index) :], mix)
        labels = self.split.labels
        assert self.num_classes is not None  # seen to by `__init__`
        shares = mix_labels(labels[index], labels[mix.index], share, self.num_classes)
        return self._pixels.batch(images, index, view, shares)


class EvalLoader:
    """Plain images of a split, in order, each once.

    Args:
        split: the images; `Batch.index` is the position in this very split.
        batch_size: images of a step; the last may have fewer.
        device: where the batches lie.
    """

    def __init__(self, split: Split, batch_size: int, *, device: torch.device | str = "cpu") -> None:
        self.split, self.batch_size = split, batch_size
        self._pixels = SplitPixels(split, device)

    def __len__(self) -> int:
        """Return the number of steps."""
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        everything = np.arange(len(self.split))
        shares = (Chosen(everything[step * self.batch_size :][: self.batch_size]) for step in range(len(self)))
        for chosen, pixels, maps in self._pixels.batches(shares):
            yield self._pixels.batch(plain_images(pixels), chosen.index, None, maps)


@dataclass(frozen=True, eq=False)
class Loaders:
    """Loaders of a training: train and val, never test.

    Attributes:
        train: views of the training images.
        val: plain validation images.
        num_classes: K of the data set.
    """

    train: TrainLoader
    val: EvalLoader
    num_classes: int


def make_loaders(
    splits: Splits,
    policy: AugmentPolicy,
    batch_size: int,
    seed: int = 0,
    *,
    views: int | None = None,
    crop: tuple[int, int] | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    eval_batch_size: int | None = None,
) -> Loaders:
    """Create loaders of train and val; see `TrainLoader`. Every worker gets all of val.

    Raises:
        DataError: train has too few images for one step, or `batch_size` is less than an image for each worker.
    """
    train = TrainLoader(
        splits.train,
        policy,
        batch_size,
        seed,
        views=views,
        crop=crop,
        num_classes=splits.num_classes,
        rank=rank,
        world_size=world_size,
        device=device,
    )
    val = open_split(splits.val, splits.num_classes, eval_batch_size or max(batch_size, EVAL_BATCH), device=device)
    return Loaders(train, val, splits.num_classes)


def open_split(
    split: Split, num_classes: int, batch_size: int = EVAL_BATCH, *, device: torch.device | str = "cpu"
) -> EvalLoader:
    """Create a loader of plain images, with small steps in segmentation, whose scores take much memory."""
    if split.label_maps is not None and len(split):
        pixels = split.label_maps.read(np.zeros(1, np.int64))[0].size
        batch_size = max(1, min(batch_size, EVAL_SCORES // (num_classes * pixels)))
    return EvalLoader(split, batch_size, device=device)


def open_test(splits: Splits, batch_size: int = EVAL_BATCH, *, device: torch.device | str = "cpu") -> EvalLoader:
    """Create the loader of the test split, for promotion only."""
    return open_split(splits.test, splits.num_classes, batch_size, device=device)
