"""Loaders: orders that can be replayed, shards that fit together, and a test split that stays shut."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mounts import small_disk
from PIL import Image
from processes import CONTEXT
from pydantic import ValidationError
from tiny_datasets import write_image_folder

from heterokd.config.data import DataSettings
from heterokd.config.reading import load_experiment
from heterokd.datasets import load_dataset
from heterokd.datasets.io.decoded_files import decoding_threads
from heterokd.datasets.io.device_pixels import Chosen, SplitPixels
from heterokd.datasets.io.image_files import FileImages, LabelledFiles
from heterokd.datasets.io.images import ArrayImages
from heterokd.datasets.io.loaders import EvalLoader, TrainLoader, Worker, make_loaders, open_test
from heterokd.datasets.io.shared_pixels import SharedImages, checksums, share_splits, shared_pixels
from heterokd.datasets.io.split import Split, Splits
from heterokd.datasets.views.mixing import draw_mix, mix_views
from heterokd.datasets.views.policy import POLICIES, AugmentPolicy, ViewSpec
from heterokd.datasets.views.render import view_images
from heterokd.errors import DataError
from heterokd.outputs import Batch
from heterokd.storage.workspace import Workspace
from heterokd.training.data import open_splits, recipe_loaders, training_splits

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


def test_what_names_a_view_stays_on_the_cpu(splits: Splits) -> None:
    """A cache reads it at every step: on a GPU it would have to wait for all that the GPU is doing."""
    batch = next(iter(TrainLoader(splits.train, ViewSpec(POLICIES["digits"]), 16, device="meta").epoch(3)))
    assert batch.shown is not None
    assert batch.to("meta").shown is batch.shown
    assert batch.index.device.type == batch.images.device.type == "meta"
    expected = next(iter(TrainLoader(splits.train, ViewSpec(POLICIES["digits"]), 16).epoch(3)))
    assert torch.equal(batch.shown, torch.stack((expected.index, torch.full((16,), 3)), dim=1))


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
    loaders = make_loaders(shut, ViewSpec(DIGITS), 64)
    assert len(list(loaders.train.epoch(0))) == len(loaders.train)
    assert sum(len(batch) for batch in loaders.val) == len(splits.val)
    assert shut.mean == splits.mean
    assert loaders.num_classes == 10
    with pytest.raises(AssertionError, match="was read"):
        next(iter(open_test(shut)))


def test_batches_are_the_views_they_name(splits: Splits) -> None:
    loader = TrainLoader(splits.train, ViewSpec(DIGITS, seed=3), 50)
    for batch in loader.epoch(4):
        assert batch.view is not None
        assert batch.view.tolist() == [4] * 50
        index = batch.index.numpy()
        assert batch.labels.tolist() == splits.train.labels[index].tolist()
        pixels = torch.from_numpy(splits.train.images.read(index))
        assert torch.equal(batch.images, view_images(pixels, index, 4, DIGITS, seed=3))


def test_an_epoch_can_be_replayed_and_no_two_are_alike(splits: Splits) -> None:
    loader = TrainLoader(splits.train, ViewSpec(DIGITS, seed=1), 64)
    first, again = list(loader.epoch(2)), list(TrainLoader(splits.train, ViewSpec(DIGITS, seed=1), 64).epoch(2))
    assert all(same(one, two) for one, two in zip(first, again, strict=True))
    assert indices(loader, 2) != indices(loader, 3)
    assert indices(loader, 2) != indices(TrainLoader(splits.train, ViewSpec(DIGITS, seed=2), 64), 2)


@pytest.mark.parametrize("count", [64, 70])
def test_shards_make_up_the_same_global_batches(count: int) -> None:
    split = numbered(count)
    whole = list(TrainLoader(split, ViewSpec(DIGITS, seed=5), 16).epoch(1))
    shards = [
        list(TrainLoader(split, ViewSpec(DIGITS, seed=5), 16, worker=Worker(rank, 4)).epoch(1)) for rank in range(4)
    ]
    for step, batch in enumerate(whole):
        parts = [shard[step] for shard in shards]
        assert all(len(part) for part in parts)
        assert torch.equal(torch.cat([part.index for part in parts]), batch.index)
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    shown = torch.cat([batch.index for batch in whole]).tolist()
    assert len(shown) == len(set(shown)) == count // 16 * 16


def test_the_last_batch() -> None:
    assert [len(batch) for batch in TrainLoader(numbered(20), ViewSpec(DIGITS), 8).epoch(0)] == [8, 8]
    assert [len(batch) for batch in TrainLoader(numbered(5), ViewSpec(DIGITS), 8).epoch(0)] == [5]
    assert len(TrainLoader(numbered(19), ViewSpec(DIGITS), 8, worker=Worker(world_size=4))) == 2


def test_loaders_refuse_what_cannot_be_shared() -> None:
    with pytest.raises(DataError, match="the train split has 3 images, too few for one batch of 8 over 4 worker"):
        TrainLoader(numbered(3), ViewSpec(DIGITS), 8, worker=Worker(world_size=4))
    with pytest.raises(DataError, match=r"training\.batch_size: 2 images are too few for 3 workers"):
        TrainLoader(numbered(20), ViewSpec(DIGITS), 2, worker=Worker(world_size=3))
    with pytest.raises(DataError, match="at least one view, got views=0"):
        TrainLoader(numbered(20), ViewSpec(DIGITS, views=0), 4)


def test_a_bounded_number_of_views_comes_round() -> None:
    split, index = numbered(60), np.arange(60)
    loader, fresh = TrainLoader(split, ViewSpec(DIGITS, views=5), 10), TrainLoader(split, ViewSpec(DIGITS), 10)
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


def test_large_splits_are_read_batch_by_batch(counted: Counted) -> None:
    split = Split(counted, np.zeros(len(counted), np.int64), "train")
    wanted = [Chosen(index) for index in np.array_split(np.arange(len(counted)), 20)]
    whole, ahead = SplitPixels(split, "cpu", max_bytes=len(counted) * 105), SplitPixels(split, "cpu", max_bytes=0)
    for (chosen, pixels, _), (same_chosen, read, _) in zip(whole.batches(wanted), ahead.batches(wanted), strict=True):
        assert chosen is same_chosen
        assert torch.equal(pixels, read)
    before = counted.read_so_far
    list(whole.batches(wanted))
    assert counted.read_so_far == before, "the split stays"
    next(ahead.batches(wanted))  # left in the middle
    assert 55 <= counted.read_so_far - before < len(counted)


def test_few_labels_count_positions_anew(splits: Splits) -> None:
    few = splits.with_labels_per_class(4)
    batches = list(TrainLoader(few.train, ViewSpec(DIGITS), 64).epoch(0))
    assert sorted(batches[0].index.tolist()) == list(range(40))
    assert batches[0].labels.tolist() == few.train.labels[batches[0].index.numpy()].tolist()


# --- mixed views


def test_mixed_batches_are_the_views_they_name(splits: Splits) -> None:
    ofa = POLICIES["ofa"]
    loader = make_loaders(splits, ViewSpec(ofa, seed=3), 50).train
    everything = torch.from_numpy(splits.train.images.read(np.arange(len(splits.train))))
    for batch in loader.epoch(4):
        index = batch.index.numpy()
        mix = draw_mix(ofa, index, 4, len(splits.train), 3)
        own = view_images(everything[batch.index], index, 4, ofa, 3)
        images, share = mix_views(own, view_images(everything[mix.index], mix.index, mix.view, ofa, 3), mix)
        assert torch.equal(batch.images, images)
        for row, label in enumerate(splits.train.labels[index]):
            expected = np.zeros(10)
            expected[label] += share[row]
            expected[splits.train.labels[mix.index[row]]] += 1 - share[row]
            assert batch.labels[row].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
        assert batch.view is not None
        again = loader.views_of(index, batch.view.numpy())
        assert same(again, batch)


def test_views_of_any_kind_can_be_made_one_by_one(splits: Splits) -> None:
    for policy in (DIGITS, POLICIES["ofa"]):
        loader = TrainLoader(splits.train, ViewSpec(policy, seed=1, views=4), 32, num_classes=10)
        batch = next(iter(loader.epoch(7)))
        assert batch.view is not None
        index, view = batch.index.numpy(), batch.view.numpy()
        for place in (0, 13, 31):
            one = loader.views_of(index[place : place + 1], view[place : place + 1])
            assert torch.equal(one.images[0], batch.images[place])
            assert torch.equal(one.labels[0], batch.labels[place])


def test_shards_of_mixed_views_fit_together(splits: Splits) -> None:
    def loader(rank: int, world_size: int) -> TrainLoader:
        ofa = POLICIES["ofa"]
        return TrainLoader(splits.train, ViewSpec(ofa), 32, num_classes=10, worker=Worker(rank, world_size))

    whole = next(iter(loader(0, 1).epoch(0)))
    parts = [next(iter(loader(rank, 2).epoch(0))) for rank in range(2)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)


def test_mixing_needs_classes() -> None:
    with pytest.raises(DataError, match="mixup and cutmix make shares of classes"):
        TrainLoader(numbered(20), ViewSpec(POLICIES["ofa"]), 8)
    for policy in (AugmentPolicy(mixup=0.2), AugmentPolicy(operations=1), "ofa"):
        with pytest.raises(ValidationError, match="are for images with one class, but data set 'digit_scenes'"):
            DataSettings(dataset="digit_scenes", augment=policy)
        DataSettings(dataset="digits", augment=policy)


# --- decoded images that are shared


class Counted:
    """Images that count how many of them were read."""

    def __init__(self, array: np.ndarray) -> None:
        self.images, self.read_so_far = ArrayImages(array), 0

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: np.ndarray) -> np.ndarray:
        self.read_so_far += len(index)
        return self.images.read(index)


@pytest.fixture
def counted() -> Counted:
    return Counted(np.random.default_rng(0).integers(0, 256, (1100, 5, 7, 3), np.uint8))


def test_shared_images_are_decoded_once(tmp_path: Path, counted: Counted) -> None:
    first = shared_pixels(tmp_path / "caches", counted, "abc", "train")
    assert isinstance(first, SharedImages)
    decoded = counted.read_so_far
    second = shared_pixels(tmp_path / "caches", counted, "abc", "train")
    assert counted.read_so_far == decoded + 1  # one, to learn their size
    index = np.array([1099, 3, 3, 0, 512])
    for shared in (first, second, pickle.loads(pickle.dumps(first))):
        assert (shared.read(index) == counted.images.array[index]).all()
        assert len(shared) == 1100
    assert len(pickle.dumps(first)) < 5000, "a pickled one holds no pixels"
    assert shared_pixels(tmp_path / "caches", counted, "other", "train").path != first.path  # type: ignore[union-attr]
    assert not list((tmp_path / "caches").glob("*.part"))


def test_a_damaged_file_is_found(tmp_path: Path, counted: Counted) -> None:
    shared = shared_pixels(tmp_path, counted, "abc", "val")
    assert isinstance(shared, SharedImages)
    whole = shared.path.read_bytes()
    damaged = bytearray(whole)
    damaged[-30] ^= 4  # in the last image
    shared.path.write_bytes(damaged)
    fresh = shared_pixels(tmp_path, counted, "abc", "val")
    assert (fresh.read(np.array([5])) == counted.images.array[[5]]).all()
    with pytest.raises(DataError, match=r"image 1099 is damaged; remove the file"):
        fresh.read(np.array([0, 1099]))
    shared.path.write_bytes(whole[:-1])  # cut off: whoever comes next writes it anew
    (tmp_path / f"{shared.path.name}.1.part").write_bytes(b"left by one that was stopped")
    again = shared_pixels(tmp_path, counted, "abc", "val")
    assert (again.read(np.array([1099])) == counted.images.array[[1099]]).all()
    assert shared.path.read_bytes() == whole
    assert not list(tmp_path.glob("*.part"))
    shared.path.unlink()
    with pytest.raises(DataError, match="is missing or damaged; start again"):
        SharedImages(shared.path, shared.shape).read(np.array([0]))


def test_every_byte_counts_in_a_checksum() -> None:
    images = np.random.default_rng(1).integers(0, 256, (1, 3, 3, 3), np.uint8)
    before = checksums(images)[0]
    for place in range(27):
        changed = images.copy()
        changed.ravel()[place] ^= 128
        assert checksums(changed)[0] != before
    assert (checksums(np.zeros((2, 27), np.uint8)) != 0).all()


def test_a_disk_without_room_leaves_images_as_they_are(tmp_path: Path, counted: Counted) -> None:
    with small_disk(tmp_path / "small", "128k") as place:
        assert shared_pixels(place, counted, "abc", "train") is counted
        assert not list(place.glob("*.pixels"))


def in_two_processes(run: Callable[..., None], *arguments: Any) -> list[Any]:
    """What two processes that run the same answer through a queue, their last argument."""
    answers = CONTEXT.Queue()
    processes = [CONTEXT.Process(target=run, args=(*arguments, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    got = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    return got


def share(folder: Path, array: np.ndarray, answers: Queue[Any]) -> None:
    counted = Counted(array)
    shared = shared_pixels(folder, counted, "abc", "train")
    answers.put((counted.read_so_far, int(shared.read(np.arange(len(shared))).astype(np.int64).sum())))


def test_processes_that_come_together_decode_once(tmp_path: Path, counted: Counted) -> None:
    got = in_two_processes(share, tmp_path, counted.images.array)
    assert sorted(read for read, _ in got) == [1, 1 + 1100]
    assert {total for _, total in got} == {int(counted.images.array.sum(dtype=np.int64))}


def test_folder_images_give_the_same_batches_from_the_shared_file(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    names = [f"{number}.png" for number in range(24)]
    for name in names:
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), np.uint8)).save(tmp_path / name)
    files = LabelledFiles(tmp_path, np.array(names, np.bytes_), np.arange(24) % 4)
    images = FileImages(files, 16)
    plain = Split(images, files.labels, "train")
    shared = replace(plain, images=shared_pixels(tmp_path / "caches", images, "abc", "train"))
    for policy in (POLICIES["standard"], POLICIES["ofa"]):
        one, two = (TrainLoader(split, ViewSpec(policy), 8, num_classes=4) for split in (plain, shared))
        assert all(same(a, b) for a, b in zip(one.epoch(0), two.epoch(0), strict=True))
        assert two._pixels._resident is None, "mapped pages are not copied"


def test_pixels_beyond_memory_go_to_a_file_up_to_the_limit(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "photographs")
    settings = DataSettings(dataset="image_folder", root=tmp_path / "photographs", image_size=16)
    splits = open_splits(settings)
    size = (len(splits.train) + len(splits.val)) * 16 * 16 * 3

    def kinds(max_bytes: float) -> list[type]:
        shared = share_splits(tmp_path / f"pixels{max_bytes}", splits, max_bytes, in_memory=0)
        return [type(split.images) for split in (shared.train, shared.val)]

    assert kinds(size) == [SharedImages, SharedImages]
    assert not {*kinds(size - 1), *kinds(0)} & {SharedImages}
    other = settings.model_copy(update={"pixels_max_gb": 0.0})
    assert open_splits(other) is splits, "the limit changes no data"


def test_decoding_threads_are_those_of_the_trial() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with decoding_threads() as pool:
            assert pool._max_workers == 3
    finally:
        torch.set_num_threads(before)


def decode(file: Path, root: Path, answers: Queue[Any]) -> None:
    """Go through a folder's images once: how many were decoded here, how many there are, the sum of their pixels."""
    decoded, real = [], FileImages.decode
    FileImages.decode = lambda images, place: (decoded.append(place), real(images, place))[1]
    experiment = load_experiment(file)
    splits = training_splits(open_splits(experiment.data), Workspace(root))
    loaders = recipe_loaders(experiment.recipe({"method": "scratch"}), splits)
    total = sum(float(batch.images.double().sum()) for batch in [*loaders.train.epoch(0), *loaders.val])
    answers.put((len(decoded), len(splits.train) + len(splits.val), total))


def test_of_two_processes_one_decodes_a_folders_images(tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    write_image_folder(tmp_path / "photographs")
    data = {"dataset": "image_folder", "root": str(tmp_path / "photographs"), "labels_per_class": None}
    counts, images, sums = zip(*in_two_processes(decode, tiny_file(data=data), tmp_path / "runs"), strict=True)
    assert sums[0] == sums[1]
    few, many = sorted(counts)
    # Either looks at the first image of each split for its shape.
    assert few <= 6
    assert images[0] <= many <= images[0] + 6
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "runs/caches/pixels").glob("*.pixels")) == [
        "train",
        "val",
    ]
