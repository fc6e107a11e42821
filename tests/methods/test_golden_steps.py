"""Whole training steps against the authors' programs: the same weights, batches and draws, then losses and weights.

The numbers are those of the programs, which ran as they are (commits stand at the tests; what had to be mended to let
them run, or differs by design, too). Weights and inputs come from a seeded generator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from golden_steps import digest, fill, randn, sgd, step
from torch import Tensor, nn

from heterokd.methods.cirkd import CIRKD
from heterokd.methods.crd import Contrast, ContrastMemory, crd_loss
from heterokd.methods.ofd import OFD
from heterokd.methods.review_kd import ReviewKD
from heterokd.methods.tekap import normal_noise, perturb
from heterokd.methods.tekap_feature import tekap_feature_loss
from heterokd.networks.classifier import expected_negative
from heterokd.outputs import IGNORE, Batch, Outputs, OutputSpec, PreActivations, Signal, StageSpec

IMAGES, BATCH, NEGATIVES, WIDTH, TAU = 40, 8, 24, 6, 0.5


class GivenDraws(ContrastMemory):
    """A memory whose negatives are given: rows [B, K]."""

    given_rows: Tensor

    def draw(self, labels: Tensor, index: Tensor, progress: float, count: int, rows: int | None = None) -> Tensor:
        assert (len(labels), count) == self.given_rows.shape
        return torch.zeros(len(labels), self.rows).scatter_add_(1, self.given_rows, torch.ones(self.given_rows.shape))


class ContrastSetting:
    """Images, a linear student, the teacher's embeddings, and CRD's layers and memory."""

    def __init__(self, seed: int, filled: bool) -> None:
        self.generator = g = torch.Generator().manual_seed(seed)
        self.images, self.teacher = randn(g, IMAGES, 4), randn(g, IMAGES, 7)
        self.labels = torch.randint(0, 4, (IMAGES,), generator=g)
        self.student = nn.Linear(4, 5)
        kind = GivenDraws if filled else ContrastMemory
        self.memory = kind(IMAGES, WIDTH, TAU, 0.5)
        self.contrast = Contrast(5, 7, WIDTH, self.memory, NEGATIVES, gather=False)
        fill(self.student, g)
        fill(self.contrast, g)
        self.orders = [torch.randperm(IMAGES, generator=g) for _ in range(2)]
        if filled:
            for table in (self.memory.student, self.memory.teacher):
                table.copy_(F.normalize(randn(g, IMAGES, WIDTH), dim=1))
            self.memory.owners.copy_(torch.arange(IMAGES))
            self.memory.classes.copy_(self.labels)

    def batches(self, epochs: int) -> Iterable[tuple[Batch, float]]:
        """Yield batches with the progress; negatives of a filled memory are never of the batch itself."""
        chunks = [index for order in self.orders[:epochs] for index in order.split(BATCH)]
        for number, index in enumerate(chunks):
            if isinstance(self.memory, GivenDraws):
                others = torch.tensor([row for row in range(IMAGES) if row not in index.tolist()])
                drawn = torch.randint(0, len(others), (BATCH, NEGATIVES), generator=self.generator)
                self.memory.given_rows = others[drawn]
            yield Batch(torch.zeros(BATCH, 3, 2, 2), self.labels[index], index), number / len(chunks)


@dataclass(frozen=True)
class GoldenSteps:
    """What a program gave.

    Attributes:
        losses: of each step.
        weights: digest of the student's and the method's parameters after the last step.
        memories: digests of its memories after the last step.
    """

    losses: Sequence[float]
    weights: float
    memories: Sequence[float]

    def check(self, losses: Sequence[float], modules: Sequence[nn.Module], memories: Sequence[Tensor]) -> None:
        parameters = [parameter for module in modules for parameter in module.parameters()]
        assert losses == pytest.approx(self.losses, rel=2e-6)
        assert digest(parameters) == pytest.approx(self.weights, abs=1e-5)
        assert [digest([memory]) for memory in memories] == pytest.approx(self.memories, abs=1e-5)


CRD_STEPS = {
    False: GoldenSteps(
        (8.69620132, 8.36894321, 9.3224926, 8.79929543, 8.65088749), 0.7845989, (-1.55416055, -2.11685247)
    ),
    True: GoldenSteps(
        (
            9.08095455,
            9.50602722,
            8.94872284,
            8.6719389,
            8.55139542,
            9.11661911,
            8.55444336,
            8.59269142,
            8.79867363,
            8.32862854,
        ),
        1.34710916,
        (-2.08848052, -2.12408562),
    ),
}


@pytest.mark.parametrize("filled", CRD_STEPS)
def test_crds_epochs_are_the_authors(filled: bool) -> None:
    """megvii-research/mdistiller CRD.py at a08d46f; HobbitLong/RepDistiller crd/ at b84f547 gives the same.

    The program's memory begins with random vectors. From an empty one: an epoch in which the rows of each batch were
    set to the batch's embeddings before its step, with the negatives that ours draws. From a filled one: two epochs.
    """
    setting = ContrastSetting(70, filled)
    optimizer = sgd((setting.student, setting.contrast))
    losses = []
    for batch, progress in setting.batches(2 if filled else 1):
        student, teacher = setting.student(setting.images[batch.index]), setting.teacher[batch.index]
        ours, theirs, counts = setting.contrast(student, [teacher], batch, progress)
        losses.append(step(optimizer, crd_loss(ours, theirs[0], counts)))
    modules, memories = (setting.student, setting.contrast), (setting.memory.student, setting.memory.teacher)
    CRD_STEPS[filled].check(losses, modules, memories)


TEKAP_STEPS = GoldenSteps(
    (
        14.8040714,
        14.6132784,
        14.7972212,
        15.2782717,
        14.5618658,
        13.3298712,
        14.0917387,
        13.4298372,
        13.7103262,
        15.0793457,
    ),
    -2.10507503,
    (1.47493646, 3.89911034),
)


def test_tekaps_memory_of_features_is_the_authors() -> None:
    """mdimtiazh/TeKAP crd/criterion.py and memory.py at 279d380: two epochs from a filled memory, the same noise."""
    setting = ContrastSetting(71, filled=True)
    optimizer = sgd((setting.student, setting.contrast))
    losses = []
    for batch, progress in setting.batches(2):
        student, teacher = setting.student(setting.images[batch.index]), setting.teacher[batch.index]
        copies = perturb(teacher, 0.1 * normal_noise(batch.index, progress, 1, 7), 0.1)
        ours, (theirs, *perturbed), counts = setting.contrast(student, [teacher, *copies], batch, progress, True)
        losses.append(step(optimizer, tekap_feature_loss(ours, theirs, perturbed, counts)))
    modules, memories = (setting.student, setting.contrast), (setting.memory.student, setting.memory.teacher)
    TEKAP_STEPS.check(losses, modules, memories)


CLASSES, GRID, PIXELS, REGIONS = 3, 10, 48, 5


class PixelSetting:
    """Maps, labels of twice their size, a student of 1x1 convolutions, and CIRKD with queues that are filled."""

    def __init__(self, ignore: bool) -> None:
        self.generator = g = torch.Generator().manual_seed(72)
        self.ignore = ignore
        self.embedding, self.head = nn.Conv2d(4, 5, 1), nn.Conv2d(4, CLASSES, 1)
        params = CIRKD.Params(
            pixel_memory=PIXELS, region_memory=REGIONS, pixel_contrast=30, region_contrast=9, temperature=0.5
        )
        self.method = CIRKD(params, OutputSpec(CLASSES, 5, (), 24), OutputSpec(CLASSES, 6, (), 24))
        self.modules = self.embedding, self.head, self.method.projector
        for module in self.modules:
            fill(module, g)
        for queues, size in ((self.method.memory.pixels, PIXELS), (self.method.memory.regions, REGIONS)):
            queues.vectors.copy_(F.normalize(randn(g, CLASSES, size, 6), dim=2))

    def batches(self, steps: int = 4) -> Iterable[tuple[Batch, Tensor, Tensor, Tensor, float]]:
        """Yield batches with the student's input, the teacher's maps and logits, and the progress."""
        g, side = self.generator, 2 * GRID
        for number in range(steps):
            given, teacher = randn(g, 2, 4, GRID, GRID), randn(g, 2, 6, GRID, GRID)
            logits = randn(g, 2, CLASSES, side, side)
            labels = torch.randint(0, CLASSES, (2, side, side), generator=g)
            if self.ignore:
                labels[torch.rand(2, side, side, generator=g) < 0.2] = IGNORE
            batch = Batch(torch.zeros(2, 3, side, side), labels, torch.arange(2) + 2 * number)
            yield batch, given, teacher, logits, number / steps

    def terms(self, batch: Batch, given: Tensor, teacher: Tensor, logits: Tensor, progress: float) -> dict[str, Tensor]:
        large = F.interpolate(self.head(given), scale_factor=2.0, mode="nearest")
        student = Outputs(embedding=self.embedding(given), logits=large)
        terms = self.method(student, Outputs(embedding=teacher, logits=logits), batch, progress)
        # With labels to ignore, only the memories leave the same pixels out as the program does.
        return {name: terms[name] for name in (("pixel", "region") if self.ignore else terms)}


CIRKD_STEPS: dict[bool, tuple[dict[str, list[float]], float, list[float]]] = {
    False: (
        {
            "kd": [0.276265234, 0.289491355, 0.297088027, 0.28574115],
            "minibatch": [0.548910975, 0.550227642, 0.520240545, 0.516762972],
            "pixel": [0.0632441565, 0.0690746531, 0.0662604198, 0.0553946868],
            "region": [0.0532222949, 0.0647063181, 0.0460584722, 0.0495179184],
        },
        -2.05731637,
        [-16.306206, 0.746207395],
    ),
    True: (
        {
            "pixel": [0.0647724941, 0.0558252446, 0.0508218408, 0.062501505],
            "region": [0.0477213636, 0.0451598577, 0.0420877151, 0.0535841174],
        },
        -2.00114099,
        [-20.6137589, 6.83706175],
    ),
}


@pytest.mark.parametrize("ignore", CIRKD_STEPS)
def test_cirkds_queues_are_the_authors(ignore: bool) -> None:
    """winycg/CIRKD cirkd_memory.py, cirkd_mini_batch.py and kd.py at dab64db: four steps, the queues wrap around.

    The program was given the draws of ours; as its pixels of a class, those of the class, which it does not index.
    Ours keeps vectors in half precision.
    """
    setting = PixelSetting(ignore)
    optimizer = sgd(setting.modules)
    losses, weights, queues = CIRKD_STEPS[ignore]
    found: dict[str, list[float]] = {name: [] for name in losses}
    for given in setting.batches():
        terms = setting.terms(*given)
        for name, term in terms.items():
            found[name].append(term.item())
        step(optimizer, torch.stack(list(terms.values())).sum())
    for name in losses:
        assert found[name] == pytest.approx(losses[name], rel=4e-4 if name in ("pixel", "region") else 1e-6), name
    memory = setting.method.memory
    parameters = [parameter for module in setting.modules for parameter in module.parameters()]
    assert digest(parameters) == pytest.approx(weights, abs=1e-4)
    assert [digest([each.vectors]) for each in (memory.pixels, memory.regions)] == pytest.approx(queues, abs=5e-3)


SIDES, CHANNELS = ((8, 8, 4, 2), (8, 4, 4, 2)), ((3, 4, 5, 6), (5, 7, 8, 9))
"""Of the student's and the teacher's stages; embeddings have 6 and 10 numbers."""


class ReviewSetting:
    """A student whose stages and embedding are 1x1 convolutions of random maps, and ReviewKD."""

    def __init__(self) -> None:
        self.generator = g = torch.Generator().manual_seed(74)
        self.levels = nn.ModuleList(nn.Conv2d(4, channels, 1) for channels in (*CHANNELS[0], 6))
        specs = (
            OutputSpec(5, dim, tuple(StageSpec(c, 32 // side) for c, side in zip(channels, sides, strict=True)), 32)
            for dim, channels, sides in zip((6, 10), CHANNELS, SIDES, strict=True)
        )
        self.method = ReviewKD(ReviewKD.Params(), *specs)
        self.modules = self.levels, self.method
        for module in self.modules:
            fill(module, g)

    def batch(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return what enters the student's levels and the teacher's maps, shallow to deep, the embedding last."""
        entering = [randn(self.generator, 4, 4, side, side) for side in (*SIDES[0], 1)]
        shapes = zip((*CHANNELS[1], 10), (*SIDES[1], 1), strict=True)
        return entering, [randn(self.generator, 4, channels, side, side) for channels, side in shapes]


