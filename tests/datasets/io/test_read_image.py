"""Files of every kind: read as they look, or refused by name."""

from __future__ import annotations

import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heterokd.datasets.image_folder import ImageFolder
from heterokd.datasets.io.options import DataOptions
from heterokd.datasets.io.read_image import Reading, image_suffixes, read_image
from heterokd.datasets.io.split import Splits
from heterokd.datasets.io.value_range import GivenRange, ScannedRange
from heterokd.errors import DataError

GREEN = (0, 255, 0)
NEW = Reading(GREEN, GivenRange(0, 200))


def png_of_16_bits(values: np.ndarray, color_type: int) -> bytes:
    """Pillow writes no colours of 16 bits."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def broken_exif() -> bytes:
    """Orientation 6, and a width of 72.0, which is no integer."""
    fields = ((0x100, 12, struct.pack("<I", 38)), (0x112, 3, struct.pack("<HH", 6, 0)))
    table = b"".join(struct.pack("<HHI", tag, kind, 1) + value for tag, kind, value in fields)
    return b"Exif\0\0II*\0\x08\0\0\0\x02\0" + table + b"\0\0\0\0" + struct.pack("<d", 72.0)


@pytest.mark.parametrize(
    "kind", ["RGBA.png", "RGBA.webp", "RGBA.gif", "RGBA.tif", "LA.png", "LA.tif", "PA.tif", "P.png"]
)
def test_transparency_shows_the_background(tmp_path: Path, kind: str) -> None:
    mode, _, suffix = kind.partition(".")
    drawing = np.zeros((8, 8, 4), np.uint8)
    drawing[:, :4] = (0, 0, 0, 255)
    image = Image.fromarray(drawing)
    if mode == "P":
        image = Image.fromarray((drawing[..., 3] == 0).astype(np.uint8))
        image.putpalette([0, 0, 0] * 2)
    elif mode == "PA":
        image = image.convert("RGB").convert("P")
        image.putalpha(Image.fromarray(drawing[..., 3]))
    elif mode == "LA":
        image = image.convert("LA")
    path = tmp_path / f"drawing.{suffix}"
    image.save(path, **({"transparency": 1} if mode == "P" else {"lossless": True} if suffix == "webp" else {}))
    read = read_image(path, 8, reading=NEW)
    assert (read[:, :4] == 0).all()
    assert (read[:, 4:] == GREEN).all()
    assert (read_image(path, 8)[:, :4] == 0).all(), "the first reader ignores transparency"


@pytest.mark.parametrize(("mode", "nothing"), [("L", 7), ("RGB", (7, 7, 7))])
def test_a_transparent_color_shows_the_background(tmp_path: Path, mode: str, nothing: int | tuple[int, ...]) -> None:
    Image.new(mode, (4, 4), nothing).save(tmp_path / "keyed.png", transparency=nothing)
    assert (read_image(tmp_path / "keyed.png", 4, reading=NEW) == GREEN).all()


def write_deep(folder: Path, kind: str, values: np.ndarray) -> Path:
    path = folder / f"deep.{kind.partition('.')[2]}"
    if kind.startswith(("RGB", "RGBA")):
        channels = 4 if kind.startswith("RGBA") else 3
        colors = np.repeat(values[:, :, None], channels, axis=2).astype(np.uint16)
        colors[..., 3:] = 65535
        path.write_bytes(png_of_16_bits(colors, {3: 2, 4: 6}[channels]))
    else:
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[kind.partition(".")[0]]
        Image.fromarray(values.astype(dtype)).save(path)
    return path


@pytest.mark.parametrize("kind", ["I;16.png", "I;16.tif", "I.tif", "F.tif", "F.pfm", "RGB.png", "RGBA.png"])
def test_deep_pixels_are_scaled_by_their_range(tmp_path: Path, kind: str) -> None:
    """8-bit values in a file of 16 bits were black."""
    path = write_deep(tmp_path, kind, np.array([[0, 50], [100, 200]]))
    grey = read_image(path, 2, reading=NEW)[..., 0].tolist()
    assert grey == [[0, 64], [128, 255]]
    scanned = ScannedRange(tmp_path, np.array([path.name.encode()]))
    assert read_image(path, 2, reading=Reading(GREEN, scanned))[..., 0].tolist() == grey
    assert pickle.loads(pickle.dumps(scanned)).bounds(is_float=kind.startswith("F")) == (0, 200)
    assert scanned.bounds(is_float=not kind.startswith("F")) == (0, 1), "floats and integers have their own ranges"


def test_numbers_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "sensor.tif"
    Image.fromarray(np.array([[np.nan, -1.0], [1.0, np.inf]], np.float32)).save(path)
    scanned = ScannedRange(tmp_path, np.array([b"sensor.tif", b"missing.tif"]))
    assert read_image(path, 2, reading=Reading(GREEN, scanned))[..., 0].tolist() == [[0, 0], [255, 255]]


@pytest.mark.parametrize(("mode", "suffix"), [("LAB", "tif"), ("YCbCr", "tif"), ("CMYK", "tif"), ("CMYK", "jpg")])
def test_every_color_space_becomes_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    grey = (
        Image.merge("LAB", [Image.new("L", (4, 4), 128)] * 3) if mode == "LAB" else Image.new("RGB", (4, 4), (119,) * 3)
    )
    grey.convert(mode).save(tmp_path / f"grey.{suffix}")
    assert np.abs(read_image(tmp_path / f"grey.{suffix}", 4, reading=NEW).astype(int) - 119).max() <= 2


def test_a_broken_exif_field_costs_nothing(tmp_path: Path) -> None:
    pixels = np.zeros((30, 30, 3), np.uint8)
    pixels[:15] = 255
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=broken_exif(), quality=100)
    turned = read_image(tmp_path / "photo.jpg", 2, reading=NEW)[..., 0]
    assert turned[:, 0].max() < 30, "turned clockwise by a quarter: what was above is right"
    assert turned[:, 1].min() > 200


def test_huge_images_need_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if they exceed Pillow's limits, which are lowered here for a small file: an error, or a warning."""
    path = tmp_path / "mosaic.png"
    Image.new("1", (300, 200)).save(path)
    for limit in (20_000, 50_000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=r"300 x 200 pixels, data\.max_megapixels allows 0\.05 million; raise it"):
            read_image(path, 4, reading=Reading(max_megapixels=0.05))
        assert read_image(path, 4, reading=Reading(max_megapixels=0.1)).shape == (4, 4, 3)
        assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.thorough)])
