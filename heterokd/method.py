"""Method: base class of the distillation methods. Each file of `heterokd/methods/` holds a final subclass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from heterokd.domains import Domain, Scalar, domains
from heterokd.errors import PairError
from heterokd.outputs import CACHEABLE, Batch, Kind, Losses, Outputs, OutputSpec, Signal


class MethodParams(BaseModel):
    """Parameters of a method, each with a description, a search domain and the paper's value as its default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        """Return the search domains, by parameter; parameters without a domain are not searched."""
        return domains(cls)

    @property
    def unread(self) -> frozenset[str]:
        """Parameters that other parameters turn off; a parameter that is younger than schema 1 is then not hashed."""
        return frozenset()


Settings = dict[str, Scalar]
"""Parameters of a method, by name."""


@dataclass(frozen=True)
class StageSimilarity:
    """Similarity of the stages of a teacher and of a student trained on labels alone.

    Attributes:
        values: CKA, [student's stage, teacher's stage], shallow to deep.
        student_kind: kind of the student's last stage.
        teacher_kind: kind of the teacher's last stage.
    """

    values: Sequence[Sequence[float]]
    student_kind: Kind
    teacher_kind: Kind


def similar(values: Sequence[float]) -> list[int]:
    """Return the numbers (from 1) of the stages with at least half of the largest similarity."""
    return [number for number, value in enumerate(values, start=1) if value >= SIMILAR_SHARE * max(values)]


SIMILAR_SHARE = 0.5


@dataclass(frozen=True)
class Panel:
    """A map of a figure, for several images.

    Attributes:
        title: title of the map.
        values: [N, h, w]; NaN is left blank.
        colormap: name of a matplotlib colormap.
        ticks: values and labels of the colour bar; the first and the last are its limits.
    """

    title: str
    values: Tensor
    colormap: str
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class MethodFigure:
    """A figure of what a method computes for some images.

    Attributes:
        caption: description of the panels.
        panels: maps that are drawn next to the images.
    """

    caption: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Verification:
    """What a method's file was compared with.

    Attributes:
        program: repository of the authors' program, or of the program that the tables were made with; empty if none
            could be run.
        commit: of the program.
        file: of the program, which holds the function that ran in float64 on the same inputs.
        value: largest relative difference of the loss's value from it.
        gradient: largest relative difference of the gradient with respect to the student's tensor.
        open_readings: what the comparison does not cover, or had to be guessed.
        defaults: source of the parameters' defaults.
    """

    program: str = ""
    commit: str = ""
    file: str = ""
    value: float | None = None
    gradient: float | None = None
    open_readings: str = ""
    defaults: str = ""


