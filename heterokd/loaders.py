"""Loaders: views -> Batch, in a seeded order, sharded over workers.

The order of an epoch and the view of every image are pure functions of (seed, epoch): nothing has to be stored to
resume, and the global batches are the same for any number of workers; worker r takes its slice of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heterokd.dataset import Split, Splits
from heterokd.errors import DataError
from heterokd.outputs import Batch
from heterokd.views import (
    STREAM_TURN,
    AugmentPolicy,
    permutation,
    philox_key,
    plain_images,
    random_words,
    view_images,
    view_scenes,
)

# A split of at most this many bytes is read once and stays on the device as uint8.
RESIDENT_BYTES = 2**28
# Images of an evaluation step unless training takes more: no gradient is kept, so memory is no matter.
EVAL_BATCH = 256
# In segmentation an evaluation step holds a score for every class and pixel: at most this many.
EVAL_SCORES = 2**26


class TrainLoader:
    """Views of a split's images, in a new order every epoch.

    Args:
        split: the images; `Batch.index` is the position in this very split.
        policy: how views differ from their image.
        batch_size: images of a step over all workers; a multiple of `world_size`.
        seed: of order and views.
        views: how many views each image has; None draws a fresh one every epoch. With `views=K`, each run of K epochs
            shows each image's K views once; in the first run they are those of `views=None`, later each image starts at
            its own place, so that an epoch mixes view numbers.
        crop: height and width of a view in segmentation, in pixels; None takes the whole canvas.
        drop_last: leave out a last, smaller batch; None does so when there is at least one full batch.
        rank: this worker's number.
        world_size: how many workers.
        device: where the batches lie.

    Raises:
        DataError: the split has too few images for one step, or `batch_size` cannot be shared evenly.
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
        drop_last: bool | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size % world_size or batch_size < 1:
            raise DataError(f"training.batch_size: {batch_size} images cannot be shared evenly by {world_size} workers")
        if views is not None and views < 1:
            raise DataError(f"an image needs at least one view, got views={views}")
        self.split, self.policy, self.batch_size, self.seed, self.views = split, policy, batch_size, seed, views
        self.rank, self.world_size, self.crop = rank, world_size, crop
        full, rest = divmod(len(split), batch_size)
        dropped = full > 0 if drop_last is None else drop_last
        # Every worker needs an image in every step, or the others would wait for it.
        self._steps = full if dropped or rest < world_size else full + 1
        if self._steps == 0:
            raise DataError(
                f"the {split.name} split has {len(split)} images, too few for one batch of {batch_size} over "
                f"{world_size} worker(s); lower training.batch_size or training.workers"
            )
        self._pixels = _Pixels(split, device)

    def __len__(self) -> int:
        """Steps of an epoch."""
        return self._steps

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """This worker's batches of an epoch, counted from 0."""
        order = permutation(len(self.split), epoch, self.seed)
        shares = [self._share(order[step * self.batch_size :][: self.batch_size]) for step in range(len(self))]
        for index, pixels, maps in self._pixels.batches(shares):
            view = self.view_numbers(index, epoch)
            if maps is None:
                images = view_images(pixels, index, view, self.policy, self.seed)
            else:
                size = self.crop or (maps.shape[1], maps.shape[2])
                images, maps = view_scenes(pixels, maps, index, view, self.policy, size, self.seed)
            yield self._pixels.batch(images, index, torch.from_numpy(view), maps)

    def view_numbers(self, index: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """The view [B] of each image that an epoch shows."""
        if self.views is None or epoch < self.views:
            return np.full(len(index), epoch, np.int64)
        words = random_words(philox_key("turn", self.seed), STREAM_TURN, index, epoch // self.views)
        return (words[:, 0].astype(np.int64) + epoch) % self.views

    def _share(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        start, end = (len(index) * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return index[start:end]


class EvalLoader:
    """A split's plain images, in order, every one of them once.

    Args:
        split: the images; `Batch.index` is the position in this very split.
        batch_size: images of a step; the last may have fewer.
        device: where the batches lie.
    """

    def __init__(self, split: Split, batch_size: int, *, device: torch.device | str = "cpu") -> None:
        self.split, self.batch_size = split, batch_size
        self._pixels = _Pixels(split, device)

    def __len__(self) -> int:
        """Steps of a pass."""
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        everything = np.arange(len(self.split))
        shares = [everything[step * self.batch_size :][: self.batch_size] for step in range(len(self))]
        for index, pixels, maps in self._pixels.batches(shares):
            yield self._pixels.batch(plain_images(pixels), index, None, maps)


@dataclass(frozen=True, eq=False)
class Loaders:
    """What a training sees: train and val, never test.

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
    """Loaders of train and val; see `TrainLoader`. Every worker gets the whole of val.

    Raises:
        DataError: train has too few images for one step, or `batch_size` cannot be shared evenly.
    """
    train = TrainLoader(
        splits.train,
        policy,
        batch_size,
        seed,
        views=views,
        crop=crop,
        rank=rank,
        world_size=world_size,
        device=device,
    )
    val = open_split(splits.val, splits.num_classes, eval_batch_size or max(batch_size, EVAL_BATCH), device=device)
    return Loaders(train, val, splits.num_classes)


def open_split(
    split: Split, num_classes: int, batch_size: int = EVAL_BATCH, *, device: torch.device | str = "cpu"
) -> EvalLoader:
    """A split's plain images in steps that fit into memory: in segmentation a step has few of them."""
    if split.label_maps is not None and len(split):
        pixels = split.label_maps.read(np.zeros(1, np.int64))[0].size
        batch_size = max(1, min(batch_size, EVAL_SCORES // (num_classes * pixels)))
    return EvalLoader(split, batch_size, device=device)


def open_test(splits: Splits, batch_size: int = EVAL_BATCH, *, device: torch.device | str = "cpu") -> EvalLoader:
    """The loader of the test split: for promotion alone."""
    return open_split(splits.test, splits.num_classes, batch_size, device=device)


class _Pixels:
    """A split's pixels and label maps: on the device as a whole when small, else read one batch ahead."""

    def __init__(self, split: Split, device: torch.device | str) -> None:
        self.split, self.device = split, torch.device(device)
        self._resident: tuple[Tensor, Tensor | None] | None = None

    def batches(self, shares: list[NDArray[np.int64]]) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor | None]]:
        """Each share's positions, its pixels [B, H, W, 3] and its label maps [B, H, W], both uint8."""
        if not shares:
            return
        if self._fits(shares[0][:1]):
            if self._resident is None:
                self._resident = self._read(np.arange(len(self.split)))
            pixels, maps = self._resident
            for share in shares:
                chosen = torch.from_numpy(share).to(self.device)
                yield share, pixels[chosen], None if maps is None else maps[chosen]
            return
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self._read, shares[0])
            for share, following in zip(shares, [*shares[1:], None], strict=True):
                pixels, maps = coming.result()
                if following is not None:
                    coming = ahead.submit(self._read, following)
                yield share, pixels, maps

    def batch(self, images: Tensor, index: NDArray[np.int64], view: Tensor | None, maps: Tensor | None) -> Batch:
        """A batch on the device."""
        labels = torch.from_numpy(self.split.labels[index]).to(self.device) if maps is None else maps.long()
        return Batch(
            images=images,
            labels=labels,
            index=torch.from_numpy(index.copy()).to(self.device),
            view=None if view is None else view.to(self.device),
        )

    def _fits(self, some: NDArray[np.int64]) -> bool:
        if self._resident is not None:
            return True
        return len(self.split) * self.split.images.read(some).nbytes <= RESIDENT_BYTES

    def _read(self, index: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        def move(array: NDArray[np.uint8]) -> Tensor:
            return torch.from_numpy(array).to(self.device, non_blocking=True)

        maps = self.split.label_maps
        return move(self.split.images.read(index)), None if maps is None else move(maps.read(index))
