"""TTM: match the teacher's softened class probabilities with the student's unsoftened probabilities.

Zheng, Yang: "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024,
https://arxiv.org/abs/2402.11148

    p = softmax(z)                        z: logits [B, K]
    q = p_t^gamma / sum_c p_t^gamma       the power transform of the teacher, which is softmax(gamma z_t)
    L = weight * KL( q || p_s )           mean over the batch; gamma = 1 / tau, and no tau^2

KD softens both networks; leaving the student as it is adds a Renyi entropy of the student to KD's objective, which
keeps it from being too sure. The term is 0 where p_s = q, so a student that equals its teacher still has something to
learn, unless gamma is 1.

Defaults are those of the authors' CIFAR-100 example (VGG-13 to VGG-8: gamma 0.1, weight 45, task weight 1); both differ
by pair in their tables.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from heterokd.domains import Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.outputs import Batch, Losses, Outputs


def divergence(student_logits: Tensor, teacher_logits: Tensor, exponent: float) -> Tensor:
    """Compute KL(q || p_s) of each image: logits [B, K] give [B] in float32; the teacher takes no gradient."""
    student_log_BK = F.log_softmax(student_logits.float(), dim=1)
    # (p^gamma) / sum(p^gamma) is softmax(gamma z): the softmax before the power cancels, and with it its underflow.
    transformed_log_BK = F.log_softmax(exponent * teacher_logits.detach().float(), dim=1)
    return F.kl_div(student_log_BK, transformed_log_BK, reduction="none", log_target=True).sum(dim=1)


def ttm_loss(student_logits: Tensor, teacher_logits: Tensor, exponent: float = 0.1) -> Tensor:
    """Compute KL(q || p_s) with q the teacher to the power gamma; logits [B, K], mean over the batch, a scalar."""
    return divergence(student_logits, teacher_logits, exponent).mean()


class TTM(Method):
    """Match the teacher's softened class probabilities with the student's unsoftened probabilities."""

    verification = Verification(
        program="zkxufo/TTM",
        commit="fe457b3",
        file="distiller_zoo/ttm.py",
        value=9e-08,
        gradient=8e-08,
        defaults="program, README",
    )

    class Params(MethodParams):
        """Parameters of TTM."""

        exponent: Annotated[float, Float(0.05, 1, log=True)] = Field(
            0.1, gt=0, description="gamma = 1 / tau: the power of the teacher's probabilities; smaller is softer"
        )
        weight: Annotated[float, Float(0.5, 100, log=True)] = Field(45.0, ge=0, description="multiplies the term")

    params: Params

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the term `ttm`."""
        loss = ttm_loss(student.logits, teacher.logits, self.params.exponent)
        return {"ttm": self.params.weight * loss}
