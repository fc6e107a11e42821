"""The section `data`: the images, their split and their augmentation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from operator import not_
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, PlainValidator, Strict, ValidationError, ValidationInfo, field_validator, model_validator

from heterokd.config.extension import Extension, is_reference, read_extension
from heterokd.config.settings import LARGEST_SEED, Names, PathName, Settings
from heterokd.config.test_time import TestTimeSettings
from heterokd.datasets import DATASETS
from heterokd.datasets.io.options import BLACK_CANVAS, FIRST_READER, MEGAPIXELS, PADDING, WHITE, Color, DataOptions
from heterokd.datasets.io.split import REST, Dataset
from heterokd.datasets.masks.settings import MaskSettings
from heterokd.datasets.views.policy import BLACK, FIRST_SCENES, NETWORK_MEAN, POLICIES, AugmentPolicy, Fill
from heterokd.errors import ConfigError, did_you_mean
from heterokd.tasks import TASKS, Inference, TaskName

STORES = ("s3", "gs", "gcs", "file")
Side = Annotated[int, Field(ge=8, le=4096)]
Level = Annotated[int, Field(ge=0, le=255)]
# YAML has no tuples.
RedGreenBlue = Annotated[tuple[Level, Level, Level], Strict(False)]
Bounds = Annotated[tuple[float, float], Strict(False)]


def _url_or_path(root: object) -> str | Path | None:
    """Keep a URL as text: a path would lose one of its slashes."""
    if root is not None and not isinstance(root, str | Path):
        raise ValueError(f"expected a file or folder name, got {root!r}")
    if isinstance(root, str):
        return root.rstrip("/") if "://" in root else Path(root)
    return root


def _rest_or_folder(root: object) -> str | Path | None:
    return REST if root == REST else _url_or_path(root)


Root = Annotated[str | Path | None, PlainValidator(_url_or_path)]
RestOrRoot = Annotated[str | Path | None, PlainValidator(_rest_or_folder)]

# Keys that are not part of `Dataset.load`: the data set that reads them says so.
OPTIONS = tuple(field.name for field in fields(DataOptions))


def dataset_class(name: str, extension: Extension | None = None) -> type[Dataset]:
    """Look up a data set by name, or in the file that defines it.

    Raises:
        ConfigError: unknown data set, or the class in its file is not a data set.
    """
    if extension is None:
        if name not in DATASETS:
            raise ConfigError(f"there is no data set {name!r}; {did_you_mean(name, DATASETS)}")
        return DATASETS[name]
    kind: type[Dataset] = extension.load("heterokd.datasets.io.split:Dataset")
    if kind.tasks not in TASKS:
        raise ConfigError(
            f"{extension.file}: {extension.class_name}.tasks is {kind.tasks!r}; {did_you_mean(str(kind.tasks), TASKS)}"
        )
    return kind


def task_named(content: Mapping[str, object]) -> TaskName | None:
    """Return the task of an unchecked section `data`; None if the section is not valid."""
    with suppress(ValidationError):
        return DataSettings.model_validate(content).task
    return None


class DataSettings(Settings):
    """The images of an experiment."""

    extension: Extension | None = Field(
        None, exclude_if=not_, description="the file of a user's data set; filled in from `dataset`"
    )
    dataset: str = Field(description="a name that `heterokd datasets` lists, or FILE.py:Class")
    root: Root = Field(
        None,
        description="folder of the data set, or s3://, gs:// or file:// (copied to each node's disk); data sets in the "
        "package need none",
    )
    image_size: int = Field(32, ge=8, le=2048, description="height = width of a view, in pixels")
    crop: tuple[Side, Side] | None = Field(
        None, strict=False, description="segmentation: height and width of a view; default: image_size twice"
    )
    evaluation: Literal["whole", "sliding"] = Field(
        "whole", description="segmentation: evaluate whole images, or sliding windows of a view's size"
    )
    evaluation_size: Literal["label", "canvas"] = Field(
        "label",
        description="segmentation: evaluations count pixels at the size of each label map, or on the canvas onto which "
        "images are read (faster where images are larger; experiments before schema 5)",
    )
    test_time: TestTimeSettings = Field(
        TestTimeSettings(), description="segmentation: views that an evaluation averages"
    )
    drawn_at: int | None = Field(
        None, description="segmentation: set by heterokd for teacher.image_size, to the student's image_size"
    )
    scene_views: Literal[1, 2, 3] = Field(
        3,
        description="segmentation: version of the rules of views. Experiments before schema 6 have 2: padding is the "
        "mean color of ImageNet, not of each network. Before schema 4 they have 1: the policy scenes draws the area of "
        "the crop, not the zoom, and padding is black",
    )
    masks: MaskSettings | None = Field(
        None,
        exclude_if=not_,
        description="segmentation: classes of label maps, and how images without splits are split",
    )
    labels_per_class: int | None = Field(None, ge=1, description="keep this many training images of each class")
    train_images: int | None = Field(None, ge=1, description="keep this many training images of all classes together")
    unlabelled: RestOrRoot = Field(
        None,
        description="images without labels, which the student learns from by the teacher: a folder, an address, or "
        "rest (the training images that labels_per_class or train_images leave out)",
    )
    augment: str | AugmentPolicy | None = Field(
        None, description="name or settings of an augmentation policy; default: the data set's"
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="of the train / val / test split")
    reader: Literal[1, 2] = Field(
        2, description="version of the rules by which files are found and read; experiments before schema 3 have 1"
    )
    background: str | RedGreenBlue = Field(
        "white", description="color below transparent pixels: a name, #rrggbb or [red, green, blue]"
    )
    value_range: Literal["auto"] | Bounds = Field(
        "auto",
        description="values that become black and white in images of more than 8 bits; auto: those that the files use",
    )
    class_order: Literal["sorted", "natural"] | Names | None = Field(
        None,
        description="order of the classes: sorted, natural (2 before 10), or a list; default: classes.txt or sorted",
    )
    table: PathName | None = Field(
        None, description="CSV or Parquet file in root with the columns path, label and, if you like, split and group"
    )
    group: str | None = Field(
        None, description="regular expression; images whose paths agree in its match are in the same split"
    )
    crops: Literal["square", "photo"] = Field(
        "square",
        description="source of training crops: the centre square at image_size, or the photo (decoded each time)",
    )
    val_crop: float = Field(
        1.0, gt=0, le=1, description="share of the shorter side that val and test show (crop_pct of timm)"
    )
    pixels_max_gb: float = Field(
        50.0,
        ge=0,
        description="decoded images of this size are kept in a file on the disk, if it has twice the space; up to a "
        "quarter of the memory they always are",
    )
    max_megapixels: float = Field(MEGAPIXELS, gt=0, description="larger images are refused, in millions of pixels")

    @model_validator(mode="before")
    @classmethod
    def _with_file(cls, content: object) -> object:
        """Read the file of a user's data set, whose name is then that of its class."""
        if not isinstance(content, Mapping) or not is_reference(content.get("dataset")):
            return content
        with suppress(ConfigError):  # `_known_dataset` raises it again, for the key `dataset`
            extension = read_extension(content["dataset"], DATASETS)
            return {**content, "dataset": extension.name, "extension": extension}
        return content

    @field_validator("root", "unlabelled")
    @classmethod
    def _is_a_store(cls, root: str | Path | None) -> str | Path | None:
        if not isinstance(root, str) or root == REST:
            return root
        parts = urlsplit(root)
        if parts.username or parts.password or "secret" in parts.query.lower():
            raise ValueError(
                "a URL must not contain credentials; give each machine a role, or set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            )
        if parts.scheme not in STORES or (parts.scheme != "file" and not parts.netloc):
            raise ValueError(f"expected a folder, s3://BUCKET/..., gs://BUCKET/... or file:///FOLDER, got {root!r}")
        return root

    @field_validator("dataset")
    @classmethod
    def _known_dataset(cls, name: str, info: ValidationInfo) -> str:
        try:
            if is_reference(name):
                read_extension(name, DATASETS)
            dataset_class(name, info.data.get("extension"))
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return name

    @field_validator("augment")
    @classmethod
    def _known_policy(cls, policy: str | AugmentPolicy | None) -> str | AugmentPolicy | None:
        if isinstance(policy, str) and policy not in POLICIES:
            raise ValueError(f"there is no augmentation policy {policy!r}; {did_you_mean(policy, POLICIES)}")
        return policy

    @field_validator("background")
    @classmethod
    def _known_color(cls, color: str | Color) -> str | Color:
        _rgb(color)
        return color

    @field_validator("value_range")
    @classmethod
    def _ascends(cls, bounds: str | tuple[float, float]) -> str | tuple[float, float]:
        if not isinstance(bounds, str) and not bounds[0] < bounds[1]:
            raise ValueError(f"expected [black, white] with black < white, got {list(bounds)}")
        return bounds

    @field_validator("group")
    @classmethod
    def _is_an_expression(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
        return pattern

    @model_validator(mode="after")
    def _fits_the_data_set(self) -> DataSettings:
        if self.dataset_class.needs_root and self.root is None:
            raise ValueError(f"data set {self.dataset!r} is read from a folder: set data.root to it")
        changed = [key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default]
        for key in OPTIONS:
            if key in changed and key in self.unread and key != "reader":
                raise ValueError(f"{key}: data set {self.dataset!r} does not read it; leave it out")
            is_first = self.reader == FIRST_READER and "reader" in self.dataset_class.reads
            if key in changed and is_first and key not in ("reader", "max_megapixels"):
                raise ValueError(f"{key}: needs data.reader: 2; set it, or leave {key} out")
        if self.crops == "photo" and (self.policy.rotation or self.policy.translate or self.policy.scale[1] > 1):
            raise ValueError(
                "crops: photo needs a policy without rotation and translate, of scale up to 1; set crops: square"
            )
        mixes = self.policy.mixes or bool(self.policy.operations)
        reason = TASKS[self.task].refusal(self.dataset, changed, mixes=mixes)
        if reason is not None:
            raise ValueError(reason)
        if self.unlabelled == REST and self.labels_per_class is None and self.train_images is None:
            raise ValueError(
                "unlabelled: rest is the training images that labels_per_class or train_images leave out; set one of "
                "them, or give a folder"
            )
        return self

    @property
    def dataset_class(self) -> type[Dataset]:
        """The data set."""
        return dataset_class(self.dataset, self.extension)

    @property
    def options(self) -> DataOptions:
        """How files are found and read."""
        return DataOptions(
            reader=self.reader,
            background=_rgb(self.background),
            value_range=self.value_range,
            max_megapixels=self.max_megapixels,
            masks=self.masks,
            padding=BLACK_CANVAS if self.fill == BLACK else PADDING,
            class_order=self.class_order,
            table=self.table,
            group=self.group,
            crops=self.crops,
            val_crop=self.val_crop,
            drawn_at=self.drawn_at,
        )

    @property
    def unread(self) -> frozenset[str]:
        """Keys that the data set does not read: some of `DataOptions`, and without label maps those of their views."""
        unread = frozenset(OPTIONS) & frozenset(type(self).model_fields) - self.dataset_class.reads
        if not TASKS[self.task].labels_are_maps:
            return unread | {"scene_views", "evaluation_size"}
        # Data sets in the package have label maps of the size of the canvas.
        return unread if self.dataset_class.needs_root else unread | {"evaluation_size"}

    @property
    def task(self) -> TaskName:
        """The data set's task."""
        return self.dataset_class.tasks

    @property
    def view_size(self) -> tuple[int, int]:
        """Height and width of a training view, in pixels."""
        return self.crop or (self.image_size, self.image_size)

    @property
    def view_crop(self) -> tuple[int, int] | None:
        """Height and width of the crops that training views are; None if a view shows the whole image."""
        return TASKS[self.task].crop(self.view_size)

    @property
    def inference(self) -> Inference:
        """How a segmentation network answers for an image in an evaluation."""
        window = self.view_size if self.evaluation == "sliding" else None
        return Inference(window, self.test_time.flip, self.test_time.scales)

    @property
    def fill(self) -> Fill:
        """Color of views and canvases outside their images, in [0, 1]."""
        if self.scene_views == 3 and TASKS[self.task].labels_are_maps:
            return NETWORK_MEAN
        black = self.scene_views == 1 or not TASKS[self.task].labels_are_maps
        return BLACK if black else (PADDING[0] / 255, PADDING[1] / 255, PADDING[2] / 255)

    @property
    def policy(self) -> AugmentPolicy:
        """The augmentation policy with all its settings."""
        if isinstance(self.augment, AugmentPolicy):
            return self.augment
        named = self.dataset_class.policy_at(self.image_size) if self.augment is None else POLICIES[self.augment]
        return FIRST_SCENES if self.scene_views == 1 and named == POLICIES["scenes"] else named


def _rgb(color: str | Color) -> Color:
    if not isinstance(color, str):
        return color
    if color == "white":
        return WHITE
    from PIL import ImageColor  # lazily: other experiments need no Pillow

    try:
        red, green, blue, *alpha = ImageColor.getrgb(color)
    except ValueError:
        alpha = [0]
    if alpha:
        raise ValueError(
            f"there is no color {color!r}; give a name of CSS, #rrggbb or [red, green, blue], 0 to 255 each"
        )
    return red, green, blue
