"""Projections between features of different shapes, built from an `OutputSpec` before any forward.

    ConvProjector     a stage's map -> a vector, by separable convolutions (OFA's CNN branches, HCD)
    TokenProjector    a stage's map -> a vector, by patch merging and transformer blocks (OFA's ViT and MLP branches)
    Bridge            a stage's map -> the map that another network's next stage expects (FBT's L2G)
    to_smaller_grid   two maps of different grids -> both on the coarser grid, so that positions correspond
    resize_map        a map -> another grid, by bilinear interpolation
    unit_positions    a map -> its positions' vectors, each of length 1

Letters in shapes: B batch, C H W the channels, height and width of a map, N tokens, D width.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heterokd.outputs import OutputSpec

FINAL_SIDE = 7
"""Token grids are merged down to about this side: the deepest grid of four-stage networks at 224 px (OFA's code)."""

FEW_PAIRS = 1024
"""Pairs of an input and an output position up to which a depthwise convolution is computed as a matrix product."""

NO_LENGTH = 1e-12
"""Squared length up to which a vector has no direction: its gradient would be millions of times too large."""


def count_merges(side: int) -> int:
    """Count the halvings of a grid of `side` down to about `FINAL_SIDE`: 56 -> 3, 28 -> 2, 14 -> 1, 7 -> 0."""
    return max(0, int(math.log2(side / FINAL_SIDE)))


def count_heads(width: int, wanted: int) -> int:
    """Return the largest number of attention heads that is at most `wanted` and divides `width`."""
    return next(heads for heads in range(max(1, min(wanted, width)), 0, -1) if width % heads == 0)


def initialise(module: nn.Module) -> None:
    """Initialise as OFA: He normal (fan out) for convolutions, truncated normal 0.02 for linear layers."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def to_smaller_grid(student_map: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
    """Average both maps [B, C, H, W] to the smaller height and width of the two; a map of this size is unchanged.

    If the sizes are not multiples, neighbouring windows overlap by a cell (adaptive average pooling).
    """
    (height, width), (other_height, other_width) = student_map.shape[-2:], teacher_map.shape[-2:]
    size = min(height, other_height), min(width, other_width)
    student_map, teacher_map = (
        x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size) for x in (student_map, teacher_map)
    )
    return student_map, teacher_map


def resize_map(map_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map [B, C, H, W] (bilinear) to a height and width, float32; unchanged if it has them."""
    if tuple(map_BCHW.shape[-2:]) == size:
        return map_BCHW.float()
    return F.interpolate(map_BCHW.float(), size=size, mode="bilinear", align_corners=False)


def unit_positions(map_BCHW: Tensor) -> Tensor:
    """Normalise each position's vector to length 1, float32 [B, C, N = H W]; zeros stay zeros, without gradient."""
    vectors_BCN = map_BCHW.float().flatten(2)
    squares = vectors_BCN.square().sum(dim=1, keepdim=True)
    return vectors_BCN * torch.where(squares > NO_LENGTH, squares.clamp_min(NO_LENGTH).rsqrt(), 0.0)


class SeparableConv(nn.Sequential):
    """Two depthwise-separable 3x3 convolutions, each with batch norm and ReLU; the first has the stride."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False),
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.stride = stride

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, width, H / stride, W / stride], sides rounded up.

        The values are those of the layers in sequence; on a CPU they are computed by matrix products, since its
        convolutions of many small groups are slow.
        """
        if not map_BCHW.is_cpu:
            for layer in self:
                map_BCHW = layer(map_BCHW)
            return map_BCHW
        height, width = map_BCHW.shape[2:]
        few = height * width * _halved(height, self.stride) * _halved(width, self.stride) <= FEW_PAIRS
        for first, stride in ((0, self.stride), (4, 1)):
            depth, point = self.get_parameter(f"{first}.weight"), self.get_parameter(f"{first + 1}.weight")
            apply = _separable_of_few if few else _separable_of_many
            map_BCHW = apply(map_BCHW, depth, stride, point, self[first + 2])
        return map_BCHW


def _separable_of_few(map_BCHW: Tensor, depth: Tensor, stride: int, point: Tensor, norm: nn.Module) -> Tensor:
    """Depthwise and 1x1 convolution, norm and ReLU, with channels as first axis; a kernel is a matrix of positions."""
    images, (height, width) = len(map_BCHW), map_BCHW.shape[2:]
    size = _halved(height, stride), _halved(width, stride)
    kernel_CQP = (depth.flatten(1) @ _links(height, width, stride).to(depth)).view(len(depth), height * width, -1)
    x_CBP = torch.bmm(map_BCHW.flatten(2).transpose(0, 1), kernel_CQP)
    x_1CBP = (point.flatten(1) @ x_CBP.flatten(1)).view(1, len(point), images, -1)
    found: Tensor = norm(x_1CBP).relu_().view(len(point), images, *size).transpose(0, 1)
    return found


def _separable_of_many(map_BCHW: Tensor, depth: Tensor, stride: int, point: Tensor, norm: nn.Module) -> Tensor:
    """Depthwise and 1x1 convolution, norm and ReLU, channels last."""
    x = map_BCHW.contiguous(memory_format=torch.channels_last)
    x = F.conv2d(x, depth, None, stride, 1, groups=len(depth))
    # Not a linear layer over positions: MKL's products are slower on some processors than oneDNN's convolutions.
    found: Tensor = norm(F.conv2d(x, point)).relu_()
    return found


def _halved(length: int, stride: int) -> int:
    """Return a side's length after a padded 3x3 convolution."""
    return -(-length // stride)


@lru_cache(maxsize=64)
def _links(height: int, width: int, stride: int) -> Tensor:
    """Return which entry of a 3x3 kernel maps input position Q to output position P, as zeros and ones [9, Q * P]."""

    def along(length: int) -> Tensor:
        offset_QP = torch.arange(length).unsqueeze(1) - stride * torch.arange(_halved(length, stride)) + 1
        return torch.stack([offset_QP == tap for tap in range(3)]).float()

    return torch.einsum("yhi,xwj->yxhwij", along(height), along(width)).reshape(9, -1)


class ConvProjector(nn.Module):
    """A stage's map to a vector: 4 - stage separable blocks (a 1x1 convolution at stage 4), then the mean over pixels.

    Channels double from block to block but never exceed `width`, the last block's. Maps of a CNN are halved
    by every block; token maps only until they are about `FINAL_SIDE` wide, so equal-stride networks keep their grid.
    """

    def __init__(self, spec: OutputSpec, stage: int, width: int) -> None:
        super().__init__()
        channels, blocks = spec.stages[stage - 1].channels, len(spec.stages) - stage
        halvings = blocks if spec.stages[stage - 1].kind == "cnn" else count_merges(spec.side(stage))
        layers: list[nn.Module] = []
        for block in range(blocks):
            out = width if block == blocks - 1 else min(2 * channels, width)
            layers.append(SeparableConv(channels, out, stride=2 if block < halvings else 1))
            channels = out
        self.layers = nn.Sequential(*(layers or [nn.Conv2d(channels, width, 1)]))
        initialise(self)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, width]."""
        if isinstance(self.layers[0], nn.Conv2d):  # the mean of a linear map is the linear map of the mean
            return F.linear(map_BCHW.mean(dim=(2, 3)), self.layers[0].weight.flatten(1), self.layers[0].bias)
        pooled: Tensor = self.layers(map_BCHW).mean(dim=(2, 3))
        return pooled


class PatchMerging(nn.Module):
    """Swin's patch merging: a 2x2 patch -> layer norm -> one token; odd sides are zero-padded."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, width, bias=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), width]."""
        height, width = x_BHWC.shape[1:3]
        x = F.pad(x_BHWC, (0, 0, 0, width % 2, 0, height % 2))
        corners = [x[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
        merged: Tensor = self.reduction(self.norm(torch.cat(corners, dim=-1)))
        return merged


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens [B, N, D], with an optional bias [heads, N, N] on its scores."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.out = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, bias: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        B, N, D = x_BND.shape
        query, key, value = self.qkv(x_BND).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mask = None if bias is None else bias.to(query.dtype)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed: Tensor = self.out(attended.transpose(1, 2).reshape(B, N, D))
        return mixed


def feed_forward(width: int) -> nn.Sequential:
    """Build the two linear layers of a transformer block, four times as wide inside."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class TokenBlock(nn.Module):
    """Pre-norm transformer block over all tokens [B, N, D]."""

    def __init__(self, width: int, heads: int = 4, *, qkv_bias: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, count_heads(width, heads), qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = feed_forward(width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = x_BND + self.attention(self.norm1(x_BND))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class TokenProjector(nn.Module):
    """A stage's map to a vector: patch merging to about 7x7 tokens, max(4 - stage, 1) blocks, the mean over tokens.

    A merge has a GELU where another merge follows; with `merge_activation: first` the first merge always has it.
    """

    def __init__(
        self,
        spec: OutputSpec,
        stage: int,
        width: int,
        *,
        merge_activation: Literal["first", "between"] = "first",
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        channels, merges = spec.stages[stage - 1].channels, count_merges(spec.side(stage))
        mergers: list[nn.Module] = []
        for merge in range(merges):
            mergers.append(PatchMerging(channels, width))
            if merge < merges - 1 or (merge == 0 and merge_activation == "first"):
                mergers.append(nn.GELU())
            channels = width
        if channels != width:
            mergers.append(nn.Linear(channels, width))
        self.merging = nn.Sequential(*mergers)
        self.blocks = nn.Sequential(
            *(TokenBlock(width, qkv_bias=qkv_bias) for _ in range(max(len(spec.stages) - stage, 1)))
        )
        initialise(self)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, width]."""
        tokens_BND = self.merging(map_BCHW.permute(0, 2, 3, 1)).flatten(1, 2)
        pooled: Tensor = self.blocks(tokens_BND).mean(dim=1)
        return pooled


class WindowBlock(nn.Module):
    """Swin block without shift: attention inside windows with a relative position bias, then the two layers.

    Liu et al.: "Swin Transformer", ICCV 2021, https://arxiv.org/abs/2103.14030. A window is never wider than the grid;
    grids that windows do not divide are zero-padded on the right and below, as Swin does.
    """

    index: Tensor

    def __init__(self, width: int, side: int, window: int = 7) -> None:
        super().__init__()
        self.window = min(window, side)
        heads = count_heads(width, width // 32)
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = feed_forward(width)
        self.bias = nn.Parameter(torch.zeros((2 * self.window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias, std=0.02)
        place = torch.arange(self.window**2)
        row, column = place // self.window, place % self.window
        offset = torch.stack((row[:, None] - row[None], column[:, None] - column[None])) + self.window - 1
        self.register_buffer("index", offset[0] * (2 * self.window - 1) + offset[1], persistent=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = x_BHWC + self._attend(self.norm1(x_BHWC))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed

    def _attend(self, x_BHWC: Tensor) -> Tensor:
        B, H, W, C = x_BHWC.shape
        w = self.window
        x = F.pad(x_BHWC, (0, 0, 0, -W % w, 0, -H % w))
        rows, columns = x.shape[1] // w, x.shape[2] // w
        windows = x.reshape(B, rows, w, columns, w, C).transpose(2, 3).reshape(B * rows * columns, w * w, C)
        windows = self.attention(windows, self.bias[self.index].permute(2, 0, 1))
        x = windows.reshape(B, rows, columns, w, w, C).transpose(2, 3).reshape(B, rows * w, columns * w, C)
        cropped: Tensor = x[:, :H, :W]
        return cropped


class Bridge(nn.Module):
    """Map of a network to the input of another network's next stage: patch embedding, then window attention.

    The patch embedding is a convolution with kernel = stride = ratio of the incoming grid to the expected grid (1x1 if
    it is not larger), nearest upsampling if the expected grid is larger, and a layer norm. Grids whose ratio is not
    whole, and maps of another size than specified, are first averaged to the nearest grid that fits.
    """

    def __init__(
        self, channels: int, side: int, target_channels: int, target_side: int, blocks: int = 1, window: int = 7
    ) -> None:
        super().__init__()
        ratio = max(1, side // target_side)
        self.side = ratio * target_side if side > target_side else side
        self.target_side = target_side
        self.embed = nn.Conv2d(channels, target_channels, ratio, ratio)
        self.norm = nn.LayerNorm(target_channels)
        self.blocks = nn.Sequential(*(WindowBlock(target_channels, target_side, window) for _ in range(blocks)))
        initialise(self)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, target_channels, target_side, target_side]."""
        x = map_BCHW
        if x.shape[-2:] != (self.side, self.side):
            x = F.adaptive_avg_pool2d(x, self.side)
        x = self.embed(x)
        if self.side < self.target_side:  # after the 1x1 convolution: the same values, fewer products
            x = F.interpolate(x, size=(self.target_side, self.target_side), mode="nearest")
        mixed: Tensor = self.blocks(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return mixed.contiguous()
