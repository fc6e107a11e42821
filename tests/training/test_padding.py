"""Padding of images with label maps is the mean colour of each network, in training and in evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from heterokd.config.data import DataSettings
from heterokd.datasets.io.loaders import TrainLoader, open_split
from heterokd.datasets.io.split import Splits
from heterokd.datasets.views.policy import NETWORK_MEAN, AugmentPolicy, ViewSpec
from heterokd.networks.network import build_network
from heterokd.outputs import IGNORE
from heterokd.students.promotion.served import ServingModel
from heterokd.training.data import open_splits
from heterokd.training.task_modules import build_task

RED, SIZES = (200, 10, 30), ((24, 60), (64, 20), (40, 40))
"""A colour that no padding has, and sizes of images on a canvas of 64 pixels."""
POLICY = AugmentPolicy(zoom=(0.5, 2.0), flip=0.5, rotation=20.0, brightness=0.8)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return open_splits(settings(red_images(tmp_path_factory.mktemp("red"))))


def red_images(folder: Path) -> Path:
    for split in ("train", "val", "test"):
        for number, (height, width) in enumerate(SIZES):
            for kind, colour in (("images", RED), ("masks", number % 2)):
                (folder / split / kind).mkdir(parents=True, exist_ok=True)
                shape = (height, width, 3) if kind == "images" else (height, width)
                Image.fromarray(np.full(shape, colour, np.uint8)).save(folder / split / kind / f"{number}.png")
    return folder


def settings(root: Path, **more: object) -> DataSettings:
    masks = {"classes": ["a", "b"]}
    return DataSettings.model_validate(
        {"dataset": "mask_folder", "root": root, "image_size": 64, "masks": masks, **more}
    )


def views(splits: Splits, policy: AugmentPolicy, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    loader = TrainLoader(splits.train, ViewSpec(policy, crop=(size, size), fill=NETWORK_MEAN), 3)
    parts = [loader.views_of(np.arange(3), np.full(3, view)) for view in range(6)]
    return torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])


@pytest.mark.parametrize("name", ["fpn-test_resnet", "unet-vgg11"])
def test_padding_is_zero_after_each_networks_normalisation(splits: Splits, name: str) -> None:
    network = build_network(name, 2, image_size=64)
    network.mean.copy_(torch.tensor([0.5, 0.1, 0.9]).view(1, 3, 1, 1))
    images, labels = views(splits, POLICY, 48)
    normalised, padding = network.normalise(images), labels == IGNORE
    assert 0.2 < padding.float().mean() < 0.9
    assert (normalised.permute(0, 2, 3, 1)[padding] == 0).all(), "whatever brightness the view has"
    assert network(images).logits.isfinite().all()


@pytest.mark.parametrize("policy", [AugmentPolicy(zoom=(0.5, 2.0), flip=0.5, rotation=20.0), AugmentPolicy()])
@pytest.mark.parametrize("size", [64, 48])
def test_no_pixel_of_an_image_has_a_colour_of_the_canvas(splits: Splits, policy: AugmentPolicy, size: int) -> None:
    images, labels = views(splits, policy, size)
    padding = images.isnan().all(1)
    assert torch.equal(padding, images.isnan().any(1))
    assert torch.equal(padding, labels == IGNORE)
    colours = images.permute(0, 2, 3, 1)[~padding]
    torch.testing.assert_close(colours, (torch.tensor(RED) / 255).expand_as(colours), atol=1e-5, rtol=0)
    if policy == AugmentPolicy() and size == 64:
        assert [int((~each).sum()) for each in padding[:3]] == [height * width for height, width in SIZES]


def test_evaluations_and_registered_models_see_the_same(splits: Splits) -> None:
    (batch,) = open_split(splits.val, 2)
    assert [int((~image.isnan().any(0)).sum()) for image in batch.images] == [h * w for h, w in SIZES]

    class Shown(nn.Module):
        """A graph that returns the first two colours it is given."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.5, 0.1, 0.9]).view(1, 3, 1, 1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, :2]

    seen = ServingModel(Shown(), build_task("segmentation", 2), (96, 96))(batch.images)
    outside = batch.images.isnan().any(1)
    assert torch.equal(seen.permute(0, 2, 3, 1)[outside], torch.tensor([0.5, 0.1]).expand(int(outside.sum()), 2))
    torch.testing.assert_close(seen.permute(0, 2, 3, 1)[~outside][0], torch.tensor(RED[:2]) / 255)


def test_older_rules_keep_the_canvas(tmp_path: Path) -> None:
    older = open_splits(settings(red_images(tmp_path), scene_views=2))
    (batch,) = open_split(older.val, 2)
    assert not batch.images.isnan().any()
    assert batch.images[0, :, -1, -1].mul(255).round().tolist() == [124, 116, 104]
