"""Tiny teacher-student pairs of both tasks, by the shapes of their outputs, with random outputs and batches."""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor, nn

from heterokd.outputs import EVERY_NETWORK, IGNORE, Batch, Kind, Outputs, OutputSpec, PreActivations, Signal, StageSpec
from heterokd.tasks import task_of

Structure = Literal["cnn", "hierarchical", "isotropic", "mlp"]
MADE_OF: dict[Structure, Kind] = {"cnn": "cnn", "hierarchical": "attention", "isotropic": "attention", "mlp": "mlp"}

BATCH_SIZE, NUM_CLASSES = 8, 10
CROP, SCENES = (64, 96), 4  # height and width of segmentation's images, and how many are in a batch: nothing is square
SIGNALS = list(EVERY_NETWORK | Signal.CLASS_MAPS | Signal.PRE_ACTIVATIONS)


def spec(kind: Structure, widths: tuple[int, ...], image_size: int) -> OutputSpec:
    """Build a spec of a structure: a pyramid of maps (cnn, hierarchical), or a single token grid (isotropic, mlp).

    `isotropic` reads its class token (no class maps); only the stages of `cnn` end in BatchNorm and ReLU.
    """
    strides = (4, 8, 16, 32) if kind in ("cnn", "hierarchical") else (16, 16, 16, 16)
    serves = EVERY_NETWORK
    if kind != "isotropic":
        serves |= Signal.CLASS_MAPS
    if kind == "cnn":
        serves |= Signal.PRE_ACTIVATIONS
    return OutputSpec(
        num_classes=NUM_CLASSES,
        embedding_dim=widths[-1],
        stages=tuple(StageSpec(width, stride, MADE_OF[kind]) for width, stride in zip(widths, strides, strict=True)),
        image_size=image_size,
        prefix_tokens=1 if kind == "isotropic" else 0,
        stem=StageSpec(widths[0], strides[0]),
        serves=serves,
    )


def map_spec(kind: Kind, widths: tuple[int, ...], embedding_dim: int, logits_stride: int) -> OutputSpec:
    """A segmentation network: a dilated CNN or a pyramid of attention stages, under a decoder of any stride."""
    strides = (4, 8, 8, 8) if kind == "cnn" else (4, 8, 16, 32)
    return OutputSpec(
        num_classes=NUM_CLASSES,
        embedding_dim=embedding_dim,
        stages=tuple(StageSpec(width, stride, kind) for width, stride in zip(widths, strides, strict=True)),
        image_size=CROP[0],
        serves=Signal.LOGITS | Signal.EMBEDDING | Signal.STAGES,
        logits_stride=logits_stride,
    )


# Unlike widths and unlike image sizes: no method may count on equal shapes, not even between two of a kind.
STUDENTS = {
    "cnn": spec("cnn", (8, 16, 24, 40), 64),
    "hierarchical": spec("hierarchical", (16, 32, 64, 96), 64),
    "isotropic": spec("isotropic", (32, 32, 32, 32), 64),
    "mlp": spec("mlp", (48, 48, 48, 48), 64),
    "cnn/8": map_spec("cnn", (8, 16, 24, 40), 20, 8),
    "attention/4": map_spec("attention", (16, 32, 64, 96), 28, 4),
}
TEACHERS = {
    "cnn": spec("cnn", (16, 32, 64, 72), 96),
    "hierarchical": spec("hierarchical", (24, 48, 96, 192), 96),
    "isotropic": spec("isotropic", (64, 64, 64, 64), 96),
    "mlp": spec("mlp", (80, 80, 80, 80), 96),
    "cnn/4": map_spec("cnn", (16, 32, 64, 72), 36, 4),
    "attention/16": map_spec("attention", (24, 48, 96, 192), 44, 16),
}


Pair = tuple[str, str]
"""Names of a student and of a teacher, keys of `STUDENTS` and `TEACHERS`."""

PAIRS: list[Pair] = [
    pair for pair in itertools.product(STUDENTS, TEACHERS) if task_of(STUDENTS[pair[0]]) == task_of(TEACHERS[pair[1]])
]
UNLIKE_PAIRS: list[Pair] = [
    ("cnn", "isotropic"),
    ("isotropic", "cnn"),
    ("mlp", "hierarchical"),
    ("cnn/8", "attention/16"),
    ("attention/4", "cnn/4"),
]


