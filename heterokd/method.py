"""Method: the only base class of heterokd. One file of `heterokd/methods/` holds one final subclass of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from heterokd.domains import Scalar
from heterokd.outputs import Batch, Kind, Losses, Outputs, OutputSpec, Signal


class MethodParams(BaseModel):
    """Parameters of a method: one sentence and one search domain each; the default is the paper's value."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class StageSimilarity:
    """How similar the stages of a teacher and of a student trained on labels alone are.

    Attributes:
        values: CKA, [student's stage, teacher's stage], shallow to deep.
        student_kind: what the student's last stage is made of.
        teacher_kind: what the teacher's last stage is made of.
    """

    values: Sequence[Sequence[float]]
    student_kind: Kind
    teacher_kind: Kind


def similar(values: Sequence[float]) -> list[int]:
    """Numbers (from 1) of the stages whose similarity is at least half of the largest one."""
    return [number for number, value in enumerate(values, start=1) if value >= SIMILAR_SHARE * max(values)]


SIMILAR_SHARE = 0.5


@dataclass(frozen=True)
class Panel:
    """One map of a figure, for several images.

    Attributes:
        title: what it shows.
        values: [N, h, w]; NaN where nothing is shown.
        colormap: matplotlib's name.
        ticks: values of the colour bar and their labels; the first and the last are its ends.
    """

    title: str
    values: Tensor
    colormap: str
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class MethodFigure:
    """What a method computed for some images.

    Attributes:
        caption: what the panels show.
        panels: drawn next to the images.
    """

    caption: str
    panels: tuple[Panel, ...]


class Method(nn.Module, ABC):
    """A distillation loss with its parameters and projectors.

    A method sees outputs; never networks, loaders or optimizers. The task loss is not its business: `Distiller` adds
    it once. Subclasses are final and fill `forward`, and `build` when they learn something (projectors).

    Attributes:
        student_needs: what is read from the student: the most that any setting of Params reads. `build` may narrow
            it for one instance (FBT does: what it reads depends on the pair).
        teacher_needs: the same for the teacher.
        tasks: the tasks that the equation is written for.
        memories: names of the sub-modules whose buffers each data-parallel worker fills by itself. They are part of
            checkpoints; `Distiller` keeps them out of what the first worker sends to all at every step.
        has_figure: whether `figure` gives one.
        has_initial_settings: whether `initial_settings` gives any.
    """

    student_needs: Signal = Signal.LOGITS
    teacher_needs: Signal = Signal.LOGITS
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})
    memories: ClassVar[tuple[str, ...]] = ()
    has_figure: ClassVar[bool] = False
    has_initial_settings: ClassVar[bool] = False

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

    @classmethod
    def initial_settings(cls, similarity: StageSimilarity) -> Sequence[dict[str, Scalar]]:
        """Parameters to try first for a pair whose stages are this similar; none for methods that pair no stages."""
        return ()

    @classmethod
    def gather_settings(cls) -> dict[str, Scalar]:
        """Parameters that compare the images of all workers; none for methods that compare no images."""
        return {"gather": True} if "gather" in cls.Params.model_fields else {}

    def figure(self, student: Outputs, teacher: Outputs, labels: Tensor) -> MethodFigure | None:
        """Draw what the trained method computes for some images; None for methods that have nothing to show.

        Args:
            student: the student's outputs.
            teacher: the teacher's outputs.
            labels: of the images.
        """
        return None


def summary(owner: type) -> str:
    """First line of a docstring: what catalogues and `heterokd methods` print."""
    return (owner.__doc__ or "").strip().split("\n", 1)[0]
