"""Encoders of timm that smp's universal encoder does not take: plain Vision Transformers, and Hiera.

smp's decoders read maps at strides 4, 8, 16 and 32. A plain ViT has maps of a single stride, from which
`PyramidEncoder` makes four, as ViTDet does: Li, Mao, Girshick, He: "Exploring Plain Vision Transformer Backbones for
Object Detection", ECCV 2022, https://arxiv.org/abs/2203.16527. Hiera has the four maps, but of images of one size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import ClassVar, Protocol, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from timm.models.hiera import Hiera, MaskUnitAttention, Reroll
from torch import Tensor, nn

from heterokd.errors import NetworkError
from heterokd.outputs import Kind

STRIDES = (4, 8, 16, 32)
DEPTH = 5  # of smp's encoders: the image, an empty map at stride 2, and the four maps
PYRAMID_CHANNELS = 256
PYRAMID_OPTION = "pyramid_channels"


class MapsEncoder(nn.Module):
    """A network of timm as smp's decoders read encoders.

    Attributes:
        model: timm's network, which gives maps; all of it has published weights.
        kind: kind of the four maps.
        any_size: whether an exported graph takes images of any size.
    """

    kind: ClassVar[Kind] = "attention"
    any_size: ClassVar[bool] = False
    output_stride: ClassVar[int] = STRIDES[-1]

    model: nn.Module

    def __init__(self, channels: list[int], depth: int) -> None:
        super().__init__()
        if depth != DEPTH:
            raise NetworkError(f"encoder_depth must be {DEPTH} for encoders that are Vision Transformers, got {depth}")
        self.out_channels = [3, 0, *channels]

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        """Accept the three colours that all networks here take; called by smp."""

    def make_dilated(self, output_stride: int) -> None:
        """Refuse another stride; called by smp."""
        raise NetworkError(f"a Vision Transformer cannot be dilated to a stride of {output_stride}")

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the maps at strides 4, 8, 16 and 32."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the image, an empty map at stride 2 and the four maps, as smp's universal encoder does."""
        count, _, height, width = images.shape  # not len(), which fixes the batch of an exported graph
        return [images, images.new_empty(count, 0, height // 2, width // 2), *self.maps(images)]


class PyramidEncoder(MapsEncoder):
    """A plain ViT with ViTDet's simple feature pyramid on its last map.

    Args:
        name: of timm's network.
        pretrained: load its published weights.
        options: of timm's network, and `pyramid_channels`, the channels of each map.
        depth: of smp's encoders.
        output_stride: of smp's encoders.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool,
        options: Mapping[str, object],
        depth: int = DEPTH,
        output_stride: int = STRIDES[-1],
    ) -> None:
        of_timm = dict(options)
        channels = int(cast(int, of_timm.pop(PYRAMID_OPTION, PYRAMID_CHANNELS)))
        super().__init__([channels] * len(STRIDES), depth)
        self.model, (width,), (stride,) = _maps_of(name, 1, pretrained=pretrained, **of_timm)
        if stride not in STRIDES[1:]:
            raise NetworkError(
                f"a pyramid needs maps of stride 8, 16 or 32, those of {name} have {stride}: set patch_size"
            )
        self.levels = nn.ModuleList(_level(width, math.log2(stride / to), channels) for to in STRIDES)

    def maps(self, images: Tensor) -> list[Tensor]:
        """See `MapsEncoder`."""
        last = self.model(images)[-1]
        return [level(last) for level in self.levels]


def _level(width: int, doublings: float, channels: int) -> nn.Sequential:
    """Return the layers from the last map to one that is larger by a power of two, or smaller."""
    layers: list[nn.Module] = []
    if doublings < 0:
        factor = round(2**-doublings)
        layers.append(nn.MaxPool2d(factor, factor))
    for number in range(round(doublings)):
        if number:
            layers += [LayerNorm2d(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, 2))
        width //= 2
    joined = [nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels)]
    return nn.Sequential(
        *layers, *joined, nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)
    )


class HieraEncoder(MapsEncoder):
    """Hiera on images of any size whose sides are multiples of 32; see `PyramidEncoder` for the arguments.

    timm's Hiera is for one size, on which the order of its tokens and its position embedding depend. Both follow each
    batch here; the embedding is interpolated from the size that the network was published for.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool,
        options: Mapping[str, object],
        depth: int = DEPTH,
        output_stride: int = STRIDES[-1],
    ) -> None:
        model, channels, _ = _maps_of(name, len(STRIDES), pretrained=pretrained, **options)
        super().__init__(channels, depth)
        self.model = model
        cast(Hiera, model.model).__class__ = _HieraOfAnySize

    def maps(self, images: Tensor) -> list[Tensor]:
        """See `MapsEncoder`."""
        cast("_HieraOfAnySize", self.model.model).use_size((images.shape[-2], images.shape[-1]))
        found: list[Tensor] = self.model(images)
        return found

    def flatten_windows(self) -> None:
        """Compute attention in windows on tensors of four dimensions, the most that ONNX has it for."""
        for module in self.model.modules():
            if isinstance(module, MaskUnitAttention) and module.use_mask_unit_attn:
                module.__class__ = _FlatWindows


class _FlatWindows(MaskUnitAttention):
    def forward(self, x: Tensor) -> Tensor:
        """Do as timm's, with each window as a further head."""
        images, tokens, _ = x.shape
        windows = tokens // (self.q_stride * self.window_size)
        parts = self.qkv(x).reshape(images, -1, windows, 3, self.heads, self.head_dim).permute(3, 0, 4, 2, 1, 5)
        q, k, v = parts.unbind(0)
        if self.q_stride > 1:
            q = q.view(images, self.heads, windows, self.q_stride, -1, self.head_dim).amax(dim=3)
        joined = F.scaled_dot_product_attention(*(part.flatten(1, 2) for part in (q, k, v)))
        joined = joined.reshape(images, self.heads, windows, -1, self.head_dim)
        found: Tensor = self.proj(joined.transpose(1, 3).reshape(images, -1, self.dim_out))
        return found


class _FeatureInfo(Protocol):
    def channels(self) -> list[int]: ...
    def reduction(self) -> list[int]: ...


def _maps_of(name: str, count: int, **options: object) -> tuple[nn.Module, list[int], list[int]]:
    """Build timm's network that gives its last maps, with their channels and strides."""
    build: Callable[..., nn.Module] = timm.create_model
    model = build(name, features_only=True, out_indices=count, **options)
    info = cast(_FeatureInfo, model.feature_info)
    return model, info.channels(), info.reduction()


class _HieraOfAnySize(Hiera):
    def use_size(self, size: tuple[int, int]) -> None:
        """Use the order of tokens of images of this size."""
        schedule = self.unroll.schedule
        self.tokens_spatial_shape = [side // stride for side, stride in zip(size, self.patch_stride, strict=True)]
        units = zip(self.tokens_spatial_shape, self.mask_unit_size, strict=True)
        self.mask_spatial_shape = [side // unit for side, unit in units]
        self.unroll.size = list(self.tokens_spatial_shape)
        self.reroll.schedule = Reroll(size, self.patch_stride, schedule, self.stage_ends, self.q_pool).schedule

    def _pos_embed(self, x: Tensor) -> Tensor:
        rows, columns = self.tokens_spatial_shape
        if self.pos_embed is None or self.pos_embed_win is not None or self.pos_embed.shape[1] == rows * columns:
            found: Tensor = super()._pos_embed(x)
            return found
        side = math.isqrt(self.pos_embed.shape[1])
        square = self.pos_embed.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        return x + F.interpolate(square, (rows, columns), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)


EncoderClass = type[PyramidEncoder] | type[HieraEncoder]


@lru_cache(maxsize=256)
def encoder_class(encoder: str) -> EncoderClass | None:
    """Return the class for an encoder of timm; None for smp's universal encoder."""
    name = encoder.partition(".")[0]
    try:
        with torch.device("meta"):
            model, _, _ = _maps_of(name, 1)
    except Exception:  # noqa: BLE001  networks without maps raise errors of any kind; smp then says why
        return None
    inner = getattr(model, "model", None)
    if isinstance(inner, Hiera):
        return HieraEncoder
    is_vit = hasattr(inner, "patch_embed") and hasattr(inner, "blocks")
    reductions = {info["reduction"] for info in getattr(inner, "feature_info", ())} if is_vit else set()
    return PyramidEncoder if len(reductions) == 1 else None


@contextmanager
def registered(kind: EncoderClass, encoder: str, pretrained: bool, options: Mapping[str, object]) -> Iterator[str]:
    """Register an encoder in smp while a network is built; yields its name there."""
    import segmentation_models_pytorch as smp

    key = f"heterokd-{encoder}"
    build = partial(kind, encoder, pretrained, options)
    smp.encoders.encoders[key] = {"encoder": build, "params": {}, "pretrained_settings": {}}
    try:
        yield key
    finally:
        del smp.encoders.encoders[key]
