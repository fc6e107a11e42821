"""LSKD: match the order and proportion of the teacher's logits, whatever their range.

Sun, Ren, Li, Wang, Cao: "Logit Standardization in Knowledge Distillation", CVPR 2024,
https://arxiv.org/abs/2403.01427

    s(z) = (z - mean(z)) / (std(z) + eps)          z: the logits of one image, [K]; std divides by K - 1; eps 1e-7
    L = weight * tau^2 * KL( softmax(s(z_t) / tau) || softmax(s(z_s) / tau) )                  mean over the batch

Each image's logits set their temperature, and the student is free to choose its range. The paper puts the same
s before DKD, CTKD and MLKD too; this file is KD with it. With two classes s knows but two values, plus and minus
1 / sqrt(2): it says which class is first, and the term has a value and next to no gradient.

Defaults are those of the authors' CIFAR-100 recipe: tau 2, weight 9 (ten times that of plain KD) with a task
weight of 0.1.

Deviation: logits that are constant up to rounding (a classifier that starts from zero) are standardised to 0, as in the
authors' code, but pass no gradient, where theirs divides by 1e-7 and a student would take an enormous step.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from heterokd.domains import Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods.kd import kd_loss
from heterokd.outputs import Batch, Losses, Outputs

EPS = 1e-7
"""Added to the standard deviation, as in the authors' code."""

# Standard deviation, as a share of the largest logit, under which float32 logits are constant up to rounding.
CONSTANT = 1e-6


def standardise(logits: Tensor) -> Tensor:
    """Each row minus its mean, over its unbiased standard deviation; [B, K], float32, 0 where a row is constant."""
    logits_BK = logits.float()
    centred_BK = logits_BK - logits_BK.mean(dim=1, keepdim=True)
    std_B1 = logits_BK.std(dim=1, keepdim=True)
    constant_B1 = std_B1 <= CONSTANT * logits_BK.abs().amax(dim=1, keepdim=True).clamp_min(1)
    return torch.where(constant_B1, 0.0, centred_BK / (std_B1 + EPS))


def lskd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """Compute tau^2 * KL(teacher || student) of standardised logits [B, K], mean over the batch, a scalar."""
    return kd_loss(standardise(student_logits), standardise(teacher_logits.detach()), temperature)


class LSKD(Method):
    """Match the order and proportion of the teacher's logits, whatever their range."""

    verification = Verification(
        program="sunshangquan/logit-standardization-KD",
        commit="f6e5aa5",
        file="distillers/KD.py",
        value=1e-07,
        gradient=2e-08,
        defaults="program, README",
    )

    class Params(MethodParams):
        """Parameters of LSKD."""

        temperature: Annotated[float, Float(0.5, 8, log=True)] = Field(
            2.0, gt=0, description="tau: divides both networks' standardised logits"
        )
        weight: Annotated[float, Float(0.5, 50, log=True)] = Field(9.0, ge=0, description="multiplies the term")

    params: Params

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the term `lskd`."""
        loss = lskd_loss(student.logits, teacher.logits, self.params.temperature)
        return {"lskd": self.params.weight * loss}
