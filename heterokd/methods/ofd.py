"""OFD: match the teacher's maps before their last ReLU, as far as the ReLU lets them through.

Heo, Kim, Yun, Park, Kwak, Choi: "A Comprehensive Overhaul of Feature Distillation", ICCV 2019,
https://arxiv.org/abs/1904.01866

    t_i the teacher's map of stage i before its last ReLU, m_i its margin, a negative number per channel:
        the mean of the negative part of what the batch norm before the ReLU gives
    s_i = batch norm(conv1x1(the student's map of stage i)), as many channels as t_i
    sigma(t) = max(t, m)                                                             the margin ReLU
    d(s, t) = 0 where t <= 0 and s <= sigma(t), else (s - sigma(t))^2                        partial L2
    L = weight * sum_i 2^-(n - i) mean_b sum_{c, h, w} d(s_i, t_i)          i = 1..n from shallow to deep

Defaults are those of the CIFAR tables of DKD's authors (weight 1e-3); ResNet50 to MobileNet on ImageNet uses 1e-4.

The student's maps are read before the last ReLU where it has one after batch norm, and as the stages are otherwise, so
any student fits; the teacher needs that ReLU. d is summed, so the weight depends on the number of channels and
positions; search it. Deviation: the finer of both grids is averaged to the coarser grid; the authors' code always
averages the teacher's to the student's, which is the same wherever the student's is not the finer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from heterokd.domains import Choice, Float
from heterokd.errors import PairError
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods._projectors import initialise, to_smaller_grid
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal


def partial_l2(student_map: Tensor, teacher_map: Tensor, margin: Tensor) -> Tensor:
    """Sum d over channels and positions, mean over the batch; maps [B, C, H, W], margin [C], a scalar."""
    pooled, target = to_smaller_grid(student_map.float(), teacher_map.detach().float())
    bounded = torch.maximum(target, margin.detach().float().view(1, -1, 1, 1))
    counts = (target > 0) | (pooled > bounded)
    return ((pooled - bounded).square() * counts).sum(dim=(1, 2, 3)).mean()


def ofd_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], margins: Sequence[Tensor]) -> Tensor:
    """Sum `partial_l2` over stages, with weights halved from stage to stage back from the deepest.

    Args:
        student_maps: [B, C, H, W] each, shallow to deep, already as many channels as the teacher's.
        teacher_maps: [B, C, h, w] each, before the ReLU; take no gradient.
        margins: [C] each.

    Returns:
        A scalar.
    """
    stages = list(zip(student_maps, teacher_maps, margins, strict=True))
    return torch.stack([partial_l2(*stage) / 2**steps for steps, stage in enumerate(reversed(stages))]).sum()


class OFD(Method):
    """Match the teacher's maps before their last ReLU, as far as the ReLU lets them through."""

    verification = Verification(
        program="megvii-research/mdistiller",
        commit="a08d46f",
        file="distillers/OFD.py",
        value=3e-08,
        gradient=3e-08,
        open_readings="grids where the student's is the finer: averaged here",
        defaults="program, CIFAR-100",
    )

    class Params(MethodParams):
        """Parameters of OFD."""

        weight: Annotated[float, Float(1e-5, 1e-2, log=True)] = Field(
            1e-3, ge=0, description="multiplies the sum over stages, channels and positions"
        )
        stages: Annotated[str, Choice("1234", "234", "34", "4")] = Field(
            "1234",
            pattern="^1?2?3?4?$",
            min_length=1,
            coerce_numbers_to_str=True,
            description="the stages that are compared, shallow to deep, one digit each; the deepest weighs most",
        )

    student_needs = Signal.STAGES | Signal.PRE_ACTIVATIONS
    teacher_needs = Signal.PRE_ACTIVATIONS
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build a connector per chosen stage, and choose the student's maps to read.

        Raises:
            PairError: the teacher has no ReLU that follows batch norm.
        """
        if Signal.PRE_ACTIVATIONS not in teacher.serves:
            raise PairError(
                "ofd reads the teacher's maps before a ReLU that follows batch norm; "
                f"this {teacher.kind} teacher has none"
            )
        self.student_needs = Signal.PRE_ACTIVATIONS if Signal.PRE_ACTIVATIONS in student.serves else Signal.STAGES
        self.connectors = nn.ModuleDict()
        for digit in self.params.stages:
            channels, width = (spec.stages[int(digit) - 1].channels for spec in (student, teacher))
            self.connectors[digit] = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        initialise(self.connectors)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the term `features`."""
        before_relu = Signal.PRE_ACTIVATIONS in self.student_needs
        maps = student.pre_activations.maps if before_relu else student.stages
        target = teacher.pre_activations
        chosen = [int(digit) - 1 for digit in self.connectors]
        loss = ofd_loss(
            [connector(maps[i]) for i, connector in zip(chosen, self.connectors.values(), strict=True)],
            [target.maps[i] for i in chosen],
            [target.margins[i] for i in chosen],
        )
        return {"features": self.params.weight * loss}
