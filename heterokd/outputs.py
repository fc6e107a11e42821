"""Outputs of a network: the types that networks, teachers, caches and methods share.

Letters in shapes: B batch, K classes, D embedding, C H W the channels, height and width of a map, N tokens. In
segmentation logits and embedding are maps too, [B, K, h, w] and [B, D, h, w], at the decoder's stride.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Flag, auto
from typing import TYPE_CHECKING, Literal, NoReturn, Protocol

from heterokd.errors import MissingSignal, PairError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kind = Literal["cnn", "attention", "mlp"]
TaskName = Literal["classification", "segmentation"]
IGNORE = 255
"""Label of pixels that are ignored by losses and metrics."""
UNLABELLED = -100
"""Label of images without a label, which torch's cross-entropy ignores by default."""

Losses = dict[str, "Tensor"]
"""Named, weighted scalars of a step, which are summed and logged."""


class Signal(Flag):
    """Signals that can be read from a network."""

    NONE = 0
    LOGITS = auto()  # [B, K]; in segmentation [B, K, h, w]
    EMBEDDING = auto()  # input of the last classifier: [B, D]; in segmentation [B, D, h, w]
    STAGES = auto()  # four maps [B, C, H, W], shallow to deep; class tokens are dropped
    TAIL = auto()  # a callable: the network from stage j to its logits, see `Tail`
    STEM = auto()  # [B, C, H, W]: input of stage 1
    CLASS_MAPS = auto()  # [B, K, h, w]: the classifier at every position; not of every network, see `OutputSpec.serves`
    PRE_ACTIVATIONS = auto()  # see `PreActivations`; not of every network

    @property
    def names(self) -> str:
        """Names of the signals, or `nothing`."""
        return ", ".join(str(signal.name).lower() for signal in self) or "nothing"


EVERY_NETWORK = Signal.LOGITS | Signal.EMBEDDING | Signal.STAGES | Signal.TAIL | Signal.STEM
"""Signals of every network."""

CACHEABLE = Signal.LOGITS | Signal.EMBEDDING | Signal.TAIL
"""Signals that a cache of teacher outputs serves; for the tail, the teacher's last stages stay loaded."""


@dataclass(frozen=True)
class StageSpec:
    """Shape of a stage's map.

    Attributes:
        channels: C of the map.
        stride: input pixels per map pixel, so H = image_size / stride (rounded up).
        kind: kind of the stage's blocks.
        map_side: H, where the stride does not give it (convolutions without padding); None where it does.
    """

    channels: int
    stride: int
    kind: Kind = "cnn"
    map_side: int | None = None


