"""Measured: measurements of a study's winner on val; measured.json, from which the page is drawn without data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from heterokd.storage.files import damaged, read_json, write_text
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.typed_json import parse


@dataclass(frozen=True)
class MeasuredNetwork:
    """Costs of a network.

    Attributes:
        network: name of the network.
        costs: value by the key of the cost; None if it was not measured.
    """

    network: str
    costs: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """An image of val that the winner classifies wrongly.

    Attributes:
        file: name of the image in the study's folder of pictures.
        index: number of the image in val.
        label: number of its class.
        predicted: number of the predicted class.
        confidence: probability of the prediction.
        label_probability: probability of the label.
    """

    file: str
    index: int
    label: int
    predicted: int
    confidence: float
    label_probability: float


@dataclass(frozen=True)
class _Content:
    """Content of measured.json, see `Measured`."""

    winner: int
    scratch: int | None = None
    images: int = 0
    classes: tuple[str, ...] = ()
    confusion: list[tuple[int, int, int]] | None = None
    scratch_confusion: list[tuple[int, int, int]] | None = None
    iou: dict[str, list[float | None]] = field(default_factory=dict)
    iou_intervals: list[tuple[float | None, float | None]] | None = None
    failures: tuple[Failure, ...] = ()
    similarity: tuple[tuple[float, ...], ...] = ()
    compared: int = 0
    networks: dict[str, dict[str, str | float | None]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    training_images: dict[str, int] = field(default_factory=dict)


@dataclass
class Measured:
    """Measurements at the end of a search. Parts that could not be measured are empty, and `missing` holds the reason.

    Attributes:
        winner: number of the winner's trial.
        scratch: number of the baseline's trial, unless it is the winner or is missing.
        images: number of images of val.
        classes: names of the K classes.
        confusion: [K, K] images of val, rows are labels and columns predictions; in classification.
        scratch_confusion: the same for the baseline.
        iou: IoU of each class [K], NaN where neither labels nor predictions have it; by network: `teacher`, the
            winner's method, `scratch`; in segmentation.
        iou_intervals: [K, 2] 95 % interval of the winner's IoU of each class, NaN without pixels.
        failures: wrong images with the most confidence, the most confident first; in classification.
        similarity: CKA, [student's stage, teacher's stage].
        compared: number of images that CKA was computed on.
        networks: costs of `student` and `teacher`.
        missing: by part, why it could not be measured.
        training_images: number of `labelled` and of `unlabelled` training images; empty in older versions.
    """

    winner: int
    scratch: int | None = None
    images: int = 0
    classes: tuple[str, ...] = ()
    confusion: NDArray[np.int64] | None = None
    scratch_confusion: NDArray[np.int64] | None = None
    iou: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    iou_intervals: NDArray[np.float64] | None = None
    failures: tuple[Failure, ...] = ()
    similarity: tuple[tuple[float, ...], ...] = ()
    compared: int = 0
    networks: dict[str, MeasuredNetwork] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    training_images: dict[str, int] = field(default_factory=dict)

    def cost(self, name: str, key: str) -> float | None:
        """Return a cost of `student` or `teacher`; None if it was not measured."""
        return self.networks[name].costs.get(key) if name in self.networks else None

    def write(self, folder: StudyFolder) -> None:
        """Replace the study's measured.json."""
        content = {
            **vars(self),
            "confusion": _sparse(self.confusion),
            "scratch_confusion": _sparse(self.scratch_confusion),
            "iou": {name: _numbers(values) for name, values in self.iou.items()},
            "iou_intervals": None if self.iou_intervals is None else [_numbers(pair) for pair in self.iou_intervals],
            "failures": [asdict(failure) for failure in self.failures],
            "networks": {name: {"network": each.network, **each.costs} for name, each in self.networks.items()},
        }
        write_text(folder.measured_file, json.dumps(content))

    @classmethod
    def read(cls, folder: StudyFolder) -> Measured | None:
        """Read the study's measured.json, or return None if it does not exist.

        Raises:
            StudyError: the file is damaged.
        """
        known = read_json(folder.measured_file)
        if not known:
            return None
        try:
            content = parse(_Content, known)
        except ValueError as error:
            raise damaged(folder.measured_file, error) from None
        size = len(content.classes)
        return cls(
            winner=content.winner,
            scratch=content.scratch,
            images=content.images,
            classes=content.classes,
            confusion=_dense(content.confusion, size),
            scratch_confusion=_dense(content.scratch_confusion, size),
            iou={name: np.array(values, dtype=np.float64) for name, values in content.iou.items()},
            iou_intervals=None
            if content.iou_intervals is None
            else np.array(content.iou_intervals, dtype=np.float64).reshape(-1, 2),
            failures=content.failures,
            similarity=content.similarity,
            compared=content.compared,
            networks={
                name: MeasuredNetwork(
                    str(each["network"]), {key: cost for key, cost in each.items() if not isinstance(cost, str)}
                )
                for name, each in content.networks.items()
            },
            missing=content.missing,
            training_images=content.training_images,
        )


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _sparse(counts: NDArray[np.int64] | None) -> list[list[int]] | None:
    """Convert to [row, column, count] of all counts above 0: with a thousand classes the matrix is nearly empty."""
    if counts is None:
        return None
    return [[int(row), int(column), int(counts[row, column])] for row, column in np.argwhere(counts)]


def _dense(entries: Sequence[Sequence[int]] | None, size: int) -> NDArray[np.int64] | None:
    if entries is None:
        return None
    counts = np.zeros((size, size), np.int64)
    for row, column, count in entries:
        counts[row, column] = count
    return counts
