"""Method: the only base class of heterokd. One file of `heterokd/methods/` holds one final subclass of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import nn

from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal


class MethodParams(BaseModel):
    """Parameters of a method: one sentence and one search domain each; the default is the paper's value."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Method(nn.Module, ABC):
    """A distillation loss with its parameters and projectors.

    A method sees outputs; never networks, loaders or optimizers. The task loss is not its business: `Distiller` adds
    it once. Subclasses are final and fill `forward`, and `build` when they learn something (projectors).

    Attributes:
        student_needs: what is read from the student: the most that any setting of Params reads. `build` may narrow
            it for one instance (FBT does: what it reads depends on the pair).
        teacher_needs: likewise for the teacher.
        tasks: the tasks that the equation is written for.
        memories: names of the sub-modules whose buffers each data-parallel worker fills by itself. They are part of
            checkpoints; `Distiller` keeps them out of what the first worker sends to all at every step.
    """

    student_needs: Signal = Signal.LOGITS
    teacher_needs: Signal = Signal.LOGITS
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})
    memories: ClassVar[tuple[str, ...]] = ()

    Params: ClassVar[type[MethodParams]] = MethodParams

    def __init__(self, params: MethodParams | None, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build the projectors from the two specs alone, before any forward.

        Args:
            params: an instance of the subclass's own `Params`; None takes the defaults.
            student: shapes of the student's outputs.
            teacher: shapes of the teacher's outputs.

        Raises:
            PairError: the method, or the layout in `params`, cannot exist for this pair.
        """
        super().__init__()
        self.params = self.Params() if params is None else params
        self.build(student, teacher)

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Create projectors as sub-modules; methods that learn nothing leave this empty."""
        return

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """The method's terms for one batch.

        Args:
            student: the student's outputs, with gradient.
            teacher: the teacher's outputs, without.
            batch: labels, index.
            progress: fraction of the training that is done, in [0, 1]; warm-ups read it.

        Returns:
            Named scalars, already weighted; the caller sums them as they are.
        """


def summary(owner: type) -> str:
    """First line of a docstring: what catalogues and `heterokd methods` print."""
    return (owner.__doc__ or "").strip().split("\n", 1)[0]
