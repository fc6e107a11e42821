"""SRRL: the teacher's classifier, applied to the student's projected features, gives the teacher's logits.

Yang, Martinez, Bulat, Tzimiropoulos: "Knowledge Distillation via Softmax Regression Representation Learning", ICLR
2021, https://openreview.net/forum?id=ZzwDy_wiWv

    g = ReLU(BatchNorm(conv1x1(f_s)))        f_s: last stage of the student [B, C_s, h, w]; g [B, C_t, h, w]
    L_FM = mean over b, c of (mean over positions of g - mean over positions of f_t)^2
    L_SR = mean over b, k of (tail_t(g) - z_t)^2          tail_t: the teacher from its last stage to its logits z_t
    L = feature_weight * L_FM + weight * L_SR

The teacher's classifier gets no gradient step; the projector is dropped after training. Defaults are those of the
authors' program on ImageNet (ResNet34 -> ResNet18, ResNet50 -> MobileNet): both weights 1.

Deviations: the ReLU is left out where the teacher's last stage does not end in a ReLU (transformers, MLPs): negative
features could not be matched. The tail includes the teacher's final norm, if it has any.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from heterokd.domains import Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods._projectors import resize_map
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal


def srrl_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Compute L_SR from the teacher's classifier on both networks' features, [B, K] each; a scalar."""
    return F.mse_loss(student_logits.float(), teacher_logits.detach().float())


def feature_mean_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Compute L_FM: squared difference of the means over positions; maps [B, C, H, W] of any grids, a scalar."""
    return F.mse_loss(student_map.float().mean(dim=(2, 3)), teacher_map.detach().float().mean(dim=(2, 3)))


class SRRL(Method):
    """The teacher's classifier, applied to the student's projected features, gives the teacher's logits."""

    verification = Verification(
        program="jingyang2017/KD_SRRL",
        commit="d2e802f",
        file="AIN.py (feature means)",
        value=2e-08,
        gradient=3e-08,
        defaults="program, ImageNet",
    )

    student_needs = Signal.STAGES
    teacher_needs = Signal.LOGITS | Signal.STAGES | Signal.TAIL

    class Params(MethodParams):
        """Parameters of SRRL."""

        weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="multiplies the squared difference of the logits of the teacher's classifier"
        )
        feature_weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="multiplies the squared difference of the mean features"
        )

    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build the projector from the student's to the teacher's last stage."""
        width = teacher.stages[-1].channels
        projection = nn.Conv2d(student.stages[-1].channels, width, 1, bias=False)
        nn.init.normal_(projection.weight, std=math.sqrt(2 / width))
        rectified = Signal.PRE_ACTIVATIONS in teacher.serves
        self.projector = nn.Sequential(projection, nn.BatchNorm2d(width), nn.ReLU() if rectified else nn.Identity())

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `regression` and `feature`."""
        projected, target = self.projector(student.stages[-1].float()), teacher.stages[-1].detach()
        logits = teacher.tail(resize_map(projected, (target.shape[2], target.shape[3])), 5)
        return {
            "regression": self.params.weight * srrl_loss(logits, teacher.logits),
            "feature": self.params.feature_weight * feature_mean_loss(projected, target),
        }
