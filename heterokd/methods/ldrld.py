"""LDRLD: match the teacher pair by pair among the student's first classes, and the remaining classes together.

Xu, Liu, Liu, Wang, Xu, Cheng: "Local Dense Logit Relations for Enhanced Knowledge Distillation", ICCV 2025,
https://arxiv.org/abs/2507.15911

    r_1, ..., r_d                              the d classes with the student's largest logits, largest first
    KL[S] = KL( softmax(z_t[S] / tau) || softmax(z_s[S] / tau) )      among the classes of S alone; z: logits [B, K]
    w_ij  = delta * exp(-lambda * (i + j)) / (eps + |i - j|)          ranks i < j from 1
    local = ( KL[r_1 ... r_d] + sum_{i<j} w_ij KL[r_i, r_j] ) / ( d * (d - 1) / 2 + 1 )
    remaining = KL[all classes but r_1 ... r_d]                       the paper's RNTK
    L = tau^2 * ( alpha * local + beta * remaining )                  mean over the batch

Defaults are the authors' for CIFAR-100, ResNet32x4 to ResNet8x4: d 7, tau 4, alpha 10.5, beta 7, task weight 1; eps
1.5, delta 2, lambda 0.05. The form is that of the authors' code.

Deviations: pairs are gathered into one tensor of two columns, where the code masks a full row for each. With at most d
classes all of them are taken; with one remaining class or none that term is 0. Which classes are first is the student's
choice and takes no gradient.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from heterokd.domains import Float, Int
from heterokd.method import Method, MethodParams, Verification
from heterokd.outputs import Batch, Losses, Outputs

# The paper's delta, lambda and eps: what a pair of ranks weighs.
PAIR_SCALE = 2.0
RANK_DECAY = 0.05
DISTANCE_OFFSET = 1.5
# A logit whose softmax is exactly 0 and whose log is the same for both networks, so that it does not contribute.
ABSENT = -1e30


def local_loss(student_logits: Tensor, teacher_logits: Tensor, count: int = 7, temperature: float = 4.0) -> Tensor:
    """Compute tau^2 * `local`: the student's first classes together and in pairs.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K]; takes no gradient.
        count: d, at most K are used.
        temperature: tau.

    Returns:
        A scalar, the mean over the batch.
    """
    student_BK, teacher_BK = student_logits.float() / temperature, teacher_logits.detach().float() / temperature
    classes_Bd = _first_classes(student_BK, count)
    student_Bd, teacher_Bd = student_BK.gather(1, classes_Bd), teacher_BK.gather(1, classes_Bd)
    first, second = torch.triu_indices(student_Bd.shape[1], student_Bd.shape[1], offset=1, device=student_Bd.device)
    student_BP2 = torch.stack([student_Bd[:, first], student_Bd[:, second]], dim=2)
    teacher_BP2 = torch.stack([teacher_Bd[:, first], teacher_Bd[:, second]], dim=2)
    pairs_P = _divergence(student_BP2, teacher_BP2).mean(dim=0)
    together = _divergence(student_Bd, teacher_Bd).mean()
    return (together + (pair_weights(first, second) * pairs_P).sum()) / (len(first) + 1) * temperature**2


def remaining_loss(student_logits: Tensor, teacher_logits: Tensor, count: int = 7, temperature: float = 4.0) -> Tensor:
    """Compute tau^2 * KL among the classes that are not the student's first `count`; 0 when none remain.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K]; takes no gradient.
        count: d.
        temperature: tau.

    Returns:
        A scalar, the mean over the batch.
    """
    student_BK, teacher_BK = student_logits.float() / temperature, teacher_logits.detach().float() / temperature
    if student_BK.shape[1] <= count:
        return student_BK.new_zeros(())
    classes_Bd = _first_classes(student_BK, count)
    rest = student_BK.scatter(1, classes_Bd, ABSENT), teacher_BK.scatter(1, classes_Bd, ABSENT)
    return _divergence(*rest).mean() * temperature**2


def ldrld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    count: int = 7,
    local_weight: float = 10.5,
    remaining_weight: float = 7.0,
    temperature: float = 4.0,
) -> Tensor:
    """Compute both terms, weighted by alpha and beta; logits [B, K], the teacher's take no gradient, a scalar."""
    local = local_loss(student_logits, teacher_logits, count, temperature)
    remaining = remaining_loss(student_logits, teacher_logits, count, temperature)
    return local_weight * local + remaining_weight * remaining


def pair_weights(first: Tensor, second: Tensor) -> Tensor:
    """Compute the weights w of pairs [P] of ranks from 0: close ranks and high ranks weigh more."""
    total = first + second + 2
    return PAIR_SCALE * torch.exp(-RANK_DECAY * total) / (DISTANCE_OFFSET + (first - second).abs())


def _first_classes(student_BK: Tensor, count: int) -> Tensor:
    """Return the classes r_1 ... r_d, [B, d]."""
    return student_BK.detach().topk(min(count, student_BK.shape[1]), dim=1).indices


def _divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Compute KL(teacher || student) of the softmaxes along the last dimension, which it removes."""
    student_log = F.log_softmax(student_logits, dim=-1)
    teacher_log = F.log_softmax(teacher_logits, dim=-1)
    return F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(dim=-1)


class LDRLD(Method):
    """Match the teacher pair by pair among the student's first classes, and the remaining classes together."""

    verification = Verification(
        program="yema-web/LDRLD",
        commit="b4dcfc9",
        file="distiller_zoo/LDRLD.py",
        value=6e-08,
        gradient=5e-08,
        defaults="program, README",
    )

    class Params(MethodParams):
        """Parameters of LDRLD."""

        count: Annotated[int, Int(3, 12)] = Field(
            7, ge=2, description="d: so many of the student's largest logits form pairs; at most all classes"
        )
        local_weight: Annotated[float, Float(0.5, 20, log=True)] = Field(
            10.5, ge=0, description="alpha: multiplies the term of the student's first classes and their pairs"
        )
        remaining_weight: Annotated[float, Float(0.5, 20, log=True)] = Field(
            7.0, ge=0, description="beta: multiplies the term among the remaining classes"
        )
        temperature: Annotated[float, Float(1, 8, log=True)] = Field(
            4.0, gt=0, description="tau: divides both networks' logits; larger values show more of the small classes"
        )

    params: Params

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `local` and `remaining`."""
        local = local_loss(student.logits, teacher.logits, self.params.count, self.params.temperature)
        remaining = remaining_loss(student.logits, teacher.logits, self.params.count, self.params.temperature)
        return {
            "local": self.params.local_weight * local,
            "remaining": self.params.remaining_weight * remaining,
        }
