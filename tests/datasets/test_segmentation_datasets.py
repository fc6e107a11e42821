"""What every data set with label maps keeps to; then canvases, label files, and what is particular to one."""

from __future__ import annotations

import shutil
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from another_process import AnotherProcess
from PIL import Image
from tiny_datasets import CITIES, TINY, write_ade20k, write_cityscapes, write_voc2012

from heterokd.datasets import DATASETS, load_dataset
from heterokd.datasets.digit_scenes import SCENES, DigitScenes, scene_splits
from heterokd.datasets.digits import read_digits
from heterokd.datasets.io.label_maps import SceneFiles, SceneImages, SceneLabels, read_scene
from heterokd.datasets.io.split import SHARES, SPLIT_NAMES, Split, Splits, stratified_split
from heterokd.datasets.masks.classes import label_table
from heterokd.datasets.masks.read import read_numbers
from heterokd.errors import DataError
from heterokd.outputs import IGNORE

SIZE = 32
CANVAS = {"cityscapes": (SIZE, 2 * SIZE)}


@pytest.fixture(scope="module", params=sorted(name for name in DATASETS if DATASETS[name].tasks == "segmentation"))
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


def parts(splits: Splits) -> tuple[Split, Split, Split]:
    return splits.train, splits.val, splits.test


def images_of(split: Split) -> np.ndarray:
    return split.images.read(np.arange(len(split)))


def maps_of(split: Split) -> np.ndarray:
    assert split.label_maps is not None
    return split.label_maps.read(np.arange(len(split)))


def files_of(split: Split) -> SceneFiles:
    assert isinstance(split.images, SceneImages)
    return split.images.files


def test_images_and_label_maps_share_one_canvas(named: tuple[str, Path | None], splits: Splits) -> None:
    height, width = CANVAS.get(named[0], (SIZE, SIZE))
    for split, name in zip(parts(splits), ("train", "val", "test"), strict=True):
        assert split.name == name
        assert split.label_maps is not None
        assert len(split) == len(split.images) == len(split.label_maps) > 0
        assert split.labels.dtype == np.int64
        assert not split.labels.any()
        images, maps = images_of(split), maps_of(split)
        assert images.dtype == maps.dtype == np.uint8
        assert images.shape == (len(split), height, width, 3)
        assert maps.shape == (len(split), height, width)
        # Shrinking loses a patch here and there.
        assert {IGNORE} < set(np.unique(maps)) <= {*range(splits.num_classes), IGNORE}
        assert len(np.unique(maps)) > 0.9 * splits.num_classes


def test_reading_is_by_position_and_the_callers_own(splits: Splits) -> None:
    index = np.array([1, 0, 1])
    some = splits.train.chosen(index)
    for read, whole in (
        (some.images.read, images_of(splits.train)),
        (some.label_maps.read, maps_of(splits.train)),  # type: ignore[union-attr]
    ):
        pixels = read(np.arange(3))
        assert (pixels == whole[index]).all()
        pixels[:] = 7
        assert (read(np.arange(3)) == whole[index]).all()


def test_splits_share_no_image(splits: Splits) -> None:
    together = np.concatenate([images_of(split) for split in parts(splits)])
    assert len(np.unique(together.reshape(len(together), -1), axis=0)) == len(together)


def test_the_seed_decides_what_is_not_shipped(named: tuple[str, Path | None], splits: Splits) -> None:
    dataset = DATASETS[named[0]]()
    again, other = dataset.load(named[1], SIZE, seed=0), dataset.load(named[1], SIZE, seed=1)
    drawn = TINY[named[0]].drawn if named[0] in TINY else {"train", "val", "test"}
    assert again.fingerprint == splits.fingerprint != other.fingerprint
    for split, same, changed in zip(parts(splits), parts(again), parts(other), strict=True):
        assert split.digest == same.digest
        assert (split.digest != changed.digest) == (split.name in drawn)
    assert dataset.load(named[1], SIZE - 8, seed=0).fingerprint != splits.fingerprint


def test_another_process_finds_the_same_content(
    named: tuple[str, Path | None], splits: Splits, elsewhere: AnotherProcess
) -> None:
    code = (
        "import sys; from heterokd.datasets import load_dataset; "
        f"splits = load_dataset(sys.argv[1], sys.argv[2] or None, {SIZE}); "
        "print(splits.fingerprint, splits.train.digest, splits.val.digest, splits.test.digest)"
    )
    found = elsewhere(code, named[0], str(named[1] or ""))
    assert found.split() == [splits.fingerprint, *(split.digest for split in parts(splits))]


