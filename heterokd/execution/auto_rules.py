"""Rules of `heterokd auto` that depend on the images: sizes of views, proposed students, methods, training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from heterokd.datasets.io.inspect import FolderInspection
from heterokd.datasets.masks.inspect import MaskInspection
from heterokd.methods import ONE_OF_EACH_KIND, SCENE_METHODS

FAMILIES = {
    "cnn": (
        "test_resnet",
        "mobilenetv3_small_050",
        "mobilenetv2_050",
        "mobilenetv3_small_100",
        "mobilenetv2_100",
        "efficientnet_lite0",
        "efficientnet_b0",
        "resnet10t",
        "resnet18",
        "resnet34",
        "resnet50",
    ),
    "attention": ("test_vit", "pvt_v2_b0", "deit_tiny_patch16_224", "pvt_v2_b1", "deit_small_patch16_224"),
    "mlp": ("resmlp_12_224", "mixer_s16_224", "mixer_s32_224"),
}
"""Proposed students, small to large: networks that papers distil into, and timm's smallest of each family."""

SCENE_FAMILIES = {
    "cnn": (
        "linknet-mobilenetv3_small_050",
        "segformer-mobilenetv3_small_050",
        "deeplabv3plus-test_resnet",
        "deeplabv3plus-mobilenetv3_small_050",
        "deeplabv3plus-mobilenetv3_small_100",
        "deeplabv3plus-mobilenet_v2",
        "deeplabv3plus-resnet18",
        "deeplabv3plus-resnet50",
    ),
    "attention": ("segformer-mit_b0", "segformer-mit_b1", "segformer-mit_b2"),
}
"""The same for images with label maps."""

SIDES = (32, 48, 64, 96, 128, 160, 192, 224)
"""Sizes of views: the largest one up to the median side of the images, at least the first."""

SCENE_SIDES = (64, 96, 128, 192, 256, 320, 384, 448, 512)
"""The same of images with label maps; multiples of 32, up to the median longer side."""


@dataclass(frozen=True)
class ImageRules:
    """Properties of the images that decide sizes, lengths, networks and methods.

    Attributes:
        size: height = width of a view, in pixels.
        classes: number of classes.
        train_images: number of training images.
        section: the section `data` of the experiment, without its size.
        families: students to propose.
        methods: methods to search.
        batches: batch sizes below 2,000 images, below 20,000, and from there.
        training: settings of the students' training.
        learning_rate: range that is searched.
    """

    size: int
    classes: int
    train_images: int
    section: Mapping[str, object]
    families: Mapping[str, Sequence[str]]
    methods: Sequence[str]
    batches: tuple[int, int, int]
    training: Mapping[str, object]
    learning_rate: tuple[float, float]

    @property
    def is_scene(self) -> bool:
        """Whether the images have label maps."""
        return self.families is SCENE_FAMILIES

    @property
    def batch(self) -> int:
        """Images per update."""
        return self.batches[0 if self.train_images < 2_000 else 1 if self.train_images < 20_000 else 2]


def rules_for(seen: FolderInspection | MaskInspection, images: Path) -> ImageRules:
    """Return the properties of the images; of those with label maps by the rules for segmentation."""
    if isinstance(seen, MaskInspection):
        return ImageRules(
            size=max([SCENE_SIDES[0], *(side for side in SCENE_SIDES if side <= seen.side)]),
            classes=len(seen.classes),
            train_images=len(seen.splits.train),
            section={"dataset": "mask_folder", "root": str(images), "masks": seen.settings()},
            families=SCENE_FAMILIES,
            methods=SCENE_METHODS,
            batches=(8, 16, 16),
            training={"optimizer": "adamw", "learning_rate": 0.001, "weight_decay": 0.01, "warmup_epochs": 1},
            learning_rate=(0.0003, 0.01),
        )
    return ImageRules(
        size=max([SIDES[0], *(side for side in SIDES if side <= seen.side)]),
        classes=len(seen.classes),
        train_images=_train_images(seen),
        section={"dataset": "image_folder", "root": str(images), **({"table": seen.table} if seen.table else {})},
        families=FAMILIES,
        methods=ONE_OF_EACH_KIND,
        batches=(32, 64, 128),
        training={"optimizer": "sgd", "learning_rate": 0.05},
        learning_rate=(0.005, 0.5),
    )


def _train_images(seen: FolderInspection) -> int:
    """Return the number of training images: those of train, or three in five if there are no splits."""
    if seen.splits:
        return sum(file.split == "train" for file in seen.kept)
    return max(1, 3 * len(seen.kept) // 5)
