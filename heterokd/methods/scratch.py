"""Scratch: the student trained on labels alone, the baseline that every distillation has to beat.

Not a paper: the row "From Scratch" of every table (FBT Table 1, HCD Table 1). The task loss is the whole loss.
"""

from __future__ import annotations

from heterokd.method import Method
from heterokd.outputs import Batch, Losses, Outputs, Signal


class Scratch(Method):
    """No distillation: the task loss alone."""

    tasks = frozenset({"classification", "segmentation"})
    student_needs = Signal.NONE
    teacher_needs = Signal.NONE

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Return no terms."""
        return {}
