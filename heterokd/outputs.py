"""What a network gives: the one set of types that networks, teachers, caches and methods share.

Letters in shapes: B batch, K classes, D embedding, C H W the channels, height and width of a map, N tokens. In
segmentation logits and embedding are maps too, [B, K, h, w] and [B, D, h, w], at the decoder's own stride.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Flag, auto
from typing import TYPE_CHECKING, Literal, NoReturn, Protocol

from heterokd.errors import MissingSignal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kind = Literal["cnn", "attention", "mlp"]
IGNORE = 255
"""The label of pixels that count nowhere: not in the task loss, in no method's terms, in no metric."""

Losses = dict[str, "Tensor"]
"""Named, weighted scalars of one step: what is summed is what is logged."""


class Signal(Flag):
    """What can be read from a network."""

    NONE = 0
    LOGITS = auto()  # [B, K]; in segmentation [B, K, h, w]
    EMBEDDING = auto()  # what enters the last classifier: [B, D]; in segmentation [B, D, h, w]
    STAGES = auto()  # four maps [B, C, H, W], shallow to deep; class tokens are dropped
    TAIL = auto()  # a callable: the network from stage j to its logits, see `Tail`
    STEM = auto()  # [B, C, H, W]: what enters stage 1
    CLASS_MAPS = auto()  # [B, K, h, w]: the classifier at every position; not of every network, see `OutputSpec.serves`
    PRE_ACTIVATIONS = auto()  # see `PreActivations`; not of every network either


EVERY_NETWORK = Signal.LOGITS | Signal.EMBEDDING | Signal.STAGES | Signal.TAIL | Signal.STEM
"""What can be read from a network of any structure."""


@dataclass(frozen=True)
class StageSpec:
    """The shape of one stage's map.

    Attributes:
        channels: C of the map.
        stride: input pixels per map pixel, so H = image_size / stride (rounded up).
        kind: what the stage is made of.
    """

    channels: int
    stride: int
    kind: Kind = "cnn"


