"""What a method adds to one student's loss: projectors as small as the students, equations from `heterokd.methods`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.search_efficiency.digits import CLASSES
from benchmarks.search_efficiency.networks import Network, Weights, linear, linear_init, two_layers
from benchmarks.search_efficiency.pairs import Pair
from heterokd.methods import BASELINE
from heterokd.methods.dist import dist_loss
from heterokd.methods.dkd import dkd_loss
from heterokd.methods.fbt import FBT, fbt_loss
from heterokd.methods.fitnet import fitnet_loss
from heterokd.methods.hcd import HCD, hcd_loss, sub_logits
from heterokd.methods.kd import kd_loss
from heterokd.methods.ofa import ofa_loss

STRUCTURES: dict[str, tuple[str, ...]] = {
    "ofa": ("stages",),
    "hcd": ("num_sublogits",),
    "fbt": ("front_stage", "back_stage"),
    "fitnet": ("stages",),
}
"""Parameters that change the shape of a training."""

NUMBERS: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    "kd": ("temperature", "weight"),
    "dkd": ("target_weight", "non_target_weight", "temperature"),
    "dist": ("inter_weight", "intra_weight", "temperature"),
    "ofa": ("eps", "stage_weight"),
    "hcd": ("sub_kl_weight", "orthogonality_weight", "temperature"),
    "fbt": ("infonce_weight",),
    "fitnet": ("weight",),
}
"""Parameters that are numbers in an equation; the rest have a single option."""

DKD_WARMUP = 0.1
WIDTH = 24
"""Of the vectors that OFA's branches and HCD's projectors make of a stage."""

StudentOutputs = tuple[list[Tensor], Tensor, Tensor]


@dataclass(frozen=True)
class Shown:
    """What the teacher says of the views, and its weights, of which FBT runs the last stages.

    Attributes:
        logits: of every view, [V, N, K].
        embedding: likewise, [V, N, D].
        maps: four, [V, N, C, P].
        weights: frozen.
    """

    logits: Tensor
    embedding: Tensor
    maps: tuple[Tensor, ...]
    weights: Weights

    def at(self, at_B2: Tensor) -> Taught:
        """Of a batch of (image, view)."""
        return Taught(self, at_B2[:, 1], at_B2[:, 0])


@dataclass(frozen=True)
class Taught:
    """What the teacher says of a batch."""

    shown: Shown
    views: Tensor
    images: Tensor

    @property
    def logits(self) -> Tensor:
        """Class scores, [B, K]."""
        return self.shown.logits[self.views, self.images]

    @property
    def embedding(self) -> Tensor:
        """What enters its classifier, [B, D]."""
        return self.shown.embedding[self.views, self.images]

    def map(self, stage: int) -> Tensor:
        """Of one stage, [B, C, P]."""
        return self.shown.maps[stage - 1][self.views, self.images]


def init_method(pair: Pair, method: str, fixed: Mapping[str, Any], generator: torch.Generator) -> Weights:
    """Fresh projectors."""
    teacher, student = pair.teacher, pair.student
    weights: Weights = {}
    if method == "ofa":
        for digit in fixed["stages"]:
            weights |= linear_init(f"ofa.{digit}.in", student.size(int(digit)), WIDTH, generator)
            weights |= linear_init(f"ofa.{digit}.out", WIDTH, CLASSES, generator)
    elif method == "hcd":
        hidden = teacher.embedding_dim
        for stage in range(1, 5):
            weights |= linear_init(f"hcd.{stage}.projector", student.size(stage), WIDTH, generator)
            weights |= linear_init(f"hcd.{stage}.mapper.in", WIDTH + hidden, hidden, generator)
            weights |= linear_init(f"hcd.{stage}.mapper.out", hidden, fixed["num_sublogits"] * CLASSES, generator)
    elif method == "fbt":
        front, back = _fused(pair)
        expected = back.size(fixed["back_stage"] - 1)
        weights |= linear_init("fbt.bridge", front.size(fixed["front_stage"]), expected, generator)
        if student.embedding_dim != teacher.embedding_dim:
            weights |= linear_init("fbt.align", student.embedding_dim, teacher.embedding_dim, generator)
        weights["fbt.logit_scale"] = torch.tensor(math.log(1 / FBT.Params().temperature))
    elif method == "fitnet":
        for digit in fixed["stages"]:
            stage = int(digit) - 1
            ends = student.channels[stage], teacher.channels[stage]
            weights |= linear_init(f"fitnet.{digit}", *ends, generator)
    return weights


def terms(
    pair: Pair,
    method: str,
    fixed: Mapping[str, Any],
    weights: Weights,
    numbers: Weights,
    student: StudentOutputs,
    teacher: Taught,
    labels_B: Tensor,
    progress: float,
) -> Tensor | float:
    """What a method adds to the task loss of one student, weighted and summed."""
    maps, logits, _ = student
    own = {name.split(".", 1)[1]: value for name, value in numbers.items()}
    if method == "kd":
        return own["weight"] * kd_loss(logits, teacher.logits, own["temperature"])
    if method == "dkd":
        warm = min(1.0, progress / DKD_WARMUP)
        weighted = own["target_weight"], own["non_target_weight"], own["temperature"]
        return warm * dkd_loss(logits, teacher.logits, labels_B, *weighted)
    if method == "dist":
        return dist_loss(logits, teacher.logits, own["inter_weight"], own["intra_weight"], own["temperature"])
    if method == "ofa":
        exits = [two_layers(weights, f"ofa.{digit}", maps[int(digit) - 1].flatten(1)) for digit in fixed["stages"]]
        stages = sum(ofa_loss(one, teacher.logits, labels_B, own["eps"]) for one in exits)
        return ofa_loss(logits, teacher.logits, labels_B, own["eps"]) + own["stage_weight"] * stages
    if method == "hcd":
        params = HCD.Params.model_construct(num_sublogits=fixed["num_sublogits"], **own)
        made = [_sub_logits(weights, stage, maps[stage - 1], teacher, fixed) for stage in range(1, 5)]
        return hcd_loss(logits, teacher.logits, made, labels_B, params)
    if method == "fbt":
        return _fbt(pair, fixed, weights, own, student, teacher, labels_B)
    if method == "fitnet":
        made = [linear(weights, f"fitnet.{digit}", maps[int(digit) - 1].transpose(1, 2)) for digit in fixed["stages"]]
        targets = [_square(teacher.map(int(digit))) for digit in fixed["stages"]]
        return own["weight"] * fitnet_loss([_square(one.transpose(1, 2)) for one in made], targets)
    return 0.0


def _sub_logits(weights: Weights, stage: int, map_BCP: Tensor, teacher: Taught, fixed: Mapping[str, Any]) -> Tensor:
    vector = linear(weights, f"hcd.{stage}.projector", map_BCP.flatten(1))
    shared = two_layers(weights, f"hcd.{stage}.mapper", torch.cat((vector, teacher.embedding), dim=1))
    return sub_logits(shared, fixed["num_sublogits"])


def _fused(pair: Pair) -> tuple[Network, Network]:
    """Front and back of the fused network, as `FBT.build` chooses them."""
    teacher_first = pair.teacher.kind == "cnn" and pair.student.kind != "cnn"
    return (pair.teacher, pair.student) if teacher_first else (pair.student, pair.teacher)


def _fbt(
    pair: Pair,
    fixed: Mapping[str, Any],
    weights: Weights,
    own: Weights,
    student: StudentOutputs,
    teacher: Taught,
    labels_B: Tensor,
) -> Tensor:
    params = FBT.Params.model_construct(**own)
    _, back = _fused(pair)
    if back is pair.student:
        front_map, back_weights = teacher.map(fixed["front_stage"]), weights
    else:
        front_map, back_weights = student[0][fixed["front_stage"] - 1], teacher.shown.weights
    before = fixed["back_stage"] - 1
    bridged = linear(weights, "fbt.bridge", front_map.flatten(1)).unflatten(1, (back.channels[before - 1], -1))
    fused_logits, fused_embedding = back.tail(back_weights, bridged, fixed["back_stage"])
    scale = weights["fbt.logit_scale"].exp()

    def pair_loss(taught: tuple[Tensor, Tensor], teaching: tuple[Tensor, Tensor]) -> Tensor:
        embedding = taught[1]
        if embedding.shape[1] != teaching[1].shape[1]:
            embedding = linear(weights, "fbt.align", embedding)
        return fbt_loss(taught[0], teaching[0], embedding, teaching[1], labels_B, scale, params)

    of_teacher, fused = (teacher.logits, teacher.embedding), (fused_logits, fused_embedding)
    detached = fused_logits.detach(), fused_embedding.detach()
    return pair_loss(student[1:], of_teacher) + pair_loss(fused, of_teacher) + pair_loss(student[1:], detached)


def _square(map_BCP: Tensor) -> Tensor:
    """[B, C, P] -> [B, C, side, side]."""
    side = math.isqrt(map_BCP.shape[2])
    return map_BCP.unflatten(2, (side, side))
