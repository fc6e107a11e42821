"""ExportFormat: base class of the files in `heterokd/students/export/formats/`."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from heterokd.networks.network import AnyNetwork
from heterokd.networks.onnx_graph import AXES


@dataclass(frozen=True, eq=False)
class ToWrite:
    """A student to export.

    Attributes:
        network: network in evaluation mode, on the CPU.
        example: images [2, 3, H, W] to trace the network with; two, because a batch of one becomes a constant.
        any_size: whether the graph must take images of any height and width, or only of the example's size.
        card: description of the student as JSON values, to store in the file if it can hold text.
        calibration: training images [N, 3, H, W] in [0, 1], at the size of `example`; None if the format needs none.
    """

    network: AnyNetwork
    example: Tensor
    any_size: bool
    card: Mapping[str, object]
    calibration: Tensor | None = None

    @property
    def open_axes(self) -> tuple[int, ...]:
        """Numbers of the dynamic axes."""
        return tuple(axis for axis in AXES if axis == 0 or self.any_size)

    @property
    def card_text(self) -> str:
        """The card as JSON."""
        return json.dumps(dict(self.card))


@dataclass(frozen=True, eq=False)
class Opened:
    """An opened export.

    Attributes:
        run: function from images [B, 3, H, W] in [0, 1] to logits.
        opened_with: code that opens the files.
        normalises: whether the files include the normalisation of images.
    """

    run: Callable[[Tensor], Tensor]
    opened_with: str
    normalises: bool = True


class ExportFormat(ABC):
    """An export format. Subclasses are final; `write` may raise any exception for a network that it cannot export.

    Attributes:
        files: names of the files; the first holds the weights.
        libraries: distributions that write and run the files; their versions are recorded.
        runtime: name of the runtime.
        is_graph: whether the files hold the traced computation; False: the weights alone.
        is_exact: whether outputs must equal the student's; otherwise the metric on val is measured.
        calibration_images: maximum number of training images that `write` needs.
    """

    files: ClassVar[tuple[str, ...]]
    libraries: ClassVar[tuple[str, ...]]
    runtime: ClassVar[str] = "torch, CPU"
    is_graph: ClassVar[bool] = True
    is_exact: ClassVar[bool] = True
    calibration_images: ClassVar[int] = 0

    @abstractmethod
    def write(self, student: ToWrite, folder: Path) -> None:
        """Write `files` to an existing folder."""

    @abstractmethod
    def open(self, folder: Path) -> Opened:
        """Open the files of a folder, without the student: the result is compared with the student, and timed."""
