"""ExportFormat: what a file of `heterokd/students/export/formats/` defines, and what its opened files give."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from heterokd.networks.network import AnyNetwork

INPUT, OUTPUT = "images", "logits"
"""Names of what an exported graph takes and gives."""
AXES = {0: "batch", 2: "height", 3: "width"}
"""Axes of the images that may be of any length."""


@dataclass(frozen=True, eq=False)
class ToWrite:
    """A student to be written.

    Attributes:
        network: in evaluation mode, on the CPU.
        example: images [2, 3, H, W] for an exporter to follow; two, since it makes a constant of a batch of one.
        any_size: whether the file shall take images of any height and width, or those of the example alone.
        card: what is known of the student, as plain values, to be kept in the file where it can hold a text.
    """

    network: AnyNetwork
    example: Tensor
    any_size: bool
    card: Mapping[str, object]

    @property
    def open_axes(self) -> tuple[int, ...]:
        """Axes of the images whose length the file must not fix."""
        return tuple(axis for axis in AXES if axis == 0 or self.any_size)

    @property
    def card_text(self) -> str:
        """The card as JSON."""
        return json.dumps(dict(self.card))


@dataclass(frozen=True, eq=False)
class Opened:
    """Files of a student, opened again.

    Attributes:
        run: images [B, 3, H, W] in [0, 1] to logits, by the file.
        opened_with: code with which a user opens it.
        normalises: whether mean and deviation are part of the file.
    """

    run: Callable[[Tensor], Tensor]
    opened_with: str
    normalises: bool = True


class ExportFormat(ABC):
    """One kind of file. Subclasses are final; an exporter may raise whatever it trips over.

    Attributes:
        files: names of the files; the first holds the weights.
        libraries: distributions whose versions the record names: those that write the file and run it.
        runtime: what runs it, in words.
        is_graph: whether the file holds the computation, as followed on an example; False: the weights alone.
    """

    files: ClassVar[tuple[str, ...]]
    libraries: ClassVar[tuple[str, ...]]
    runtime: ClassVar[str] = "torch, CPU"
    is_graph: ClassVar[bool] = True

    @abstractmethod
    def write(self, student: ToWrite, folder: Path) -> None:
        """Write `files` into a folder that exists."""

    @abstractmethod
    def open(self, folder: Path) -> Opened:
        """Open what `write` left in a folder, from its files alone: it is compared with the student, and timed."""
