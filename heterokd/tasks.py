"""Tasks without torch: names, metrics, shapes, wording. Their losses are in `training.task_modules`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from heterokd.outputs import OutputSpec
from heterokd.outputs import TaskName as TaskName

Size = tuple[int, int]
"""Height and width in pixels."""

Side = TypeVar("Side")


@dataclass(frozen=True)
class Inference:
    """How a segmentation network answers for an image in an evaluation.

    Attributes:
        window: height and width of sliding windows, in pixels; None: the whole image at once.
        flip: also evaluate the mirrored image.
        scales: factors by which the image is resized; class probabilities of all views are averaged.
    """

    window: Size | None = None
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)


WHOLE = Inference()


class Task(ABC):
    """Task of a data set.

    Attributes:
        name: name of the task.
        score: metric that students are selected by, without its split.
        metric_names: all metrics, without the split.
        unit: unit with a single class: image or pixel.
        output_words: description of the logits in a model card.
        network_hint: networks for this task, for error messages.
        resizes: whether a network resizes every image to a fixed size.
    """

    name: ClassVar[TaskName]
    score: ClassVar[str]
    metric_names: ClassVar[tuple[str, ...]]
    unit: ClassVar[str]
    output_words: ClassVar[str]
    network_hint: ClassVar[str]
    resizes: ClassVar[bool]

    @abstractmethod
    def label_shape(self, size: tuple[Side, Side]) -> tuple[Side, ...]:
        """Return the shape of an image's labels; sides are numbers, or names of dynamic axes."""

    @abstractmethod
    def crop(self, view: Size) -> Size | None:
        """Return the crop size of training views; None if a view shows the whole image."""

    @abstractmethod
    def example_size(self, view: Size, image_size: int) -> Size:
        """Return the image size for measuring a student's latency, from the size of its training views."""

    @abstractmethod
    def refusal(self, dataset: str, changed: Collection[str], *, mixes: bool) -> str | None:
        """Return the reason why settings of the section `data` do not fit the task, or None.

        Args:
            dataset: name of the data set.
            changed: keys with a value other than the default.
            mixes: whether the augmentation policy needs images with a single class.
        """

    @abstractmethod
    def fits(self, spec: OutputSpec) -> bool:
        """Whether a network with these outputs is for this task."""

    @abstractmethod
    def size_words(self, view: Size) -> str:
        """Return a model card's note on the image size."""

    @property
    def labels_are_maps(self) -> bool:
        """Whether every pixel has a label."""
        return bool(self.label_shape((1, 1)))

    def logits_shape(self, num_classes: int, size: Size) -> tuple[int, ...]:
        """Return the shape of an image's logits at the size of its labels."""
        return (num_classes, *self.label_shape(size))


class Classification(Task):
    """One class per image."""

    name = "classification"
    score = "top1"
    metric_names = ("top1", "top5", "balanced_accuracy", "macro_f1", "auroc", "loss", "agreement")
    unit = "image"
    output_words = "logits of"
    network_hint = "one class per image; set a classifier of timm"
    resizes = True

    def label_shape(self, size: tuple[Side, Side]) -> tuple[Side, ...]:
        """Return (): a class number."""
        return ()

    def crop(self, view: Size) -> Size | None:
        """Return None: a view shows the whole image."""
        return None

    def example_size(self, view: Size, image_size: int) -> Size:
        """Return the size that the network resizes every image to."""
        return image_size, image_size

    def refusal(self, dataset: str, changed: Collection[str], *, mixes: bool) -> str | None:
        """Refuse the settings of crops and of evaluations of label maps."""
        for key in ("crop", "evaluation", "test_time"):
            if key in changed:
                return f"{key}: is for segmentation; data set {dataset!r} has one class per image"
        return None

    def fits(self, spec: OutputSpec) -> bool:
        """Whether the logits are one vector per image."""
        return spec.logits_stride is None

    def size_words(self, view: Size) -> str:
        """Return no note."""
        return ""


class Segmentation(Task):
    """One class per pixel."""

    name = "segmentation"
    score = "miou"
    metric_names = (
        *("miou", "iou_classes", "dice", "mean_accuracy", "pixel_accuracy", "boundary_iou"),
        *("loss", "agreement"),
    )
    unit = "pixel"
    output_words = "logits at every pixel of"
    network_hint = "a label map per image; set a segmentation network, ARCHITECTURE-ENCODER, such as segformer-mit_b0"
    resizes = False

    def label_shape(self, size: tuple[Side, Side]) -> tuple[Side, ...]:
        """Return the image size: a class number for every pixel."""
        return size

    def crop(self, view: Size) -> Size | None:
        """Return the size of a view, which is a crop of the image."""
        return view

    def example_size(self, view: Size, image_size: int) -> Size:
        """Return the size of a training view; the network takes other sizes too."""
        return view

    def refusal(self, dataset: str, changed: Collection[str], *, mixes: bool) -> str | None:
        """Refuse settings that count or mix images of a class."""
        if "labels_per_class" in changed:
            return "labels_per_class: counts images of one class; for label maps set train_images"
        if "unlabelled" in changed:
            return f"unlabelled: is for images with one class, and data set {dataset!r} has label maps; leave it out"
        if mixes:
            return (
                "augment: mixup, cutmix and RandAugment (operations) are for images with one class, "
                f"but data set {dataset!r} has label maps; set them to 0, or take the policy 'scenes'"
            )
        return None

    def fits(self, spec: OutputSpec) -> bool:
        """Whether the logits are a map."""
        return spec.logits_stride is not None

    def size_words(self, view: Size) -> str:
        """Return the size of the training views."""
        return f" (trained on {view[0]} x {view[1]})"


TASKS: dict[TaskName, Task] = {task.name: task for task in (Classification(), Segmentation())}


def task_of(spec: OutputSpec) -> Task:
    """Return the task of a network with these outputs."""
    return next(task for task in TASKS.values() if task.fits(spec))
