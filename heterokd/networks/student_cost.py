"""StudentCost: what a file of `heterokd/networks/student_costs/` defines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import nn


class StudentCost(ABC):
    """A figure of a network of which less is better. Subclasses are final; the file's name is the figure's key.

    Attributes:
        name: in words.
        unit: of the figure, in words.
        symbol: of the unit, to stand behind the figure.
        digits: significant digits to show.
        is_timed: whether the figure depends on the machine: it is then measured once on each and remembered, with real
            weights. Other figures come from networks without weights where those can be built.
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
        """Describe how `measure` comes to its figure, for a table of figures; empty where nothing is to say."""
        return ""

    @classmethod
    def figure(cls, value: float) -> str:
        """Format a value: `11.2 M parameters`."""
        return f"{value:.{cls.digits}g} {cls.symbol} {cls.name}"

    @classmethod
    def label(cls) -> str:
        """Label an axis or a column: `parameters in millions`."""
        return f"{cls.name} in {cls.unit}"
