"""Files of mmsegmentation's SegFormer and of its authors: names and shapes as theirs, read into the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heterokd.errors import CheckpointError
from heterokd.networks.network import build_network
from heterokd.networks.openmmlab import STAGE_NORM
from heterokd.networks.weights import find_weights

DIMS, DEPTHS, RATIOS = (32, 64, 160, 256), (2, 2, 2, 2), (8, 4, 2, 1)
"""MiT-B0."""


def random(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.05


def normalisation(name: str, width: int, *, batch: bool = False) -> dict[str, Tensor]:
    found = {f"{name}.weight": 1 + random(width), f"{name}.bias": random(width)}
    if batch:
        found |= {
            f"{name}.running_mean": random(width),
            f"{name}.running_var": 1 + random(width).abs(),
            f"{name}.num_batches_tracked": torch.tensor(7),
        }
    return found


def layer(name: str, *shape: int, bias: bool = True) -> dict[str, Tensor]:
    return {f"{name}.weight": random(*shape)} | ({f"{name}.bias": random(shape[0])} if bias else {})


def of_mmsegmentation(classes: int = 19) -> dict[str, Tensor]:
    """segformer_mit-b0 as mmsegmentation's model zoo stores it."""
    state: dict[str, Tensor] = {}
    for i, (width, depth, ratio) in enumerate(zip(DIMS, DEPTHS, RATIOS, strict=True)):
        stage, before = f"backbone.layers.{i}", (3, *DIMS)[i]
        side = 3 if i else 7
        state |= layer(f"{stage}.0.projection", width, before, side, side) | normalisation(f"{stage}.0.norm", width)
        for j in range(depth):
            block = f"{stage}.1.{j}"
            state |= normalisation(f"{block}.norm1", width)
            state |= {f"{block}.attn.attn.in_proj_weight": random(3 * width, width)}
            state |= {f"{block}.attn.attn.in_proj_bias": random(3 * width)}
            state |= layer(f"{block}.attn.attn.out_proj", width, width)
            if ratio > 1:
                state |= layer(f"{block}.attn.sr", width, width, ratio, ratio)
                state |= normalisation(f"{block}.attn.norm", width)
            state |= normalisation(f"{block}.norm2", width)
            state |= layer(f"{block}.ffn.layers.0", 4 * width, width, 1, 1)
            state |= layer(f"{block}.ffn.layers.1", 4 * width, 1, 3, 3)
            state |= layer(f"{block}.ffn.layers.4", width, 4 * width, 1, 1)
        state |= normalisation(f"{stage}.2", width)
    head = layer("decode_head.conv_seg", classes, 256, 1, 1)
    for i, width in enumerate(DIMS):
        head |= layer(f"decode_head.convs.{i}.conv", 256, width, 1, 1, bias=False)
        head |= normalisation(f"decode_head.convs.{i}.bn", 256, batch=True)
    head |= layer("decode_head.fusion_conv.conv", 256, 1024, 1, 1, bias=False)
    return state | head | normalisation("decode_head.fusion_conv.bn", 256, batch=True)


def of_the_authors(classes: int = 19) -> dict[str, Tensor]:
    """segformer.b0 as the authors' program stores it."""
    body = build_network("segformer-mit_b0", classes, {}, image_size=64).body.encoder.state_dict()
    state = {f"backbone.{name}": random(*tensor.shape) for name, tensor in body.items()}
    state |= layer("decode_head.conv_seg", classes, 128, 1, 1)  # inherited, and not used
    for i, width in enumerate(DIMS, start=1):
        state |= layer(f"decode_head.linear_c{i}.proj", 256, width)
    state |= layer("decode_head.linear_fuse.conv", 256, 1024, 1, 1, bias=False)
    state |= normalisation("decode_head.linear_fuse.bn", 256, batch=True)
    return state | layer("decode_head.linear_pred", classes, 256, 1, 1)


def built(options: dict[str, Any], classes: int = 19) -> Any:
    return build_network("segformer-mit_b0", classes, options, image_size=64).eval()


