"""Damaged image and label files through the data sets: each is read, or named by its path; nothing else happens.

    python benchmarks/fuzz.py                  10,000 files
    python benchmarks/fuzz.py --files 500      fewer; tests/test_fuzzing.py runs some of them

Good files of many formats, modes and sizes are damaged by a seeded generator: flipped bits, cut ends, headers of
another file, sizes of zero or of millions, repeated and removed parts. They lie in image folders and in copies of VOC
2012 (images and label maps), which are indexed and read file by file.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from heterokd.datasets import DATASETS
from heterokd.datasets.io.split import Dataset, Splits
from heterokd.errors import DataError

SIDE = 24
BATCH = 200
"""Files of a folder."""
LIMIT_S = 20
"""Seconds after which a file counts as hanging."""


class Hangs(BaseException):
    """Raised when a file takes too long."""


def good_files(rng: np.random.Generator) -> dict[str, list[bytes]]:
    """Return the contents of good files by suffix."""
    found: dict[str, list[bytes]] = {}

    def add(suffix: str, image: Image.Image, name: str, **options: object) -> None:
        content = io.BytesIO()
        image.save(content, name, **options)
        found.setdefault(suffix, []).append(content.getvalue())

    for width, height in ((16, 16), (1, 9), (33, 20)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        grey, palette = image.convert("L"), image.convert("P", palette=Image.Palette.ADAPTIVE)
        deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        exif = Image.Exif()
        exif[0x0112], exif[0x0100] = 6, 16
        for each in (image, grey, palette, deep, image.convert("RGBA"), image.convert("LA"), image.convert("1")):
            add(".png", each, "PNG")
        add(".png", palette, "PNG", transparency=0)
        add(".png", image, "PNG", exif=exif)
        add(".jpg", image, "JPEG", exif=exif)
        add(".jpg", image, "JPEG", progressive=True)
        add(".jpg", grey, "JPEG")
        add(".jpg", image.convert("CMYK"), "JPEG")
        add(".webp", image, "WEBP", lossless=True)
        add(".webp", image, "WEBP", exif=exif)
        add(".bmp", image, "BMP")
        add(".bmp", palette, "BMP")
        add(".gif", palette, "GIF", save_all=True, append_images=[palette])
        for compression in ("raw", "tiff_lzw", "tiff_deflate"):
            add(".tif", image, "TIFF", compression=compression)
        add(".tif", Image.fromarray(pixels[..., 0].astype(np.float32)), "TIFF")
        add(".ppm", image, "PPM")
        add(".tga", image, "TGA")
    return found


def label_files(rng: np.random.Generator, width: int, height: int) -> list[bytes]:
    """Return the contents of label maps of VOC's 21 classes."""
    numbers = Image.fromarray(rng.choice([*range(21), 255], (height, width)).astype(np.uint8))
    contents = []
    for palette in (True, False):
        image = numbers.copy()
        if palette:
            image.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
        content = io.BytesIO()
        image.save(content, "PNG")
        contents.append(content.getvalue())
    return contents


