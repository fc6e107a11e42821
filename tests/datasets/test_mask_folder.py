"""Label maps of users: folders, kinds of values, class lists, splits, and odd sets, each read right or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from tiny_datasets import write_ade20k, write_voc2012

from heterokd.config.data import DataSettings
from heterokd.datasets import load_dataset
from heterokd.datasets.io.options import DataOptions
from heterokd.datasets.io.split import Splits
from heterokd.datasets.mask_folder import MaskFolder
from heterokd.datasets.masks.class_list import read_class_list
from heterokd.datasets.masks.class_pixels import check_classes, describe_classes
from heterokd.datasets.masks.pairs import find_pairs, has_label_maps
from heterokd.datasets.masks.settings import MaskClass, MaskSettings
from heterokd.errors import DataError
from heterokd.outputs import IGNORE

SIDE = 16
BLACK, RED, BLUE = (0, 0, 0), (128, 0, 0), (0, 0, 128)


def options(group: str | None = None, **content: object) -> DataOptions:
    return DataOptions(group=group, masks=MaskSettings.model_validate(content))


def load(root: Path, **content: object) -> Splits:
    return load_dataset("mask_folder", root, SIDE, options=options(**content))


def halves(left: object, right: object) -> NDArray[np.uint8]:
    """A map of two halves: of numbers [16, 16], or of colours [16, 16, 3]."""
    array = np.zeros((SIDE, SIDE, *np.shape(left)), np.uint8)
    array[:, : SIDE // 2], array[:, SIDE // 2 :] = left, right
    return array


def photo(path: Path, seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def write(
    root: Path,
    map_of: Callable[[int], NDArray[np.generic]],
    count: int = 10,
    image: str = "images/{}.jpg",
    mask: str = "",
) -> None:
    for number in range(count):
        photo(root / image.format(number), number)
        path = root / (mask or "masks/{}.png").format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(map_of(number)).save(path)


def maps(splits: Splits) -> NDArray[np.uint8]:
    assert splits.train.label_maps is not None
    return splits.train.label_maps.read(np.arange(len(splits.train)))


def read_all(splits: Splits) -> None:
    for split in (splits.train, splits.val, splits.test):
        split.label_maps.read(np.arange(len(split)))  # type: ignore[union-attr]


LAYOUTS = {
    "images, masks": ("images/{}.jpg", "masks/{}.png"),
    "img, labels, endings": ("img/{}_img.png", "labels/{}_label.png"),
    "beginnings": ("Images/image_{}.jpg", "GT/mask_{}.png"),
    "cities": ("leftImg8bit/ulm/ulm_{}_leftImg8bit.png", "gtFine/ulm/ulm_{}_gtFine_labelIds.png"),
    "VOC": ("JPEGImages/{}.jpg", "SegmentationClass/{}.png"),
    "one folder": ("{}.jpg", "{}_mask.png"),
    "one folder, same name": ("{}.jpg", "{}.png"),
}


@pytest.mark.parametrize(("image", "mask"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_without_splits(tmp_path: Path, image: str, mask: str) -> None:
    write(tmp_path, lambda number: halves(0, 1), 10, image, mask)
    splits = load(tmp_path)
    assert [len(split) for split in (splits.train, splits.val, splits.test)] == [6, 2, 2]
    assert has_label_maps(tmp_path)
    assert (maps(splits) == halves(0, 1)).all()


SPLIT_LAYOUTS = {
    "outside": ("{}/images/{{}}.jpg", "{}/masks/{{}}.png"),
    "inside": ("images/{}/{{}}.jpg", "annotations/{}/{{}}.png"),
    "joined": ("{}/{{}}.png", "{}annot/{{}}_L.png"),
    "joined, plural": ("{}_images/{{}}.jpg", "{}_masks/{{}}.png"),
    "one folder": ("{}/{{}}.jpg", "{}/{{}}_mask.png"),
}


@pytest.mark.parametrize(("image", "mask"), SPLIT_LAYOUTS.values(), ids=SPLIT_LAYOUTS.keys())
def test_layouts_with_splits(tmp_path: Path, image: str, mask: str) -> None:
    for name, count in (("train", 8), ("valid", 3), ("test", 2)):
        write(tmp_path, lambda number: halves(0, 1), count, image.format(name), mask.format(name))
    splits = load(tmp_path)
    assert [len(split) for split in (splits.train, splits.val, splits.test)] == [8, 3, 2]


def test_a_missing_split_is_taken_from_train(tmp_path: Path) -> None:
    for name, count in (("train", 10), ("val", 3)):
        write(tmp_path, lambda number: halves(0, 1), count, f"{name}/images/{{}}.jpg", f"{name}/masks/{{}}.png")
    photo(tmp_path / "test/images/0.jpg", 5)  # as in a competition, without label maps
    splits = load(tmp_path)
    assert [len(split) for split in (splits.train, splits.val, splits.test)] == [8, 3, 2]
    assert splits.notes[0] == "not read: 1 image(s) without label map (test/images/0.jpg)"


def test_numbers_palettes_and_colours_give_the_same_classes(tmp_path: Path) -> None:
    values = {BLACK: 0, RED: 1, BLUE: 2}
    palette = Image.fromarray(halves(0, 2))
    palette.putpalette([channel for colour in values for channel in colour])
    write(tmp_path / "numbers", lambda number: halves(0, 2))
    write(tmp_path / "deep", lambda number: halves(0, 2).astype(np.uint16))
    write(tmp_path / "colours", lambda number: halves(BLACK, BLUE))
    write(tmp_path / "alpha", lambda number: np.dstack((halves(BLACK, BLUE), halves(255, 255))))
    write(tmp_path / "palette", lambda number: halves(0, 0))
    for file in (tmp_path / "palette" / "masks").iterdir():
        palette.save(file)
    by_number, by_colour = {"bg": 0, "red": 1, "blue": 2}, {"bg": "#000000", "red": "128,0,0", "blue": [0, 0, 128]}
    for name in ("numbers", "deep", "palette"):
        assert (maps(load(tmp_path / name, classes=by_number)) == halves(0, 2)).all(), name
    for name in ("colours", "alpha", "palette"):
        assert (maps(load(tmp_path / name, classes=by_colour)) == halves(0, 2)).all(), name
    with pytest.raises(DataError, match=r"colour images, but data\.masks\.classes has names alone; .*#000000, #000080"):
        load(tmp_path / "colours", classes=["bg", "blue"])
    with pytest.raises(DataError, match=r"does not fit label maps with colours"):
        load(tmp_path / "colours", classes=by_number)


def test_without_a_class_list_the_values_are_the_classes(tmp_path: Path) -> None:
    write(tmp_path / "colours", lambda number: halves(BLACK, (BLUE, RED)[number % 2]))
    found = load(tmp_path / "colours")
    assert found.class_names == ("#000000", "#000080", "#800000")
    assert "each of the 3 colours found is a class" in found.notes[-1]
    for name, numbers, names in (
        ("border", (0, 1, 255), ("0", "1")),
        ("trimap", (1, 2, 3), ("1", "2", "3")),
        ("grey levels", (0, 127, 255), ("0", "127", "255")),
        ("two", (1, 255), ("1", "255")),
    ):
        write(tmp_path / name, lambda number, numbers=numbers: halves(numbers[number % len(numbers)], numbers[1]))
        assert load(tmp_path / name).class_names == names, name


def test_masks_of_0_and_255_are_two_classes(tmp_path: Path) -> None:
    write(tmp_path, lambda number: halves(0, 255))
    found = load(tmp_path)
    assert found.class_names == ("background", "object")
    assert (maps(found) == halves(0, 1)).all()
    assert "0 and 255 only: two classes" in found.notes[-1]
    named = load(tmp_path, classes=["rest", "cell"])
    assert (maps(named) == halves(0, 1)).all()
    assert "255 is read as 'cell', not as ignored" in named.notes[-1]
    check_classes(named)
    # A list that says otherwise is followed; train then shows one class, which is refused before work.
    ignored = load(tmp_path, classes=["rest", "cell", "nucleus"])
    with pytest.raises(DataError, match=r"all labelled pixels of train are of class 'rest' \(50% .*object: 255"):
        check_classes(ignored)


def test_ignored_merged_and_dropped(tmp_path: Path) -> None:
    write(tmp_path, lambda number: halves(number % 5, 4))
    names = ["sky", "car", "bus", "road", "void"]
    found = load(tmp_path, classes=names, merge={"vehicle": ["car", "bus"]}, drop=["void"], ignore=7)
    assert found.class_names == ("sky", "vehicle", "road")
    assert set(np.unique(maps(found))) <= {0, 1, 2, IGNORE}
    assert (maps(found)[:, :, -1] == IGNORE).all()
    for content, problem in (
        ({"merge": {"vehicle": ["cart", "bus"]}}, r"merge: there is no class 'cart'; .*'car'"),
        ({"drop": ["lorry"]}, "drop: there is no class 'lorry'"),
        ({"merge": {"vehicle": ["car"]}, "drop": ["car"]}, "'car' is both merged and dropped"),
        ({"merge": {"sky": ["car", "bus"]}}, "'sky' is a class already"),
        ({"drop": names[1:]}, "1 classes are left"),
        ({"ignore": 3}, "3 is the value of class 'road'"),
    ):
        with pytest.raises(DataError, match=problem):
            load(tmp_path, classes=names, **content)


def test_values_beyond_the_class_list_are_named_with_their_file(tmp_path: Path) -> None:
    write(tmp_path, lambda number: halves(0, 1))
    Image.fromarray(halves(0, 9)).save(tmp_path / "masks" / "3.png")
    found = load(tmp_path, classes=["a", "b"])
    with pytest.raises(DataError, match=r"masks/3\.png: holds the label 9, expected 0 to 1 or 255"):
        read_all(found)


LISTS = {
    "names": ("classes.txt", "# of May\nbackground\ncar 2\n", [("background", ()), ("car 2", ())]),
    "numbers": ("classes.txt", "0 background\n255: car\n", [("background", (0,)), ("car", (255,))]),
    "Roboflow": ("_classes.csv", "Pixel Value, Class\n0, background\n1, car\n", [("background", (0,)), ("car", (1,))]),
    "CVAT": (
        "labelmap.txt",
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:0,0,128::\n",
        [("background", ("0,0,0",)), ("car", ("0,0,128",))],
    ),
    "CamVid": (
        "label_colors.txt",
        "64 128 64\tAnimal\n192 0 128\tArchway\n",
        [("Animal", ("64,128,64",)), ("Archway", ("192,0,128",))],
    ),
    "CSV": ("class_dict.csv", "name,r,g,b\nsky,1,2,3\nroad,4,5,6\n", [("sky", ("1,2,3",)), ("road", ("4,5,6",))]),
    "hexadecimal": ("classes.txt", "#000000 sky\n#0000ff road\n", [("sky", ("#000000",)), ("road", ("#0000ff",))]),
    "JSON": ("classes.json", '{"0": "sky", "3": "road"}', [("sky", (0,)), ("road", (3,))]),
    "JSON names": ("classes.json", '["sky", "road"]', [("sky", ()), ("road", ())]),
    "YAML": ("classes.yaml", "sky: 0\nroad: [1, 2]\n", [("sky", (0,)), ("road", (1, 2))]),
}


@pytest.mark.parametrize(("name", "text", "expected"), LISTS.values(), ids=LISTS.keys())
def test_class_lists(tmp_path: Path, name: str, text: str, expected: list[tuple[str, tuple[object, ...]]]) -> None:
    (tmp_path / name).write_text(text)
    found = read_class_list(tmp_path / name)
    assert found == tuple(MaskClass(name=name, values=values) for name, values in expected)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("classes.txt", "", "lists no classes"),
        ("classes.txt", "sky\n1: road\n", r"line 2 is a number \('1: road'\), the lines before are names"),
        ("classes.txt", "sky\nsky\n", "'sky' is listed twice"),
        ("classes.txt", "sky,1,2,300\n", "'1,2,300' is no colour"),
        ("classes.json", "{", "neither JSON nor YAML"),
        ("classes.json", "3", "holds no list of names"),
    ],
)
def test_class_lists_that_cannot_be_read(tmp_path: Path, name: str, text: str, problem: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=problem):
        read_class_list(tmp_path / name)


def test_a_class_list_in_the_folder_is_found(tmp_path: Path) -> None:
    write(tmp_path, lambda number: halves(BLACK, RED))
    (tmp_path / "labelmap.txt").write_text("background:0,0,0::\ncar:128,0,0::\nbus:0,0,128::\n")
    found = load(tmp_path)
    assert found.class_names == ("background", "car", "bus")
    assert found.notes == (f"classes: those of {tmp_path / 'labelmap.txt'}",)
    (tmp_path / "labelmap.txt").rename(tmp_path / "mine.txt")
    assert load(tmp_path, classes="mine.txt").class_names == found.class_names
    assert load(tmp_path, classes="mine.txt").fingerprint == found.fingerprint
    assert MaskFolder().load(tmp_path, SIDE, 0).class_names == ("#000000", "#800000")  # without a list
    with pytest.raises(DataError, match=r"there is no file .*gone\.txt"):
        load(tmp_path, classes="gone.txt")


def names_of(splits: Splits) -> dict[str, set[str]]:
    parts = (splits.train, splits.val, splits.test)
    return {split.name: {Path(name.decode()).stem for name in split.images.files.images} for split in parts}  # type: ignore[attr-defined]


def test_splits_by_share_list_and_group(tmp_path: Path) -> None:
    write(tmp_path, lambda number: halves(0, 1), 20, "images/p{}.jpg", "masks/p{}.png")
    shares = load(tmp_path, val_share=0.1, test_share=0.3)
    assert [len(split) for split in (shares.train, shares.val, shares.test)] == [12, 2, 6]
    for split, lines in (("val", "p3\np4.jpg\n"), ("test", "images/p5.jpg\n")):
        (tmp_path / f"{split}.txt").write_text(lines)
    listed = names_of(load(tmp_path, lists={"val": "val.txt", "test": "test.txt"}))
    assert (listed["val"], listed["test"], len(listed["train"])) == ({"p3", "p4"}, {"p5"}, 17)
    first = names_of(load(tmp_path, lists={"test": "test.txt"}, val_share=0.5))
    assert (first["test"], len(first["val"])) == ({"p5"}, 10)
    grouped = names_of(load(tmp_path, group=r"p1?(\d)\."))
    assert all({f"p1{name[1:]}" for name in part if len(name) == 2} <= part for part in grouped.values())
    for content, problem in (
        ({"group": "x"}, "'x' does not match 'images/p0.jpg'"),
        ({"group": "p"}, "puts all images into one group"),
        ({"lists": {"val": "val.txt"}, "val_share": 0.2}, r"val_share: data\.masks\.lists\.val holds val already"),
        ({"lists": {"val": "val.txt", "test": "val.txt"}}, "'p3' is in the list of val as well"),
        ({"lists": {"val": "gone.txt"}}, "gone.txt: is missing"),
    ):
        with pytest.raises(DataError, match=problem):
            load(tmp_path, **content)
    (tmp_path / "val.txt").write_text("p99\n")
    with pytest.raises(DataError, match="there is no image 'p99' with a label map"):
        load(tmp_path, lists={"val": "val.txt"})


def test_files_without_a_partner_are_named(tmp_path: Path) -> None:
    write(tmp_path, lambda number: halves(0, 1))
    photo(tmp_path / "images" / "alone.jpg", 3)
    Image.fromarray(halves(0, 1)).save(tmp_path / "masks" / "lost.png")
    assert load(tmp_path).notes[:2] == (
        "not read: 1 image(s) without label map (images/alone.jpg)",
        "not read: 1 mask(s) without image (masks/lost.png)",
    )
    for number in range(11):
        photo(tmp_path / "images" / f"more{number}.jpg", number)
    with pytest.raises(DataError, match=r"12 of 22 images have no label map, such as images/alone\.jpg"):
        find_pairs(tmp_path)


def smooth(root: Path) -> None:
    write(root, lambda number: np.tile(np.arange(0, 128, 8, dtype=np.uint8) + number % 8, (SIDE, 1)))


def two_masks(root: Path) -> None:
    write(root, lambda number: halves(0, 1))
    Image.fromarray(halves(0, 1)).save(root / "masks" / "3.bmp")


def other_sizes(root: Path) -> None:
    write(root, lambda number: halves(0, 1))
    photo(root / "images" / "3.jpg", 3, (SIDE, SIDE + 4))


def negative(root: Path) -> None:
    write(root, lambda number: halves(0, 1).astype(np.int32) - 5, mask="masks/{}.tif")


def no_train(root: Path) -> None:
    write(root, lambda number: halves(0, 1), 10, "test/images/{}.jpg", "test/masks/{}.png")


def both_ways(root: Path) -> None:
    write(root, lambda number: halves(0, 1))
    write(root, lambda number: halves(0, 1), 10, "train/images/{}.jpg", "train/masks/{}.png")


ODD = {
    "one value": (lambda root: write(root, lambda number: halves(0, 0)), "all 10 label maps hold the single value 0"),
    "smooth": (smooth, "hold 128 different values .*too many for classes"),
    "JPEG": (lambda root: write(root, lambda number: halves(0, 1), mask="masks/{}.jpg"), "is a JPEG, which changes"),
    "two masks": (two_masks, r"masks/3\.png: has the same name as masks/3\.bmp"),
    "sizes": (other_sizes, r"masks/3\.png: is 16 x 16 pixels, its image .*3\.jpg 20 x 16"),
    "negative": (negative, "holds numbers from -5 to -4"),
    "no pairs": (lambda root: photo(root / "images" / "3.jpg", 3), "no image has a label map"),
    "nothing": (lambda root: None, "no image has a label map; put images in 'images'"),
    "no train": (no_train, "has test but no train"),
    "both ways": (both_ways, "in folders of splits and outside"),
    "few": (lambda root: write(root, lambda number: halves(0, 1), 2), "too few images"),
}


@pytest.mark.parametrize(("make", "problem"), ODD.values(), ids=ODD.keys())
def test_odd_sets_are_refused_in_a_sentence(tmp_path: Path, make: Callable[[Path], None], problem: str) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=problem):
        load(tmp_path).check_images()


def test_layouts_of_published_sets_with_other_classes(tmp_path: Path) -> None:
    (tmp_path / "voc").mkdir()
    write_voc2012(tmp_path / "voc")
    folder = tmp_path / "voc" / "VOCdevkit" / "VOC2012"
    for number, path in enumerate(sorted((folder / "SegmentationClass").iterdir())):
        Image.fromarray(np.asarray(Image.open(path)) % 8 if number % 2 else np.asarray(Image.open(path)) % 7).save(path)
    names = [f"part {number}" for number in range(8)]
    for root in (tmp_path / "voc", folder):  # as VOC ships it, and as annotation programs do
        own = load_dataset("voc2012", root, SIDE, options=options(classes=names, val_share=0.5))
        assert own.class_names == tuple(names)
        assert (len(own.train), len(own.val)) == (6, 6)
        assert set(np.unique(maps(own))) <= {*range(8), IGNORE}
    (tmp_path / "ade").mkdir()
    write_ade20k(tmp_path / "ade")
    for path in (tmp_path / "ade").rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)) % 5).save(path)
    own = load_dataset("ade20k", tmp_path / "ade", SIDE, options=options(classes=["a", "b", "c", "d"]))
    assert own.num_classes == 4
    whole = load_dataset("ade20k", tmp_path / "ade", SIDE)
    assert (maps(own) == maps(whole)).all()  # numbers count from 1, as in ADE20K
    assert (
        load_dataset("ade20k", tmp_path / "ade", SIDE, options=options(merge={"in": ["wall", "floor"]})).num_classes
        == 149
    )


def test_the_classes_are_described_before_work(tmp_path: Path) -> None:
    for split, (left, right) in {"train": (0, 255), "val": (0, 1), "test": (0, 1)}.items():
        write(
            tmp_path,
            lambda number, a=left, b=right: halves(a, b),
            4,
            f"{split}/images/{{}}.jpg",
            f"{split}/masks/{{}}.png",
        )
    Image.fromarray(halves(0, 2)).save(tmp_path / "train" / "masks" / "0.png")
    assert describe_classes(load(tmp_path, classes=["ground", "car", "bus"])) == [
        "4 training images, 4 val, 4 test; 3 classes; 37.5% of the pixels of train are ignored, 0.0% of val",
        f"class   {'train':>20}  {'val':>20}",
        f"ground  {'80.00%     4 images':>20}  {'50.00%     4 images':>20}",
        f"car     {'0.00%     0 images':>20}  {'50.00%     4 images':>20}",
        f"bus     {'20.00%     1 images':>20}  {'0.00%     0 images':>20}",
        "train has no pixel of 1 of 3 classes: car",
        "val has no pixel of 1 of 3 classes: bus",
    ]


def test_settings_are_checked_with_the_experiment(tmp_path: Path) -> None:
    content = {"dataset": "mask_folder", "root": str(tmp_path)}
    ordered = [
        DataSettings.model_validate({**content, "masks": {"classes": names}})
        for names in ({"a": 0, "b": 1}, {"b": 1, "a": 0})
    ]
    assert ordered[0].model_dump_json() != ordered[1].model_dump_json()  # the order is the classes' numbers
    assert DataSettings.model_validate_json(ordered[1].model_dump_json()) == ordered[1]
    assert "masks" not in DataSettings.model_validate(content).model_dump()
    for data, problem in (
        ({"dataset": "digits", "masks": {}}, "masks: data set 'digits' does not read it"),
        ({"dataset": "digit_scenes", "masks": {}}, "masks: data set 'digit_scenes' does not read it"),
        ({**content, "masks": {"classes": {"a": "blue"}}}, "'blue' is no colour"),
        ({**content, "masks": {"classes": ["a", "a"]}}, "'a' is listed twice"),
        ({**content, "masks": {"val_share": 0}}, "greater than 0"),
        ({**content, "masks": {"val_share": 1.0}}, "less than or equal to 0.9"),
        ({**content, "masks": {"names": ["a"]}}, "Extra inputs are not permitted"),
    ):
        with pytest.raises(ValidationError, match=problem):
            DataSettings.model_validate(data)


def test_the_padding_of_a_canvas_does_not_count_as_ignored(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        write(
            tmp_path,
            lambda number: halves(0, 255 if number == 0 else 1)[: SIDE // 2],
            4,
            f"{split}/images/{{}}.jpg",
            f"{split}/masks/{{}}.png",
        )
        for image in (tmp_path / split / "images").iterdir():
            Image.open(image).crop((0, 0, SIDE, SIDE // 2)).save(image)
    splits = load(tmp_path, classes=["ground", "car"])
    assert splits.train.extents is not None
    assert describe_classes(splits)[0].endswith("2 classes; 12.5% of the pixels of train are ignored, 12.5% of val")
