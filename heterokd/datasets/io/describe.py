"""Describe the images of a data set before work begins: what is used, and what looks wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from heterokd.datasets.io.decoded_files import decoding_threads
from heterokd.datasets.io.image_files import FileImages, LabelledFiles
from heterokd.datasets.io.images import positions_in_source, source_of
from heterokd.datasets.io.options import FIRST_READER
from heterokd.datasets.io.read_image import open_image, to_rgb
from heterokd.datasets.io.split import Split, Splits
from heterokd.datasets.io.unlabelled import copies_of_held_out
from heterokd.datasets.io.value_range import ScannedRange, raw_mode
from heterokd.errors import DataError

# Maximum number of files of a split, evenly spaced, that are opened for a description.
OPENED = 1024
# Copies at another size or quality: their difference hashes (64 bits) differ in at most so many bits, and their
# thumbnails by at most so many levels of 255, in the mean and at 99 % of the values.
NEAR_BITS = 4
NEAR_MEAN, NEAR_MOST = 4.0, 40
THUMBNAIL = 32
# Maximum number of images with a similar hash that an image is compared with: many plain images would take long.
NEIGHBOURS = 64
# Shares of images.
MANY, UNEVEN = 0.5, 10.0
NAMED = 5
UNLABELLED = "unlabelled"  # images without labels, where splits have names


@dataclass(frozen=True)
class _Look:
    """An opened file.

    Attributes:
        name: path below the root.
        split: its split, or `UNLABELLED`.
        label: its class number.
        size: width and height in pixels.
        mode: mode of Pillow; `RGB;16` for colors of 16 bits.
        frames: whether it has several frames or pages.
        hash: difference hash, 64 bits; None if it cannot be decoded.
        thumbnail: [32, 32, 3] pixels; empty if it cannot be decoded.
    """

    name: str
    split: str
    label: int
    size: tuple[int, int]
    mode: str
    frames: bool
    hash: int | None
    thumbnail: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8), compare=False)


def describe_images(splits: Splits) -> list[str]:
    """Describe images with one class each that are read from files; empty for others.

    Up to `OPENED` files each of train, of val, and of the images without labels are opened. Of test, files are only
    compared with those without labels, byte by byte.
    """
    shown = {"train": splits.train, "val": splits.val, UNLABELLED: splits.unlabelled}
    parts = {
        name: split
        for name, split in shown.items()
        if split is not None and split.label_maps is None and isinstance(source_of(split.images), FileImages)
    }
    if not parts:
        return []
    lines = [_counts(splits)]
    looks = [look for name, split in parts.items() for look in _look_at(split, name)]
    readable = [look for look in looks if look.hash is not None]
    lines += _sizes(readable, sum(map(len, parts.values())), next(iter(parts.values())))
    wrong = [*_uneven(splits), *_near_copies(readable), *_shown(splits, readable)]
    damaged = [look.name for look in looks if look.hash is None]
    if damaged:
        wrong.append(f"{len(damaged)} files cannot be read (such as {damaged[0]})")
    return [*lines, *(f"looks wrong: {sentence}" for sentence in wrong)]


def _counts(splits: Splits) -> str:
    counts = np.bincount(splits.train.labels, minlength=splits.num_classes)
    few, most = int(counts.argmin()), int(counts.argmax())
    names = splits.class_names
    others = f" and {len(splits.unlabelled)} without labels" if splits.unlabelled is not None else ""
    return (
        f"{len(splits.train)} training images{others}, {len(splits.val)} val, {len(splits.test)} test; "
        f"{splits.num_classes} "
        f"classes, in train from {counts[few]} ({names[few]}) to {counts[most]} ({names[most]})"
    )


def _uneven(splits: Splits) -> list[str]:
    counts = np.bincount(splits.train.labels, minlength=splits.num_classes)
    if counts.max() < UNEVEN * max(1, counts.min()):
        return []
    largest = counts.max() / counts.sum()
    return [
        f"classes are uneven, up to {counts.max() / max(1, counts.min()):.0f} to 1: always the largest class is right "
        f"{largest:.1%} of the time"
    ]


def _look_at(split: Split, name: str) -> list[_Look]:
    images = split.images
    index = np.arange(len(images))
    index = index[:: -(-len(index) // OPENED) or 1]
    source = source_of(images)
    assert isinstance(source, FileImages)  # checked by `describe_images`
    positions = positions_in_source(images, index)
    files = source.files
    with decoding_threads() as pool:  # which also fetch stored files
        return list(pool.map(partial(_open, files, name), positions.tolist(), split.labels[index].tolist()))


def _open(files: LabelledFiles, split: str, position: int, label: int) -> _Look:
    path, name, reading = files.path(position), files.name(position), files.reading
    look = _Look(name, split, label, (0, 0), "", False, None)
    try:
        with open_image(path, reading) as opened:
            size, raw = opened.size, raw_mode(opened)
            mode = f"{opened.mode};16" if ";16" in raw and not opened.mode.startswith("I") else opened.mode
            opened.draft("RGB", (64, 64))
            image = to_rgb(opened, path, reading)
            small = image.convert("L").resize((9, 8), Image.Resampling.BOX)
            thumbnail = np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
            frames = getattr(opened, "n_frames", 1) > 1
    except DataError:
        return look
    pixels = np.asarray(small)
    bits = np.packbits(pixels[:, 1:] > pixels[:, :-1])
    return _Look(name, split, label, size, mode, frames, int.from_bytes(bits.tobytes(), "big"), thumbnail)


def _sizes(looks: Sequence[_Look], total: int, split: Split) -> list[str]:
    if not looks:
        return []
    sides = sorted(min(look.size) for look in looks)
    modes = ", ".join(f"{count} {mode}" for mode, count in Counter(look.mode for look in looks).most_common(NAMED))
    of = "" if len(looks) >= total else f" (of {len(looks)} files that were opened)"
    lines = [f"shorter sides of {sides[0]} to {sides[-1]} pixels, median {sides[len(sides) // 2]}; {modes}{of}"]
    source = source_of(split.images)
    assert isinstance(source, FileImages)
    reading = source.files.reading
    deep = [look for look in looks if look.mode[:1] in ("I", "F") or look.mode.endswith(";16")]
    if deep and reading.values is not None:
        is_float = {look.mode == "F" for look in deep}
        ranges = " and ".join("{:g} to {:g}".format(*reading.values.bounds(is_float=kind)) for kind in sorted(is_float))
        origin = "the range that they use" if isinstance(reading.values, ScannedRange) else "data.value_range"
        lines.append(f"files of more than 8 bits: {ranges} becomes black to white, {origin}")
    elif deep:
        lines.append(f"files of more than 8 bits: the high byte is read (data.reader: {FIRST_READER})")
    clear = sum(look.mode in ("RGBA", "LA", "PA", "RGBA;16") for look in looks)
    if clear:
        below = "ignored" if reading.background is None else "laid on rgb({}, {}, {})".format(*reading.background)
        lines.append(f"transparency is {below}: {clear} files with an alpha channel")
    frames = [look.name for look in looks if look.frames]
    if frames:
        lines.append(f"of {len(frames)} files with several frames the first is read (such as {frames[0]})")
    return lines


def _near_copies(looks: Sequence[_Look]) -> list[str]:
    """Say which images are nearly the same in train and val, or under two labels."""
    pairs = _near_pairs(looks)
    sentences = []
    leaked = [(a, b) for a, b in pairs if {a.split, b.split} == {"train", "val"}]
    if leaked:
        first, second = leaked[0]
        count = len({look.name for pair in leaked for look in pair if look.split == "val"})
        sentences.append(
            f"{count} images of val are nearly the same in train ({first.name} and {second.name}): scores are too high"
        )
    mixed = [(a, b) for a, b in pairs if a.label != b.label and UNLABELLED not in (a.split, b.split)]
    if mixed:
        first, second = mixed[0]
        sentences.append(f"{len(mixed)} pairs of nearly equal images have two labels ({first.name} and {second.name})")
    hashes = Counter(look.hash for look in looks if look.split == "train")
    total = sum(hashes.values())
    if total and hashes.most_common(1)[0][1] > max(1, MANY * total):
        sentences.append(f"{hashes.most_common(1)[0][1]} of {total} training images that were opened look the same")
    return sentences


def _shown(splits: Splits, looks: Sequence[_Look]) -> list[str]:
    """Say which images without labels are images of val or test, or nearly the same as images of val."""
    copies = copies_of_held_out(splits)
    sentences = [
        f"{len(names)} images without labels are images of {name} (such as {names[0]}): the student sees them in "
        "training, without their labels"
        for name, names in copies.items()
        if names
    ]
    exact = set(copies.get("val", ()))
    pairs = [pair for pair in _near_pairs(looks) if {look.split for look in pair} == {"val", UNLABELLED}]
    near = sorted({look.name for pair in pairs for look in pair if look.split == UNLABELLED} - exact)
    if near:
        sentences.append(f"{len(near)} images without labels are nearly the same as images of val (such as {near[0]})")
    return sentences


def _near_pairs(looks: Sequence[_Look]) -> list[tuple[_Look, _Look]]:
    """Return pairs of images with similar hashes and thumbnails."""
    hashes = np.array([look.hash for look in looks], np.uint64)
    pairs = []
    for place, value in enumerate(hashes):
        near = np.flatnonzero(np.bitwise_count(hashes[place + 1 :] ^ value) <= NEAR_BITS) + place + 1
        first = looks[place].thumbnail.astype(np.int16)
        for other in near.tolist()[:NEIGHBOURS]:
            difference = np.abs(looks[other].thumbnail - first)
            if difference.mean() <= NEAR_MEAN and (difference > NEAR_MOST).mean() <= 0.01:
                pairs.append((looks[place], looks[other]))
    return pairs
