"""RLD: the teacher's confidence goes to the label, and only classes that it ranks below the label are matched.

Sun, Chen, Lyu, Chen, Chen, Wang: "Knowledge Distillation with Refined Logits", ICCV 2025,
https://arxiv.org/abs/2408.07703

    z: logits [B, K]; y: the label; p = softmax(z / tau_c)
    b_t = (max_c p_t(c), 1 - max_c p_t(c))     the teacher's confidence, whichever class it is in
    b_s = (p_s(y), 1 - p_s(y))                 the student's confidence in the label
    confidence = tau_c^2 * KL(b_t || b_s)      sample confidence distillation (SCD)
    q = softmax(z / tau) over the classes c with z_t(c) < z_t(y), for teacher and student alike
    correlation = tau^2 * KL(q_t || q_s)       masked correlation distillation (MCD)
    L = warm * ( alpha * confidence + beta * correlation )                                    mean over the batch
    warm = min(1, progress / warmup)

A teacher that errs thus never argues against the label. Where the label is the teacher's first class this is DKD, with
classes tied with the label left out. An image whose label the teacher ranks last has no class to match and counts as 0
in `correlation`, as does an image with a single class below the label: with two classes the term is always 0.

Defaults are those of the authors' CIFAR-100 recipe (alpha 1, beta 8, tau 4, tau_c 1, warm-up 20 of 240 epochs, task
weight 1); their ImageNet recipes use tau 1, a warm-up of one epoch, and beta 0.5 (ResNet34 to ResNet18) or 2 (ResNet50
to MobileNet).

Deviations: 1 - p comes from a difference of log-sum-exps, where the authors' code takes the log of a sum of rounded
probabilities and a sure student gives infinity. Their switch to standardise the logits first is left out (see LSKD).
Mixed labels count as their largest share.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from heterokd.domains import Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods.dkd import target_or_not
from heterokd.outputs import Batch, Losses, Outputs, hard_labels

MASKED = -1e9
"""Logit of a class that is left out. Finite, so that a row without any class is uniform for both: its term is 0."""


def confidence_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute tau_c^2 * KL(b_t || b_s): the teacher's confidence in its first class for the student's in the label.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K]; takes no gradient.
        labels: [B] class numbers, or [B, K] class shares.
        temperature: tau_c.

    Returns:
        A scalar, the mean over the batch.
    """
    teacher = teacher_logits.detach()
    student_log = target_or_not(student_logits, labels, temperature)
    teacher_log = target_or_not(teacher, teacher.argmax(dim=1), temperature)
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True) * temperature**2


def correlation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 4.0
) -> Tensor:
    """Compute tau^2 * KL(q_t || q_s) over the classes that the teacher ranks below the label; 0 for an image with none.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K]; takes no gradient.
        labels: [B] class numbers, or [B, K] class shares.
        temperature: tau.

    Returns:
        A scalar, the mean over the batch.
    """
    teacher = teacher_logits.detach().float()
    masked_BK = teacher >= teacher.gather(1, hard_labels(labels).unsqueeze(1))
    student_log = F.log_softmax((student_logits.float() / temperature).masked_fill(masked_BK, MASKED), dim=1)
    teacher_log = F.log_softmax((teacher / temperature).masked_fill(masked_BK, MASKED), dim=1)
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True) * temperature**2


# One argument for each symbol of the equation.
def rld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    confidence_weight: float = 1.0,
    correlation_weight: float = 8.0,
    temperature: float = 4.0,
    confidence_temperature: float = 1.0,
) -> Tensor:
    """Compute both weighted terms (alpha, beta) without warm-up; logits [B, K], labels [B] or [B, K], a scalar."""
    confidence = confidence_loss(student_logits, teacher_logits, labels, confidence_temperature)
    correlation = correlation_loss(student_logits, teacher_logits, labels, temperature)
    return confidence_weight * confidence + correlation_weight * correlation


class RLD(Method):
    """Give the teacher's confidence to the label, and match only classes that it ranks below the label."""

    verification = Verification(
        program="zju-SWJ/RLD",
        commit="d54578f",
        file="distillers/RLD.py",
        value=1e-07,
        gradient=2e-08,
        defaults="program, CIFAR-100",
    )

    class Params(MethodParams):
        """Parameters of RLD."""

        confidence_weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="alpha: multiplies the term of the student's confidence in the label"
        )
        correlation_weight: Annotated[float, Float(0.5, 16, log=True)] = Field(
            8.0, ge=0, description="beta: multiplies the term among the classes that the teacher ranks below the label"
        )
        temperature: Annotated[float, Float(1, 8, log=True)] = Field(
            4.0, gt=0, description="tau: divides both networks' logits in the term among the classes"
        )
        confidence_temperature: float = Field(
            1.0, gt=0, description="tau_c: divides both networks' logits in the term of the confidence"
        )
        warmup: Annotated[float, Float(0, 0.3)] = Field(
            20 / 240, ge=0, le=1, description="fraction of the training over which both terms grow from zero"
        )

    reads_labels = "all"
    params: Params

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `confidence` and `correlation`."""
        params = self.params
        warm = min(1.0, progress / params.warmup) if params.warmup > 0 else 1.0
        logits = student.logits, teacher.logits
        confidence = confidence_loss(*logits, batch.labels, params.confidence_temperature)
        correlation = correlation_loss(*logits, batch.labels, params.temperature)
        return {
            "confidence": warm * params.confidence_weight * confidence,
            "correlation": warm * params.correlation_weight * correlation,
        }
