"""CUB-200-2011: the archive's tables and its official split."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_datasets import write_cub200

from heterokd.datasets.cub200 import CUB200
from heterokd.datasets.io.split import Splits
from heterokd.errors import DataError

FOLDER = "CUB_200_2011"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_cub200(tmp_path)
    return tmp_path


def load(root: Path) -> Splits:
    return CUB200().load(root, 16, seed=0)


def test_official_test_is_test(root: Path) -> None:
    splits = load(root)
    assert splits.class_names == ("Black footed Albatross", "Laysan Albatross", "Sooty Albatross")
    assert [len(split) for split in (splits.train, splits.val, splits.test)] == [33, 3, 12]
    files = splits.test.images.files
    # Every fourth image is one of test in the tiny copy; the label is the folder's number.
    assert all(int(files.name(place).split("_")[-2]) % 4 == 0 for place in range(len(files)))
    assert [int(files.name(place).split("/")[1][:3]) - 1 for place in range(len(files))] == files.labels.tolist()


@pytest.mark.parametrize("name", ["images", "classes", "image_class_labels", "train_test_split"])
def test_every_table_is_needed(root: Path, name: str) -> None:
    path = root / FOLDER / f"{name}.txt"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"{name}\.txt: is empty"):
        load(root)
    path.write_bytes(b"1 \xff\xfe")
    with pytest.raises(DataError, match=rf"{name}\.txt: is no text file"):
        load(root)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}\.txt: is missing; download CUB-200-2011 .* and unpack it there"):
        load(root)


@pytest.mark.parametrize(
    ("name", "line", "by", "sentence"),
    [
        ("image_class_labels", "7 1\n", "", r"has no line for image 7 of images\.txt"),
        ("image_class_labels", "7 1\n", "7 4\n", "image 7 has the unknown value '4'"),
        ("train_test_split", "7 1\n", "7 2\n", "image 7 has the unknown value '2'"),
        ("train_test_split", "7 1\n", "7 1\n7 0\n", "line 8 gives '7' a second value"),
        ("train_test_split", "7 1\n", "7\n", "line 7 is '7', expected `<key> <value>`"),
    ],
)
def test_damaged_lines_are_named(root: Path, name: str, line: str, by: str, sentence: str) -> None:
    path = root / FOLDER / f"{name}.txt"
    path.write_text(path.read_text().replace(f"\n{line}", f"\n{by}", 1))
    with pytest.raises(DataError, match=rf"{name}\.txt: {sentence}"):
        load(root)


def test_a_class_without_test_images_is_named(root: Path) -> None:
    path = root / FOLDER / "train_test_split.txt"
    path.write_text("".join(f"{key} {int(key <= 16 or key % 4 != 0)}\n" for key in range(1, 49)))
    with pytest.raises(DataError, match=r"train_test_split\.txt: class 'Black footed Albatross' has no test images"):
        load(root)


def test_a_missing_image_is_named(root: Path) -> None:
    path = load(root).test.images.files.path(3)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}: is missing; download CUB-200-2011"):
        load(root)
