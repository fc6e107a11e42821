"""WTTM: TTM that dwells on the images of which the teacher is not sure.

Zheng, Yang: "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024,
https://arxiv.org/abs/2402.11148

    p = softmax(z)                        z: logits [B, K]
    U = sum_c p_t^gamma                   power sum of one image: 1 for a sure teacher, K^(1 - gamma) for a uniform one
    q = p_t^gamma / U                     the power transform of the teacher
    L = weight * U * KL( q || p_s )       mean over the batch; gamma = 1 / tau, and no tau^2

U grows with the number of classes, so a weight found at one K does not carry over to another.

Defaults are those of the authors' one published command with this term (VGG-13 to VGG-8 on CIFAR-100, with CRD: gamma
0.2, weight 4, task weight 1). Without CRD they set both by pair.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from heterokd.domains import Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods.ttm import divergence
from heterokd.outputs import Batch, Losses, Outputs


def power_sum(teacher_logits: Tensor, exponent: float) -> Tensor:
    """U = sum_c p_t^gamma of each image: logits [B, K] give [B] in float32, without gradient."""
    log_BK = F.log_softmax(teacher_logits.detach().float(), dim=1)
    return (exponent * log_BK).logsumexp(dim=1).exp()


def wttm_loss(student_logits: Tensor, teacher_logits: Tensor, exponent: float = 0.2) -> Tensor:
    """Compute U * KL(q || p_s) with q the teacher to the power gamma; logits [B, K], mean over the batch, a scalar."""
    return (power_sum(teacher_logits, exponent) * divergence(student_logits, teacher_logits, exponent)).mean()


class WTTM(Method):
    """Weight TTM towards the images of which the teacher is not sure."""

    verification = Verification(
        program="zkxufo/TTM",
        commit="fe457b3",
        file="distiller_zoo/wttm.py",
        value=5e-08,
        gradient=3e-08,
        open_readings="weight without CRD",
        defaults="program, README",
    )

    class Params(MethodParams):
        """Parameters of WTTM."""

        exponent: Annotated[float, Float(0.05, 1, log=True)] = Field(
            0.2, gt=0, description="gamma = 1 / tau: the power of the teacher's probabilities; smaller is softer"
        )
        weight: Annotated[float, Float(0.1, 50, log=True)] = Field(4.0, ge=0, description="multiplies the term")

    params: Params

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the term `wttm`."""
        loss = wttm_loss(student.logits, teacher.logits, self.params.exponent)
        return {"wttm": self.params.weight * loss}
