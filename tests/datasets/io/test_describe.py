"""What a user sees of a folder before work begins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heterokd.config.data import DataSettings
from heterokd.datasets import load_dataset
from heterokd.datasets.image_folder import ImageFolder
from heterokd.datasets.io.describe import describe_images
from heterokd.datasets.io.options import DataOptions
from heterokd.datasets.io.split import Splits
from heterokd.training.data import open_splits

ICONS = Path(__file__).parents[3].parent / "shared" / "data" / "icons"


def scene(seed: int) -> Image.Image:
    """Smooth shapes of some size, as photographs have."""
    rough = np.random.default_rng(seed).integers(60, 200, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((96, 80), Image.Resampling.BICUBIC)


def put(root: Path, name: str, image: Image.Image, **options: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)  # type: ignore[arg-type]


def loaded(root: Path, **options: object) -> Splits:
    return ImageFolder().load_with(root, 16, 0, DataOptions(**options))  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    number = 0
    for split, count in (("train", 8), ("val", 3), ("test", 2)):
        for label in "ab":
            for place in range(count):
                put(tmp_path, f"{split}/{label}/{place}.png", scene(number))
                number += 1
    return tmp_path


def test_counts_sizes_and_modes(folder: Path) -> None:
    put(folder, "train/b/grey.png", scene(90).convert("L").resize((40, 30)))
    put(folder, "train/b/clear.png", scene(91).convert("RGBA"))
    put(folder, "train/b/film.gif", scene(92), save_all=True, append_images=[scene(93)])
    assert describe_images(loaded(folder)) == [
        "19 training images, 6 val, 4 test; 2 classes, in train from 8 (a) to 11 (b)",
        "shorter sides of 30 to 80 pixels, median 80; 22 RGB, 1 RGBA, 1 P, 1 L",
        "transparency is laid on rgb(255, 255, 255): 1 files with an alpha channel",
        "of 1 files with several frames the first is read (such as train/b/film.gif)",
    ]
    assert any("transparency is ignored" in line for line in describe_images(loaded(folder, reader=1)))


def test_copies_in_train_and_val_are_found(folder: Path) -> None:
    """At another size and quality, where the bytes differ."""
    put(folder, "val/a/copy.jpg", scene(3).resize((72, 60)), quality=75)
    put(folder, "train/b/relabelled.png", scene(2).resize((60, 50)))
    assert describe_images(loaded(folder))[-2:] == [
        "looks wrong: 1 images of val are nearly the same in train (train/a/3.png and val/a/copy.jpg): "
        "scores are too high",
        "looks wrong: 1 pairs of nearly equal images have two labels (train/a/2.png and train/b/relabelled.png)",
    ]


def test_uneven_classes_and_one_image_many_times(folder: Path) -> None:
    for place in range(100):
        put(folder, f"train/b/again{place}.png", scene(5))
    lines = describe_images(loaded(folder))
    assert any(
        "classes are uneven, up to 14 to 1: always the largest class is right 93.1% of" in line for line in lines
    )
    assert "looks wrong: 101 of 116 training images that were opened look the same" in lines


def test_ranges_of_deep_files_and_damaged_ones(folder: Path) -> None:
    for place in range(4):
        put(folder, f"train/b/deep{place}.png", Image.fromarray(np.full((8, 8), 1000 * place, np.uint16)))
    (folder / "train" / "a" / "torn.png").write_bytes(b"torn")
    lines = describe_images(loaded(folder))
    assert "files of more than 8 bits: 0 to 3000 becomes black to white, the range that they use" in lines
    assert "looks wrong: 1 files cannot be read (such as train/a/torn.png)" in lines
    given = describe_images(loaded(folder, value_range=(0.0, 4095.0)))
    assert "files of more than 8 bits: 0 to 4095 becomes black to white, data.value_range" in given


def test_what_is_not_read_from_files_is_not_described() -> None:
    assert describe_images(load_dataset("digits", image_size=8)) == []


@pytest.mark.thorough
@pytest.mark.skipif(not ICONS.is_dir(), reason="the drawings are not here")
def test_real_drawings() -> None:
    lines = describe_images(open_splits(DataSettings(dataset="image_folder", root=ICONS, image_size=64)))
    assert lines[0].startswith("2104 training images, 748 val, 718 test; 15 classes, in train from 32 (drink)")
    assert any("transparency is laid on rgb(255, 255, 255)" in line for line in lines)