def attended(state: dict[str, Tensor], x: Tensor, heads: int) -> Tensor:
    """The first attention as mmsegmentation computes it: `torch.nn.MultiheadAttention` on reduced keys and values."""
    place = "backbone.layers.0.1.0.attn"
    width = x.shape[1]
    attention = torch.nn.MultiheadAttention(width, heads).eval()
    attention.load_state_dict({name: state[f"{place}.attn.{name}"] for name in attention.state_dict()})
    reduced = F.conv2d(x, state[f"{place}.sr.weight"], state[f"{place}.sr.bias"], stride=8).flatten(2).permute(2, 0, 1)
    reduced = F.layer_norm(reduced, (width,), state[f"{place}.norm.weight"], state[f"{place}.norm.bias"])
    found: Tensor = attention(x.flatten(2).permute(2, 0, 1), reduced, reduced)[0]
    return found.permute(1, 0, 2)


def test_mmsegmentations_file_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state, file = of_mmsegmentation(), tmp_path / "segformer_mit-b0.pth"
    torch.save({"meta": {"CLASSES": ("road", "car")}, "state_dict": state, "optimizer": {"state": {}}}, file)
    network = built({STAGE_NORM: True})
    found = find_weights(network, file)
    assert any("names of mmsegmentation converted" in note for note in found.notes)
    network.body.load_state_dict(found.state, strict=False)
    body = network.body
    with torch.no_grad():
        x = random(2, 32, 16, 16)
        theirs = attended(state, x, heads=1)
        ours = body.encoder.block1[0].attn(x.flatten(2).transpose(1, 2), 16, 16)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)

        maps = [random(1, width, 16 // 2**i, 16 // 2**i) for i, width in enumerate(DIMS)]
        joined = []
        for i, each in enumerate(maps):
            y = F.conv2d(each, state[f"decode_head.convs.{i}.conv.weight"])
            bn = {
                key: state[f"decode_head.convs.{i}.bn.{key}"]
                for key in ("running_mean", "running_var", "weight", "bias")
            }
            y = F.batch_norm(y, **bn).relu()
            joined.append(F.interpolate(y, (16, 16), mode="bilinear", align_corners=False))
        y = F.conv2d(torch.cat(joined, 1), state["decode_head.fusion_conv.conv.weight"])
        bn = {
            key: state[f"decode_head.fusion_conv.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        }
        y = F.batch_norm(y, **bn).relu()
        expected = F.conv2d(y, state["decode_head.conv_seg.weight"], state["decode_head.conv_seg.bias"])
        given = body.segmentation_head[0](body.decoder([torch.zeros(1, 3, 64, 64), torch.zeros(1, 0, 32, 32), *maps]))
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-4)
        assert network(torch.rand(1, 3, 64, 64)).logits.shape == (1, 19, 16, 16)


def test_the_authors_file_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state, file = of_the_authors(), tmp_path / "segformer.b0.pth"
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, file)
    network = built({})
    found = find_weights(network, file)
    assert any("names of SegFormer's program converted" in note for note in found.notes)
    for ours, theirs in (
        ("encoder.block3.1.attn.kv.weight", "backbone.block3.1.attn.kv.weight"),
        ("decoder.mlp_stage.0.linear.weight", "decode_head.linear_c4.proj.weight"),
        ("decoder.mlp_stage.3.linear.bias", "decode_head.linear_c1.proj.bias"),
        ("segmentation_head.0.weight", "decode_head.linear_pred.weight"),
    ):
        assert torch.equal(found.state[ours], state[theirs])
    assert found.state.keys() >= {name for name, _ in network.body.named_parameters()}


def test_the_other_decoder_is_named(tmp_path: Path) -> None:
    for state, options, advice in (
        (of_mmsegmentation(), {}, "set options.decoder_stage_norm: true"),
        (of_the_authors(), {STAGE_NORM: True}, "leave out options.decoder_stage_norm"),
    ):
        torch.save(state, tmp_path / "weights.pth")
        with pytest.raises(CheckpointError, match=advice):
            find_weights(built(options), tmp_path / "weights.pth")


def test_a_head_of_other_classes_starts_a_fit(tmp_path: Path) -> None:
    torch.save(of_mmsegmentation(150), tmp_path / "weights.pth")
    found = find_weights(built({STAGE_NORM: True}), tmp_path / "weights.pth")
    assert found.classes == 150
    assert "segmentation_head.0.weight" not in found.state