class FakeTail(nn.Module):
    """The Tail protocol with one linear layer per entry point; it refuses inputs that are not of stage j - 1.

    A step is one linear layer per position and a resize.
    """

    def __init__(self, of: OutputSpec) -> None:
        super().__init__()
        self.of = of
        self.entries = nn.ModuleList(nn.Linear(stage.channels, of.embedding_dim) for stage in of.stages)
        self.classifier = nn.Linear(of.embedding_dim, of.num_classes)
        self.steps = nn.ModuleList(nn.Linear(of.at(j - 1).channels, of.at(j).channels) for j in (1, 2, 3, 4))

    def tokens(self, x: Tensor, j: int) -> Tensor:
        """The tokens [B, N, C] of a map or of tokens of stage j - 1."""
        tokens_BNC = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        grid = self.of.side(j - 1) ** 2
        assert tokens_BNC.shape[1] in (grid, grid + self.of.prefix_tokens), tuple(x.shape)
        assert tokens_BNC.shape[2] == self.of.at(j - 1).channels, tuple(x.shape)
        return tokens_BNC

    def step(self, x: Tensor, j: int, like: Tensor | None = None) -> Tensor:
        """From stage j - 1 to stage j."""
        assert j in (1, 2, 3, 4), f"the tail was stepped to {j!r}"
        assert like is None or like.shape == x.shape, "class tokens of another map"
        before, side = self.of.side(j - 1), self.of.side(j)
        tokens_BNC = self.steps[j - 1](self.tokens(x, j)[:, -(before**2) :].float()).tanh()
        return nn.functional.adaptive_avg_pool2d(tokens_BNC.transpose(1, 2).unflatten(2, (before, before)), side)

    def outputs(self, x: Tensor, j: int) -> Outputs:
        """From stage j - 1 to logits and embedding."""
        assert j in (2, 3, 4, 5), f"the tail was entered at {j!r}"
        tokens_BNC = self.tokens(x, j)
        embedding = self.entries[j - 2](tokens_BNC.float()).tanh().mean(dim=1)
        return Outputs(logits=self.classifier(embedding), embedding=embedding)

    def forward(self, x: Tensor, j: int) -> Tensor:
        """From stage j - 1 to the logits."""
        return self.outputs(x, j).logits


def random_outputs(
    of: OutputSpec, owner: Literal["student", "teacher"], seed: int, dtype: torch.dtype = torch.float32
) -> Outputs:
    """What the spec serves; each tensor is a leaf that would keep a gradient, the teacher's too: none may come."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    if of.logits_stride is not None:

        def map_of(channels: int, stride: int) -> Tensor:
            return leaf(SCENES, channels, -(-CROP[0] // stride), -(-CROP[1] // stride))

        return Outputs(
            logits=map_of(of.num_classes, of.logits_stride),
            embedding=map_of(of.embedding_dim, of.logits_stride),
            stages=tuple(map_of(stage.channels, stage.stride) for stage in of.stages),
            owner=owner,
        )

    def maps() -> tuple[Tensor, ...]:
        return tuple(leaf(BATCH_SIZE, of.at(j).channels, of.side(j), of.side(j)) for j in (1, 2, 3, 4))

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tail = FakeTail(of).requires_grad_(owner == "student")
    return Outputs(
        logits=leaf(BATCH_SIZE, of.num_classes),
        embedding=leaf(BATCH_SIZE, of.embedding_dim),
        stages=maps(),
        tail=tail,
        stem=leaf(BATCH_SIZE, of.at(0).channels, of.side(0), of.side(0)),
        class_maps=leaf(BATCH_SIZE, of.num_classes, of.side(4), of.side(4)) if Signal.CLASS_MAPS in of.serves else None,
        pre_activations=PreActivations(maps(), tuple(-leaf(s.channels).detach().abs() for s in of.stages))
        if Signal.PRE_ACTIVATIONS in of.serves
        else None,
        owner=owner,
    )


def random_batch(pair: Pair, seed: int = 2, soft: bool = False) -> Batch:
    """Labels of the pair's task: label maps have patches of one class, IGNORE in places and in all of one image."""
    generator = torch.Generator().manual_seed(seed)
    if task_of(STUDENTS[pair[0]]).labels_are_maps:
        patches = torch.randint(0, NUM_CLASSES, (SCENES, CROP[0] // 16, CROP[1] // 16), generator=generator)
        labels = patches.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
        labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORE
        labels[-1] = IGNORE
        return Batch(torch.rand(SCENES, 3, *CROP, generator=generator), labels, torch.arange(SCENES))
    labels = torch.randint(0, NUM_CLASSES, (BATCH_SIZE,), generator=generator)
    if soft:
        labels = torch.rand(BATCH_SIZE, NUM_CLASSES, generator=generator).softmax(dim=1)
    images = torch.rand(BATCH_SIZE, 3, 64, 64, generator=generator)
    return Batch(images, labels, torch.arange(BATCH_SIZE), torch.zeros(BATCH_SIZE, dtype=torch.long))


def leaves(outputs: Outputs, signal: Signal) -> list[Tensor]:
    """Every tensor of a signal; of the tail, every weight."""
    value = getattr(outputs, str(signal.name).lower())
    if isinstance(value, nn.Module):
        return list(value.parameters())
    held = value.maps if isinstance(value, PreActivations) else value
    return list(held) if isinstance(held, tuple) else [held]


def has_gradient(tensor: Tensor) -> bool:
    """Whether a finite gradient that is not zero has come to a tensor."""
    return tensor.grad is not None and bool(torch.isfinite(tensor.grad).all()) and bool(tensor.grad.abs().sum() > 0)


def pairs_of(task: str) -> list[Pair]:
    """The pairs of a task."""
    return [pair for pair in PAIRS if task_of(STUDENTS[pair[0]]).name == task]


def both_outputs(pair: Pair, dtype: torch.dtype = torch.float32) -> tuple[Outputs, Outputs]:
    """Random outputs of a pair."""
    student = random_outputs(STUDENTS[pair[0]], "student", 0, dtype)
    return student, random_outputs(TEACHERS[pair[1]], "teacher", 1, dtype)
