"""ImageNet: the folders as the challenge's archives unpack."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_datasets import write_imagenet

from heterokd.datasets.imagenet import ImageNet, _listed, _watched
from heterokd.datasets.io.image_files import FileImages
from heterokd.datasets.io.saved_index import indexed_splits
from heterokd.datasets.io.split import Split, Splits
from heterokd.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_imagenet(tmp_path)
    return tmp_path


def load(root: Path, seed: int = 0) -> Splits:
    return ImageNet().load(root, 16, seed)


def names(split: Split) -> set[str]:
    assert isinstance(split.images, FileImages)
    return {split.images.files.name(place) for place in range(len(split))}


def test_official_val_is_test_and_val_comes_from_train(root: Path) -> None:
    splits = load(root)
    assert [np.bincount(split.labels).tolist() for split in (splits.train, splits.val, splits.test)] == [
        [19] * 3,
        [1] * 3,
        [4] * 3,
    ]
    assert all(name.startswith("val/") for name in names(splits.test))
    assert all(name.startswith("train/") for name in names(splits.val) | names(splits.train))
    assert not names(splits.val) & names(splits.train)
    for split in (splits.train, splits.val, splits.test):
        assert isinstance(split.images, FileImages)
        folders = [split.images.files.name(place).split("/")[1] for place in range(len(split))]
        assert folders == [sorted(set(folders))[label] for label in split.labels]


def test_names_of_classes(root: Path) -> None:
    assert load(root).class_names == ("tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)")
    path = root / "LOC_synset_mapping.txt"
    path.write_text("n01440764 tench\n")
    with pytest.raises(DataError, match=r"LOC_synset_mapping\.txt: has no line for class 'n02012849'"):
        load(root)
    path.write_text("n01440764\n")
    with pytest.raises(DataError, match=r"LOC_synset_mapping\.txt: line 1 is 'n01440764', expected `<key> <value>`"):
        load(root)
    path.unlink()
    assert load(root).class_names == ("n01440764", "n02012849", "n03126707")


def test_what_is_missing_is_named(root: Path) -> None:
    flat = root / "val"
    for path in list(flat.glob("*/*")):
        path.rename(flat / path.name)
    for folder in list(flat.iterdir()):
        if folder.is_dir():
            folder.rmdir()
    with pytest.raises(DataError, match=r"val: holds no folders of classes .* one folder per class as well"):
        load(root)
    shutil.rmtree(flat)
    with pytest.raises(DataError, match=r"val: there is no such folder; download ILSVRC2012 from"):
        load(root)
    with pytest.raises(DataError, match=r"nowhere/train: there is no such folder"):
        load(Path("nowhere"))


def test_a_saved_index_is_the_listing_until_the_folders_change(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store, made = tmp_path_factory.mktemp("home") / "indexes", list[int]()

    def make() -> Splits:
        made.append(1)
        return _listed(root, 16, 0)

    def indexed(least: int = 1) -> Splits:
        return indexed_splits(make, root, {"seed": 0}, lambda: _watched(root), store=store, least=least)

    def age() -> None:
        for path in _watched(root):
            os.utime(path, (1e9, 1e9))

    age()
    first = indexed(least=10**6)
    assert not store.exists(), "small sets are listed"
    assert indexed().fingerprint == first.fingerprint
    (file,) = store.iterdir()
    again = indexed()
    assert len(made) == 2
    assert (again.fingerprint, again.class_names, again.image_size) == (first.fingerprint, first.class_names, 16)
    for name in ("train", "val", "test"):
        one, two = getattr(first, name), getattr(again, name)
        assert names(one) == names(two)
        assert one.labels.tolist() == two.labels.tolist()
        assert (one.images.read(np.arange(2)) == two.images.read(np.arange(2))).all()

    image = next((root / "train" / "n01440764").iterdir())
    image.write_bytes(image.read_bytes() + b"0")  # another size, in place
    assert indexed().fingerprint != first.fingerprint
    assert len(made) == 3
    age()
    file.write_bytes(b"half")
    changed = indexed()
    assert len(made) == 4
    shutil.copy(image, image.with_name("new.JPEG"))
    assert len(names(indexed().train)) == len(names(changed.train)) + 1
    assert len(made) == 5
    assert len(names(indexed().train)) == len(names(changed.train)) + 1
    assert len(made) == 6, "a folder that has just changed is not trusted"
