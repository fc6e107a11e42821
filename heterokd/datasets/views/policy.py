"""Augmentation policies: the settings of views, and the named policies."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

# Part of every policy's hash: raise it if the same draws give other pixels, so that stored outputs are not reused.
VIEWS_VERSION = 1


def _is_range(bounds: tuple[float, float]) -> tuple[float, float]:
    if not 0 < bounds[0] <= bounds[1]:
        raise ValueError(f"`0 < low <= high` must hold, got low={bounds[0]!r}, high={bounds[1]!r}")
    return bounds


Range = Annotated[tuple[float, float], AfterValidator(_is_range)]


class AugmentPolicy(BaseModel):
    """Settings of the views of images; by default all augmentation is off, and a view is its image."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    scale: Range = Field(
        (1.0, 1.0), description="area of the random crop as a share of the image; above 1 the image shrinks"
    )
    ratio: Range = Field((1.0, 1.0), description="width / height of the random crop, uniform on a log scale")
    translate: float = Field(0.0, ge=0, le=1, description="maximum shift in x and in y, as a share of the side")
    rotation: float = Field(0.0, ge=0, le=180, description="maximum rotation to either side, in degrees")
    flip: float = Field(0.0, ge=0, le=1, description="probability of mirroring left and right")
    brightness: float = Field(
        0.0, ge=0, le=1, description="maximum change of the factor 1 by which pixels are multiplied"
    )
    contrast: float = Field(
        0.0,
        ge=0,
        le=1,
        description="maximum change of the factor 1 by which distances to the image's mean grey are multiplied",
    )
    saturation: float = Field(
        0.0,
        ge=0,
        le=1,
        description="maximum change of the factor 1 by which distances to the pixel's grey are multiplied",
    )
    erasing: float = Field(0.0, ge=0, le=1, description="probability of erasing a random rectangle (black)")
    hue: float = Field(0.0, ge=0, le=0.5, description="maximum rotation of the hue to either side, in full circles")
    erasing_noise: bool = Field(False, description="fill the erased rectangle with random colours instead of black")
    operations: int = Field(
        0, ge=0, le=8, description="RandAugment: number of operations, each applied to half of the views"
    )
    magnitude: float = Field(
        9.0, ge=0, le=10, description="RandAugment: strength of the operations; 10 is the strongest"
    )
    magnitude_std: float = Field(0.0, ge=0, le=10, description="RandAugment: standard deviation of the strength")
    mixup: float = Field(0.0, ge=0, le=10, description="blend views of two images, with shares from Beta(mixup, mixup)")
    cutmix: float = Field(
        0.0, ge=0, le=10, description="insert a piece of another image's view, with its area from Beta(cutmix, cutmix)"
    )

    zoom: Range = Field(
        (1.0, 1.0),
        description="segmentation: factor by which images are enlarged before the crop, drawn evenly; instead of scale",
    )

    @model_validator(mode="after")
    def _has_a_single_scale(self) -> AugmentPolicy:
        if self.zoom != (1.0, 1.0) and self.scale != (1.0, 1.0):
            raise ValueError("zoom and scale both set the size of the crop; set one of them")
        return self

    @property
    def hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of all settings and of the version of the views' code."""
        # Later settings count only if they are set, so that the hashes of older policies stay the same.
        settings = self.model_dump(mode="json", include=_FIRST) | self.model_dump(
            mode="json", exclude=_FIRST, exclude_defaults=True
        )
        content = {"version": VIEWS_VERSION, **settings}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def warps(self) -> bool:
        """Whether views resample their images."""
        sizes = (self.scale, self.ratio, self.zoom)
        return any(bounds != (1.0, 1.0) for bounds in sizes) or self.translate > 0 or self.rotation > 0

    @property
    def colours(self) -> bool:
        """Whether views change colours, apart from RandAugment."""
        return self.brightness > 0 or self.contrast > 0 or self.saturation > 0 or self.hue > 0

    @property
    def mixes(self) -> bool:
        """Whether views show two images, with shares of two classes as their label."""
        return self.mixup > 0 or self.cutmix > 0


_FIRST = {"scale", "ratio", "translate", "rotation", "flip", "brightness", "contrast", "saturation", "erasing"}
"""Settings of the first policies, part of every hash. The default of later settings is "off", and never changes."""


POLICIES: dict[str, AugmentPolicy] = {
    "none": AugmentPolicy(),
    # Handwriting: small changes only; a mirrored or rotated digit is another digit.
    "digits": AugmentPolicy(scale=(0.8, 1.25), ratio=(0.9, 1 / 0.9), translate=0.06, rotation=10.0),
    # Photographs: Inception's crop (area 8 % to 100 %, sides 3:4 to 4:3), flip, mild colour.
    "standard": AugmentPolicy(
        scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, brightness=0.2, contrast=0.2, saturation=0.2
    ),
    # The same without colour: OFA-KD's views of CIFAR-100 and ImageNet, https://arxiv.org/abs/2310.19444.
    "crop": AugmentPolicy(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5),
    # OFA-KD's views for transformers and MLPs, on CIFAR-100 and ImageNet: timm's rand-m9-mstd0.5-inc1, reprob 0.25 with
    # pixel noise, mixup 0.8, cutmix 1.0 (github.com/Hao840/OFAKD, vit_mlp.yaml; its color_jitter has no effect, since
    # timm drops it if RandAugment is used).
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
    # Images with label maps: half to twice the size, drawn evenly, and flip, as in CIRKD's code
    # (https://arxiv.org/abs/2204.06986) and mmsegmentation.
    "scenes": AugmentPolicy(zoom=(0.5, 2.0), flip=0.5),
    # Photographs of 32 pixels: flip, and a shift by up to 4 pixels, as by padding with 4 black pixels and cropping.
    "cifar": AugmentPolicy(translate=4 / 32, flip=0.5),
}

FIRST_SCENES = AugmentPolicy(scale=(0.25, 4.0), flip=0.5)
"""The policy `scenes` before schema 4, which drew the crop's area evenly: its median zoom was 0.69 instead of 1.25."""

Fill = tuple[float, float, float]
"""Red, green and blue in [0, 1]."""
BLACK: Fill = (0.0, 0.0, 0.0)
NETWORK_MEAN: Fill = (-1.0, -1.0, -1.0)
"""No colour: the pixels are NaN, which a network replaces by the mean colour that it subtracts."""


@dataclass(frozen=True)
class ViewSpec:
    """Views of the training images in a training.

    Attributes:
        policy: augmentation policy.
        seed: seed of the views and of their order.
        views: number of views of each image; None draws a new view every epoch.
        crop: height and width of a view in segmentation, in pixels; None: the size of the image.
        teacher_size: height = width at which a teacher sees the views, in pixels; None: as the student.
        fill: colour of a view in segmentation where it lies outside of its image.
    """

    policy: AugmentPolicy
    seed: int = 0
    views: int | None = None
    crop: tuple[int, int] | None = None
    teacher_size: int | None = None
    fill: Fill = BLACK
