"""DKD: match the teacher's target class and its other classes separately.

Zhao, Cui, Song, Qiu, Liang: "Decoupled Knowledge Distillation", CVPR 2022, https://arxiv.org/abs/2203.08679

    p = softmax(z / tau)                       z: logits [B, K]; y: the label
    b = (p_y, 1 - p_y)                         the target class against all others
    q = softmax(z / tau) without class y       the other classes among themselves, [B, K - 1]
    L = warm * tau^2 * ( alpha * KL(b_t || b_s) + beta * KL(q_t || q_s) )                    mean over the batch
    warm = min(1, progress / warmup)

KD is the special case alpha = 1, beta = 1 - p_t(y): KD fades the other classes out where the teacher is sure.

Defaults are those of the heterogeneous tables (OFA's configurations: alpha 1, beta 2, tau 1). The authors' CIFAR tables
use alpha 1, beta 8 (2 to 8 by pair), tau 4; their ImageNet tables tau 1 with beta 0.5 (ResNet34 to ResNet18) or 2
(ResNet50 to MobileNet). The warm-up is the authors': 20 of 240 epochs on CIFAR.

Deviations: class y is left out of q exactly, where the authors' code subtracts 1000 from its logit; 1 - p_y comes from
a difference of log-sum-exps, so a sure teacher or student stays finite. With two classes q has one entry and its term
is 0. Mixed labels count as their largest share.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from heterokd.domains import Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.outputs import Batch, Losses, Outputs, hard_labels


def target_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute tau^2 * KL(b_t || b_s) of the label against all other classes.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K]; takes no gradient.
        labels: [B] class numbers, or [B, K] class shares.
        temperature: tau.

    Returns:
        A scalar, the mean over the batch.
    """
    student_log = target_or_not(student_logits, labels, temperature)
    teacher_log = target_or_not(teacher_logits.detach(), labels, temperature)
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True) * temperature**2


def non_target_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute tau^2 * KL(q_t || q_s) among the classes that are not the label; 0 when there are two classes.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K]; takes no gradient.
        labels: [B] class numbers, or [B, K] class shares.
        temperature: tau.

    Returns:
        A scalar, the mean over the batch.
    """
    student_log = F.log_softmax(others(student_logits.float() / temperature, labels), dim=1)
    teacher_log = F.log_softmax(others(teacher_logits.detach().float() / temperature, labels), dim=1)
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True) * temperature**2


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    target_weight: float = 1.0,
    non_target_weight: float = 2.0,
    temperature: float = 1.0,
) -> Tensor:
    """Compute both weighted terms (alpha, beta) without warm-up; logits [B, K], labels [B] or [B, K], a scalar."""
    target = target_loss(student_logits, teacher_logits, labels, temperature)
    non_target = non_target_loss(student_logits, teacher_logits, labels, temperature)
    return target_weight * target + non_target_weight * non_target


def others(logits_BK: Tensor, labels: Tensor) -> Tensor:
    """Return the logits without the label's column, [B, K - 1]; by gather, as a mask would synchronise the device."""
    column = torch.arange(logits_BK.shape[1] - 1, device=logits_BK.device)
    target = hard_labels(labels).unsqueeze(1)
    return logits_BK.gather(1, column + (column >= target).long())


def target_or_not(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return (log p_y, log(1 - p_y)), [B, 2]."""
    scaled_BK = logits.float() / temperature
    target_B = scaled_BK.gather(1, hard_labels(labels).unsqueeze(1)).squeeze(1)
    others_B = others(scaled_BK, labels).logsumexp(dim=1)
    return F.log_softmax(torch.stack([target_B, others_B], dim=1), dim=1)


class DKD(Method):
    """Match the teacher's target class and its other classes separately."""

    verification = Verification(
        program="megvii-research/mdistiller",
        commit="a08d46f",
        file="distillers/DKD.py",
        value=9e-08,
        gradient=1e-08,
        defaults="OFA's configurations",
    )

    class Params(MethodParams):
        """Parameters of DKD."""

        target_weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="alpha: multiplies the term of the target class against all others"
        )
        non_target_weight: Annotated[float, Float(0.5, 16, log=True)] = Field(
            2.0, ge=0, description="beta: multiplies the term among the other classes"
        )
        temperature: Annotated[float, Float(1, 8, log=True)] = Field(
            1.0, gt=0, description="tau: divides both networks' logits; larger values show more of the small classes"
        )
        warmup: Annotated[float, Float(0, 0.3)] = Field(
            20 / 240, ge=0, le=1, description="fraction of the training over which both terms grow from zero"
        )

    reads_labels = "all"
    params: Params

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `target` and `non_target`."""
        warm = min(1.0, progress / self.params.warmup) if self.params.warmup > 0 else 1.0
        logits = student.logits, teacher.logits
        target = target_loss(*logits, batch.labels, self.params.temperature)
        non_target = non_target_loss(*logits, batch.labels, self.params.temperature)
        return {
            "target": warm * self.params.target_weight * target,
            "non_target": warm * self.params.non_target_weight * non_target,
        }
