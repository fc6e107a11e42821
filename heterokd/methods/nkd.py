"""NKD: the teacher's belief in the label, and its other classes among themselves.

Yang, Zeng, Li, Zhang, Yuan, Li: "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
Normalized Loss and Customized Soft Labels", ICCV 2023, https://arxiv.org/abs/2303.13005

    p = softmax(z)                             z: logits [B, K]; y: the label
    q = softmax(z / tau) without class y       the other classes among themselves, [B, K - 1]
    target     = - p_t(y) log p_s(y)           without temperature
    non_target = - tau^2 * sum_c q_t(c) log q_s(c)
    L = weight * ( target + gamma * non_target )                                             mean over the batch

Both terms are cross-entropies: where the student equals the teacher they are entropies, not 0. The gradient of the
second is that of DKD's second term.

Defaults are those of the authors' code (gamma 1.5, tau 1, weight 1, task weight 1; their ImageNet recipe).

Paper and code differ: the paper leaves the label out of q; a version of the released code builds a mask that is true
everywhere, so that q holds all classes. The default is the paper's; `non_target: all_classes` is that code's. With two
classes the paper's q has one entry and its term is 0. Mixed labels count as their largest share, as in the authors'
code.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from heterokd.domains import Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods.dkd import others
from heterokd.outputs import Batch, Losses, Outputs, hard_labels

NonTarget = Literal["without_label", "all_classes"]


def target_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Compute -p_t(y) log p_s(y): logits [B, K], labels [B] or [B, K], mean over the batch, a scalar."""
    label_B1 = hard_labels(labels).unsqueeze(1)
    student_log = F.log_softmax(student_logits.float(), dim=1).gather(1, label_B1)
    teacher_share = F.softmax(teacher_logits.detach().float(), dim=1).gather(1, label_B1)
    return -(teacher_share * student_log).mean()


def non_target_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    non_target: NonTarget = "without_label",
) -> Tensor:
    """Compute tau^2 times the cross-entropy of q_s under q_t.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K]; takes no gradient.
        labels: [B] class numbers, or [B, K] class shares.
        temperature: tau.
        non_target: whether q is without the label (the paper) or holds all classes (the later released code).

    Returns:
        A scalar, the mean over the batch.
    """
    student, teacher = student_logits.float() / temperature, teacher_logits.detach().float() / temperature
    if non_target == "without_label":
        student, teacher = others(student, labels), others(teacher, labels)
    crossed = F.softmax(teacher, dim=1) * F.log_softmax(student, dim=1)
    return -crossed.sum(dim=1).mean() * temperature**2


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    non_target_weight: float = 1.5,
    temperature: float = 1.0,
    non_target: NonTarget = "without_label",
) -> Tensor:
    """Both terms, the second weighted by gamma; logits [B, K], labels [B] or [B, K], a scalar."""
    target = target_loss(student_logits, teacher_logits, labels)
    rest = non_target_loss(student_logits, teacher_logits, labels, temperature, non_target)
    return target + non_target_weight * rest


class NKD(Method):
    """The teacher's belief in the label, and its other classes among themselves."""

    verification = Verification(
        program="yzd-v/cls_KD",
        commit="1e5d48f",
        file="nkd.py",
        value=3e-09,
        gradient=3e-08,
        defaults="program, ImageNet",
    )

    class Params(MethodParams):
        """Parameters of NKD."""

        non_target_weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.5, ge=0, description="gamma: multiplies the term among the other classes"
        )
        temperature: Annotated[float, Float(1, 8, log=True)] = Field(
            1.0, gt=0, description="tau: divides the logits of the other classes; the label's term has no temperature"
        )
        weight: Annotated[float, Float(0.1, 10, log=True)] = Field(1.0, ge=0, description="multiplies both terms")
        non_target: NonTarget = Field(
            "without_label", description="without_label: the paper's other classes; all_classes: the released code's"
        )

    reads_labels = "all"
    params: Params

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `target` and `non_target`."""
        params = self.params
        target = target_loss(student.logits, teacher.logits, batch.labels)
        rest = non_target_loss(student.logits, teacher.logits, batch.labels, params.temperature, params.non_target)
        return {"target": params.weight * target, "non_target": params.weight * params.non_target_weight * rest}
