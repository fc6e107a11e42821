"""Loaders: orders that can be replayed, shards that fit together, and a test split that stays shut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from heterokd.dataset import ArrayImages, Split, Splits
from heterokd.datasets import load_dataset
from heterokd.errors import DataError
from heterokd.loaders import EvalLoader, TrainLoader, make_loaders, open_test
from heterokd.outputs import Batch
from heterokd.views import POLICIES, view_images

DIGITS = POLICIES["digits"]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_dataset("digits", image_size=16)


def numbered(count: int) -> Split:
    """Images whose pixels are their position."""
    pixels = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 4, 4, 3)).copy()
    return Split(ArrayImages(pixels), np.arange(count) % 3, "train")


def indices(loader: TrainLoader, epoch: int) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader.epoch(epoch)]


def same(one: Batch, two: Batch) -> bool:
    assert one.view is not None
    assert two.view is not None
    pairs = [(one.images, two.images), (one.labels, two.labels), (one.index, two.index), (one.view, two.view)]
    return all(torch.equal(a, b) for a, b in pairs)


class Shut:
    """Images that may not be looked at."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def read(self, index: np.ndarray) -> np.ndarray:
        raise AssertionError("the test split was read")


def test_loaders_never_open_the_test_split(splits: Splits) -> None:
    shut = replace(splits, test=replace(splits.test, images=Shut(len(splits.test))))
    loaders = make_loaders(shut, DIGITS, 64)
    assert len(list(loaders.train.epoch(0))) == len(loaders.train)
    assert sum(len(batch) for batch in loaders.val) == len(splits.val)
    assert shut.mean == splits.mean
    assert loaders.num_classes == 10
    with pytest.raises(AssertionError, match="was read"):
        next(iter(open_test(shut)))


def test_batches_are_the_views_they_name(splits: Splits) -> None:
    loader = TrainLoader(splits.train, DIGITS, 50, seed=3)
    for batch in loader.epoch(4):
        assert batch.view is not None
        assert batch.view.tolist() == [4] * 50
        index = batch.index.numpy()
        assert batch.labels.tolist() == splits.train.labels[index].tolist()
        pixels = torch.from_numpy(splits.train.images.read(index))
        assert torch.equal(batch.images, view_images(pixels, index, 4, DIGITS, seed=3))


def test_an_epoch_can_be_replayed_and_no_two_are_alike(splits: Splits) -> None:
    loader = TrainLoader(splits.train, DIGITS, 64, seed=1)
    first, again = list(loader.epoch(2)), list(TrainLoader(splits.train, DIGITS, 64, seed=1).epoch(2))
    assert all(same(one, two) for one, two in zip(first, again, strict=True))
    assert indices(loader, 2) != indices(loader, 3)
    assert indices(loader, 2) != indices(TrainLoader(splits.train, DIGITS, 64, seed=2), 2)


@pytest.mark.parametrize("count", [64, 70])
def test_shards_make_up_the_same_global_batches(count: int) -> None:
    split = numbered(count)
    whole = list(TrainLoader(split, DIGITS, 16, seed=5, drop_last=False).epoch(1))
    shards = [
        list(TrainLoader(split, DIGITS, 16, seed=5, drop_last=False, rank=rank, world_size=4).epoch(1))
        for rank in range(4)
    ]
    for step, batch in enumerate(whole):
        parts = [shard[step] for shard in shards]
        assert all(len(part) for part in parts)
        assert torch.equal(torch.cat([part.index for part in parts]), batch.index)
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert sorted(torch.cat([batch.index for batch in whole]).tolist()) == list(range(count))


def test_the_last_batch() -> None:
    assert [len(batch) for batch in TrainLoader(numbered(20), DIGITS, 8).epoch(0)] == [8, 8]
    assert [len(batch) for batch in TrainLoader(numbered(20), DIGITS, 8, drop_last=False).epoch(0)] == [8, 8, 4]
    assert [len(batch) for batch in TrainLoader(numbered(5), DIGITS, 8).epoch(0)] == [5]
    # Three images are too few for four workers to have one each.
    assert len(TrainLoader(numbered(19), DIGITS, 8, drop_last=False, world_size=4)) == 2


def test_loaders_refuse_what_cannot_be_shared() -> None:
    with pytest.raises(DataError, match="the train split has 3 images, too few for one batch of 8 over 4 worker"):
        TrainLoader(numbered(3), DIGITS, 8, world_size=4)
    with pytest.raises(DataError, match="too few for one batch of 8"):
        TrainLoader(numbered(5), DIGITS, 8, drop_last=True)
    with pytest.raises(DataError, match=r"training\.batch_size: 9 images cannot be shared evenly by 2"):
        TrainLoader(numbered(20), DIGITS, 9, world_size=2)
    with pytest.raises(DataError, match="at least one view, got views=0"):
        TrainLoader(numbered(20), DIGITS, 4, views=0)


def test_a_bounded_number_of_views_comes_round() -> None:
    split, index = numbered(60), np.arange(60)
    loader, fresh = TrainLoader(split, DIGITS, 10, views=5), TrainLoader(split, DIGITS, 10)
    for epoch in range(5):  # as many views as epochs: nothing differs from fresh views
        assert all(same(one, two) for one, two in zip(loader.epoch(epoch), fresh.epoch(epoch), strict=True))
    later = np.stack([loader.view_numbers(index, epoch) for epoch in range(10, 15)])
    assert (np.sort(later, axis=0) == np.arange(5)[:, None]).all()
    assert all(len(set(epoch)) == 5 for epoch in later)
    shown = torch.cat([batch.view for batch in loader.epoch(10) if batch.view is not None])
    order = torch.cat([batch.index for batch in loader.epoch(10)]).numpy()
    assert shown.tolist() == loader.view_numbers(order, 10).tolist()


def test_evaluation_sees_plain_images_in_order(splits: Splits) -> None:
    batches = list(EvalLoader(splits.val, 100))
    assert len(batches) == len(EvalLoader(splits.val, 100)) == 4
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(len(splits.val)))
    assert torch.cat([batch.labels for batch in batches]).tolist() == splits.val.labels.tolist()
    assert all(batch.view is None for batch in batches)
    pixels = torch.cat([batch.images for batch in batches])
    everything = splits.val.images.read(np.arange(len(splits.val)))
    assert ((pixels * 255).round().byte().permute(0, 2, 3, 1).numpy() == everything).all()


def test_large_splits_are_read_batch_by_batch(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(TrainLoader(splits.train, DIGITS, 64).epoch(0))
    monkeypatch.setattr("heterokd.pixels.RESIDENT_BYTES", 0)
    loader = TrainLoader(splits.train, DIGITS, 64)
    assert all(same(one, two) for one, two in zip(loader.epoch(0), expected, strict=True))
    assert loader._pixels._resident is None
    next(iter(loader.epoch(0)))  # left in the middle
    assert len(list(EvalLoader(splits.val, 64))) == 6


def test_few_labels_count_positions_anew(splits: Splits) -> None:
    few = splits.with_labels_per_class(4)
    batches = list(TrainLoader(few.train, DIGITS, 64).epoch(0))
    assert sorted(batches[0].index.tolist()) == list(range(40))
    assert batches[0].labels.tolist() == few.train.labels[batches[0].index.numpy()].tolist()
