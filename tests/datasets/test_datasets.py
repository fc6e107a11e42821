"""What every data set keeps to, over `DATASETS`; then what is particular to one."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from another_process import AnotherProcess
from PIL import Image
from tiny_datasets import EVERY_SPLIT, TINY, write_classes

from heterokd.datasets import DATASETS, load_dataset
from heterokd.datasets.image_folder import ImageFolder
from heterokd.datasets.io.decoded_files import memory_budget
from heterokd.datasets.io.image_files import FileImages, file_splits
from heterokd.datasets.io.images import ArrayImages
from heterokd.datasets.io.read_image import read_image
from heterokd.datasets.io.split import Split, Splits, stratified_split
from heterokd.errors import DataError
from heterokd.tasks import TASKS

SIZE = 16


CLASSIFICATION = sorted(name for name in DATASETS if DATASETS[name].tasks == "classification")


@pytest.fixture(scope="module", params=CLASSIFICATION)
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path | None]:
    name: str = request.param
    if not DATASETS[name].needs_root:
        return name, None
    root = tmp_path_factory.mktemp(name)
    TINY[name].write(root)
    return name, root


@pytest.fixture(scope="module")
def splits(named: tuple[str, Path | None]) -> Splits:
    return load_dataset(named[0], named[1], SIZE)


def everything(split: Split) -> np.ndarray:
    return split.images.read(np.arange(len(split)))


def test_splits_are_named_and_every_class_is_in_each(splits: Splits) -> None:
    assert (splits.train.name, splits.val.name, splits.test.name) == ("train", "val", "test")
    for split in (splits.train, splits.val, splits.test):
        assert len(split) == len(split.images) == len(split.labels)
        assert split.labels.dtype == np.int64
        assert set(split.labels) == set(range(splits.num_classes))


def test_images_are_squares_of_bytes_in_any_order_and_the_callers_own(splits: Splits) -> None:
    index = np.array([3, 0, 3])
    pixels = splits.train.images.read(index)
    assert pixels.shape == (3, SIZE, SIZE, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == everything(splits.train)[index]).all()
    pixels[:] = 0
    assert splits.train.images.read(index).any()


def test_splits_share_no_image(splits: Splits) -> None:
    parts = [everything(split) for split in (splits.train, splits.val, splits.test)]
    together = np.concatenate(parts).reshape(sum(map(len, parts)), -1)
    # Digits holds a few identical scans; what may not happen is one image handed to two splits.
    assert len(np.unique(together, axis=0)) >= len(together) - 2


def test_statistics_are_those_of_train(splits: Splits) -> None:
    pixels = everything(splits.train).astype(np.float64) / 255
    assert splits.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-9)
    assert splits.std == pytest.approx(pixels.std((0, 1, 2)), abs=1e-9)


def test_the_seed_decides_the_split(named: tuple[str, Path | None], splits: Splits) -> None:
    dataset = DATASETS[named[0]]()
    again, other = dataset.load(named[1], SIZE, seed=0), dataset.load(named[1], SIZE, seed=1)
    assert again.fingerprint == splits.fingerprint
    assert (everything(again.train) == everything(splits.train)).all()
    assert again.test.digest == splits.test.digest
    drawn = TINY[named[0]].drawn if named[0] in TINY else EVERY_SPLIT
    for split, same in ((getattr(splits, name), getattr(other, name)) for name in sorted(EVERY_SPLIT)):
        assert (split.digest != same.digest) == (split.name in drawn)
    assert (other.fingerprint != splits.fingerprint) == bool(drawn)
    assert dataset.load(named[1], SIZE + 1, seed=0).fingerprint != splits.fingerprint


def test_another_process_finds_the_same_content(
    named: tuple[str, Path | None], splits: Splits, elsewhere: AnotherProcess
) -> None:
    code = (
        "import sys; from heterokd.datasets import load_dataset; "
        f"splits = load_dataset(sys.argv[1], sys.argv[2] or None, {SIZE}); "
        "print(splits.fingerprint, splits.test.digest)"
    )
    found = elsewhere(code, named[0], str(named[1] or ""))
    assert found.split() == [splits.fingerprint, splits.test.digest]


def test_few_labels(splits: Splits) -> None:
    few = splits.with_labels_per_class(3, seed=5)
    assert np.bincount(few.train.labels).tolist() == [3] * splits.num_classes
    known = {
        pixels.tobytes(): label for pixels, label in zip(everything(splits.train), splits.train.labels, strict=True)
    }
    assert [known[pixels.tobytes()] for pixels in everything(few.train)] == few.train.labels.tolist()
    assert few.val is splits.val
    assert few.test is splits.test
    assert few.train.digest == splits.with_labels_per_class(3, seed=5).train.digest
    assert few.train.digest != splits.with_labels_per_class(3, seed=6).train.digest
    assert len({splits.fingerprint, few.fingerprint, splits.with_labels_per_class(4, seed=5).fingerprint}) == 3
    # More labels keep the ones there were, so that a curve over their number compares like with like.
    more = {pixels.tobytes() for pixels in everything(splits.with_labels_per_class(4, seed=5).train)}
    assert {pixels.tobytes() for pixels in everything(few.train)} <= more


def test_too_few_labels_name_the_class(splits: Splits) -> None:
    with pytest.raises(DataError, match=r"data\.labels_per_class: class '.+' has \d+ training images, 5000 were"):
        splits.with_labels_per_class(5000)


def test_a_data_set_says_what_it_is() -> None:
    for name, dataset in DATASETS.items():
        assert dataset.__doc__, name
        assert dataset.tasks in TASKS
        assert dataset.policy_at(32).hash
    assert {name for name, dataset in DATASETS.items() if dataset.needs_root} == set(TINY)


def test_load_dataset_is_cached_and_speaks() -> None:
    assert load_dataset("digits", image_size=8) is load_dataset("digits", None, 8)
    assert len(load_dataset("digits", image_size=8, labels_per_class=2).train) == 20
    with pytest.raises(DataError, match=r"there is no data set 'digit'; did you mean 'digits'\?"):
        load_dataset("digit")
    with pytest.raises(DataError, match=r"set data\.root"):
        load_dataset("image_folder")
    with pytest.raises(DataError, match="there is no folder"):
        load_dataset("image_folder", "nowhere")


def test_stratified_split_is_exact() -> None:
    labels = np.repeat([0, 1, 2], [3, 10, 101])
    parts = stratified_split(labels, (0.6, 0.2, 0.2), seed=1)
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    assert [np.bincount(labels[part]).tolist() for part in parts] == [[1, 6, 61], [1, 2, 20], [1, 2, 20]]
    with pytest.raises(DataError, match="class 'rare' has 2 image"):
        stratified_split(np.array([0, 0]), (0.6, 0.2, 0.2), 0, ["rare"])


def test_digits_are_60_20_20() -> None:
    splits = load_dataset("digits")
    sizes = [len(splits.train), len(splits.val), len(splits.test)]
    assert sum(sizes) == 1797
    assert sizes == pytest.approx([1797 * share for share in (0.6, 0.2, 0.2)], abs=10)
    assert splits.class_names == tuple("0123456789")


def test_digest_sees_every_pixel_and_label() -> None:
    pixels, labels = np.zeros((600, 2, 2, 3), np.uint8), np.zeros(600, np.int64)
    first = Split(ArrayImages(pixels), labels, "test").digest
    changed, relabelled = pixels.copy(), labels.copy()
    changed[599, 1, 1, 2], relabelled[599] = 1, 1
    assert first == Split(ArrayImages(pixels.copy()), labels.copy(), "test").digest
    assert first != Split(ArrayImages(changed), labels, "test").digest
    assert first != Split(ArrayImages(pixels), relabelled, "test").digest


def load_folder(root: Path) -> Splits:
    return ImageFolder().load(root, SIZE, seed=0)


def names(split: Split) -> list[str]:
    assert isinstance(split.images, FileImages)
    return [split.images.files.name(place) for place in range(len(split))]


def test_folder_with_three_splits_is_taken_as_it_is(tmp_path: Path) -> None:
    for seed, name in enumerate(("train", "val", "test")):
        write_classes(tmp_path / name, {"a": 2, "b": 3 + seed}, seed)
    splits = load_folder(tmp_path)
    assert [len(split) for split in (splits.train, splits.val, splits.test)] == [5, 6, 7]
    assert all(name.startswith("val/") for name in names(splits.val))


@pytest.mark.parametrize(("shipped", "missing"), [("val", "test"), ("test", "val")])
def test_folder_with_two_splits_gets_the_third_from_train(tmp_path: Path, shipped: str, missing: str) -> None:
    write_classes(tmp_path / "train", {"a": 10, "b": 20})
    write_classes(tmp_path / shipped, {"a": 2, "b": 2}, seed=1)
    splits = load_folder(tmp_path)
    carved: Split = getattr(splits, missing)
    assert np.bincount(carved.labels).tolist() == [2, 4]
    assert all(name.startswith("train/") for name in names(carved))
    assert not set(names(carved)) & set(names(splits.train))
    assert len(getattr(splits, shipped)) == 4


def test_folder_with_train_alone_is_split_three_ways(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 10, "b": 20})
    splits = load_folder(tmp_path)
    assert [len(split) for split in (splits.train, splits.val, splits.test)] == [18, 6, 6]


def test_folder_ignores_what_is_no_image(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 5, "b": 5})
    before = load_folder(tmp_path)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "a" / "labels.csv").write_text("1,2")
    (tmp_path / "a" / "._000.png").write_bytes(b"resource fork")
    (tmp_path / ".git").mkdir()
    assert load_folder(tmp_path).fingerprint == before.fingerprint
    shutil.copy(tmp_path / "a" / "000.png", tmp_path / "a" / "copy.png")
    assert load_folder(tmp_path).fingerprint != before.fingerprint


def test_folder_errors_say_where(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two or more classes, found 0"):
        load_folder(tmp_path)
    write_classes(tmp_path / "val", {"a": 3, "b": 3})
    with pytest.raises(DataError, match="has val but no train"):
        load_folder(tmp_path)
    write_classes(tmp_path / "train", {"a": 3, "c": 3})
    with pytest.raises(DataError, match=r"val: class 'b' is not in train"):
        load_folder(tmp_path)
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(DataError, match=r"train/b: holds no images"):
        load_folder(tmp_path)


def test_damaged_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 5, "b": 5})
    whole = (tmp_path / "b" / "002.png").read_bytes()
    (tmp_path / "b" / "002.png").write_bytes(whole[: len(whole) // 2])
    splits = load_folder(tmp_path)
    holder = next(s for s in (splits.train, splits.val, splits.test) if any("b/002.png" in name for name in names(s)))
    with pytest.raises(DataError, match=r"b/002\.png: cannot be read as an image"):
        everything(holder)


def test_image_is_turned_as_exif_says_and_its_middle_is_taken(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = (255, 0, 0)
    pixels[:, 10:15, 2] = 255
    upright = tmp_path / "upright.png"
    Image.fromarray(pixels).save(upright)
    middle = read_image(upright, 10)
    assert (middle == pixels[:, 10:20]).all()
    turned, exif = Image.fromarray(pixels).rotate(90, expand=True), Image.Exif()
    exif[0x0112] = 6  # Orientation: to be turned clockwise by a quarter
    turned.save(tmp_path / "turned.png", exif=exif)
    assert (read_image(tmp_path / "turned.png", 10) == middle).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "1", "CMYK"])
def test_image_of_any_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    if mode == "I;16":
        Image.fromarray(np.full((9, 9), 0x8000, np.uint16)).save(path)
    else:
        Image.new("RGB", (9, 9), (128, 128, 128)).convert(mode).save(
            path, **({"transparency": 0} if mode == "P" else {})
        )
    image = read_image(path, 4)
    assert image.shape == (4, 4, 3)
    assert image.dtype == np.uint8
    if mode != "1":
        assert abs(image.astype(int) - 128).max() <= 8


def test_decoded_images_are_kept_but_not_sent(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 5, "b": 5})
    images = load_folder(tmp_path).train.images
    index = np.arange(len(images))
    first = images.read(index)
    sent = pickle.dumps(images)
    shutil.rmtree(tmp_path)
    assert (images.read(index) == first).all()
    with pytest.raises(DataError, match="cannot be read"):
        pickle.loads(sent).read(index)


def test_images_beyond_the_memory_budget_are_decoded_each_time(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 5, "b": 5})
    images = load_folder(tmp_path).train.images
    index = np.arange(len(images))
    pixels = images.read(index)
    whole = len(images) * images.image_size**2 * 3
    for budget, is_kept in ((whole, True), (whole - 1, False)):
        fresh = FileImages(images.files, images.image_size, budget)
        assert (fresh.read(index) == pixels).all()
        assert (fresh._pixels is not None) == is_kept


def test_memory_budget_is_a_share_of_the_machine() -> None:
    assert 0 < memory_budget() <= 2**30


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_region_is_read_alone(tmp_path: Path, suffix: str) -> None:
    """At full size and where a large JPEG is decoded at a smaller one; as the whole image cut by hand."""
    pixels = np.zeros((400, 600, 3), np.uint8)
    pixels[100:300, 200:400] = np.linspace(0, 255, 200).astype(np.uint8)[:, None, None]
    pixels[380:] = 255
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(pixels).save(path, **({"quality": 100, "subsampling": 0} if suffix == "jpg" else {}))
    for region, cut in (
        ((200, 100, 400, 300), pixels[100:300, 200:400]),
        ((0, 0, 0, -20), pixels[:380, 110:490]),  # its middle square
        ((500, 100, 900, 300), pixels[150:250, 500:600][:100]),  # cut off at the border
    ):
        expected = np.asarray(Image.fromarray(cut).resize((25, 25), Image.Resampling.BICUBIC)).astype(int)
        difference = np.abs(read_image(path, 25, region).astype(int) - expected)
        assert difference.mean() <= (0 if suffix == "png" else 3), region
        assert difference[-1].mean() <= (0 if suffix == "png" else 8), region  # nothing of what lies below it
    with pytest.raises(DataError, match=r"600 x 400 pixels hold nothing of the region \(700, 0, 800, 50\)"):
        read_image(path, 25, (700, 0, 800, 50))


def test_a_region_follows_a_turned_image(tmp_path: Path) -> None:
    pixels = np.zeros((400, 600, 3), np.uint8)
    pixels[:380] = 90
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.fromarray(pixels).rotate(90, expand=True).save(path, exif=exif, quality=100)
    assert (np.abs(read_image(path, 25, (0, 0, 0, -20)).astype(int) - 90) <= 2).all()


def test_sizes_of_very_many_files_are_sampled(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 10, "b": 10})

    def fingerprint(sizes: int) -> str:
        found = load_folder(tmp_path)
        files = {split.name: split.images.files for split in (found.train, found.val, found.test)}
        return file_splits("image_folder", files, found.class_names, SIZE, sizes=sizes).fingerprint

    whole, sampled = fingerprint(1000), fingerprint(3)
    assert whole == load_folder(tmp_path).fingerprint != sampled == fingerprint(3)
    (tmp_path / "a" / "000.png").rename(tmp_path / "a" / "0000.png")
    assert fingerprint(3) != sampled


def test_names_of_any_alphabet(tmp_path: Path) -> None:
    write_classes(tmp_path, {"søster": 5, "猫": 6})
    splits = load_folder(tmp_path)
    assert splits.class_names == ("søster", "猫")
    assert sum(len(everything(split)) for split in (splits.train, splits.val, splits.test)) == 11