def damaged(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Damage the content of a file."""
    data = bytearray(content)
    place, length = int(rng.integers(len(data))), int(rng.integers(1, 9))
    match rng.integers(11):
        case 0:  # flipped bits anywhere
            for bit in rng.integers(0, 8 * len(data), length):
                data[bit // 8] ^= 1 << (bit % 8)
        case 1:  # and in the header
            for bit in rng.integers(0, 8 * min(64, len(data)), length):
                data[bit // 8] ^= 1 << (bit % 8)
        case 2:
            del data[place:]
        case 3:
            data[: min(len(other), 4 * length)] = other[: 4 * length]
        case 4:  # another file's end
            data[place:] = other[min(place, len(other)) :]
        case 5:
            del data[place : place + length]
        case 6:
            data[place:place] = data[max(0, place - 16 * length) : place]
        case 7:
            data[place:place] = rng.bytes(length)
        case 8:  # a size of zero, of one or of millions
            value = (0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 30_000)[rng.integers(6)]
            for start in {16, 20, place} if data[:4] == b"\x89PNG" else {place}:
                if rng.integers(2):
                    data[start : start + 4] = value.to_bytes(4, ("big", "little")[rng.integers(2)])
        case 9:  # no damage but the end, which many readers ignore
            data += rng.bytes(16)
        case _:
            data = bytearray(rng.bytes(length * 8)) if rng.integers(4) else bytearray()
    return bytes(data)


def write_image_folder(root: Path, rng: np.random.Generator) -> list[Path]:
    """Write a folder of damaged images of two classes; return the damaged files."""
    good, files = good_files(rng), []
    suffixes = list(good)
    for number in range(BATCH):
        suffix, other = (suffixes[place] for place in rng.integers(0, len(suffixes), 2))
        content = good[suffix][rng.integers(len(good[suffix]))]
        file = root / ("cat", "dog")[number % 2] / f"{number:04d}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(damaged(content, good[other][0], rng))
        files.append(file)
    return files


def write_voc(root: Path, rng: np.random.Generator) -> list[Path]:
    """Write VOC 2012 with damaged images and label maps; return the damaged files."""
    folder = root / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    names, files = [f"2007_{number:06d}" for number in range(BATCH)], []
    for number, name in enumerate(names):
        width, height = ((16, 16), (40, 30), (7, 33))[number % 3]
        content = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(content, "JPEG")
        image, label = folder / "JPEGImages" / f"{name}.jpg", folder / "SegmentationClass" / f"{name}.png"
        labels = label_files(rng, width, height)
        chosen = labels[rng.integers(2)]
        image.write_bytes(content.getvalue())
        label.write_bytes(chosen)
        if number % 4:
            label.write_bytes(damaged(chosen, labels[0], rng))
            files.append(label)
        else:
            image.write_bytes(damaged(content.getvalue(), chosen, rng))
            files.append(image)
    for part, chosen_names in (("train", names[: BATCH // 2]), ("val", names[BATCH // 2 :])):
        (folder / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(chosen_names) + "\n")
    return files


def outcomes(dataset: type[Dataset], root: Path, files: list[Path]) -> dict[Path, str]:
    """Index and read a folder of damaged files: `read`, `named`, or what else happened, by file."""
    found: dict[Path, str] = {}
    repaired = io.BytesIO()
    Image.new("RGB", (16, 16)).save(repaired, "PNG")

    def note(error: DataError) -> Path | None:
        """Note the file that a sentence names."""
        return next((file for file in files if str(file) in str(error)), None)

    while True:
        try:
            with _limited():
                splits = dataset().load(root, SIDE, 0)
        except DataError as error:
            file = note(error)
            if file is None or file in found:
                raise AssertionError(f"{root}: {error}") from error
            found[file] = "named"
            file.write_bytes(repaired.getvalue())  # as a user would replace it
            continue
        break
    for file, read in readers(splits):
        if found.get(file, "read") != "read" or file not in files:
            continue
        try:
            with _limited():
                read()
            found.setdefault(file, "read")
        except DataError as error:
            named = note(error)
            found[file] = "named" if named == file else f"another is named: {error}"
        except Hangs:
            found[file] = "hangs"
        except Exception as error:  # noqa: BLE001  any other exception is a failure of the file
            found[file] = f"{type(error).__name__}: {error}"
    return {file: found.get(file, "silence") for file in files}


def readers(splits: Splits) -> Iterator[tuple[Path, Callable[[], NDArray[np.uint8]]]]:
    """Yield each file of a data set with a function that reads it."""
    for split in (splits.train, splits.val, splits.test):
        for position in range(len(split)):
            index = np.array([position])
            if split.label_maps is None:
                yield split.images.files.path(position), lambda split=split, index=index: split.images.read(index)
            else:
                scenes = split.images.files
                yield scenes.image(position), lambda split=split, index=index: split.images.read(index)
                yield scenes.label(position), lambda split=split, index=index: split.label_maps.read(index)


@contextmanager
def _limited() -> Iterator[None]:
    def late(*_: object) -> None:
        raise Hangs

    signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)


def fuzz(files: int, seed: int = 0) -> Counter[str]:
    """Damage and read files; return the number of each outcome."""
    rng, counts = np.random.default_rng(seed), Counter[str]()
    kinds = (("image_folder", write_image_folder), ("voc2012", write_voc))
    for batch in range(-(-files // BATCH)):
        name, write = kinds[batch % len(kinds)]
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / name
            root.mkdir()
            written = write(root, rng)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, about what it read nevertheless
                ends = outcomes(DATASETS[name], root, written)
            for file, outcome in ends.items():
                counts[f"{name}: {outcome if outcome in ('read', 'named') else 'wrong'}"] += 1
                if outcome not in ("read", "named"):
                    kept = Path(tempfile.gettempdir()) / f"fuzz-{seed}-{batch}-{file.name}"
                    shutil.copy(file, kept)
                    print(f"{kept}: {outcome}")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.perf_counter()
    counts = fuzz(arguments.files, arguments.seed)
    print(f"{counts.total()} files in {time.perf_counter() - began:.0f} s: {dict(sorted(counts.items()))}")
    if arguments.out:
        arguments.out.write_text(json.dumps(counts, indent=1), encoding="utf-8")
    sys.exit(any(name.endswith("wrong") for name in counts))


if __name__ == "__main__":
    main()
