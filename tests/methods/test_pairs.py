"""Every method on every pair of families, with real networks: built from specs alone, trained two steps.

`tests/methods/test_methods.py` checks methods on random tensors; here each of {CNN, hierarchical attention, plain
attention, MLP} teaches each of them, at 64 pixels, through the distiller that trainings use; in segmentation each of
two decoders teaches the other.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from quick import cases

from heterokd.errors import PairError
from heterokd.methods import METHODS
from heterokd.networks.classifier import Network
from heterokd.networks.network import build_network, predict_spec
from heterokd.outputs import IGNORE, Batch, Outputs, Signal
from heterokd.training.distiller import Distiller
from heterokd.training.task_modules import ClassificationTask, SegmentationTask
from heterokd.training.teacher import LiveTeacher

SIZE, CLASSES, IMAGES = 64, 5, 6
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "cnn": ("test_resnet", {}),
    "hierarchical": (
        "swin_tiny_patch4_window7_224",
        {"img_size": SIZE, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 2},
    ),
    "plain": (
        "vit_tiny_patch16_224",
        {"img_size": SIZE, "patch_size": 16, "depth": 4, "embed_dim": 32, "num_heads": 2},
    ),
    "mlp": ("mixer_s32_224", {"img_size": SIZE, "patch_size": 16, "num_blocks": 4, "embed_dim": 32}),
    "deeplabv3": ("deeplabv3-test_resnet", {"encoder_output_stride": 8, "decoder_channels": 24}),
    "segformer": ("segformer-mit_b0", {"decoder_segmentation_channels": 32}),
}
DECODERS = ("deeplabv3", "segformer")
# What cannot exist: no batch norm before the last ReLU (OFD), no linear classifier over pooled positions (SDD, CAT-KD).
REFUSED = {
    *(("ofd", teacher) for teacher in ("hierarchical", "plain", "mlp")),
    *((method, "plain", *role) for method in ("sdd", "cat_kd") for role in ((), ("student",))),
}
BACKBONES = [family for family in FAMILIES if family not in DECODERS]
CASES = [
    (method, student, teacher)
    for task, families in (("classification", BACKBONES), ("segmentation", DECODERS))
    for method in METHODS
    if task in METHODS[method].tasks
    for student in families
    for teacher in families
    if task == "classification" or student != teacher
]


def is_refused(method: str, student: str, teacher: str) -> bool:
    return (method, teacher) in REFUSED or (method, student, "student") in REFUSED


def taking_turns() -> set[tuple[str, str, str]]:
    """A case of each method and task that is not refused; the methods take turns, so that every pair is among them."""
    found = set()
    for families in (BACKBONES, DECODERS):
        of_methods: dict[str, list[tuple[str, str, str]]] = {}
        for case in CASES:
            if case[1] in families and not is_refused(*case):
                of_methods.setdefault(case[0], []).append(case)
        found |= {some[number % len(some)] for number, some in enumerate(of_methods.values())}
    return found


def build(family: str, seed: int) -> Network:
    torch.manual_seed(seed)
    name, options = FAMILIES[family]
    return build_network(name, CLASSES, options, image_size=SIZE)


@lru_cache
def teacher_of(family: str) -> LiveTeacher:
    return LiveTeacher(build(family, 1))


@lru_cache
def batch(maps: bool) -> Batch:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(IMAGES) % CLASSES
    if maps:
        labels = labels.reshape(-1, 1, 1).repeat(1, SIZE, SIZE)
        labels[:, : SIZE // 2, : SIZE // 2] = 0
        labels[:, :8] = IGNORE
    return Batch(
        images=torch.rand(IMAGES, 3, SIZE, SIZE, generator=generator),
        labels=labels,
        index=torch.arange(IMAGES),
        shown=torch.stack((torch.arange(IMAGES), torch.zeros(IMAGES, dtype=torch.int64)), dim=1),
    )


@pytest.mark.parametrize(("method", "student", "teacher"), cases(CASES, quick=taking_turns()))
def test_two_steps_reach_every_parameter(method: str, student: str, teacher: str) -> None:
    specs = []
    for family in (student, teacher):
        name, options = FAMILIES[family]
        specs.append(predict_spec(name, CLASSES, options, SIZE))
    if is_refused(method, student, teacher):
        with pytest.raises(PairError, match=r"\w+ \w+ \w+"):
            METHODS[method](None, specs[0], specs[1])
        return
    loss = METHODS[method](None, specs[0], specs[1])
    images = batch(maps=student in DECODERS)
    task = SegmentationTask(CLASSES) if student in DECODERS else ClassificationTask(CLASSES)
    distiller = Distiller(build(student, 0), loss, task).train()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-4)
    guide = teacher_of(teacher)
    before = {name: value.clone() for name, value in guide.network.state_dict().items()}
    for step in range(2):
        given = Outputs()
        if loss.teacher_needs != Signal.NONE:
            given = guide.outputs(images, loss.teacher_needs)
        optimizer.zero_grad()
        total, terms = distiller(images, given, 0.5 + 0.5 * step)
        assert torch.isfinite(total)
        assert sum(float(term.detach()) for term in terms.values()) == pytest.approx(
            float(total.detach()), rel=1e-5, abs=1e-5
        )
        total.backward()
        without = [name for name, parameter in distiller.named_parameters() if parameter.grad is None]
        assert not without, f"no gradient: {without}"
        assert all(torch.isfinite(parameter.grad).all() for parameter in distiller.parameters())
        optimizer.step()
    assert all(parameter.grad is None for parameter in guide.network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in guide.network.state_dict().items())
