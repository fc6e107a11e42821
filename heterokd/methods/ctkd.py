"""CTKD: KD at a temperature that learns to make the student's task hard, a little more each epoch.

Li, Li, Yang, Zhao, Song, Luo, Li, Yang: "Curriculum Temperature for Knowledge Distillation", AAAI 2023,
https://arxiv.org/abs/2211.16231

    tau = tau_0 + tau_range * sigmoid(theta)                           theta is learnt
    L = weight * mean_b tau^2 * KL( softmax(z_t / tau) || softmax(z_s / tau) )              z: logits [B, K]
    the student descends L; theta ascends it: dL/dtheta is multiplied by lambda(progress) on the way back
    lambda = -(1 - cos(pi * min(1, progress / ramp))) / 2              from 0 to -1: an easy start, then a hard teacher

`global`: theta is a single number, 1 at the start, so that tau starts at tau_0 + 0.73 tau_range. `instance`: theta is
predicted for each image, by two linear layers from the class probabilities of both networks.

Defaults are those of the authors' CIFAR-100 recipe: global, tau_0 1, tau_range 20, ramp 10 of 240 epochs, weight 0.9
with a task weight of 0.1. theta is a parameter of the method: saved with it, trained by the student's optimizer at
the student's learning rate. Data-parallel workers average its gradient and hold the same theta.

Deviations: lambda follows the steps, where the authors' code changes it once an epoch. Their SGD decays theta's value
like a weight; here single numbers are not decayed.

The instance variant's loss is that of the authors' README (zhengli97/CTKD, commit 7d52522): tau_b^2 KL of each image,
averaged; it adds 1e-7 to the teacher's probabilities, which is left out here. Its predictor is in no released file: the
width of its hidden layer (HIDDEN), and that its inputs take no gradient, so that the student cannot lower its loss
through the temperature, are readings of the paper.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from heterokd.domains import Choice, Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec

INITIAL_THETA = 1.0
"""theta before training, as in the authors' code."""

HIDDEN = 128
"""Width of the instance variant's hidden layer; the paper gives none."""


class ReverseGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by -strength: what minimises downstream maximises upstream."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, strength: float) -> Tensor:
        """Return `values` unchanged."""
        ctx.strength = strength
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient times -strength, and None for the strength."""
        return -ctx.strength * gradients[0], None


def reversal(progress: float, ramp: float) -> float:
    """-lambda in [0, 1]: how much of the reversed gradient reaches theta; a cosine over the first `ramp`."""
    share = min(1.0, progress / ramp) if ramp > 0 else 1.0
    return (1 - math.cos(math.pi * share)) / 2


def ctkd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor) -> Tensor:
    """Compute tau^2 * KL(teacher || student) at a temperature that may take gradient.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K]; takes no gradient.
        temperature: tau, of all images [1] or of each image [B].

    Returns:
        A scalar, the mean over the batch.
    """
    tau = temperature.float()
    student_log = F.log_softmax(student_logits.float() / tau.unsqueeze(1), dim=1)
    teacher_log = F.log_softmax(teacher_logits.detach().float() / tau.unsqueeze(1), dim=1)
    kl_B = F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(dim=1)
    return (tau.square() * kl_B).mean()


class CTKD(Method):
    """KD at a temperature that learns to make the student's task hard, a little more each epoch."""

    verification = Verification(
        program="zhengli97/CTKD",
        commit="7d52522",
        file="distiller_zoo/KD.py",
        value=6e-07,
        gradient=2e-08,
        open_readings="predictor of the instance variant",
        defaults="program, scripts",
    )

    class Params(MethodParams):
        """Parameters of CTKD."""

        kind: Annotated[Literal["global", "instance"], Choice("global", "instance")] = Field(
            "global",
            description="global: a single temperature; instance: a temperature per image, predicted from both networks",
        )
        temperature_start: float = Field(1.0, gt=0, description="tau_0: the lowest temperature")
        temperature_range: Annotated[float, Float(2, 40, log=True)] = Field(
            20.0, ge=0, description="tau_range: how far the temperature may rise above the lowest"
        )
        ramp: Annotated[float, Float(0, 0.5)] = Field(
            10 / 240, ge=0, le=1, description="fraction of the training over which the adversary grows from zero"
        )
        weight: Annotated[float, Float(0.1, 10, log=True)] = Field(0.9, ge=0, description="multiplies the term")

    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build a single number, or a predictor of a number for each image."""
        if self.params.kind == "global":
            self.theta = nn.Parameter(torch.full((1,), INITIAL_THETA))
            return
        last = nn.Linear(HIDDEN, 1)
        nn.init.constant_(last.bias, INITIAL_THETA)
        self.predictor = nn.Sequential(nn.Linear(student.num_classes + teacher.num_classes, HIDDEN), nn.ReLU(), last)

    def temperature(self, student_logits: Tensor, teacher_logits: Tensor, progress: float) -> Tensor:
        """Compute the temperature for logits [B, K]: [1] if global, [B] if for each image; its gradient is reversed."""
        if self.params.kind == "global":
            theta = self.theta
        else:
            both = [F.softmax(logits.detach().float(), dim=1) for logits in (student_logits, teacher_logits)]
            theta = self.predictor(torch.cat(both, dim=1)).float().squeeze(1)
        reversed_theta: Tensor = ReverseGradient.apply(theta, reversal(progress, self.params.ramp))
        return self.params.temperature_start + self.params.temperature_range * reversed_theta.sigmoid()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the term `ctkd`."""
        temperature = self.temperature(student.logits, teacher.logits, progress)
        return {"ctkd": self.params.weight * ctkd_loss(student.logits, teacher.logits, temperature)}