class Method(nn.Module, ABC):
    """A distillation loss with its parameters and projectors.

    A method reads outputs, never networks, loaders or optimizers. `Distiller` adds the task loss. Subclasses are final
    and implement `forward`, and `build` if they have learnable modules (projectors).

    Attributes:
        student_needs: signals that are read from the student, with any setting of Params. `build` may narrow it for an
            instance (FBT: the signals depend on the pair).
        teacher_needs: the same for the teacher.
        tasks: tasks that the method is defined for.
        memories: names of the sub-modules whose buffers differ between data-parallel workers. They are part of
            checkpoints, but not of the buffers that rank 0 broadcasts in every step.
        has_figure: whether `figure` is implemented.
        has_initial_settings: whether `initial_settings` is implemented.
        verification: what the method's file was compared with; None for a method that nobody has published.
        uses_task_loss: whether the cross-entropy with the labels is added to the method's terms, times
            `training.task_weight`. `build` turns it off for a loss that contains the labels.
        reads_labels: which terms of classification read labels. `none` learns from images with and without labels, and
            `all` only from those with labels, see `terms`. With `some`, `forward` computes those terms on the images
            with labels, by `labelled_rows` and `label_scale`.
    """

    student_needs: Signal = Signal.LOGITS
    teacher_needs: Signal = Signal.LOGITS
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})
    memories: ClassVar[tuple[str, ...]] = ()
    has_figure: ClassVar[bool] = False
    has_initial_settings: ClassVar[bool] = False
    verification: ClassVar[Verification | None] = None
    uses_task_loss: bool = True
    reads_labels: ClassVar[Literal["none", "some", "all"]] = "none"

    Params: ClassVar[type[MethodParams]] = MethodParams

    def __init__(self, params: MethodParams | None, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build the projectors from the two specs alone, before any forward.

        Args:
            params: an instance of the subclass's `Params`; None: the defaults.
            student: shapes of the student's outputs.
            teacher: shapes of the teacher's outputs.

        Raises:
            PairError: the method, or the layout in `params`, cannot exist for this pair, or a network does not give a
                signal that the method reads.
        """
        super().__init__()
        self.params = self.Params() if params is None else params
        try:
            self.build(student, teacher)
        except PairError:
            raise
        except Exception as error:
            # `build` reads shapes of signals that a network may lack, such as those of its stages.
            self._refuse_missing_signals(student, teacher, error)
            raise
        self._refuse_missing_signals(student, teacher)

    def _refuse_missing_signals(self, student: OutputSpec, teacher: OutputSpec, cause: Exception | None = None) -> None:
        """Raise PairError if a network does not give a signal that the method reads."""
        pairs = (("student", self.student_needs, student), ("teacher", self.teacher_needs, teacher))
        for owner, needs, spec in pairs:
            missing = needs & ~spec.serves
            if missing:
                names = " and ".join(str(signal.name).lower().replace("_", " ") for signal in missing)
                raise PairError(f"it reads the {owner}'s {names}, which this network does not give") from cause

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Create projectors as sub-modules; methods without learnable modules leave this empty."""
        return

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the method's loss terms for a batch.

        Args:
            student: the student's outputs, with gradient.
            teacher: the teacher's outputs, without gradient.
            batch: labels, index.
            progress: finished fraction of the training, in [0, 1], for warm-ups.

        Returns:
            Named scalars, already weighted; the caller sums them.
        """

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute `forward`; a method of which all terms read labels gets only the images that have a label.

        Its terms are scaled so that means over images of the parts of a batch add up to the mean over the batch.
        """
        if batch.labelled is None or self.reads_labels != "all":
            losses: Losses = self(student, teacher, batch, progress)
            return losses

        def rows(values: Tensor) -> Tensor:
            return labelled_rows(batch, values) if values.dim() > 1 else values  # vectors belong to channels

        part = replace(
            batch,
            images=rows(batch.images),
            labels=labelled_rows(batch, batch.labels),
            index=labelled_rows(batch, batch.index),
            shown=None if batch.shown is None else labelled_rows(batch, batch.shown),
            weights=None if batch.weights is None else labelled_rows(batch, batch.weights),
            labelled=None,
        )
        scale = label_scale(batch)
        losses = self(student.map(rows), teacher.map(rows), part, progress)
        return {name: scale * value for name, value in losses.items()}

    @classmethod
    def learns_unlabelled(cls) -> bool:
        """Return whether a term learns from images without labels: it reads the teacher and no label."""
        return cls.teacher_needs != Signal.NONE and cls.reads_labels != "all"

    @classmethod
    def initial_settings(cls, similarity: StageSimilarity) -> Sequence[Settings]:
        """Return parameters of initial trials for a pair of this similarity; none for methods that pair no stages."""
        return ()

    @classmethod
    def is_cacheable(cls) -> bool:
        """Return whether a cache of teacher outputs can replace the teacher."""
        return not cls.teacher_needs & ~CACHEABLE

    @classmethod
    def gather_settings(cls) -> Settings:
        """Return the parameters that compare the images of all workers; none for methods that compare no images."""
        return {"gather": True} if "gather" in cls.Params.model_fields else {}

    def figure(self, student: Outputs, teacher: Outputs, labels: Tensor) -> MethodFigure | None:
        """Draw what the trained method computes for some images, or return None.

        Args:
            student: the student's outputs.
            teacher: the teacher's outputs.
            labels: labels of the images.
        """
        return None


def labelled_rows(batch: Batch, values: Tensor) -> Tensor:
    """Return the rows [L, ...] of a tensor [B, ...] that belong to the images of a batch with a label."""
    if batch.labelled is None:
        return values
    return values[batch.labelled.nonzero()[:, 0].to(values.device)]


def label_scale(batch: Batch) -> float:
    """Return the factor of a mean over images with a label, so that parts of a batch add up to the whole batch."""
    if batch.labelled is None:
        return 1.0
    return int(batch.labelled.sum()) / len(batch.labelled) / batch.labelled_share


def summary(owner: type) -> str:
    """Return the first line of a docstring, which catalogues and `heterokd methods` print."""
    return (owner.__doc__ or "").strip().split("\n", 1)[0]