def test_finding_files_decodes_none(named: tuple[str, Path | None], tmp_path: Path) -> None:
    name, root = named
    if root is None or name == "mask_folder":  # without a class list, label maps are read to find the classes
        return
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.rglob("*"):
        if file.suffix in (".jpg", ".png"):
            file.write_bytes(bytes(file.stat().st_size))
    found = DATASETS[name]().load(tmp_path, SIZE, seed=3)
    assert found.fingerprint == DATASETS[name]().load(root, SIZE, seed=3).fingerprint
    with pytest.raises(DataError, match="cannot be read as an image"):
        images_of(found.train)


@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "voc2012"])
def test_missing_and_changed_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(is missing|no such folder); download .* unpack"):
        DATASETS[name]().load(tmp_path, SIZE, seed=0)
    TINY[name].write(tmp_path)
    before = DATASETS[name]().load(tmp_path, SIZE, seed=0)
    assert before.test.label_maps is not None
    path = files_of(before.test).label(1)
    path.write_bytes(path.read_bytes() + b"more")
    assert DATASETS[name]().load(tmp_path, SIZE, seed=0).fingerprint != before.fingerprint
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}: is missing, the label map of .*; download"):
        DATASETS[name]().load(tmp_path, SIZE, seed=0)
    with pytest.raises(DataError, match=rf"{path.name}: cannot be read"):
        before.test.label_maps.read(np.array([1]))


# --- canvases and label files -------------------------------------------------------------------------------------


def scene(folder: Path, width: int, height: int, suffix: str = "png") -> tuple[SceneFiles, np.ndarray, np.ndarray]:
    """One pair of files: four quarters of unlike colours, and the label map of the same quarters."""
    quarters = np.zeros((height, width), np.uint8)
    quarters[height // 2 :] += 2
    quarters[:, width // 2 :] += 1
    pixels = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40)], np.uint8)[quarters]
    Image.fromarray(pixels).save(folder / f"image.{suffix}")
    Image.fromarray(quarters).save(folder / "label.png")
    names = (np.array([name], np.bytes_) for name in (f"image.{suffix}".encode(), b"label.png"))
    return SceneFiles(folder, *names), pixels, quarters


FOUR = label_table({0: 3, 1: IGNORE, 2: 0, 3: 1})
MAPPED = np.array([3, IGNORE, 0, 1], np.uint8)


