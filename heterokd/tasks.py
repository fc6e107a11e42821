"""What differs between tasks, without torch: names, metrics, shapes, words. Losses: `training.task_modules`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from heterokd.formatting import metric_name

if TYPE_CHECKING:
    from heterokd.outputs import OutputSpec

TaskName = Literal["classification", "segmentation"]

Size = tuple[int, int]
"""Height and width in pixels."""

Side = TypeVar("Side")


class Task(ABC):
    """What the labels of a data set are.

    Attributes:
        name: of the task.
        score: metric that students are selected by, without its split.
        score_name: the same as printed.
        metric_names: all metrics, without the split.
        unit: what gets one class each.
        output_words: what the logits belong to, in a model card.
        network_hint: which networks fit, for error messages.
        resizes: whether a network resizes every image to one size; others take images of several sizes.
    """

    name: ClassVar[TaskName]
    score: ClassVar[str]
    score_name: ClassVar[str]
    metric_names: ClassVar[tuple[str, ...]]
    unit: ClassVar[str]
    output_words: ClassVar[str]
    network_hint: ClassVar[str]
    resizes: ClassVar[bool]

    @abstractmethod
    def label_shape(self, size: tuple[Side, Side]) -> tuple[Side, ...]:
        """Shape of one image's labels; sides are numbers, or the names of dynamic ones."""

    @abstractmethod
    def crop(self, view: Size) -> Size | None:
        """Size of the crops that training views are; None where a view shows the whole image."""

    @abstractmethod
    def example_size(self, view: Size, image_size: int) -> Size:
        """Size of the images that a deployed student is timed on, from that of its training views."""

    @abstractmethod
    def refusal(self, dataset: str, changed: Collection[str], *, mixes: bool) -> str | None:
        """Reason why settings of the section `data` do not fit the task, or None.

        Args:
            dataset: name of the data set.
            changed: keys whose value is not the default.
            mixes: whether the augmentation policy is for images with one class.
        """

    @abstractmethod
    def fits(self, spec: OutputSpec) -> bool:
        """Whether a network with these outputs decides on this task's labels."""

    @abstractmethod
    def size_words(self, view: Size) -> str:
        """What a model card adds to the size of image that a graph takes."""

    @property
    def labels_are_maps(self) -> bool:
        """Whether every pixel has a label."""
        return bool(self.label_shape((1, 1)))

    def logits_shape(self, num_classes: int, size: Size) -> tuple[int, ...]:
        """Shape of one image's logits at the size of its labels."""
        return (num_classes, *self.label_shape(size))


class Classification(Task):
    """One class per image."""

    name = "classification"
    score = "top1"
    score_name = metric_name(score)
    metric_names = ("top1", "top5", "loss", "agreement")
    unit = "image"
    output_words = "logits of"
    network_hint = "one class an image: name a classifier of timm"
    resizes = True

    def label_shape(self, size: tuple[Side, Side]) -> tuple[Side, ...]:
        """One class number."""
        return ()

    def crop(self, view: Size) -> Size | None:
        """None: data sets of this task give images at the size of a view."""
        return None

    def example_size(self, view: Size, image_size: int) -> Size:
        """The size that the network resizes every image to."""
        return image_size, image_size

    def refusal(self, dataset: str, changed: Collection[str], *, mixes: bool) -> str | None:
        """Refuse the settings of crops and windows."""
        for key in ("crop", "evaluation"):
            if key in changed:
                return f"{key}: is for segmentation; data set {dataset!r} has one class an image"
        return None

    def fits(self, spec: OutputSpec) -> bool:
        """Whether the logits are one vector per image."""
        return spec.logits_stride is None

    def size_words(self, view: Size) -> str:
        """Nothing to add."""
        return ""


class Segmentation(Task):
    """One class per pixel."""

    name = "segmentation"
    score = "miou"
    score_name = metric_name(score)
    metric_names = ("miou", "pixel_accuracy", "loss", "agreement")
    unit = "pixel"
    output_words = "logits at every pixel of"
    network_hint = "a label map an image: name a segmentation network, ARCHITECTURE-ENCODER, such as segformer-mit_b0"
    resizes = False

    def label_shape(self, size: tuple[Side, Side]) -> tuple[Side, ...]:
        """A class number for every pixel."""
        return size

    def crop(self, view: Size) -> Size | None:
        """A view is a crop of the image."""
        return view

    def example_size(self, view: Size, image_size: int) -> Size:
        """The size of a training view: the network takes others as well."""
        return view

    def refusal(self, dataset: str, changed: Collection[str], *, mixes: bool) -> str | None:
        """Refuse what counts or mixes images of one class."""
        if "labels_per_class" in changed:
            return "labels_per_class: counts images of one class; for label maps set train_images"
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
        """The size of the training views."""
        return f" (trained on {view[0]} x {view[1]})"


TASKS: dict[TaskName, Task] = {task.name: task for task in (Classification(), Segmentation())}


def task_of(spec: OutputSpec) -> Task:
    """The task that a network with these outputs does."""
    return next(task for task in TASKS.values() if task.fits(spec))
