"""StudentCost: base class of the files in `heterokd/networks/student_costs/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from torch import nn


RUNS = 30
"""Number of timed calls, of which the median counts."""


@dataclass(frozen=True)
class Runtime:
    """What a student is timed in.

    Attributes:
        name: torch, or onnx for its graph in ONNX Runtime.
        threads: number of threads of the CPU.
        device: where it runs.
    """

    name: Literal["torch", "onnx"] = "torch"
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"

    def conditions(self, size: tuple[int, int]) -> str:
        """Describe `timing.time_call` of an image of this height and width."""
        return f"median of {RUNS}, batch 1, {size[0]} x {size[1]} pixels, {self}"

    def __str__(self) -> str:
        """Name runtime, device and threads."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{'torch' if self.name == 'torch' else 'ONNX Runtime'}, " + (
            f"CPU, {threads}" if self.device == "cpu" else "GPU, with the copies to and from it"
        )


class StudentCost(ABC):
    """A cost of a network, lower is better. Subclasses are final; the file's name is the key of the cost.

    Args:
        runtime: what is timed, if the cost depends on the machine.

    Attributes:
        name: name in texts.
        unit: unit, in words.
        symbol: symbol of the unit, after a number.
        digits: number of significant digits.
        is_timed: whether the cost depends on the machine: it is then measured once per machine, with real weights, and
            stored. Other costs are computed from networks without weights if those can be built.
        is_optional: whether it is measured only where it is an objective or has a limit, because it takes seconds.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    symbol: ClassVar[str]
    digits: ClassVar[int] = 3
    is_timed: ClassVar[bool] = False
    is_optional: ClassVar[bool] = False

    def __init__(self, runtime: Runtime = Runtime()) -> None:
        """Create the cost, as measured in a runtime."""
        self.runtime = runtime

    @property
    def timed_in(self) -> Runtime:
        """What `measure` times; costs that need another runtime than the chosen one replace it."""
        return self.runtime

    @abstractmethod
    def measure(self, network: nn.Module, size: tuple[int, int]) -> float:
        """Measure a network.

        Args:
            network: images [B, 3, H, W] in [0, 1] to logits, in evaluation mode.
            size: height and width of an image, in pixels.

        Raises:
            CostError: it cannot be measured for this network.
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
