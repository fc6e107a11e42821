"""DeepLabV3 and DeepLabV3+ from smp's modules, on encoders that smp's constructors reject."""

from __future__ import annotations

from collections.abc import Mapping

from segmentation_models_pytorch.base import SegmentationHead, SegmentationModel
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3Decoder, DeepLabV3PlusDecoder
from segmentation_models_pytorch.encoders import get_encoder
from torch import nn

from heterokd.networks.segmentation_names import UNDILATED


class UndilatedDeepLab(SegmentationModel):  # type: ignore[misc]  # smp is not typed
    """DeepLabV3 or DeepLabV3+ from smp's modules on an encoder with a stride of 32.

    smp's constructors require a stride of 8 or 16, which attention encoders do not have. The state dict has the keys
    and shapes of smp's class, since dilation changes no shape.
    """

    def __init__(
        self,
        architecture: str,
        encoder: str,
        weights: str | bool | None,
        classes: int,
        arguments: Mapping[str, object],
        decoder: Mapping[str, object],
    ) -> None:
        super().__init__()
        self.encoder = get_encoder(encoder, weights=weights, **arguments)
        width = decoder["out_channels"]
        self.decoder: nn.Module
        if architecture == "deeplabv3":
            self.decoder = DeepLabV3Decoder(in_channels=self.encoder.out_channels[-1], **decoder)
        else:
            self.decoder = DeepLabV3PlusDecoder(
                encoder_channels=self.encoder.out_channels, encoder_depth=5, output_stride=16, **decoder
            )
            self.decoder.up = nn.Upsample(mode="bilinear", scale_factor=UNDILATED // 4, align_corners=True)
        self.segmentation_head = SegmentationHead(width, classes, kernel_size=1)
        self.classification_head = None
