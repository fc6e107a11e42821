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
    """An entry of timm's `feature_info`: a map that a module of the network gives.

    Attributes:
        num_chs: channels of the map.
        reduction: input pixels per map pixel.
        module: dotted name of the module.
    """

    num_chs: int
    reduction: int
    module: str


class PretrainedConfig(TypedDict):
    """The keys of timm's `pretrained_cfg` that are read here.

    Attributes:
        input_size: channels, height and width of the images.
        mean: mean per channel, of images in [0, 1].
        std: standard deviation per channel.
        classifier: dotted name of the last classifier, or of both classifiers.
        first_conv: dotted name of the first convolution.
        fixed_input_size: whether the network takes images of one size only.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classifier: NotRequired[str | tuple[str, ...] | None]
    first_conv: NotRequired[str | tuple[str, ...] | None]
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

    @abstractmethod
    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """Return the last linear layer; both in a two-headed network (distilled DeiT)."""


def classifier_of(body: TimmBody) -> nn.Module:
    """Return the last classifier; a list of both in a two-headed network."""
    classifier = body.get_classifier()
    return nn.ModuleList(classifier) if isinstance(classifier, tuple) else classifier


class SegmentationEncoder(nn.Module):
    """Encoder of smp: images to a list of maps.

    Attributes:
        output_stride: input pixels per pixel of the last map.
    """

    output_stride: int


class SegmentationBody(nn.Module):
    """Segmentation network of smp.

    Attributes:
        encoder: images to maps.
        decoder: maps to the embedding.
        segmentation_head: embedding to logits; its first layer is the last convolution.
    """

    encoder: SegmentationEncoder
    decoder: nn.Module
    segmentation_head: nn.Sequential
