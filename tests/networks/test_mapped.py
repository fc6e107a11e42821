"""Users' modules for segmentation, as teacher and as student."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from heterokd.config.networks import NetworkSettings
from heterokd.config.reading import load_experiment
from heterokd.errors import NetworkError
from heterokd.execution.check import check_experiment
from heterokd.execution.run import RunContext, run_recipe
from heterokd.networks.mapped import MappedNetwork
from heterokd.networks.network import build_network, deployable, predict_spec
from heterokd.networks.weights import load_weights, save_weights, weights_hash
from heterokd.outputs import Signal, StageSpec
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.teachers.prepare import prepare_teacher

NETS = '''
from torch import nn
import torch.nn.functional as F


def block(given, channels):
    return nn.Sequential(nn.Conv2d(given, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class Small(nn.Module):
    """A U of four stages; its logits have a stride of 4, or of 1."""

    def __init__(self, num_classes, width=8, upsampled=False):
        super().__init__()
        self.stem = block(3, width)
        self.one, self.two = block(width, width), block(width, 2 * width)
        self.three, self.four = block(2 * width, 4 * width), block(4 * width, 8 * width)
        self.mix = nn.Conv2d(9 * width, 16, 1)
        self.out = nn.Conv2d(16, num_classes, 1)
        self.upsampled = upsampled

    def forward(self, x):
        first = self.one(self.stem(x))
        last = self.four(self.three(self.two(first)))
        up = F.interpolate(last, size=first.shape[-2:], mode="bilinear")
        logits = self.out(F.relu(self.mix(torch_cat(first, up)), inplace=True))
        if self.upsampled:
            return {"out": F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)}
        return logits


def torch_cat(*maps):
    import torch

    return torch.cat(maps, dim=1)


def make(num_classes, width=8, upsampled=False):
    return Small(num_classes, width, upsampled)


def more(num_classes):
    return Small(num_classes + 1)
'''
STAGES = ["one", "two", "three", "four"]
TAPS = {"stages": STAGES}
Write = Callable[..., Path]


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "nets.py"
    file.write_text(NETS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return file


def built(taps: Any = TAPS, **options: Any) -> MappedNetwork:
    given = {**options, **({} if taps is None else {"taps": taps})}
    settings = NetworkSettings(network="./nets.py:make", options=given)
    torch.manual_seed(0)
    network = build_network(settings.network, 5, settings.options, image_size=64).eval()
    assert isinstance(network, MappedNetwork)
    assert predict_spec(settings.network, 5, settings.options, 64) == network.spec
    return network


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize("size", [(64, 64), (70, 45)])
def test_what_it_gives_is_what_its_modules_give(size: tuple[int, int], tmp_path: Path) -> None:
    """Of any size: images are padded, and maps are cropped to the positions that see the image."""
    network = built()
    assert network.spec.stages == tuple(StageSpec(8 * 2**i, 4 * 2**i) for i in range(4))
    assert (network.spec.logits_stride, network.spec.embedding_dim) == (4, 16)
    assert network.spec.serves == Signal.LOGITS | Signal.EMBEDDING | Signal.STAGES
    images = torch.rand(2, 3, *size)
    found = network(images, network.spec.serves)
    body: Any = network.body
    padded = F.pad((images - network.mean) / network.std, (0, -size[1] % 32, 0, -size[0] % 32))
    maps = [body.one(body.stem(padded))]
    for module in (body.two, body.three, body.four):
        maps.append(module(maps[-1]))
    rows, columns = -(-size[0] // 4), -(-size[1] // 4)
    torch.testing.assert_close(found.logits, body(padded)[..., :rows, :columns])
    torch.testing.assert_close(found.logits, body.out(found.embedding))
    for y, stage, stride in zip(maps, found.stages, (4, 8, 16, 32), strict=True):
        torch.testing.assert_close(stage, y[..., : -(-size[0] // stride), : -(-size[1] // stride)])
    save_weights(network, tmp_path / "a.safetensors")
    other = built()
    nn.init.zeros_(other.head.weight)  # type: ignore[arg-type]
    load_weights(other, tmp_path / "a.safetensors")
    assert weights_hash(other) == weights_hash(network)
    expected = F.interpolate(found.logits, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(deployable(network)(images), expected)


@pytest.mark.usefixtures("nets")
def test_it_is_exported_for_the_size_of_its_views() -> None:
    network = built()
    assert not network.exports_any_size((64, 96))
    axes = [{0: torch.export.Dim.AUTO}]
    program = torch.export.export(deployable(network), (torch.rand(2, 3, 40, 64),), dynamic_shapes=axes)
    images = torch.rand(3, 3, 40, 64)
    with torch.inference_mode():
        expected = F.interpolate(network(images).logits, size=(40, 64), mode="bilinear", align_corners=False)
        torch.testing.assert_close(program.module()(images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("nets")
def test_without_taps_and_upsampled_it_gives_less() -> None:
    """Without names there are no stages; logits of the image's size have no embedding of their size."""
    assert built(taps=None).spec.serves == Signal.LOGITS | Signal.EMBEDDING
    network = built(taps=None, upsampled=True)
    assert (network.spec.serves, network.spec.logits_stride) == (Signal.LOGITS, 1)
    assert network(torch.rand(1, 3, 40, 50)).logits.shape == (1, 5, 40, 50)


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize(
    ("taps", "options", "sentence"),
    [
        ({"stages": STAGES[::-1]}, {}, r"strides \[32, 16, 8, 4\] are not shallow to deep"),
        ({"stages": [*STAGES[:3], "fuor"]}, {}, "no module 'fuor' runs"),
        ({"embedding": "four"}, {}, r"taps\.embedding: 'four' gives maps of \[2, 2\], the logits have \[16, 16\]"),
    ],
)
def test_taps_that_do_not_fit(taps: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(NetworkError, match=sentence):
        built(taps, **options)


@pytest.mark.usefixtures("nets")
def test_other_classes() -> None:
    settings = NetworkSettings(network="./nets.py:more")
    with pytest.raises(NetworkError, match="gives 6 maps of logits, 5 are needed"):
        predict_spec(settings.network, 5, settings.options, 64)


@pytest.mark.usefixtures("nets")
def test_it_teaches_and_learns(tiny_file: Write, tmp_path: Path) -> None:
    """Fitted as a teacher, and trained as a student by a method that reads stages and by one that reads the cache."""
    network = {"network": "./nets.py:make", "options": {"width": 4, "taps": TAPS}}
    fit = {"epochs": 1, "warmup_epochs": 0, "batch_size": 16, "precision": "fp32", "channels_last": False}
    experiment = load_experiment(
        tiny_file(
            data={"dataset": "digit_scenes", "image_size": 32, "labels_per_class": None, "train_images": 16},
            teacher={**deepcopy(network), "training": fit},
            student=network,
            training={"epochs": 1, "batch_size": 8},
            search={"space": {"methods": ["pixel_kd", "cwd", "at"], "shared": {}}},
        )
    )
    assert check_experiment(experiment) == {}
    root = Workspace(tmp_path / "runs")
    prepared = prepare_teacher(experiment, root)
    for method in ("pixel_kd", "at"):
        folder = TrialFolder(tmp_path / method)
        folder.path.mkdir()
        recipe = experiment.recipe(experiment.published(method))
        trained = run_recipe(recipe, folder, RunContext(root, prepared.weights), lambda metrics: True)
        assert trained.metrics["train/loss"] > 0
        assert 0 <= trained.metrics["val/miou"] <= 1
