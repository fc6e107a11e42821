"""FGVC-Aircraft: the official splits, and no banner."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_datasets import write_fgvc_aircraft

from heterokd.datasets.fgvc_aircraft import FGVCAircraft
from heterokd.datasets.io.split import Splits
from heterokd.errors import DataError

FOLDER = Path("fgvc-aircraft-2013b", "data")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_fgvc_aircraft(tmp_path)
    return tmp_path


def load(root: Path, image_size: int = 16) -> Splits:
    return FGVCAircraft().load(root, image_size, seed=0)


def test_splits_are_the_official_ones(root: Path) -> None:
    splits = load(root)
    assert splits.class_names == ("707-320", "Cessna 172", "F/A-18")
    assert [len(split) for split in (splits.train, splits.val, splits.test)] == [24, 12, 12]
    for split in (splits.train, splits.val, splits.test):
        lines = (root / FOLDER / f"images_variant_{split.name}.txt").read_text().splitlines()
        files = split.images.files
        assert [
            f"{Path(files.name(place)).stem} {splits.class_names[split.labels[place]]}" for place in range(len(split))
        ] == lines


@pytest.mark.parametrize("image_size", [16, 64, 224])
def test_banner_is_left_out(root: Path, image_size: int) -> None:
    """At every size at which the JPEG is decoded."""
    path = load(root).train.images.files.path(0)
    pixels = np.full((320, 480, 3), 100, np.uint8)
    pixels[-20:] = 255
    Image.fromarray(pixels).save(path, quality=100, subsampling=0)
    read = load(root, image_size).train.images.read(np.array([0]))
    assert np.abs(read.astype(int) - 100).max() <= 25  # the banner is 155 away; JPEG's blocks of 8 ring at its edge
    assert np.abs(read[:, : image_size * 9 // 10].astype(int) - 100).max() <= 2


@pytest.mark.parametrize("name", ["variants", "images_variant_train", "images_variant_val", "images_variant_test"])
def test_every_list_is_needed(root: Path, name: str) -> None:
    (root / FOLDER / f"{name}.txt").unlink()
    with pytest.raises(DataError, match=rf"data/{name}\.txt: is missing; download FGVC-Aircraft .* unpack it there"):
        load(root)


def test_damage_is_named(root: Path) -> None:
    path = root / FOLDER / "images_variant_val.txt"
    whole = path.read_text()
    path.write_text(whole.replace("0000901 707-320", "0000901 707-321"))
    with pytest.raises(DataError, match=r"val\.txt: image 0000901 is of variant '707-321', which variants\.txt lacks"):
        load(root)
    path.write_text("".join(line for line in whole.splitlines(keepends=True) if "Cessna" not in line))
    with pytest.raises(DataError, match=r"val\.txt: has no image of variant 'Cessna 172'"):
        load(root)
    path.write_text(whole)
    (root / FOLDER / "images" / "0000901.jpg").unlink()
    with pytest.raises(DataError, match=r"images/0000901\.jpg: is missing; download FGVC-Aircraft"):
        load(root)
