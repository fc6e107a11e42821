"""Training crops that come from the photo: its detail, its shape, the same for every worker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from heterokd.config.data import DataSettings
from heterokd.datasets.image_folder import ImageFolder
from heterokd.datasets.io.image_files import FileImages
from heterokd.datasets.io.loaders import TrainLoader, Worker
from heterokd.datasets.io.options import DataOptions
from heterokd.datasets.io.read_image import Crop, read_crop
from heterokd.datasets.io.shared_pixels import SharedImages, share_splits
from heterokd.datasets.io.split import Splits
from heterokd.datasets.views.geometry import photo_crops
from heterokd.datasets.views.policy import POLICIES, ViewSpec
from heterokd.datasets.views.random import view_draws

SIZE = 32


def photo(seed: int, width: int, height: int) -> Image.Image:
    rough = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def folder(root: Path, **options: object) -> Splits:
    for number in range(30):
        path = root / "ab"[number % 2] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(number, *((240, 160), (160, 200))[number % 3 // 2]).save(path, quality=95)
    return ImageFolder().load_with(root, SIZE, 0, DataOptions(**options))  # type: ignore[arg-type]


def test_a_crop_is_cut_as_torchvision_cuts_it(tmp_path: Path) -> None:
    """The box has the drawn area and ratio, lies inside, and shows the photo's detail."""
    image = photo(0, 800, 600)
    image.save(tmp_path / "photo.png")
    crop = Crop(0.08, 4 / 3, 0.25, 1.0)
    left, top, right, bottom = crop.box(800, 600)
    assert (right - left) * (bottom - top) == pytest.approx(0.08 * 800 * 600)
    assert (right - left) / (bottom - top) == pytest.approx(4 / 3)
    assert (left, bottom) == pytest.approx((0.25 * (800 - (right - left)), 600))
    expected = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    assert (read_crop(tmp_path / "photo.png", SIZE, crop) == np.asarray(expected)).all()
    assert Crop(1.0, 4 / 3, 0.3, 0.3).box(300, 900) == pytest.approx((0, 0.3 * (900 - 450), 300, 0.3 * 450 + 450))


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_large_jpegs_are_decoded_small_and_upright(tmp_path: Path, orientation: int) -> None:
    image, exif = photo(1, 800, 600), Image.Exif()
    stored = {
        1: image,
        3: image.transpose(Image.Transpose.ROTATE_180),
        5: image.transpose(Image.Transpose.TRANSPOSE),
        6: image.transpose(Image.Transpose.ROTATE_90),
        8: image.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif[0x112] = orientation
    stored.save(tmp_path / "photo.jpg", exif=exif, quality=98, subsampling=0)
    for crop in (Crop(0.9, 1.2, 0.1, 0.7), Crop(0.1, 0.8, 0.9, 0.2)):
        expected = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=crop.box(800, 600))
        difference = np.abs(read_crop(tmp_path / "photo.jpg", SIZE, crop).astype(int) - np.asarray(expected, int))
        assert difference.mean() < 4


@pytest.mark.parametrize("policy", ["crop", "standard", "ofa"])
def test_views_are_the_same_for_every_worker_and_order(tmp_path: Path, policy: str) -> None:
    splits = folder(tmp_path, crops="photo")
    few = splits.with_labels_per_class(6)
    spec = ViewSpec(POLICIES[policy], seed=3)
    whole = TrainLoader(few.train, spec, 6, num_classes=2)
    parts = [TrainLoader(few.train, spec, 6, num_classes=2, worker=Worker(rank, 2)) for rank in range(2)]
    for batch, *shares in zip(whole.epoch(1), *(part.epoch(1) for part in parts), strict=True):
        together = torch.cat([share.images for share in shares])
        assert torch.equal(batch.images, together)
        again = whole.views_of(batch.index.numpy(), np.full(len(batch), 1))
        assert torch.equal(again.images, batch.images)
        assert torch.equal(again.labels, batch.labels)
    assert not torch.equal(batch.images, whole.views_of(batch.index.numpy(), np.full(len(batch), 2)).images)


def test_a_view_is_the_crop_of_its_draws(tmp_path: Path) -> None:
    splits = folder(tmp_path, crops="photo")
    policy = POLICIES["crop"].model_copy(update={"flip": 0.0})
    index, view = np.array([4, 0, 11]), np.array([5, 2, 0])
    batch = TrainLoader(splits.train, ViewSpec(policy, 7), 3).views_of(index, view)
    files = splits.train.images
    assert isinstance(files, FileImages)
    crops = photo_crops(policy, view_draws(policy, 7, index, view))
    for row, position in enumerate(index):
        expected = read_crop(files.files.path(position), SIZE, Crop(*crops[:, row]), files.files.reading)
        assert (np.round(batch.images[row].permute(1, 2, 0).numpy() * 255) == expected).all()
    plain = TrainLoader(splits.train, ViewSpec(POLICIES["none"], 7), 3).views_of(index, view)
    assert (np.round(plain.images.permute(0, 2, 3, 1).numpy() * 255) == files.read(index)).all()


def test_only_val_is_decoded_into_a_shared_file(tmp_path: Path) -> None:
    shared = share_splits(tmp_path / "pixels", folder(tmp_path / "images", crops="photo"))
    assert isinstance(shared.train.images, FileImages)
    assert isinstance(shared.val.images, SharedImages)


def test_val_shows_a_share_of_the_square(tmp_path: Path) -> None:
    whole, inner = folder(tmp_path), folder(tmp_path, val_crop=0.5)
    images = inner.val.images
    assert isinstance(images, FileImages)
    with Image.open(images.files.path(0)) as opened:
        side = min(opened.size) / 2
        left, top = (opened.width - side) / 2, (opened.height - side) / 2
        box = (left, top, left + side, top + side)
        expected = np.asarray(opened.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box), int)
    assert np.abs(images.read(np.array([0]))[0].astype(int) - expected).mean() < 4
    assert inner.train.digest == whole.train.digest
    assert len({whole.fingerprint, inner.fingerprint, folder(tmp_path, crops="photo").fingerprint}) == 3


def test_crops_of_photos_need_a_policy_of_crops(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="crops: photo needs a policy without rotation"):
        DataSettings(dataset="image_folder", root=tmp_path, crops="photo", augment="digits")