def test_damaged_files_are_named(tmp_path: Path, count: int) -> None:
    """Files of many formats, each cut and overwritten at seeded places: an image, or a sentence with the path."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    named = 0
    for suffix in ("png", "jpg", "gif", "tif", "webp", "bmp", "ppm", "tga", "ico", "pcx", "sgi", "dds", "jp2", "icns"):
        path = tmp_path / f"image.{suffix}"
        noise.save(path, **({"exif": broken_exif()} if suffix == "jpg" else {}))
        whole = path.read_bytes()
        for _ in range(count):
            damaged = bytearray(whole[: rng.integers(1, len(whole))])
            for place in rng.integers(0, len(damaged), 4):
                damaged[place] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                assert read_image(path, 4, reading=NEW).shape == (4, 4, 3)
            except DataError as error:
                assert str(error).startswith(f"{path}: ")  # noqa: PT017
                named += 1
    assert named > 7 * count


def test_every_format_of_pillow_is_listed() -> None:
    assert {".tif", ".gif", ".jfif", ".ppm", ".webp", ".bmp", ".png", ".jpg", ".mpo"} <= set(image_suffixes())
    assert not {".eps", ".pdf", ".mpg", ".h5"} & set(image_suffixes()), "EPS would start Ghostscript"


def folder_of(root: Path, images: list[Image.Image], suffix: str = "png", **options: object) -> Splits:
    for number, image in enumerate(images):
        path = root / "ab"[number % 2] / f"{number:03d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return ImageFolder().load_with(root, 8, 0, DataOptions(**options))  # type: ignore[arg-type]


def test_a_folder_of_deep_files_has_one_range(tmp_path: Path) -> None:
    images = [Image.fromarray(np.full((8, 8), value, np.uint16)) for value in range(100, 4100, 100)]
    pixels = folder_of(tmp_path, images).train.images
    levels = np.unique(pixels.read(np.arange(len(pixels)))[:, 0, 0, 0])
    assert len(levels) == len(pixels), "12-bit values in a file of 16 bits keep their order and their distances"
    assert levels.max() > 200
    first = ImageFolder().load_with(tmp_path, 8, 0, DataOptions(reader=1)).train.images
    assert first.read(np.arange(len(first))).max() < 16


def test_the_reading_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 4), dtype=np.uint8)
    splits = folder_of(tmp_path, [Image.fromarray(image) for image in noise])
    kinds = ({}, {"background": GREEN}, {"value_range": (0.0, 1.0)}, {"reader": 1})
    loaded = [ImageFolder().load_with(tmp_path, 8, 0, DataOptions(**kind)) for kind in kinds]  # type: ignore[arg-type]
    assert loaded[0].fingerprint == splits.fingerprint
    assert len({each.fingerprint for each in loaded}) == len(kinds)
    assert len({each.train.digest for each in loaded}) == 3, "no file has more than 8 bits"


@pytest.mark.parametrize("kind", ["one image", "black", "nearly"])
def test_a_set_without_spread_is_refused(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    pixels = np.repeat(rng.integers(3, 250, (1, 8, 8, 3), dtype=np.uint8), 60, axis=0) * (kind != "black")
    if kind == "nearly":
        pixels += rng.integers(0, 3, pixels.shape, dtype=np.uint8)
        pixels[::20] = rng.integers(0, 256, pixels[::20].shape, dtype=np.uint8)
    splits = folder_of(tmp_path, [Image.fromarray(image) for image in pixels])
    with pytest.raises(DataError, match=r"\d+ of 36 training images are alike after reading"):
        splits.check_images()


def test_small_differences_are_spread(tmp_path: Path) -> None:
    pixels = np.full((60, 8, 8, 3), 255, np.uint8)
    for number, image in enumerate(pixels):
        image[number // 8, number % 8] = 0
    folder_of(tmp_path, [Image.fromarray(image) for image in pixels]).check_images()