REVIEW_STEPS = GoldenSteps((4.99597073, 4.76316786, 4.93674898, 4.46055365), -18.8891929, ())


def test_review_kds_fusion_is_the_authors() -> None:
    """megvii-research/mdistiller ReviewKD.py at a08d46f after its warm-up: stages are fused from deep to shallow."""
    setting = ReviewSetting()
    optimizer, losses = sgd(setting.modules), []
    for _ in range(4):
        entering, teacher_maps = setting.batch()
        maps = [level(x) for level, x in zip(setting.levels, entering, strict=True)]
        outputs = (Outputs(embedding=each[4].flatten(1), stages=tuple(each[:4])) for each in (maps, teacher_maps))
        batch = Batch(torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.long), torch.arange(4))
        losses.append(step(optimizer, setting.method(*outputs, batch, 1.0)["review"]))
    REVIEW_STEPS.check(losses, setting.modules, ())


OFD_STEPS = GoldenSteps(
    (0.161166847, 0.161480024, 0.160910979, 0.158023223),
    -5.80215359,
    (-0.483881933, -5.23737166, -6.90950794, -1.374113),
)


def test_ofds_margins_and_connectors_are_the_authors() -> None:
    """megvii-research/mdistiller OFD.py at a08d46f: margins of a teacher's batch norms, then four steps."""
    setting = ReviewSetting()
    g, sides, widths = setting.generator, SIDES[1], CHANNELS[1]
    serves = Signal.LOGITS | Signal.EMBEDDING | Signal.STAGES | Signal.TAIL | Signal.PRE_ACTIVATIONS
    specs = (
        OutputSpec(
            5, 6, tuple(StageSpec(c, 32 // side) for c, side in zip(channels, sides, strict=True)), 32, serves=serves
        )
        for channels in CHANNELS
    )
    method = OFD(OFD.Params(), *specs)
    fill(method, g)
    # Shifts of up to 9 deviations: from channels that are nearly always negative to channels that never are.
    shifts, scales = [3 * randn(g, width) for width in widths], [randn(g, width) for width in widths]
    margins = tuple(map(expected_negative, shifts, scales))
    modules = setting.levels[:4], method
    optimizer, losses = sgd(modules), []
    for _ in range(4):
        entering = [randn(g, 4, 4, side, side) for side in sides]
        before = tuple(randn(g, 4, width, side, side) for width, side in zip(widths, sides, strict=True))
        maps = tuple(level(x) for level, x in zip(setting.levels, entering, strict=False))
        student, teacher = (
            Outputs(pre_activations=PreActivations(each, margins), stages=each) for each in (maps, before)
        )
        batch = Batch(torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.long), torch.arange(4))
        losses.append(step(optimizer, method(student, teacher, batch, 1.0)["features"]))
    OFD_STEPS.check(losses, modules, margins)
