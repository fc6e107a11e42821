"""IPWD: follow the teacher most on the images that its training domain shows too rarely.

Niu, Chen, Zhou, Zhang: "Respecting Transfer Gap in Knowledge Distillation", NeurIPS 2022,
https://arxiv.org/abs/2210.12787

    z_kd                      logits of the head that follows the teacher, [B, K]
    z_cls                     logits of the head that follows the labels alone, [B, K]; y: the label
    w = 1 / P(x | teacher's domain) = 1 + CE(norm(z_cls), y) / CE(norm(z_kd), y)               per image, no gradient
    norm(z) = (z - mean(z)) / (std(z) + 1e-7)                                                  over the classes
    L = weight * mean_x w * tau^2 * KL( softmax(z_t / tau) || softmax(z_kd / tau) ) + head_weight * CE(z_extra, y)

By this estimate, an image weighs more the better the first head fits its label in comparison with the second.

The student has a single classifier; the method adds the second, `z_extra`, a linear projector of the student's
embedding to class logits, dropped after training. By default the student's classifier is the head that follows the
teacher, so that what is kept has been distilled in all its layers; the task loss on it is the cross-entropy that joins
the KL. The projector then follows the labels alone. `kept_head: cls` exchanges the roles: the kept classifier sees the
labels alone, the projector follows the teacher and the labels, and the teacher reaches what is kept through the
embedding.

Not verified, because no official code is public: w's form (it is quoted from secondary sources), the form of norm and
that it serves the weights alone, which of the two heads is kept, whether weights are brought to mean one, tau, weight
and head weight. Defaults of tau and of both weights are those of `kd` (1) and of a plain second loss (1).

Deviations: both cross-entropies are at least `FLOOR`, so that an image which both heads know has w = 2 and not 0 / 0.
Mixed labels count as their largest share.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from heterokd.domains import Choice, Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal, hard_labels

FLOOR = 1e-3
"""Smallest cross-entropy of a weight, in nats: a head that gives the label 99.9 % is sure."""


def image_weights(
    kd_logits: Tensor, cls_logits: Tensor, labels: Tensor, normalise_logits: bool = True, mean_one: bool = False
) -> Tensor:
    """Compute the weights w, [B] in float32, without gradient.

    Args:
        kd_logits: [B, K], of the head that follows the teacher.
        cls_logits: [B, K], of the head that follows the labels.
        labels: [B] class numbers, or [B, K] class shares.
        normalise_logits: bring every row of logits to mean 0 and standard deviation 1 first.
        mean_one: divide by the mean over the batch.
    """
    target_B = hard_labels(labels)
    kd_B, cls_B = (
        F.cross_entropy(
            _normal(logits.detach().float()) if normalise_logits else logits.detach().float(),
            target_B,
            reduction="none",
        ).clamp_min(FLOOR)
        for logits in (kd_logits, cls_logits)
    )
    weights_B = 1 + cls_B / kd_B
    return weights_B / weights_B.mean() if mean_one else weights_B


def ipwd_loss(student_logits: Tensor, teacher_logits: Tensor, weights: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute tau^2 * KL(teacher || student), weighted image by image.

    Args:
        student_logits: [B, K], of the head that follows the teacher.
        teacher_logits: [B, K]; takes no gradient.
        weights: [B], see `image_weights`.
        temperature: tau.

    Returns:
        A scalar: the weighted sum, divided by B.
    """
    student_log = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher_log = F.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    divergence_B = F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(dim=1)
    return (weights.detach() * divergence_B).mean() * temperature**2


def _normal(logits_BK: Tensor) -> Tensor:
    """Rows of mean 0 and standard deviation 1; a constant row is 0."""
    return (logits_BK - logits_BK.mean(dim=1, keepdim=True)) / (logits_BK.std(dim=1, keepdim=True) + 1e-7)


class IPWD(Method):
    """Follow the teacher most on the images that its training domain shows too rarely."""

    verification = Verification(
        open_readings="weights, temperature and the second head: no program could be had", defaults="kd"
    )

    student_needs = Signal.LOGITS | Signal.EMBEDDING

    class Params(MethodParams):
        """Parameters of IPWD."""

        temperature: Annotated[float, Float(1, 8, log=True)] = Field(
            1.0, gt=0, description="tau: divides both networks' logits; not verified"
        )
        weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="multiplies the weighted KD term; not verified"
        )
        head_weight: Annotated[float, Float(0.1, 3, log=True)] = Field(
            1.0, gt=0, description="multiplies the label loss of the method's head; not verified"
        )
        mean_one: Annotated[bool, Choice(False, True)] = Field(
            False, description="divide the images' weights by their mean over the batch; not verified"
        )
        normalise_logits: bool = Field(
            True, description="standardise each row of logits before the weights are estimated; not verified"
        )
        kept_head: Literal["kd", "cls"] = Field(
            "kd", description="what the student's classifier follows: teacher and labels, or labels; not verified"
        )

    reads_labels = "all"
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build the second classifier: a projector of the student's embedding to class logits."""
        self.projector = nn.Linear(student.embedding_dim, student.num_classes)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `kd`, and `head`, the label loss of the method's classifier."""
        extra: Tensor = self.projector(student.embedding)
        kd_logits, cls_logits = student.logits, extra
        if self.params.kept_head == "cls":
            kd_logits, cls_logits = cls_logits, kd_logits
        weights = image_weights(kd_logits, cls_logits, batch.labels, self.params.normalise_logits, self.params.mean_one)
        kd = ipwd_loss(kd_logits, teacher.logits, weights, self.params.temperature)
        head = F.cross_entropy(extra.float(), hard_labels(batch.labels))
        return {"kd": self.params.weight * kd, "head": self.params.head_weight * head}