def read_both(files: SceneFiles, canvas: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    first = np.zeros(1, np.int64)
    labels = SceneLabels(files, canvas, FOUR, "fetch it", kept=False)
    return SceneImages(files, canvas, kept=False).read(first)[0], labels.read(first)[0]


def test_smaller_images_lie_at_the_top_left_and_are_not_enlarged(tmp_path: Path) -> None:
    files, pixels, numbers = scene(tmp_path, 20, 10)
    image, labels = read_both(files, (16, 24))
    assert (image[:10, :20] == pixels).all()
    assert (labels[:10, :20] == MAPPED[numbers]).all()
    assert not image[10:].any()
    assert not image[:, 20:].any()
    assert (labels[10:] == IGNORE).all()
    assert (labels[:, 20:] == IGNORE).all()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize(("width", "height", "inside"), [(160, 80, (8, 16)), (40, 160, (16, 4)), (17, 9, (8, 16))])
def test_larger_images_are_shrunk_to_fit(
    tmp_path: Path, width: int, height: int, inside: tuple[int, int], suffix: str
) -> None:
    files, _, _ = scene(tmp_path, width, height, suffix)
    image, labels = read_both(files, (16, 16))
    rows, columns = inside
    assert (labels[rows:] == IGNORE).all()
    assert not image[rows:].any()
    assert not image[:, columns:].any()
    expected = np.kron(np.array([[3, IGNORE], [0, 1]]), np.ones((rows // 2, columns // 2)))
    assert (labels[:rows, :columns] == expected).mean() > 0.75  # an odd side's middle belongs to one half
    corners = image[[0, 0, rows - 1, rows - 1], [0, columns - 1, 0, columns - 1]].astype(int)
    assert np.abs(corners - [(200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40)]).max() < 60


def test_shrinking_images_smooths_and_shrinking_labels_does_not(tmp_path: Path) -> None:
    fine = (np.indices((64, 64)).sum(0) % 2).astype(np.uint8)
    Image.fromarray(fine * 255).save(tmp_path / "image.png")
    Image.fromarray(fine * 2).save(tmp_path / "label.png")
    files = SceneFiles(tmp_path, np.array([b"image.png"]), np.array([b"label.png"]))
    image, labels = read_both(files, (16, 16))
    assert np.abs(image.astype(int) - 127).max() <= 2
    assert set(np.unique(labels)) <= {0, 3}


def test_labels_follow_their_image_not_its_exif(tmp_path: Path) -> None:
    files, _, _ = scene(tmp_path, 20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(files.image(0)).save(files.image(0), exif=exif)
    assert read_scene(files.image(0), (10, 20))[9, 0].tolist() == [40, 40, 200]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_give_their_numbers(tmp_path: Path, bits: int) -> None:
    numbers = (np.arange(64).reshape(8, 8) % 2**bits).astype(np.uint8)
    image = Image.fromarray(numbers)
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(tmp_path / "label.png", bits=bits)
    assert (read_numbers(tmp_path / "label.png", "") == numbers).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_gives_its_numbers(tmp_path: Path, bits: int) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    numbers = np.arange(2**bits, dtype=np.uint8)[None].repeat(8, 1)[:, : 8 * 2**bits]
    line = np.packbits(np.unpackbits(numbers[:, :, None], axis=2)[..., 8 - bits :].ravel()).tobytes()
    head = struct.pack(">IIBBBBB", numbers.shape[1], 1, bits, 0, 0, 0, 0)  # Pillow does not write such files
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" + line)) + chunk(b"IEND", b"")
    (tmp_path / "label.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert (read_numbers(tmp_path / "label.png", "") == numbers).all()


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "RGBA", "LA", "BMP", "TIFF"])
def test_numbers_are_read_from_every_format_that_keeps_them(tmp_path: Path, mode: str) -> None:
    files, _, numbers = scene(tmp_path, 60, 40)
    path, image = files.label(0), Image.fromarray(numbers.astype(np.uint16) if mode == "I;16" else numbers)
    image.convert(mode if mode in ("RGB", "RGBA", "LA") else image.mode).save(
        path, format=mode if mode in ("BMP", "TIFF") else "PNG"
    )
    assert (read_numbers(path, "") == numbers).all()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("JPEG", "is a JPEG, which changes the numbers of pixels when it compresses; save label maps as PNG; fetch it"),
        ("colour", "is a colour image, but the classes are numbers; give .*data.masks.classes"),
        ("transparent", "has transparent pixels, whose class is unknown"),
        ("float", "has pixels of mode F, expected integers"),
        ("text", "cannot be read"),
        ("cut", "cannot be read"),
    ],
)
def test_label_files_that_hold_no_numbers_are_refused(tmp_path: Path, mode: str, expected: str) -> None:
    files, pixels, numbers = scene(tmp_path, 60, 40)
    path = files.label(0)
    if mode == "JPEG":
        Image.fromarray(numbers).save(path, format="JPEG")
    elif mode == "colour":
        Image.fromarray(pixels).save(path)
    elif mode == "transparent":
        Image.fromarray(np.stack((numbers, numbers, numbers, numbers * 80), -1)).save(path)
    elif mode == "float":
        Image.fromarray(numbers.astype(np.float32)).save(path, format="TIFF")
    elif mode == "text":
        path.write_text("labels")
    else:
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=rf"label\.png: .*{expected}"):
        read_both(files, (16, 16))


def test_label_maps_must_fit_their_image_and_the_classes(tmp_path: Path) -> None:
    files, _, numbers = scene(tmp_path, 20, 10)
    Image.fromarray(numbers.T).save(files.label(0))
    with pytest.raises(DataError, match=r"label\.png: is 10 x 20 pixels, its image .*image\.png 20 x 10; fetch it"):
        read_both(files, (16, 16))
    numbers[3, 4] = 77
    Image.fromarray(numbers).save(files.label(0))
    with pytest.raises(DataError, match=r"label\.png: holds the label 77, expected 0 to 3; fetch it"):
        read_both(files, (16, 16))
    files.image(0).write_bytes(files.image(0).read_bytes()[:50])
    with pytest.raises(DataError, match=r"image\.png: cannot be read as an image"):
        read_both(files, (16, 16))


def test_decoded_scenes_are_kept_within_the_memory_budget(tmp_path: Path) -> None:
    write_ade20k(tmp_path)
    kept = DATASETS["ade20k"]().load(tmp_path, SIZE, seed=0).test
    images, maps, labels = images_of(kept), maps_of(kept), kept.label_maps
    assert isinstance(labels, SceneLabels)
    files, canvas = files_of(kept), (SIZE, SIZE)
    fresh = replace(
        kept,
        images=SceneImages(files, canvas, kept=False),
        label_maps=SceneLabels(files, canvas, labels.table, labels.advice, kept=False),
    )
    assert (images_of(fresh) == images).all()
    assert (maps_of(fresh) == maps).all()
    shutil.rmtree(tmp_path)
    assert (images_of(kept) == images).all()
    assert (maps_of(kept) == maps).all()
    with pytest.raises(DataError):
        images_of(fresh)


# --- one data set each --------------------------------------------------------------------------------------------


def test_class_names_are_complete() -> None:
    names = {}
    for name, count in (("voc2012", 21), ("cityscapes", 19), ("ade20k", 150), ("digit_scenes", 11)):
        module = sys.modules[DATASETS[name].__module__]
        names[name] = tuple(getattr(module, "CLASS_NAMES", None) or getattr(module, "CLASSES", ()))
        if name == "digit_scenes":
            names[name] = load_dataset(name, None, SIZE).class_names
        assert len(set(names[name])) == len(names[name]) == count
    assert [names["voc2012"][number] for number in (0, 1, 15, 20)] == ["background", "aeroplane", "person", "tvmonitor"]
    assert [names["cityscapes"][number] for number in (0, 8, 13, 18)] == ["road", "vegetation", "car", "bicycle"]
    # Numbers of the benchmark's list, which counts from 1: https://github.com/CSAILVision/sceneparsing.
    of_ade20k = {1: "wall", 13: "person", 21: "car", 51: "refrigerator", 100: "buffet", 125: "microwave", 150: "flag"}
    assert {number: names["ade20k"][number - 1] for number in of_ade20k} == of_ade20k


def test_voc_names_an_image_that_its_lists_have_and_its_folder_has_not(tmp_path: Path) -> None:
    write_voc2012(tmp_path)
    path = files_of(DATASETS["voc2012"]().load(tmp_path, SIZE, seed=0).train).image(3)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}: is missing; download .* unpack"):
        DATASETS["voc2012"]().load(tmp_path, SIZE, seed=0)