@dataclass(frozen=True)
class OutputSpec:
    """The shapes of a network's outputs, known before any forward.

    Attributes:
        num_classes: K of the logits.
        embedding_dim: D of the embedding.
        stages: four stages, shallow to deep.
        image_size: height = width of the images that the network itself sees, in pixels.
        prefix_tokens: class (and register) tokens that the tail puts before a map's tokens.
        stem: what enters stage 1; None where nobody knows.
        serves: the signals that the network's structure has. CLASS_MAPS belong to heads that average over positions and
            then apply one linear layer (their mean over positions is the logits: not class tokens, attention pooling,
            norms or hidden layers after the average); PRE_ACTIVATIONS to CNNs whose four stages all end in
            BatchNorm -> (add) -> ReLU.
        logits_stride: input pixels per pixel of the logits (and of the embedding) in segmentation; None in
            classification.
    """

    num_classes: int
    embedding_dim: int
    stages: tuple[StageSpec, ...]
    image_size: int = 224
    prefix_tokens: int = 0
    stem: StageSpec | None = None
    serves: Signal = EVERY_NETWORK
    logits_stride: int | None = None

    def at(self, stage: int) -> StageSpec:
        """The map of `stage`: 1 is the shallowest, 0 the stem's."""
        if stage:
            return self.stages[stage - 1]
        if self.stem is None:
            raise ValueError("this OutputSpec does not say what enters stage 1 (stem is None)")
        return self.stem

    def side(self, stage: int) -> int:
        """Height = width of the map of `stage` (1 is the shallowest, 0 the stem's), in map pixels."""
        return -(-self.image_size // self.at(stage).stride)

    @property
    def kind(self) -> Kind:
        """What the deepest stage is made of: the family of the network."""
        return self.stages[-1].kind if self.stages else "cnn"


@dataclass(frozen=True)
class PreActivations:
    """The stage maps before the last ReLU of each stage, and what that ReLU is expected to cut off.

    Attributes:
        maps: four maps [B, C, H, W]; their ReLU is the stage's map.
        margins: four vectors [C] without gradient: the expected negative response per channel, from the shift and scale
            of the stage's last BatchNorm (Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019).
    """

    maps: tuple[Tensor, ...]
    margins: tuple[Tensor, ...]


class Tail(Protocol):
    """A network from stage j to its logits, differentiable in its input.

    `x` is what stage j-1 gives: a map [B, C, H, W], or tokens [B, N, C] with or without the network's class
    tokens (fresh ones get the network's own class-token parameter; the maps of the same forward get their own
    class tokens back, so `outputs.tail(outputs.stages[j - 2], j)` equals `outputs.logits`).
    `j` is 2, 3, 4, or 5 for the final norm and classifier alone.
    """

    def __call__(self, x: Tensor, j: int) -> Tensor:
        """Logits [B, K]."""
        ...

    def outputs(self, x: Tensor, j: int) -> Outputs:
        """Logits [B, K] and embedding [B, D]."""
        ...

    def step(self, x: Tensor, j: int, like: Tensor | None = None) -> Tensor:
        """Stage j alone: its map [B, C, H, W] from that of stage j - 1, or from the stem for j = 1 (j is 1 to 4).

        The class tokens of a map that came from `step` or from the same forward go on with it. A map computed from
        such a one takes them along when `like` names it: `tail.step(prompt(before), j, like=before)`.
        """
        ...


class Outputs:
    """One forward of a student, a live teacher or a cached teacher: the same type for all three.

    Raises:
        MissingSignal: on reading what was not asked for; the sentence says which Signal to add.
    """

    __slots__ = (
        "_class_maps",
        "_embedding",
        "_logits",
        "_pre_activations",
        "_stages",
        "_stem",
        "_tail",
        "owner",
    )

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
        return self._logits if self._logits is not None else self._missing("LOGITS", "logits")

    @property
    def embedding(self) -> Tensor:
        """Pooled features before the last classifier, [B, D]."""
        return self._embedding if self._embedding is not None else self._missing("EMBEDDING", "embedding")

    @property
    def stages(self) -> tuple[Tensor, ...]:
        """Four maps [B, C, H, W], shallow to deep."""
        return self._stages if self._stages is not None else self._missing("STAGES", "stages")

    @property
    def tail(self) -> Tail:
        """The network from stage j to its logits."""
        return self._tail if self._tail is not None else self._missing("TAIL", "tail")

    @property
    def stem(self) -> Tensor:
        """What enters stage 1, [B, C, H, W]."""
        return self._stem if self._stem is not None else self._missing("STEM", "stem")

    @property
    def class_maps(self) -> Tensor:
        """The classifier at every position of the last map, [B, K, h, w]; the mean over positions is the logits."""
        return self._class_maps if self._class_maps is not None else self._missing("CLASS_MAPS", "class_maps")

    @property
    def pre_activations(self) -> PreActivations:
        """Four maps before their last ReLU, with their margins."""
        held = self._pre_activations
        return held if held is not None else self._missing("PRE_ACTIVATIONS", "pre_activations")

    @property
    def serves(self) -> Signal:
        """The signals that these outputs hold."""
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
        """The same outputs with nothing but `needs`, so that an undeclared read fails for everybody alike."""
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
        """The same outputs with `change` applied to every tensor (`Tensor.detach`, `Tensor.float`, a copy)."""
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

    def _missing(self, signal: str, attribute: str) -> NoReturn:
        needs = {"student": "student_needs", "teacher": "teacher_needs"}.get(self.owner, "the needs of its forward")
        raise MissingSignal(
            f"{self.owner}.{attribute} was read but not asked for: add Signal.{signal} to {needs} "
            f"(asked for: {self.serves})"
        )


@dataclass(frozen=True)
class Batch:
    """One step's images.

    Attributes:
        images: [B, 3, H, W] float in [0, 1]; each network resizes and normalises them for itself.
        labels: [B] class numbers, or [B, K] class shares when images are mixed; in segmentation [B, H, W] class
            numbers, `IGNORE` where a pixel counts nowhere.
        index: [B] positions in the training split: a memory bank's key.
        shown: [B, 2] index and view number, which name each augmented image: the cache's key. It stays on the CPU,
            where caches are read, so that nobody waits for a GPU to learn it; None for plain images.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    shown: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def view(self) -> Tensor | None:
        """[B] view numbers, on the CPU; None for plain images."""
        return None if self.shown is None else self.shown[:, 1]

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """The same batch on `device`, apart from `shown`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            images=move(self.images),
            labels=move(self.labels),
            index=move(self.index),
        )


def hard_labels(labels: Tensor) -> Tensor:
    """Class numbers [B]: labels as they are, or the largest share of mixed ones (every method's rule)."""
    return labels.argmax(dim=1) if labels.dim() == 2 else labels


def labels_at(labels: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Label maps [B, H, W] on another grid, [B, h, w]: the nearest pixel's, so that no class is made up."""
    if tuple(labels.shape[-2:]) == tuple(size):
        return labels
    import torch.nn.functional as F  # here, since experiments are checked without torch

    # Class numbers are small: they are exact in float32, the only kind that nearest neighbours are offered for.
    nearest = F.interpolate(labels[:, None].float(), size=tuple(size), mode="nearest-exact")
    return nearest[:, 0].to(labels.dtype)
