"""What val says of a study's winner, as plain numbers: measured.json, from which the page is drawn without data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterokd.storage.files import read_json, write_text
from heterokd.storage.study_dir import StudyFolder


@dataclass(frozen=True)
class MeasuredNetwork:
    """What a network costs.

    Attributes:
        network: its name.
        costs: by the name of the cost; None where it was not measured.
    """

    network: str
    costs: Mapping[str, float | None] = field(default_factory=dict)


@dataclass
class Measured:
    """Of one study, at the end of its search. Parts that could not be measured are empty, and `missing` says why.

    Attributes:
        winner: number of its trial.
        scratch: number of the baseline's trial, if there is one beside the winner.
        images: of val.
        classes: their names.
        confusion: [K, K] images of val, rows are labels and columns decisions; in classification.
        scratch_confusion: the same of the baseline.
        iou: of each class [K], NaN where neither labels nor decisions hold it; by network: `teacher`, the winner's
            method, `scratch`; in segmentation.
        similarity: CKA, [student's stage, teacher's stage].
        compared: images that CKA was computed on.
        networks: `student` and `teacher`.
        missing: by part, why it could not be measured.
    """

    winner: int
    scratch: int | None = None
    images: int = 0
    classes: tuple[str, ...] = ()
    confusion: NDArray[np.int64] | None = None
    scratch_confusion: NDArray[np.int64] | None = None
    iou: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    similarity: tuple[tuple[float, ...], ...] = ()
    compared: int = 0
    networks: dict[str, MeasuredNetwork] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def cost(self, name: str, key: str) -> float | None:
        """What `student` or `teacher` costs; None where it was not measured."""
        return self.networks[name].costs.get(key) if name in self.networks else None

    def write(self, folder: StudyFolder) -> None:
        """Replace the study's measured.json."""
        content = {
            **self.__dict__,
            "confusion": _sparse(self.confusion),
            "scratch_confusion": _sparse(self.scratch_confusion),
            "iou": {name: [None if np.isnan(one) else float(one) for one in iou] for name, iou in self.iou.items()},
            "networks": {name: {"network": one.network, **one.costs} for name, one in self.networks.items()},
        }
        write_text(folder.measured_file, json.dumps(content))

    @classmethod
    def read(cls, folder: StudyFolder) -> Measured | None:
        """What was measured in a study; None where nothing was.

        Raises:
            StudyError: the file is damaged.
        """
        content: Mapping[str, Any] = read_json(folder.measured_file)
        if not content:
            return None
        size = len(content["classes"])
        return cls(
            **{
                **content,
                "classes": tuple(content["classes"]),
                "confusion": _dense(content["confusion"], size),
                "scratch_confusion": _dense(content["scratch_confusion"], size),
                "iou": {name: np.array(iou, dtype=np.float64) for name, iou in content["iou"].items()},
                "similarity": tuple(map(tuple, content["similarity"])),
                "networks": {
                    name: MeasuredNetwork(one["network"], {key: cost for key, cost in one.items() if key != "network"})
                    for name, one in content["networks"].items()
                },
            }
        )


def _sparse(counts: NDArray[np.int64] | None) -> list[list[int]] | None:
    """[row, column, count] of what is not 0: of a thousand classes a matrix is nearly empty."""
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
