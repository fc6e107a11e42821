"""Whole steps of PAT against the authors' program: the same weights and batches, then losses and weights.

jimmylin0979/PAT distillers/pat.py at a7aff3f, with what `heterokd/methods/pat.py` corrects mended in it: feedback from
the same images and the plain teacher, SE's product with its map and its SiLU, positions of queries, order of tokens.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from golden_steps import digest, fill, randn, sgd, step
from torch import Tensor, nn

from heterokd.methods.pat import PAT
from heterokd.outputs import Batch, Kind, Outputs, OutputSpec, StageSpec

CLASSES, SIDE, STEPS = 5, 32, 3
STUDENT = OutputSpec(CLASSES, 6, tuple(StageSpec(2 + j, 2**j) for j in (1, 2, 3, 4)), SIDE)
"""Channels 3 to 6 on grids of 16, 8, 4 and 2."""


class Student(nn.Module):
    """Four convolutions of stride 2 and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, *(stage.channels for stage in STUDENT.stages)]
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(widths))
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps: list[Tensor] = []
        for stage in self.stages:
            maps.append(stage(maps[-1] if maps else images).relu())
        return self.head(maps[-1].mean(dim=(2, 3))), maps


class Tokens(nn.Module):
    """A layer over positions and a layer over channels, for maps or tokens of 8 x 8 positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.positions, self.channels = nn.Linear(64, 64), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens_BND = x if x.dim() == 3 else x.flatten(2).transpose(1, 2)
        mixed_BND = self.channels((self.positions(tokens_BND.transpose(1, 2)).tanh()).transpose(1, 2)).tanh()
        return mixed_BND if x.dim() == 3 else mixed_BND.transpose(1, 2).unflatten(2, (8, 8))


class Teacher(nn.Module):
    """Four convolutions, or four layers of tokens, behind a convolution; it is its own tail."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        if kind == "cnn":
            self.stem: nn.Module = nn.Conv2d(3, 16, 3, 2, 1)
            shapes = ((16, 16, 1), (16, 32, 2), (32, 32, 2), (32, 32, 2))
            self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(a, b, 3, s, 1), nn.Tanh()) for a, b, s in shapes)
            channels, strides = (16, 32, 32, 32), (2, 4, 8, 16)
        else:
            self.stem = nn.Conv2d(3, 16, 4, 4)
            self.stages = nn.ModuleList(Tokens(16) for _ in range(4))
            channels, strides = (16,) * 4, (4,) * 4
        self.head = nn.Linear(channels[-1], CLASSES)
        stages = tuple(StageSpec(c, s, kind) for c, s in zip(channels, strides, strict=True))
        self.spec = OutputSpec(CLASSES, channels[-1], stages, SIDE, stem=StageSpec(16, strides[0], kind))

    def step(self, x: Tensor, j: int, like: Tensor | None = None) -> Tensor:
        y: Tensor = self.stages[j - 1](x)
        return y

    def forward(self, x: Tensor, j: int) -> Tensor:
        assert j == 5
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits

    def outputs(self, x: Tensor, j: int = 1) -> Outputs:
        entry: Tensor = self.stem(x)
        maps = [entry]
        for number in (1, 2, 3, 4):
            maps.append(self.step(maps[-1], number))
        return Outputs(logits=self(maps[4], 5), stages=tuple(maps[1:]), stem=entry, tail=self)


class Setting:
    """Student, teacher, method and batches."""

    def __init__(self, kind: Kind) -> None:
        self.generator = g = torch.Generator().manual_seed(73)
        self.student, self.teacher = Student(), Teacher(kind).requires_grad_(False)
        params = PAT.Params(width=16, initial_gate=0.3, temperature=2.0)
        self.method = PAT(params, STUDENT, self.teacher.spec)
        for module in (self.student, self.teacher, self.method):
            fill(module, g, 0.2 if kind == "cnn" else 0.3)
        self.modules = self.student, self.method

    def batch(self, number: int) -> Batch:
        images, labels = (
            randn(self.generator, 4, 3, SIDE, SIDE),
            torch.randint(0, CLASSES, (4,), generator=self.generator),
        )
        return Batch(images, labels, torch.arange(4) + 4 * number)


GOLDEN: dict[Kind, tuple[dict[str, list[float]], float]] = {
    "cnn": (
        {
            "kl": [0.117640972, 0.126824304, 0.242219761],
            "features": [1.95868301, 1.93371081, 1.91517353],
            "prompts": [0.00937372819, 0.0080896616, 0.00364804268],
        },
        -21.5911063,
    ),
    "mlp": (
        {
            "kl": [1.23932695, 0.213999406, 0.115801439],
            "features": [1.81193948, 1.76705301, 1.76669407],
            "prompts": [0.00217671692, 0.0022244826, 0.00619136542],
        },
        8.97711901,
    ),
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_pats_steps_are_the_authors(kind: Kind) -> None:
    setting = Setting(kind)
    losses, weights = GOLDEN[kind]
    found: dict[str, list[float]] = {name: [] for name in losses}
    optimizer = sgd(setting.modules)
    for number in range(STEPS):
        batch = setting.batch(number)
        logits, maps = setting.student(batch.images)
        student = Outputs(logits=logits, stages=tuple(maps))
        terms = setting.method(student, setting.teacher.outputs(batch.images), batch, 0.0)
        for name, term in terms.items():
            found[name].append(term.item())
        step(optimizer, F.cross_entropy(logits, batch.labels) + torch.stack(list(terms.values())).sum())
    for name in losses:
        assert found[name] == pytest.approx(losses[name], rel=3e-5), name
    parameters = [parameter for module in setting.modules for parameter in module.parameters()]
    assert digest(parameters) == pytest.approx(weights, abs=1e-4)
