"""Many small students trained side by side, each by the project's own loss functions.

What differs between the students of one call are numbers (weights, seeds, learning rates, temperatures): those are
tensors with the students as their first dimension, and `torch.func.vmap` runs a loss that is written for one student
over all. What changes the shape of a training (method, stages, number of sub-logits, layout) is its *structure*, equal
for all of one call. Optimizer and schedule are the quickstart's: SGD with momentum, cosine, gradients clipped for each
student alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.search_efficiency.digits import VIEWS, Digits
from benchmarks.search_efficiency.methods import NUMBERS, STRUCTURES, Shown, init_method, terms
from benchmarks.search_efficiency.networks import Weights
from benchmarks.search_efficiency.pairs import EPOCHS, Config, Pair
from heterokd.methods.fbt import MAX_LOGIT_SCALE

BATCH = 20
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
CLIP = 5.0
FEW = 32
"""Students that are evaluated at a time: their maps then fit into the processor's cache."""


@dataclass(frozen=True)
class Structure:
    """What configurations must share to be trained in one call."""

    method: str
    values: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, config: Config) -> Structure:
        """A configuration's."""
        method = str(config["method"])
        return cls(method, tuple((name, config[f"{method}.{name}"]) for name in STRUCTURES.get(method, ())))


@dataclass(frozen=True)
class Curves:
    """What came of some trainings.

    Attributes:
        val: [S, E] right answers on val, after every epoch or after the last alone.
        test: likewise.
    """

    val: Tensor
    test: Tensor


class _Divergence(TorchFunctionMode):
    """F.kl_div by its definition: `vmap` has no batching rule for the kernel and would loop over the students."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.kl_div:
            log_student, log_teacher = args
            assert (kwargs["reduction"], kwargs["log_target"]) == ("batchmean", True), "only as the methods call it"
            return (log_teacher.exp() * (log_teacher - log_student)).sum() / len(log_student)
        return func(*args, **kwargs)


class Students:
    """Students of one structure in training; student number c * len(seeds) + s has configuration c and seed s.

    Attributes:
        weights: of all, [S, ...] by name; their networks' and their projectors'.
    """

    def __init__(
        self,
        pair: Pair,
        digits: Digits,
        shown: Shown,
        configs: Sequence[Config],
        seeds: Sequence[int],
        epochs: int = EPOCHS,
    ) -> None:
        """Begin.

        Args:
            pair: teacher and student.
            digits: the images.
            shown: what the teacher says of every view.
            configs: of one structure.
            seeds: of weights, order and views.
            epochs: of the whole training.
        """
        self._pair, self._digits, self._shown, self._epochs = pair, digits, shown, epochs
        self._structure = Structure.of(configs[0])
        assert all(Structure.of(config) == self._structure for config in configs)
        keys = [f"{self._structure.method}.{name}" for name in NUMBERS[self._structure.method]]
        self._numbers = {key: _each(configs, key, len(seeds)) for key in keys}
        self._rates_S = _each(configs, "training.learning_rate", len(seeds))
        first = [initial(pair, self._structure, seed) for seed in seeds]
        self.weights = {
            name: torch.stack([one[name] for one in first] * len(configs)).requires_grad_() for name in first[0]
        }
        self._momenta = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        orders = torch.stack([order(seed, len(digits.labels), epochs) for seed in seeds])
        self._orders = orders.repeat(len(configs), 1, 1, 1)  # [S, epochs, N, 2]
        self.steps = math.ceil(len(digits.labels) / BATCH)

    def train_epoch(self, epoch: int, steps: int | None = None) -> None:
        """All steps of an epoch, or its first few."""
        for step in range(self.steps if steps is None else steps):
            progress = (epoch * self.steps + step) / (self._epochs * self.steps)
            at = self._orders[:, epoch, step * BATCH : (step + 1) * BATCH]
            with _Divergence():
                losses_S = torch.func.vmap(self._loss_of_one, in_dims=(0, 0, 0, None))(
                    self.weights, self._numbers, at, progress
                )
            gradients = torch.autograd.grad(losses_S.sum(), list(self.weights.values()))
            update(self.weights, self._momenta, gradients, self._rates_S * cosine(progress))

    def right(self) -> tuple[Tensor, Tensor]:
        """Right answers of each on val and on test, [S]."""
        given = self._digits
        return (
            right(self._pair, self.weights, given.val_images, given.val_labels),
            right(self._pair, self.weights, given.test_images, given.test_labels),
        )

    def _loss_of_one(self, own: Weights, numbers: Weights, at_B2: Tensor, progress: float) -> Tensor:
        given, structure = self._digits, self._structure
        images, labels = given.views[at_B2[:, 1], at_B2[:, 0]], given.labels[at_B2[:, 0]]
        student, teacher = self._pair.student.outputs(own, images), self._shown.at(at_B2)
        added = terms(
            self._pair, structure.method, dict(structure.values), own, numbers, student, teacher, labels, progress
        )
        return F.cross_entropy(student[1], labels) + added


def train(
    pair: Pair,
    digits: Digits,
    shown: Shown,
    configs: Sequence[Config],
    seeds: Sequence[int],
    *,
    every_epoch: bool,
    epochs: int = EPOCHS,
) -> Curves:
    """Train each configuration with each seed to the end.

    Args:
        pair: teacher and student.
        digits: the images.
        shown: what the teacher says of every view.
        configs: of one structure.
        seeds: of weights, order and views.
        every_epoch: evaluate after each, which takes as long as the training; otherwise after the last.
        epochs: of each training.
    """
    students = Students(pair, digits, shown, configs, seeds, epochs)
    found = []
    for epoch in range(epochs):
        students.train_epoch(epoch)
        if every_epoch or epoch == epochs - 1:
            found.append(students.right())
    return Curves(*(torch.stack(counts, 1) for counts in zip(*found, strict=True)))


def cosine(progress: float) -> float:
    """Share of the peak learning rate."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def _each(configs: Sequence[Config], key: str, seeds: int) -> Tensor:
    """A number of each student."""
    return torch.tensor([float(config[key]) for config in configs for _ in range(seeds)])  # type: ignore[arg-type]


