"""Graphs of segmentation students, as they are registered: saved, loaded, and compared with the live network."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from heterokd.networks.network import build_network, deployable
from heterokd.networks.segmentation import SegmentationNetwork
from heterokd.networks.segmentation_names import ARCHITECTURES
from heterokd.students.registry import graph_size
from heterokd.tracking.store import quiet
from heterokd.training.meters import upsample

SWIN = "swin_tiny_patch4_window7_224"
ENCODERS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "mobilenet_v2": {},
    "mit_b0": {},
    "pvt_v2_b0": {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "num_heads": [1, 1, 2, 2]},
    "test_resnet": {},
    SWIN: {"depths": [1, 1, 2, 1], "embed_dim": 16, "num_heads": [1, 2, 4, 8]},
}
DECODERS = ("deeplabv3", "deeplabv3plus", "segformer", "upernet", "fpn")
# The other decoders on a single encoder: they have no layer that an encoder changes. PAN takes no small views.
MORE = [f"{name}-test_resnet" for name in ARCHITECTURES if name not in (*DECODERS, "dpt", "pan")]
VIEWS = ((48, 48), (64, 64), (96, 96), (64, 96))
# Every combination, at one size of views after the other.
COMBINATIONS = [
    (f"{architecture}-{encoder}", VIEWS[number % len(VIEWS)])
    for number, (architecture, encoder) in enumerate(product(DECODERS, ENCODERS))
] + [(name, (64, 96)) for name in MORE]


def exported(name: str, view: tuple[int, int], folder: Path) -> tuple[SegmentationNetwork, Any, bool]:
    """A network, its graph from a file, and whether that takes images of any size; the export is that of MLflow."""
    torch.manual_seed(0)
    network = build_network(name, 4, ENCODERS[name.partition("-")[2]], image_size=max(view))
    assert isinstance(network, SegmentationNetwork)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # as a trained network has them
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    any_size = graph_size(network.eval(), view) is None
    axes = (0, 2, 3) if any_size else (0,)
    with quiet():
        program = torch.export.export(
            deployable(network), (torch.rand(2, 3, *view),), dynamic_shapes=[dict.fromkeys(axes, torch.export.Dim.AUTO)]
        )
        torch.export.save(program, folder / "student.pt2")
        return network, torch.export.load(folder / "student.pt2").module(), any_size


def check(name: str, view: tuple[int, int], folder: Path) -> None:
    network, graph, any_size = exported(name, view, folder)
    assert any_size == (SWIN not in name)
    # One size whose sides are multiples of every stride, one of odd sides, unless the graph takes that of views alone.
    sizes = {view, (96, 64), (51, 75)} if any_size else {view}
    for size, batch in product(sizes, (1, 5)):
        images = torch.rand(batch, 3, *size)
        with torch.inference_mode():
            torch.testing.assert_close(graph(images), upsample(network(images).logits, size), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "view"),
    [
        pytest.param("deeplabv3plus-test_resnet", (48, 48), marks=pytest.mark.thorough),
        pytest.param("segformer-pvt_v2_b0", (64, 96), marks=pytest.mark.thorough),
        pytest.param(f"fpn-{SWIN}", (48, 64), marks=pytest.mark.thorough),
    ],
)
def test_a_graph_gives_the_networks_logits(name: str, view: tuple[int, int], tmp_path: Path) -> None:
    check(name, view, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "view"), COMBINATIONS)
def test_every_combination_gives_its_logits(name: str, view: tuple[int, int], tmp_path: Path) -> None:
    check(name, view, tmp_path)


@pytest.mark.thorough
def test_views_of_one_deepest_pixel_fix_the_size(tmp_path: Path) -> None:
    network, graph, any_size = exported("fpn-test_resnet", (32, 48), tmp_path)
    assert not any_size
    images = torch.rand(5, 3, 32, 48)
    with torch.inference_mode():
        torch.testing.assert_close(graph(images), upsample(network(images).logits, (32, 48)), atol=1e-5, rtol=0)
