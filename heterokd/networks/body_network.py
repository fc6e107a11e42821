"""BodyNetwork: what all networks share: name, options, output shapes, and the normalisation of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heterokd.errors import PairError
from heterokd.networks.body_types import Normalisation
from heterokd.outputs import OutputSpec, Signal


class BodyNetwork(nn.Module):
    """A plain module that takes normalised images, with what heterokd knows about it.

    Attributes:
        body: the plain module.
        spec: shapes of the outputs.
        name: name in the experiment.
        options: arguments in addition to the name.
        mean, std: normalisation of the images, [1, C, 1, 1] with the channels that the body takes; not part of the
            state dict.
    """

    NO_SIGNAL: ClassVar = "its structure does not give it"

    body: nn.Module
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        body: nn.Module,
        spec: OutputSpec,
        options: Mapping[str, object],
        normalisation: Normalisation,
        channels: object = 3,
    ) -> None:
        """Store the attributes.

        Args:
            name: name in the experiment.
            body: the plain module.
            spec: shapes of the outputs.
            options: arguments in addition to the name.
            normalisation: mean and deviation of each colour.
            channels: channels that the body takes; 1: grey images, normalised by the means over colours.
        """
        super().__init__()
        self.name = name
        self.options = dict(options)
        self.body = body
        self.spec: OutputSpec = spec
        for key, values in zip(("mean", "std"), normalisation, strict=True):
            buffer = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            grey = buffer.mean(dim=1, keepdim=True)
            self.register_buffer(key, grey if channels == 1 else buffer, persistent=False)

    def require(self, needs: Signal) -> None:
        """Check that the network gives signals.

        Raises:
            PairError: it does not.
        """
        missing = needs & ~self.spec.serves
        if missing:
            raise PairError(f"network {self.name!r} has no {missing}: {self.NO_SIGNAL}")

    def normalise(self, images: Tensor) -> Tensor:
        """Resize and normalise images [B, 3, H, W] in [0, 1]: [B, C, image_size, image_size], mean 0, deviation 1."""
        return normalised(images, self.spec.image_size, self.mean, self.std)

    @property
    def encoder_parameters(self) -> list[nn.Parameter]:
        """Parameters of the encoder: all but those of the last classifier."""
        head = {id(parameter) for parameter in cast(nn.Module, self.head).parameters()}
        return [parameter for parameter in self.body.parameters() if id(parameter) not in head]

    def exports_any_size(self, size: tuple[int, int]) -> bool:
        """Return False: images are resized to a fixed size, the only input size of an exported graph."""
        return False


def normalised(images: Tensor, side: int, mean: Tensor, std: Tensor) -> Tensor:
    """Resize and normalise images [B, 3, H, W] in [0, 1]; grey [B, 1, side, side] if `mean` has one channel."""
    size = (side, side)
    if images.shape[-2:] != size:
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
    return ((as_grey(images) if mean.shape[1] == 1 else images) - mean) / std


def standardised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise images [B, 3, H, W] in [0, 1] without resizing; padding, which is NaN, becomes 0, the mean colour."""
    return ((images - mean) / std).nan_to_num(0.0)


def as_grey(images: Tensor) -> Tensor:
    """Convert colours [B, 3, H, W] to grey [B, 1, H, W] by ITU-R 601-2 luma, as Pillow's `convert("L")`."""
    weights = images.new_tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)