@torch.no_grad()
def update(weights: Weights, momenta: Weights, gradients: Sequence[Tensor], rates_S: Tensor) -> None:
    """One step of SGD for each student, its gradient clipped; biases, norms and scales do not decay."""
    squares_S = torch.stack([gradient.reshape(len(rates_S), -1).square().sum(1) for gradient in gradients]).sum(0)
    scale_S = (CLIP / (squares_S.sqrt() + 1e-6)).clamp(max=1.0)
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        shape = (-1, *[1] * (weight.ndim - 1))
        step = gradient * scale_S.view(shape)
        if name.endswith(("weight", "kernel")):
            step = step + WEIGHT_DECAY * weight
        momenta[name].mul_(MOMENTUM).add_(step)
        weight.sub_(rates_S.view(shape) * momenta[name])
    if "fbt.logit_scale" in weights:
        weights["fbt.logit_scale"].clamp_(max=math.log(MAX_LOGIT_SCALE))


@torch.no_grad()
def right(pair: Pair, weights: Weights, images_NX: Tensor, labels_N: Tensor) -> Tensor:
    """Right answers of each student, [S]; a student that diverged answers nothing right."""
    own = {name: value for name, value in weights.items() if not name.startswith(METHOD_PREFIXES)}
    forward = torch.func.vmap(lambda one: pair.student.outputs(one, images_NX)[1], chunk_size=FEW)
    logits_SNK = forward(own)
    finite = logits_SNK.isfinite().all(2)
    return ((logits_SNK.argmax(2) == labels_N) & finite).sum(1)


METHOD_PREFIXES = ("ofa.", "hcd.", "fbt.", "fitnet.")


def initial(pair: Pair, structure: Structure, seed: int) -> Weights:
    """Fresh weights; those of the network are the same for all methods, as in a search."""
    weights = pair.student.init(torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 2**20)
    return weights | init_method(pair, structure.method, dict(structure.values), generator)


def order(seed: int, count: int, epochs: int = EPOCHS) -> Tensor:
    """Which image in which view comes when, [epochs, N, 2]: a fresh order and a random view of each image an epoch."""
    generator = torch.Generator().manual_seed(seed + 2**21)
    images = torch.stack([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return torch.stack([images, torch.randint(VIEWS, images.shape, generator=generator)], dim=2)
