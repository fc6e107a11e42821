"""Types of the modules that timm and segmentation_models_pytorch (smp) build.

Both libraries return plain `nn.Module`s. The classes here name the attributes of them that this package reads;
`create_body` and `create_segmentation_body` cast to them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NotRequired, TypedDict

from torch import Tensor, nn

Normalisation = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation per channel, of images in [0, 1]."""


class FeatureInfo(TypedDict):
    """An entry of timm's `feature_info`: a map inside the network."""

    num_chs: int  # channels
    reduction: int  # input pixels per map pixel
    module: str  # dotted name of the module that gives the map


class PretrainedConfig(TypedDict):
    """The keys of timm's `pretrained_cfg` that are read here."""

    input_size: tuple[int, int, int]  # channels, height and width
    mean: tuple[float, ...]  # per channel, of images in [0, 1]
    std: tuple[float, ...]
    classifier: NotRequired[str | tuple[str, ...] | None]  # dotted name of the last classifier, or of two
    first_conv: NotRequired[str | tuple[str, ...] | None]  # dotted name of the first convolution
    fixed_input_size: NotRequired[bool]


class TimmBody(nn.Module, ABC):
    """Interface of timm's classifiers.

    Attributes:
        feature_info: maps inside the network, shallow to deep.
        pretrained_cfg: configuration of the name's pretrained weights.
    """

    feature_info: list[FeatureInfo]
    pretrained_cfg: PretrainedConfig

    @abstractmethod
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits [B, K], or the embedding [B, D], from the output of the last part."""

    def forward_intermediates(
        self, x: Tensor, indices: list[int] | None = None, output_fmt: str = "NCHW"
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the output of the last part, and the maps [B, C, H, W] of those numbers; most of timm's have it."""
        raise NotImplementedError

    @abstractmethod
    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """Return the last linear layer; both in a two-headed network (distilled DeiT)."""


def classifier_of(body: TimmBody) -> nn.Module:
    """Return the last classifier; a list of both in a two-headed network."""
    classifier = body.get_classifier()
    return nn.ModuleList(classifier) if isinstance(classifier, tuple) else classifier


class SegmentationEncoder(nn.Module):
    """Encoder of smp: images to a list of maps."""

    output_stride: int  # input pixels per pixel of the last map


class SegmentationBody(nn.Module):
    """Segmentation network of smp."""

    encoder: SegmentationEncoder
    decoder: nn.Module  # maps to embedding
    segmentation_head: nn.Sequential  # embedding to logits; the first layer is the last convolution
