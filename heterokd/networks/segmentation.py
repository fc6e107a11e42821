"""SegmentationNetwork: an encoder and decoder of segmentation_models_pytorch (smp) that give `Outputs`."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.helpers import to_2tuple
from timm.layers.pool2d_same import AvgPool2dSame
from torch import Tensor, nn

from heterokd.networks.body_network import BodyNetwork, standardised
from heterokd.networks.body_types import Normalisation, SegmentationBody
from heterokd.networks.segmentation_bodies import SegmentationLayout, classify, head_of, stage_maps
from heterokd.networks.segmentation_encoders import HieraEncoder, MapsEncoder
from heterokd.networks.segmentation_names import smp_encoders, split_name
from heterokd.outputs import Outputs, Signal


class SegmentationNetwork(BodyNetwork):
    """A network for semantic segmentation with LOGITS, EMBEDDING and STAGES.

    Attributes:
        body: the plain smp module; its state dict loads in smp.
        spec: shapes of the outputs; `image_size` is the training size, other sizes are possible too.
        name: `{architecture}-{encoder}`.
        options: smp's arguments in addition to the name.
        multiple: number of pixels to whose multiples the sides of images are padded.
        any_size: whether an exported graph takes images of any size: not if timm builds the encoder for a fixed size,
            as for Swin, whose windows torch.export cannot trace with dynamic sides.
    """

    NO_SIGNAL = "a segmentation network gives logits, embedding and stages"

    body: SegmentationBody

    def __init__(
        self,
        name: str,
        body: SegmentationBody,
        layout: SegmentationLayout,
        options: Mapping[str, object],
        normalisation: Normalisation,
    ) -> None:
        super().__init__(name, body, layout.spec, options, normalisation)
        self.multiple = layout.multiple
        self.any_size = "img_size" not in layout.arguments and not isinstance(body.encoder, MapsEncoder)

    def forward(self, images: Tensor, needs: Signal = Signal.LOGITS) -> Outputs:
        """Run a single forward and return the signals in `needs`.

        Args:
            images: [B, 3, H, W] float in [0, 1], of any size; NaN in the padding of a canvas. Sides that are not a
                multiple of the encoder's stride are padded at the right and bottom. All padding is zero after the
                normalisation, which is the mean colour. Positions entirely in the padding of the sides are cropped:
                maps of stride s are [ceil(H / s), ceil(W / s)].
            needs: signals to return. Logits are at the decoder's stride, without smp's upsampling to the image; the
                embedding is the input of the last convolution; stages are the encoder's last four maps.
        """
        self.require(needs)
        height, width = images.shape[-2:]
        features = self.body.encoder(pad_to_multiple(self.normalise(images), self.multiple))
        stages = logits = embedding = None
        if Signal.STAGES in needs:
            stages = tuple(
                y[..., : -(-height // stage.stride), : -(-width // stage.stride)]
                for y, stage in zip(stage_maps(features), self.spec.stages, strict=True)
            )
        if needs & (Signal.LOGITS | Signal.EMBEDDING):
            stride = self.spec.logits_stride or 1
            logits, embedding = (
                y[..., : -(-height // stride), : -(-width // stride)] for y in classify(self.body, features)
            )
        return Outputs(
            logits=logits if Signal.LOGITS in needs else None,
            embedding=embedding if Signal.EMBEDDING in needs else None,
            stages=stages,
        )

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise images [B, 3, H, W] in [0, 1] to mean 0 and deviation 1, without resizing; padding (NaN) is 0."""
        return standardised(images, self.mean, self.std)

    def exports_any_size(self, size: tuple[int, int]) -> bool:
        """Return whether a graph exported at a size takes others: not if a map has a single pixel; see `any_size`."""
        return self.any_size and min(size) > self.multiple

    @property
    def encoder_parameters(self) -> list[nn.Parameter]:
        """Parameters of the encoder, without decoder and classifier, and without the pyramid on a plain ViT."""
        encoder = self.body.encoder
        return list((encoder.model if isinstance(encoder, MapsEncoder) else encoder).parameters())

    @property
    def head(self) -> nn.Module:
        """The last classifier, a convolution over the embedding, without encoder and decoder."""
        return head_of(self.body)[1]


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad [B, C, H, W] with zeros at the right and bottom, so that both sides are multiples."""
    right, bottom = -x.shape[-1] % multiple, -x.shape[-2] % multiple
    return F.pad(x, (0, right, 0, bottom)) if right or bottom else x


class DeployableSegmentation(nn.Module):
    """Images [B, 3, H, W] in [0, 1], of any size, to logits [B, K, H, W]; can be exported with dynamic size."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.body = copy.deepcopy(network.body)
        _use_constant_padding(self.body)
        if isinstance(self.body.encoder, HieraEncoder):
            self.body.encoder.flatten_windows()
        self.multiple = network.multiple
        self.stride = network.spec.logits_stride or 1
        self.register_buffer("mean", network.mean.clone())
        self.register_buffer("std", network.std.clone())

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [B, K, H, W], upsampled bilinearly to the images' size."""
        height, width = images.shape[-2:]
        # Integer arithmetic only, and padding also by zero pixels: a branch or a rounding on the images' size would
        # become a guard of the exported graph, or could not be stored at all.
        rows, columns = (height + self.multiple - 1) // self.multiple, (width + self.multiple - 1) // self.multiple
        bottom, right = rows * self.multiple - height, columns * self.multiple - width
        features = self.body.encoder(F.pad((images - self.mean) / self.std, (0, right, 0, bottom)))
        logits, _ = classify(self.body, features)
        for side, size in ((2, height), (3, width)):
            # By index: a slice would add a guard that separates sizes with and without cropping.
            seen = torch.arange((size + self.stride - 1) // self.stride, device=logits.device)
            logits = logits.index_select(side, seen)
        return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)


def _use_constant_padding(module: nn.Module) -> None:
    """Replace TensorFlow's padding of pooling layers by a constant padding, in place.

    timm computes the padding from the map's size, with a ceil that torch.export cannot store. It is constant for maps
    whose sides are multiples of the stride, as all maps of `DeployableSegmentation` are.
    """
    for name, child in module.named_children():
        if isinstance(child, AvgPool2dSame):
            over = [
                max(0, size - stride)
                for size, stride in zip(to_2tuple(child.kernel_size), to_2tuple(child.stride), strict=True)
            ]
            padding = (over[1] // 2, over[1] - over[1] // 2, over[0] // 2, over[0] - over[0] // 2)
            pool = nn.AvgPool2d(child.kernel_size, child.stride, 0, child.ceil_mode, child.count_include_pad)
            setattr(module, name, nn.Sequential(nn.ConstantPad2d(padding, 0.0), pool))
        else:
            _use_constant_padding(child)


def encoder_normalisation(name: str) -> Normalisation:
    """Return mean and standard deviation of the images that the encoder's published weights were trained on."""
    _, encoder = split_name(name)
    config = None if encoder in smp_encoders() else timm.get_pretrained_cfg(encoder, allow_unregistered=True)
    return (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if config is None else (config.mean, config.std)
