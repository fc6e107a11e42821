"""StudentCost: base class of the files in `heterokd/networks/student_costs/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import nn


class StudentCost(ABC):
    """A cost of a network, lower is better. Subclasses are final; the file's name is the key of the cost.

    Attributes:
        name: name in texts.
        unit: unit, in words.
        symbol: symbol of the unit, after a number.
        digits: number of significant digits.
        is_timed: whether the cost depends on the machine: it is then measured once per machine, with real weights, and
            stored. Other costs are computed from networks without weights if those can be built.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    symbol: ClassVar[str]
    digits: ClassVar[int] = 3
    is_timed: ClassVar[bool] = False

    @abstractmethod
    def measure(self, network: nn.Module, size: tuple[int, int]) -> float:
        """Measure a network.

        Args:
            network: images [B, 3, H, W] in [0, 1] to logits, in evaluation mode.
            size: height and width of an image, in pixels.
        """

    def conditions(self, size: tuple[int, int]) -> str:
        """Describe the conditions of the measurement, for a table of costs; empty if there are none."""
        return ""

    @classmethod
    def figure(cls, value: float) -> str:
        """Format a value: `11.2 M parameters`."""
        return f"{value:.{cls.digits}g} {cls.symbol} {cls.name}"

    @classmethod
    def label(cls) -> str:
        """Label an axis or a column: `parameters in millions`."""
        return f"{cls.name} in {cls.unit}"