@dataclass(frozen=True)
class OutputSpec:
    """Shapes of a network's outputs, known before any forward.

    Attributes:
        num_classes: K of the logits.
        embedding_dim: D of the embedding.
        stages: four stages, shallow to deep; empty if the network gives none.
        image_size: height = width of the network's input, in pixels.
        prefix_tokens: number of class (and register) tokens that the tail puts before a map's tokens.
        stem: input of stage 1; None if unknown.
        serves: signals that the network has. CLASS_MAPS belong to heads that average over positions and
            then apply one linear layer (their mean over positions is the logits: not class tokens, attention pooling,
            norms or hidden layers after the average); PRE_ACTIVATIONS to CNNs whose four stages all end in
            BatchNorm -> (add) -> ReLU.
        logits_stride: input pixels per pixel of the logits (and of the embedding) in segmentation; None in
            classification.
        body_kind: kind of the whole network, for a network that gives no stages.
    """

    num_classes: int
    embedding_dim: int
    stages: tuple[StageSpec, ...]
    image_size: int = 224
    prefix_tokens: int = 0
    stem: StageSpec | None = None
    serves: Signal = EVERY_NETWORK
    logits_stride: int | None = None
    body_kind: Kind = "cnn"

    def at(self, stage: int) -> StageSpec:
        """Return the shape of a stage's map: 1 is the shallowest, 0 the stem.

        Raises:
            PairError: the network gives no stages.
        """
        if stage and not self.stages:
            raise PairError("the network gives no stages")
        if stage:
            return self.stages[stage - 1]
        if self.stem is None:
            raise ValueError("this OutputSpec has no shape of the input of stage 1 (stem is None)")
        return self.stem

    def side(self, stage: int) -> int:
        """Return height = width of a stage's map, in map pixels."""
        shape = self.at(stage)
        return shape.map_side or -(-self.image_size // shape.stride)

    @property
    def kind(self) -> Kind:
        """Kind of the deepest stage: the family of the network."""
        return self.stages[-1].kind if self.stages else self.body_kind


@dataclass(frozen=True)
class PreActivations:
    """Stage maps before the last ReLU of each stage, with their margins.

    Attributes:
        maps: four maps [B, C, H, W]; their ReLU is the stage's map.
        margins: four vectors [C] without gradient: the expected negative response per channel, from the shift and scale
            of the stage's last BatchNorm (Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019).
    """

    maps: tuple[Tensor, ...]
    margins: tuple[Tensor, ...]


class Tail(Protocol):
    """A network from stage j to its logits, differentiable in its input.

    `x` is the output of stage j-1: a map [B, C, H, W], or tokens [B, N, C] with or without the network's class tokens.
    A new map gets the network's class-token parameter; a map of the same forward gets the class tokens that belong to
    it, so that `outputs.tail(outputs.stages[j - 2], j)` equals `outputs.logits`.
    `j` is 2, 3, 4, or 5 for the final norm and classifier alone.
    """

    def __call__(self, x: Tensor, j: int) -> Tensor:
        """Compute the logits [B, K]."""
        ...

    def outputs(self, x: Tensor, j: int) -> Outputs:
        """Compute logits [B, K] and embedding [B, D]."""
        ...

    def step(self, x: Tensor, j: int, like: Tensor | None = None) -> Tensor:
        """Compute the map [B, C, H, W] of stage j (1 to 4) from that of stage j - 1, or from the stem for j = 1.

        The class tokens of a map from `step` or from the same forward are kept. `like` names the map whose class tokens
        a derived map takes: `tail.step(prompt(before), j, like=before)`.
        """
        ...


class Outputs:
    """Outputs of a forward of a student, a live teacher or a cached teacher.

    Raises:
        MissingSignal: a signal is read that was not requested.
    """

    __slots__ = ("_class_maps", "_embedding", "_logits", "_pre_activations", "_stages", "_stem", "_tail", "owner")

    # All arguments are optional tensors of the same object: a parameter object would be this class again.
    def __init__(
        self,
        logits: Tensor | None = None,
        embedding: Tensor | None = None,
        stages: tuple[Tensor, ...] | None = None,
        tail: Tail | None = None,
        stem: Tensor | None = None,
        class_maps: Tensor | None = None,
        pre_activations: PreActivations | None = None,
        owner: Literal["student", "teacher", "network"] = "network",
    ) -> None:
        self._logits = logits
        self._embedding = embedding
        self._stages = stages
        self._tail = tail
        self._stem = stem
        self._class_maps = class_maps
        self._pre_activations = pre_activations
        self.owner = owner

    @property
    def logits(self) -> Tensor:
        """Class scores before softmax, [B, K]."""
        return self._logits if self._logits is not None else self._missing("logits")

    @property
    def embedding(self) -> Tensor:
        """Pooled features before the last classifier, [B, D]."""
        return self._embedding if self._embedding is not None else self._missing("embedding")

    @property
    def stages(self) -> tuple[Tensor, ...]:
        """Four maps [B, C, H, W], shallow to deep."""
        return self._stages if self._stages is not None else self._missing("stages")

    @property
    def tail(self) -> Tail:
        """Network from stage j to its logits."""
        return self._tail if self._tail is not None else self._missing("tail")

    @property
    def stem(self) -> Tensor:
        """Input of stage 1, [B, C, H, W]."""
        return self._stem if self._stem is not None else self._missing("stem")

    @property
    def class_maps(self) -> Tensor:
        """Classifier at every position of the last map, [B, K, h, w]; its mean over positions is the logits."""
        return self._class_maps if self._class_maps is not None else self._missing("class_maps")

    @property
    def pre_activations(self) -> PreActivations:
        """Four maps before their last ReLU, with their margins."""
        return self._pre_activations if self._pre_activations is not None else self._missing("pre_activations")

    @property
    def serves(self) -> Signal:
        """Signals of these outputs."""
        held = Signal.NONE
        for signal, value in (
            (Signal.LOGITS, self._logits),
            (Signal.EMBEDDING, self._embedding),
            (Signal.STAGES, self._stages),
            (Signal.TAIL, self._tail),
            (Signal.STEM, self._stem),
            (Signal.CLASS_MAPS, self._class_maps),
            (Signal.PRE_ACTIVATIONS, self._pre_activations),
        ):
            if value is not None:
                held |= signal
        return held

    def only(self, needs: Signal, owner: Literal["student", "teacher", "network"] | None = None) -> Outputs:
        """Return the outputs restricted to `needs`, so that an undeclared read fails."""
        return Outputs(
            logits=self._logits if Signal.LOGITS in needs else None,
            embedding=self._embedding if Signal.EMBEDDING in needs else None,
            stages=self._stages if Signal.STAGES in needs else None,
            tail=self._tail if Signal.TAIL in needs else None,
            stem=self._stem if Signal.STEM in needs else None,
            class_maps=self._class_maps if Signal.CLASS_MAPS in needs else None,
            pre_activations=self._pre_activations if Signal.PRE_ACTIVATIONS in needs else None,
            owner=owner or self.owner,
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Outputs:
        """Apply `change` to every tensor (`Tensor.detach`, `Tensor.float`, a copy)."""
        before = self._pre_activations
        return Outputs(
            logits=None if self._logits is None else change(self._logits),
            embedding=None if self._embedding is None else change(self._embedding),
            stages=None if self._stages is None else tuple(change(stage) for stage in self._stages),
            tail=self._tail,
            stem=None if self._stem is None else change(self._stem),
            class_maps=None if self._class_maps is None else change(self._class_maps),
            pre_activations=None
            if before is None
            else PreActivations(tuple(map(change, before.maps)), tuple(map(change, before.margins))),
            owner=self.owner,
        )

    def _missing(self, attribute: str) -> NoReturn:
        needs = {"student": "student_needs", "teacher": "teacher_needs"}.get(self.owner, "the needs of its forward")
        raise MissingSignal(
            f"{self.owner}.{attribute} was read but not requested: add Signal.{attribute.upper()} to {needs} "
            f"(requested: {self.serves})"
        )


@dataclass(frozen=True)
class Batch:
    """Images of a training step.

    Attributes:
        images: [B, 3, H, W] float in [0, 1]; each network resizes and normalises them.
        labels: [B] class numbers, or [B, K] class shares when images are mixed; in segmentation [B, H, W] class
            numbers, with `IGNORE` for ignored pixels.
        index: [B] positions in the training split: keys of memory banks.
        shown: [B, 2] index and view number of each augmented image: keys of the cache. It stays on the CPU, where
            caches are read without waiting for the GPU; None for plain images.
        weights: [B] float32 weight of each image in the task loss; None: all are 1.
        own_labels: B label maps [H, W] at their own sizes, uint8 on the CPU, for evaluation; None: `labels` count.
        extents: [B, 2] height and width of plain images on their canvas, on the CPU; None: as `fitted_size` says.
        labelled: [B] whether each image has a label, on the CPU; None: every image has. The others have the label
            `UNLABELLED`, or no shares, and the weight 0.
        labelled_share: share of images with a label in the batch of all workers that this is a part of.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    shown: Tensor | None = None
    weights: Tensor | None = None
    own_labels: tuple[Tensor, ...] | None = None
    extents: Tensor | None = None
    labelled: Tensor | None = None
    labelled_share: float = 1.0

    def __len__(self) -> int:
        return len(self.images)

    @property
    def view(self) -> Tensor | None:
        """[B] view numbers, on the CPU; None for plain images."""
        return None if self.shown is None else self.shown[:, 1]

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """Copy the batch to `device`, except `shown`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        weights = None if self.weights is None else move(self.weights)
        moved = replace(self, images=move(self.images), labels=move(self.labels), index=move(self.index))
        return replace(moved, weights=weights)


def hard_labels(labels: Tensor) -> Tensor:
    """Return class numbers [B]: the labels, or the class of the largest share if images are mixed."""
    return labels.argmax(dim=1) if labels.dim() == 2 else labels


def labels_at(labels: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Resize label maps [B, H, W] to [B, h, w] with the nearest pixel's class."""
    if tuple(labels.shape[-2:]) == tuple(size):
        return labels
    import torch.nn.functional as F  # lazily: experiments are checked without torch

    # Class numbers are exact in float32; interpolate does not support integers.
    nearest = F.interpolate(labels[:, None].float(), size=tuple(size), mode="nearest-exact")
    return nearest[:, 0].to(labels.dtype)
