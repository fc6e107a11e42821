"""SegFormer's weights by the names of mmsegmentation and of the authors' program, converted to smp's names.

Both store them as `backbone` and `decode_head`. The authors' head (github.com/NVlabs/SegFormer) is smp's. That of
mmsegmentation (github.com/open-mmlab/mmsegmentation, `SegformerHead`) has a convolution with batch norm and ReLU for
each stage, which `options: {decoder_stage_norm: true}` of `segformer-mit_b0` to `mit_b5` builds. mmsegmentation's
DeepLab heads have other layers than smp's: their weights have no place here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGE_NORM = "decoder_stage_norm"
"""Option of `segformer` networks: the decoder of mmsegmentation."""

_BACKBONE = "backbone."
_RENAMED: tuple[tuple[str, str], ...] = (
    # of mmsegmentation
    (r"backbone\.layers\.(\d)\.0\.projection\.", r"encoder.patch_embed{stage}.proj."),
    (r"backbone\.layers\.(\d)\.0\.norm\.", r"encoder.patch_embed{stage}.norm."),
    (r"backbone\.layers\.(\d)\.1\.(\d+)\.attn\.attn\.out_proj\.", r"encoder.block{stage}.{block}.attn.proj."),
    (r"backbone\.layers\.(\d)\.1\.(\d+)\.ffn\.layers\.0\.", r"encoder.block{stage}.{block}.mlp.fc1."),
    (r"backbone\.layers\.(\d)\.1\.(\d+)\.ffn\.layers\.1\.", r"encoder.block{stage}.{block}.mlp.dwconv.dwconv."),
    (r"backbone\.layers\.(\d)\.1\.(\d+)\.ffn\.layers\.4\.", r"encoder.block{stage}.{block}.mlp.fc2."),
    (r"backbone\.layers\.(\d)\.1\.(\d+)\.", r"encoder.block{stage}.{block}."),
    (r"backbone\.layers\.(\d)\.2\.", r"encoder.norm{stage}."),
    (r"decode_head\.convs\.(\d)\.conv\.", r"decoder.convs.{index}.0."),
    (r"decode_head\.convs\.(\d)\.bn\.", r"decoder.convs.{index}.1."),
    (r"decode_head\.fusion_conv\.conv\.", r"decoder.fusion.0."),
    (r"decode_head\.fusion_conv\.bn\.", r"decoder.fusion.1."),
    # of the authors' program
    (r"backbone\.", r"encoder."),
    (r"decode_head\.linear_c(\d)\.proj\.", r"decoder.mlp_stage.{reversed}.linear."),
    (r"decode_head\.linear_fuse\.conv\.", r"decoder.fuse_stage.0."),
    (r"decode_head\.linear_fuse\.bn\.", r"decoder.fuse_stage.1."),
    (r"decode_head\.(?:linear_pred|conv_seg)\.", r"segmentation_head.0."),
)
"""Patterns at the beginning of names, the first that matches counts; numbers of stages begin at 1 in smp."""


def is_segformer(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether weights are named as those of a SegFormer of mmsegmentation or of its authors."""
    names = [_bare(name) for name in tensors]
    return any(name.startswith((f"{_BACKBONE}layers.0.1.0.attn.", f"{_BACKBONE}patch_embed1.")) for name in names)


def has_stage_norm(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the decoder is that of mmsegmentation."""
    return any(_bare(name).startswith("decode_head.fusion_conv.") for name in tensors)


def converted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a SegFormer by smp's names."""
    found: dict[str, Tensor] = {}
    # The authors' head inherits a classifier that it does not use.
    unused = "decode_head.conv_seg." if any("decode_head.linear_pred." in name for name in tensors) else None
    for name, tensor in tensors.items():
        bare = _bare(name)
        if unused is not None and bare.startswith(unused):
            continue
        new = _renamed(bare)
        if ".attn.attn.in_proj_" in bare:  # queries, keys and values in one tensor
            kind = bare.rpartition("in_proj_")[2]
            place = new.partition("attn.attn.")[0]
            width = len(tensor) // 3
            found[f"{place}attn.q.{kind}"], found[f"{place}attn.kv.{kind}"] = tensor[:width], tensor[width:]
        else:
            found[new] = tensor
    return found


def _bare(name: str) -> str:
    """Remove what other programs put before the names of the two parts, as `module.`."""
    match = re.search(r"(?:^|\.)((?:backbone|decode_head)\..*)", name)
    return name if match is None else match[1]


def _renamed(name: str) -> str:
    for pattern, new in _RENAMED:
        match = re.match(pattern, name)
        if match is not None:
            numbers = [int(part) for part in match.groups()]
            first = numbers[0] if numbers else 0
            block = numbers[1] if len(numbers) > 1 else 0
            return new.format(stage=first + 1, block=block, index=first, reversed=4 - first) + name[match.end() :]
    return name


class StageNormDecoder(nn.Module):
    """mmsegmentation's decoder of SegFormer: each stage has a convolution, batch norm and ReLU before they are joined.

    Args:
        encoder_channels: channels of the encoder's maps; the last four are read.
        channels: channels of each stage and of the result.
    """

    def __init__(self, encoder_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_convolution(each, channels) for each in encoder_channels[-4:])
        self.fusion = _convolution(4 * channels, channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return the map at stride 4, [B, channels, h, w]."""
        maps = features[-4:]
        size = maps[0].shape[-2:]
        stages = [
            F.interpolate(conv(each), size=size, mode="bilinear", align_corners=False)
            for conv, each in zip(self.convs, maps, strict=True)
        ]
        found: Tensor = self.fusion(torch.cat(stages, dim=1))
        return found


def _convolution(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
