"""CIFAR-100: the official files, byte for byte in their format, and what is wrong with a damaged one."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_datasets import CIFAR100_NAMES, pickled_by_python2, write_cifar100

from heterokd.config.data import DataSettings
from heterokd.datasets.cifar100 import CIFAR100
from heterokd.datasets.io.split import Splits
from heterokd.datasets.views.policy import POLICIES
from heterokd.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_cifar100(tmp_path)
    return tmp_path


def load(root: Path, image_size: int = 32) -> Splits:
    return CIFAR100().load(root, image_size, seed=0)


def content_of(path: Path) -> dict[str, Any]:
    """As the official page says to read it; numpy warns of how Python 2 called it."""
    with warnings.catch_warnings(action="ignore"):
        content = pickle.loads(path.read_bytes(), encoding="bytes")
    return {key.decode(): value for key, value in content.items()}


def test_planes_become_images_and_official_test_is_test(root: Path) -> None:
    splits = load(root)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (54, 6, 12)
    assert splits.class_names == CIFAR100_NAMES
    test = content_of(root / "cifar-100-python" / "test")
    pixels = splits.test.images.read(np.arange(12))
    assert splits.test.labels.tolist() == test["fine_labels"]
    for row, image in zip(test["data"], pixels, strict=True):
        for channel in range(3):
            assert (image[:, :, channel].reshape(-1) == row[channel * 1024 : (channel + 1) * 1024]).all()
    train = content_of(root / "cifar-100-python" / "train")
    label_of = {
        row.reshape(3, -1).T.tobytes(): label for row, label in zip(train["data"], train["fine_labels"], strict=True)
    }
    for split in (splits.train, splits.val):
        read = split.images.read(np.arange(len(split)))
        assert [label_of[image.tobytes()] for image in read] == split.labels.tolist()
    assert np.bincount(splits.val.labels).tolist() == [2, 2, 2]


def test_train_and_val_share_their_memory(root: Path) -> None:
    splits = load(root, 224)
    assert splits.train.images.images is splits.val.images.images
    assert splits.train.images.images.array.nbytes == 60 * 3072


@pytest.mark.parametrize("image_size", [224, 16])
def test_images_are_resized_as_pillow_would(root: Path, image_size: int) -> None:
    plain, resized = load(root), load(root, image_size)
    index = np.array([4, 0, 4])
    images = resized.train.images.read(index)
    expected = [
        np.asarray(Image.fromarray(image).resize((image_size, image_size), Image.Resampling.BILINEAR))
        for image in plain.train.images.read(index)
    ]
    assert np.abs(images.astype(int) - np.stack(expected)).max() <= 1
    assert (resized.train.images.read(np.arange(54))[index] == images).all()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_files_written_again_by_python_3_are_read(root: Path, protocol: int) -> None:
    before = load(root).fingerprint
    for name in ("train", "test", "meta"):
        path = root / "cifar-100-python" / name
        content = content_of(path)
        if name == "meta":
            content["fine_label_names"] = [text.decode() for text in content["fine_label_names"]]
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    assert load(root).fingerprint == before


def test_a_pickle_that_calls_something_is_refused_and_not_run(root: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return os.mkdir, (str(tmp_path / "attacked"),)

    for content in (Attack(), {"data": Attack()}):
        (root / "cifar-100-python" / "train").write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match=r"train: cannot be read \(it would run \w+\.mkdir\)"):
            load(root)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": np.zeros((60, 1024), np.uint8)}, "holds no `data` of N x 3072 bytes"),
        ({"data": None}, "holds no `data`"),
        ({"fine_labels": [0, 1, 2]}, "holds no `fine_labels` for its 60 images"),
        ({"fine_labels": None}, "holds no `fine_labels`"),
        ({"fine_labels": [number % 4 for number in range(60)]}, "labels other than all of 0 to 2"),
        ({"fine_labels": [0, 1] * 30}, "labels other than all of 0 to 2"),
    ],
)
def test_damage_is_said_in_one_sentence(root: Path, change: dict[str, Any], sentence: str) -> None:
    path = root / "cifar-100-python" / "train"
    path.write_bytes(pickled_by_python2(content_of(path) | change))
    with pytest.raises(DataError, match=sentence) as raised:
        load(root)
    assert str(raised.value).startswith(f"{path}: ")
    assert "https://www.cs.toronto.edu/~kriz/cifar.html" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_and_cut_files(root: Path) -> None:
    path = root / "cifar-100-python" / "test"
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"test: cannot be read"):
            load(root)
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(DataError, match=r"test: holds no dict"):
        load(root)
    path.unlink()
    with pytest.raises(DataError, match=r"cifar-100-python/test: is missing; download the python version"):
        load(root)
    path.write_bytes(whole)
    (root / "cifar-100-python" / "meta").write_bytes(pickle.dumps({"fine_label_names": "apple"}))
    with pytest.raises(DataError, match=r"meta: holds no list `fine_label_names`"):
        load(root)
    shutil.rmtree(root / "cifar-100-python")
    with pytest.raises(DataError, match=r"cifar-100-python/meta: is missing"):
        load(root)


def test_views_follow_the_image_size() -> None:
    for image_size, policy in ((32, "cifar"), (224, "crop")):
        settings = DataSettings(dataset="cifar100", root="data", image_size=image_size)
        assert settings.policy == POLICIES[policy]
