"""Data sets and their splits: train, val and test.

A search reads only train and val; test is read once, by promotion.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from heterokd.datasets.io.grouping import grouped_split, rounded_counts
from heterokd.datasets.io.images import (
    ArrayImages,
    ChosenImages,
    Extents,
    Images,
    OwnLabels,
    ResizedImages,
    images_alike,
    join,
    read_pieces,
    refuse_alike,
    source_of,
)
from heterokd.datasets.io.options import DataOptions
from heterokd.datasets.io.stored_files import StoredFiles
from heterokd.datasets.views.policy import POLICIES, AugmentPolicy
from heterokd.datasets.views.random import permutation
from heterokd.errors import DataError
from heterokd.outputs import TaskName

SplitName = Literal["train", "val", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = ("train", "val", "test")
REST = "rest"  # of `data.unlabelled`

SHARES = (0.6, 0.2, 0.2)
"""Shares of train, val and test if a data set has no official splits."""
HELD_OUT = 0.2
"""Share of train that becomes val (or test) if a data set has two official splits."""

# Number of image files that are decoded for mean and std; the error of their mean is below a grey level.
STATISTICS_SAMPLE = 512
# Images of a split that are decoded before training starts: a second or two, and all images of a small data set.
CHECK_BYTES = 2**27
CHECK_AT_LEAST = 32


@dataclass(frozen=True, eq=False)
class Split:
    """Images with labels.

    Attributes:
        images: read by position; in segmentation all have the size of the canvas, [Hc, Wc].
        labels: [N] class numbers; zeros if every image has a label map instead.
        name: train, val or test.
        label_maps: label maps of segmentation, [Hc, Wc] each; None in classification.
        own_labels: the same at their own sizes, which evaluations count; None: they count `label_maps`.
        extents: sizes of images on a canvas, whose padding is the mean colour of each network; None: nothing is padded,
            or all networks see the canvas' colour.
        weights: [N] weight of each image in the task loss, at least 0; None: all are 1.
        groups: group of each image, of training images with groups; None without.
        kept: [N] positions of the images in the data set's training split; None if all are kept.
        unlabelled: number of images without a label, the last of the split; their labels are `UNLABELLED`.
    """

    images: Images
    labels: NDArray[np.int64]
    name: SplitName
    label_maps: Images | None = None
    weights: NDArray[np.float32] | None = None
    groups: tuple[str, ...] | None = None
    kept: NDArray[np.int64] | None = None
    own_labels: OwnLabels | None = None
    extents: Extents | None = None
    unlabelled: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def chosen(self, index: NDArray[np.int64]) -> Split:
        """Select the images at `index`; positions start at 0 again."""
        maps = None if self.label_maps is None else ChosenImages(self.label_maps, index)
        weights = None if self.weights is None else self.weights[index]
        return replace(
            self,
            images=ChosenImages(self.images, index),
            labels=self.labels[index],
            label_maps=maps,
            weights=weights,
            groups=None if self.groups is None else tuple(self.groups[place] for place in index),
            kept=None if self.kept is None else self.kept[index],
            own_labels=None if self.own_labels is None else self.own_labels.chosen(index),
            extents=None if self.extents is None else self.extents.chosen(index),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all pixels and labels, in hexadecimal; reads every image."""
        digest = hashlib.sha256(np.ascontiguousarray(self.labels, "<i8").tobytes())
        for images in (self.images, self.label_maps):
            if images is not None:
                for pixels in read_pieces(images, np.arange(len(self))):
                    digest.update(pixels.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Splits:
    """The splits of a data set at an image size.

    Attributes:
        train: training images.
        val: images that the search selects on.
        test: images that only promotion reads.
        class_names: name of each class number.
        image_size: height = width in pixels; in segmentation the canvas is derived from it, see the data set.
        fingerprint: SHA-256 of the content and the split, in hexadecimal; the same in every process.
        notes: sentences for the user on how the files were read, and on files that are not read.
        unlabelled: images without labels, which trainings learn from by the teacher alone; None without.
    """

    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]
    image_size: int
    fingerprint: str
    notes: tuple[str, ...] = ()
    unlabelled: Split | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return len(self.class_names)

    @cached_property
    def seen(self) -> Split:
        """The images that a training sees: train, and the images without labels after them."""
        more = self.unlabelled
        if more is None:
            return self.train
        images, labels = join(self.train.images, more.images), np.concatenate((self.train.labels, more.labels))
        return Split(images, labels, self.train.name, unlabelled=len(more))

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of the train images' red, green and blue, in [0, 1]; of a fixed sample if images are in files."""
        return self._statistics[0]

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of the train images' red, green and blue, in [0, 1]."""
        return self._statistics[1]

    @cached_property
    def _statistics(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        in_memory = isinstance(source_of(self.train.images), ArrayImages)
        order = permutation(len(self.train), 0, "statistics")
        index = np.sort(order if in_memory else order[:STATISTICS_SAMPLE])
        total, squares, count = np.zeros(3), np.zeros(3), 0
        for pixels in read_pieces(self.train.images, index):
            flat = pixels.reshape(-1, 3)  # integers: as floats they would take eight times the memory
            total += flat.sum(0, dtype=np.uint64)
            squares += np.square(flat, dtype=np.uint16).sum(0, dtype=np.uint64)
            count += len(flat)
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        red, green, blue = (float(value) for value in mean / 255)
        # Images of a single colour have no deviation, and networks divide by it.
        std_red, std_green, std_blue = (max(float(value), 1e-3) for value in std / 255)
        return (red, green, blue), (std_red, std_green, std_blue)

    def check_images(self) -> None:
        """Decode some images of train and val, all of a small set, to find damaged files before training.

        Raises:
            DataError: an image or a label map is damaged (names the file), or nearly all training images are alike.
        """
        for split in (self.train, self.val, *([] if self.unlabelled is None else [self.unlabelled])):
            if not len(split) or isinstance(source_of(split.images), ArrayImages | ResizedImages):
                continue
            count = max(CHECK_AT_LEAST, CHECK_BYTES // split.images.read(np.zeros(1, np.int64)).nbytes)
            index = np.unique(np.linspace(0, len(split) - 1, min(count, len(split))).astype(np.int64))
            alike = images_alike(read_pieces(split.images, index))  # raises if an image is damaged
            if split.name == "train" and not split.unlabelled:
                refuse_alike(alike, len(index))
            if split.label_maps is not None:
                for _ in read_pieces(split.label_maps, index):
                    pass

    def with_labels_per_class(self, count: int, seed: int = 0) -> Splits:
        """Keep `count` seeded train images of each class; val and test are unchanged.

        Raises:
            DataError: a class has fewer train images.
        """
        if self.train.label_maps is not None:
            raise DataError("data.labels_per_class counts images of one class; for label maps set data.train_images")
        kept: list[NDArray[np.int64]] = []
        for number, name in enumerate(self.class_names):
            members = np.flatnonzero(self.train.labels == number)
            if not 1 <= count <= len(members):
                raise DataError(
                    f"data.labels_per_class: class {name!r} has {len(members)} training images, "
                    f"{count} were asked for; choose 1 to {len(members)}"
                )
            kept.append(members[permutation(len(members), number, "labels_per_class", seed)[:count]])
        return self._with_train(np.concatenate(kept), f"labels_per_class={count}:seed={seed}")

    def with_train_images(self, count: int, seed: int = 0) -> Splits:
        """Keep `count` seeded train images; val and test are unchanged.

        Raises:
            DataError: train has fewer images.
        """
        if not 1 <= count <= len(self.train):
            raise DataError(
                f"data.train_images: there are {len(self.train)} training images, {count} were asked for; "
                f"choose 1 to {len(self.train)}"
            )
        kept = permutation(len(self.train), 0, "train_images", seed)[:count]
        return self._with_train(kept, f"train_images={count}:seed={seed}")

    def folds(self, count: int, seed: int = 0) -> NDArray[np.int64]:
        """Return the fold of each training image, [N] in 0 to `count` - 1.

        Each class is spread evenly, in seeded order. Images of a group are in the same fold.

        Raises:
            DataError: there are fewer images or groups than folds.
        """
        if len(self.train) < count:
            raise DataError(
                f"teacher.cross_fit: {len(self.train)} training images cannot be divided into {count} folds; lower it"
            )
        fold_of, placed = np.zeros(len(self.train), np.int64), 0
        groups = self.train.groups
        if groups is not None:
            for fold, members in enumerate(grouped_split(self.train.labels, groups, [1 / count] * count, seed)):
                fold_of[members] = fold
            return fold_of
        for number in range(self.num_classes):
            members = np.flatnonzero(self.train.labels == number)
            order = permutation(len(members), number, "folds", seed)
            fold_of[members[order]] = (placed + np.arange(len(members))) % count
            placed += len(members)
        return fold_of

    def without_fold(self, fold: int, count: int, seed: int = 0) -> Splits:
        """Return the splits without the training images of a fold; val and test are unchanged.

        Raises:
            DataError: see `folds`.
        """
        others = np.flatnonzero(self.folds(count, seed) != fold)
        return self._with_train(others, f"folds={count}:without={fold}:seed={seed}")

    def _with_train(self, index: NDArray[np.int64], settings: str) -> Splits:
        digest, index = hashlib.sha256(f"{self.fingerprint}:{settings}".encode()), np.sort(index)
        part = self.train.chosen(index)
        if part.kept is None:
            part = replace(part, kept=index)
        return replace(self, train=part, fingerprint=digest.hexdigest())


class Dataset(ABC):
    """A source of images and labels. Each file of `heterokd/datasets/` holds a final subclass.

    Attributes:
        needs_root: whether it is read from the folder `data.root`.
        tasks: task of its labels.
        default_policy: default augmentation policy; see `policy_at`.
        licence: terms of use of the images, as far as their source states them, for model cards.
        reads: names of the `DataOptions` that it reads, in `load_with`.
        reads_shards: whether tars and tables in `data.root` are its images.
    """

    needs_root: ClassVar[bool] = False
    reads: ClassVar[frozenset[str]] = frozenset()
    reads_shards: ClassVar[bool] = False
    tasks: ClassVar[TaskName] = "classification"
    default_policy: ClassVar[AugmentPolicy] = POLICIES["standard"]
    licence: ClassVar[str] = "unknown"

    @classmethod
    def policy_at(cls, image_size: int) -> AugmentPolicy:
        """Return the default policy at an image size; most data sets have the same for all sizes."""
        return cls.default_policy

    def load_with(self, root: Path | None, image_size: int, seed: int, options: DataOptions) -> Splits:
        """Do as `load`, with the options that the data set reads; by default none."""
        return self.load(root, image_size, seed)

    def load_stored(self, stored: StoredFiles, image_size: int, seed: int, options: DataOptions) -> Splits:
        """Do as `load_with` for files in a store; by default all are fetched first."""
        stored.fetch()
        return self.load_with(stored.folder, image_size, seed, options)

    @abstractmethod
    def load(self, root: Path | None, image_size: int, seed: int) -> Splits:
        """Find the images and split them; images may be decoded later, when they are read.

        Args:
            root: folder of the data set; None if `needs_root` is false.
            image_size: height = width of the images in pixels; in segmentation the canvas is derived from it.
            seed: seed of the split, if the data set has no official split.

        Raises:
            DataError: the data set is missing, empty or has an unexpected shape.
        """


def stratified_split(
    labels: NDArray[np.int64], shares: Sequence[float], seed: int, class_names: Sequence[str] | None = None
) -> tuple[NDArray[np.int64], ...]:
    """Split positions into parts, with each class within an image of its share; the same on every machine.

    Args:
        labels: [N] class numbers.
        shares: share of each part; they sum to 1.
        seed: seed of the split.
        class_names: class names for the error message.

    Raises:
        DataError: a class has fewer images than there are parts.
    """
    parts: list[list[NDArray[np.int64]]] = [[] for _ in shares]
    for number in np.unique(labels):
        members = np.flatnonzero(labels == number)
        if len(members) < len(shares):
            name = class_names[number] if class_names else str(number)
            raise DataError(
                f"data.root: class {name!r} has {len(members)} image(s), too few for {len(shares)} splits; "
                f"add images or remove the class"
            )
        members = members[permutation(len(members), int(number), "split", seed)]
        ends = np.cumsum(rounded_counts(len(members), shares))
        for part, piece in zip(parts, np.split(members, ends[:-1]), strict=True):
            part.append(piece)
    return tuple(np.sort(np.concatenate(part)) for part in parts)