def test_voc_takes_the_augmented_set_where_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    write_voc2012(tmp_path / "plain")
    write_voc2012(tmp_path / "more", augmented=True)
    plain, more = (DATASETS["voc2012"]().load(tmp_path / name, SIZE, seed=0) for name in ("plain", "more"))
    assert [len(split) for split in parts(plain)] == [11, 1, 8]
    assert [len(split) for split in parts(more)] == [20, 2, 8]
    assert b"SegmentationClassAug/" in files_of(more.train).labels[0]
    assert b"SegmentationClass/" in files_of(more.test).labels[0]
    assert plain.test.digest == more.test.digest

    folder = tmp_path / "more" / "VOCdevkit" / "VOC2012"
    augmented = folder / "ImageSets" / "Segmentation" / "train_aug.txt"
    ids = augmented.read_text().split()
    augmented.write_text("".join(f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in ids))
    assert DATASETS["voc2012"]().load(tmp_path / "more", SIZE, seed=0).fingerprint == more.fingerprint
    official = (folder / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    augmented.write_text("\n".join([*ids, official[0]]))
    with pytest.raises(DataError, match=rf"train_aug\.txt: lists 1 image\(s\) of val\.txt, such as .*{official[0]}"):
        DATASETS["voc2012"]().load(tmp_path / "more", SIZE, seed=0)
    shutil.rmtree(folder / "SegmentationClassAug")
    with pytest.raises(DataError, match=r"has only train_aug\.txt"):
        DATASETS["voc2012"]().load(tmp_path / "more", SIZE, seed=0)


def test_cityscapes_holds_out_whole_cities(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    for seed in range(3):
        splits = DATASETS["cityscapes"]().load(tmp_path, SIZE, seed)
        cities = [{name.split(b"/")[2].decode() for name in files_of(split).images} for split in parts(splits)]
        assert cities[0] | cities[1] == set(CITIES["train"])
        assert not cities[0] & cities[1]
        assert cities[2] == set(CITIES["val"])
        assert len(splits.val) == 2
    for city in sorted(CITIES["train"])[1:]:
        shutil.rmtree(tmp_path / "leftImg8bit" / "train" / city)
    with pytest.raises(DataError, match="has a single city"):
        DATASETS["cityscapes"]().load(tmp_path, SIZE, seed=0)


def test_cityscapes_numbers_become_train_ids(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    split = DATASETS["cityscapes"]().load(tmp_path, SIZE, seed=0).test
    numbers, labels = read_numbers(files_of(split).label(0), ""), maps_of(split)[0]
    # The official table, by number in the file: https://github.com/mcordts/cityscapesScripts, helpers/labels.py.
    for number, label in ((7, 0), (11, 2), (17, 5), (26, 13), (28, 15), (31, 16), (33, 18), (0, 255), (29, 255)):
        assert (labels[numbers == number] == label).all()


def test_ade20k_counts_from_one_and_other_is_ignored(tmp_path: Path) -> None:
    write_ade20k(tmp_path)
    split = DATASETS["ade20k"]().load(tmp_path, 64, seed=0).test
    numbers = read_numbers(files_of(split).label(0), "")
    height, width = numbers.shape
    labels = maps_of(split)[0]
    assert (labels[:height, :width] == (numbers - 1) % 256).all()  # 0 becomes 255
    assert (labels[height:] == IGNORE).all()
    assert (labels[:, width:] == IGNORE).all()


# --- digit scenes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digit_scenes() -> Splits:
    return load_dataset("digit_scenes", None, 64)


@pytest.mark.thorough
def test_digit_scenes_hold_every_class_about_evenly(digit_scenes: Splits) -> None:
    assert [len(split) for split in parts(digit_scenes)] == list(SCENES.values())
    for split in parts(digit_scenes):
        maps = maps_of(split)
        share = np.bincount(maps.ravel(), minlength=256) / maps.size
        assert 0.6 < share[0] < 0.85
        assert (share[1:11] > 0.008).all()
        assert (share[1:11] < 0.04).all()
        assert share[IGNORE] < 0.15
        digits = [len(np.setdiff1d(np.unique(scene_map), [0, IGNORE])) for scene_map in maps]
        assert 2 < np.mean(digits) < 4


def test_a_border_lies_around_every_digit(digit_scenes: Splits) -> None:
    maps = maps_of(digit_scenes.test)
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        here = maps[:, : 64 - down, max(0, -right) : 64 - max(0, right)]
        there = maps[:, down:, max(0, right) : 64 + min(0, right)]
        assert here.shape == there.shape
        differ = (here != there) & (here != IGNORE) & (there != IGNORE)
        assert not differ.any()


@pytest.mark.thorough
def test_digits_differ_in_colour_from_their_paper(digit_scenes: Splits) -> None:
    images, maps = images_of(digit_scenes.val).astype(float), maps_of(digit_scenes.val)
    contrast = [
        np.abs(image[label == digit].mean(0) - image[label == 0].mean(0)).max()
        for image, label in zip(images, maps, strict=True)
        for digit in np.setdiff1d(np.unique(label), [0, IGNORE])
    ]
    assert np.quantile(contrast, 0.05) > 25


def test_digits_of_a_split_appear_in_no_other() -> None:
    """Without the digits of two splits, the third one's scenes are the same to the last bit."""
    whole = DigitScenes().load(None, 16, seed=0)
    levels, labels = read_digits()
    index_of = stratified_split(labels, SHARES, 0)
    for name, index in zip(SPLIT_NAMES, index_of, strict=True):
        kept = np.zeros_like(levels)
        kept[index] = levels[index]
        alone = scene_splits(kept, labels, 16, seed=0)
        same = [getattr(alone, other).digest == getattr(whole, other).digest for other in SPLIT_NAMES]
        assert same == [other == name for other in SPLIT_NAMES]


@pytest.mark.thorough
def test_digit_scenes_look_alike_at_any_size(digit_scenes: Splits) -> None:
    large, small = maps_of(digit_scenes.val)[:50], maps_of(load_dataset("digit_scenes", None, 32).val)[:50]
    sampled = large[:, 1::2, 1::2]
    counted = (sampled != IGNORE) & (small != IGNORE)
    assert (sampled[counted] == small[counted]).mean() > 0.97
