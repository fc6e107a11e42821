"""Plain ViTs with a pyramid and Hiera as encoders: equal to timm's, of any size, trained, stored and exported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from heterokd.errors import NetworkError
from heterokd.methods.heteroakd import HeteroAKD
from heterokd.networks.network import build_network
from heterokd.networks.segmentation_encoders import HieraEncoder, PyramidEncoder, encoder_class
from heterokd.networks.weights import load_weights, save_weights
from heterokd.outputs import Batch, Signal
from heterokd.students.export.format import ToWrite
from heterokd.students.export.formats import FORMATS

PYRAMID = ("fpn-test_vit", {"pyramid_channels": 16})
HIERA = ("fpn-hiera_tiny_224", {"embed_dim": 16, "stages": [1, 1, 1, 1]})
NEEDS = Signal.LOGITS | Signal.EMBEDDING | Signal.STAGES


def build(name: str, options: dict[str, Any], size: int = 64) -> Any:
    torch.manual_seed(0)
    return build_network(name, 5, options, image_size=size).eval()


@pytest.mark.parametrize(
    ("encoder", "kind"),
    [
        ("vit_tiny_patch16_224", PyramidEncoder),
        ("vit_small_patch16_dinov3", PyramidEncoder),
        ("hiera_tiny_224", HieraEncoder),
        ("swin_tiny_patch4_window7_224", None),
        ("pvt_v2_b0", None),
        ("resnet18", None),
    ],
)
def test_the_kind_of_an_encoder(encoder: str, kind: type | None) -> None:
    assert encoder_class(encoder) is kind


def test_the_pyramid_is_built_on_timms_last_map() -> None:
    network = build(*PYRAMID)
    plain = timm.create_model("test_vit", features_only=True, out_indices=1, img_size=64, dynamic_img_size=True).eval()
    plain.load_state_dict(network.body.encoder.model.state_dict())
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        (last,) = plain(network.normalise(images))
        stages = network(images, NEEDS).stages
    levels = network.body.encoder.levels
    assert [tuple(stage.shape) for stage in stages] == [(1, 16, 64 // s, 96 // s) for s in (4, 8, 16, 32)]
    torch.testing.assert_close(levels[2](last), stages[2])
    torch.testing.assert_close(levels[3][1:](F.max_pool2d(last, 2)), stages[3])
    pretrained = {id(parameter) for parameter in network.encoder_parameters}
    assert pretrained == {id(parameter) for parameter in network.body.encoder.model.parameters()}, "without the pyramid"


@pytest.mark.parametrize("name", ["hiera_tiny_224", "hiera_small_abswin_256"])
def test_hiera_of_another_size_is_timms_with_interpolated_positions(name: str) -> None:
    options = {"embed_dim": 16, "stages": [1, 1, 1, 1]}
    network = build(f"fpn-{name}", options, 96)
    ours = network.body.encoder.model.model
    with torch.no_grad():
        ours.pos_embed.normal_()
    side = int(name.rpartition("_")[2])
    images = network.normalise(torch.rand(2, 3, 96, 96))
    for size in (side, 96):
        theirs = timm.create_model(name, features_only=True, out_indices=4, img_size=size, **options).eval()
        state = dict(ours.state_dict())
        if state["pos_embed"].dim() == 3 and size != side:
            cells = math.isqrt(state["pos_embed"].shape[1])
            square = state["pos_embed"].reshape(1, cells, cells, -1).permute(0, 3, 1, 2)
            resized = F.interpolate(square, (size // 4, size // 4), mode="bicubic", antialias=True)
            state["pos_embed"] = resized.flatten(2).transpose(1, 2)
        theirs.model.load_state_dict(state)
        shown = images if size == 96 else F.interpolate(images, (size, size))
        with torch.no_grad():
            for mine, other in zip(network.body.encoder(shown)[2:], theirs(shown), strict=True):
                torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("pair", [(PYRAMID, ("segformer-test_resnet", {})), (("segformer-test_resnet", {}), HIERA)])
def test_they_teach_and_learn(pair: Any) -> None:
    student, teacher = (build(*each) for each in pair)
    method = HeteroAKD(None, student.spec, teacher.spec)
    batch = Batch(torch.rand(2, 3, 64, 48), torch.randint(5, (2, 64, 48)), torch.arange(2))
    student.train()
    with torch.no_grad():
        taught = teacher(batch.images, NEEDS)
    loss = sum(method(student(batch.images, NEEDS), taught, batch, 0.5).values())
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in student.encoder_parameters[:3])


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "options"), [PYRAMID, HIERA])
def test_they_are_stored_and_exported(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    network = build(name, options)
    save_weights(network, tmp_path / "weights.safetensors")
    torch.manual_seed(1)
    again = build_network(name, 5, options, image_size=64).eval()
    load_weights(again, tmp_path / "weights.safetensors")
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        network(torch.rand(1, 3, 96, 64))  # another size before
        expected = network(images).logits
        assert torch.equal(expected, again(images).logits)
    assert not network.exports_any_size((64, 64))
    kind = FORMATS["onnx"]()
    kind.write(ToWrite(network, images, any_size=False, card={}), tmp_path)
    found = kind.open(tmp_path).run(images)
    torch.testing.assert_close(found, F.interpolate(expected, (64, 64), mode="bilinear"), atol=1e-4, rtol=1e-4)


def test_what_is_refused() -> None:
    for name, options, problem in (
        ("fpn-test_vit", {"encoder_depth": 4}, "encoder_depth must be 5"),
        ("fpn-vit_tiny_patch16_224", {"patch_size": 4}, "a pyramid needs maps of stride 8, 16 or 32"),
        ("deeplabv3-hiera_tiny_224", {"encoder_output_stride": 16}, "cannot be dilated"),
        ("fpn-hiera_tiny_224", {"pyramid_channels": 8}, "has no option 'pyramid_channels'"),
    ):
        with pytest.raises(NetworkError, match=problem):
            build(name, options)
