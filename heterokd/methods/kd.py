"""KD: match the teacher's softened class probabilities.

Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", NIPS 2014 workshop, https://arxiv.org/abs/1503.02531

    L = weight * tau^2 * KL( softmax(z_t / tau) || softmax(z_s / tau) )        z: logits [B, K], mean over the batch

Defaults are those of the heterogeneous tables (OFA's configurations: tau 1, weight 1, task weight 1); the CIFAR tables
of CRD use tau 4, weight 0.9, task weight 0.1.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from heterokd.domains import Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.outputs import Batch, Losses, Outputs


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute tau^2 * KL(teacher || student) of softened probabilities; logits [B, K], batch mean, a scalar."""
    student_log = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher_log = F.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True) * temperature**2


class KD(Method):
    """Match the teacher's softened class probabilities."""

    verification = Verification(
        program="megvii-research/mdistiller",
        commit="a08d46f",
        file="distillers/KD.py",
        value=2e-09,
        gradient=1e-08,
        defaults="OFA's configurations",
    )

    class Params(MethodParams):
        """Parameters of KD."""

        temperature: Annotated[float, Float(1, 8, log=True)] = Field(
            1.0, gt=0, description="tau: divides both networks' logits; larger values show more of the small classes"
        )
        weight: Annotated[float, Float(0.1, 10, log=True)] = Field(1.0, ge=0, description="multiplies the term")

    params: Params

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the term `kd`."""
        loss = kd_loss(student.logits, teacher.logits, self.params.temperature)
        return {"kd": self.params.weight * loss}
