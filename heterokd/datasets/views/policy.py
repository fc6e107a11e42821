"""AugmentPolicy: how views differ from their image, and the policies that have a name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# Part of every policy's hash: raise it when the same draws give other pixels, so that stored outputs are made anew.
VIEWS_VERSION = 1


def _is_range(bounds: tuple[float, float]) -> tuple[float, float]:
    if not 0 < bounds[0] <= bounds[1]:
        raise ValueError(f"`0 < low <= high` must hold, got low={bounds[0]!r}, high={bounds[1]!r}")
    return bounds


Range = Annotated[tuple[float, float], AfterValidator(_is_range)]


class AugmentPolicy(BaseModel):
    """How views differ from their image; everything is off unless set, and then a view is its image."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    scale: Range = Field(
        (1.0, 1.0), description="area of the random crop as a share of the image's; above 1 the image shrinks"
    )
    ratio: Range = Field((1.0, 1.0), description="width / height of the random crop, drawn evenly on a log scale")
    translate: float = Field(0.0, ge=0, le=1, description="largest shift in x and in y, as a share of the side")
    rotation: float = Field(0.0, ge=0, le=180, description="largest turn to either side, in degrees")
    flip: float = Field(0.0, ge=0, le=1, description="probability of mirroring left and right")
    brightness: float = Field(0.0, ge=0, le=1, description="pixels are multiplied by 1 plus or minus up to this")
    contrast: float = Field(
        0.0, ge=0, le=1, description="distance to the image's mean grey, 1 plus or minus up to this"
    )
    saturation: float = Field(0.0, ge=0, le=1, description="distance to the pixel's grey, 1 plus or minus up to this")
    erasing: float = Field(0.0, ge=0, le=1, description="probability of blacking out one random rectangle")
    hue: float = Field(0.0, ge=0, le=0.5, description="largest turn of the hue to either side, in turns of its circle")
    erasing_noise: bool = Field(False, description="a rectangle that is blacked out shows random colours instead")
    operations: int = Field(0, ge=0, le=8, description="RandAugment: operations in a row, each done in half the views")
    magnitude: float = Field(9.0, ge=0, le=10, description="RandAugment: strength of an operation; 10 is the strongest")
    magnitude_std: float = Field(0.0, ge=0, le=10, description="RandAugment: standard deviation of the strength")
    mixup: float = Field(
        0.0, ge=0, le=10, description="blends views of two images; their shares are Beta(mixup, mixup)"
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        le=10,
        description="puts a piece of another image's view in; the areas' shares are Beta(cutmix, cutmix)",
    )

    @property
    def hash(self) -> str:
        """First 16 hexadecimal digits of SHA-256 over every setting and the version of the views' code."""
        # A later setting counts only where it is set, so that it leaves the views of older policies as they are.
        settings = self.model_dump(mode="json", include=_FIRST) | self.model_dump(
            mode="json", exclude=_FIRST, exclude_defaults=True
        )
        content = {"version": VIEWS_VERSION, **settings}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def warps(self) -> bool:
        """Whether a view resamples its image."""
        return self.scale != (1.0, 1.0) or self.ratio != (1.0, 1.0) or self.translate > 0 or self.rotation > 0

    @property
    def colours(self) -> bool:
        """Whether a view changes its image's colours, other than by RandAugment."""
        return self.brightness > 0 or self.contrast > 0 or self.saturation > 0 or self.hue > 0

    @property
    def mixes(self) -> bool:
        """Whether a view shows two images, and its label is shares of two classes."""
        return self.mixup > 0 or self.cutmix > 0


_FIRST = {
    *("scale", "ratio", "translate", "rotation", "flip"),
    *("brightness", "contrast", "saturation", "erasing"),
}
"""Settings of the first policies, part of every hash. The default of a later one is "off", and never changes."""


POLICIES: dict[str, AugmentPolicy] = {
    "none": AugmentPolicy(),
    # Handwriting: what a hand does by itself; a mirrored or quarter-turned digit is another digit.
    "digits": AugmentPolicy(scale=(0.8, 1.25), ratio=(0.9, 1 / 0.9), translate=0.06, rotation=10.0),
    # Photographs: the crop of Inception (area 8 % to 100 %, sides 3:4 to 4:3), flip, mild colour.
    "standard": AugmentPolicy(
        scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, brightness=0.2, contrast=0.2, saturation=0.2
    ),
    # The same without colour: what OFA-KD shows of CIFAR-100 and ImageNet, https://arxiv.org/abs/2310.19444.
    "crop": AugmentPolicy(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5),
    # What OFA-KD shows to students and teachers that are transformers or MLPs, on CIFAR-100 and ImageNet alike: timm's
    # rand-m9-mstd0.5-inc1, reprob 0.25 of pixel noise, mixup 0.8, cutmix 1.0 (github.com/Hao840/OFAKD, vit_mlp.yaml;
    # its color_jitter has no effect there, as timm leaves it out beside RandAugment).
    "ofa": AugmentPolicy(
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        flip=0.5,
        erasing=0.25,
        erasing_noise=True,
        operations=2,
        magnitude=9.0,
        magnitude_std=0.5,
        mixup=0.8,
        cutmix=1.0,
    ),
    # Street scenes and other images with label maps: half to twice the size, and flip, as in CIRKD's program
    # (https://arxiv.org/abs/2204.06986); the area is that of the crop, see `view_scenes`.
    "scenes": AugmentPolicy(scale=(0.25, 4.0), flip=0.5),
    # Photographs of 32 pixels: a crop of the image padded by 4 black pixels is a shift by up to 4 of 32; and flip.
    "cifar": AugmentPolicy(translate=4 / 32, flip=0.5),
}


@dataclass(frozen=True)
class ViewSpec:
    """Which views of the training images a training sees.

    Attributes:
        policy: augmentation policy.
        seed: seed of the views and of their order.
        views: number of views of each image; None draws a new view every epoch.
        crop: height and width of a view in segmentation, in pixels; None: the size of the image.
    """

    policy: AugmentPolicy
    seed: int = 0
    views: int | None = None
    crop: tuple[int, int] | None = None
