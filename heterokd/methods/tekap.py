"""TeKAP: follow the teacher and several noisy copies of its logits, as if there were several teachers.

Hossain, Akhter, Hong, Huh: "Single Teacher, Multiple Perspectives: Teacher Knowledge Augmentation for Enhanced
Knowledge Distillation", ICLR 2025, code at https://github.com/mdimtiazh/TeKAP

    KD(z_t) = tau^2 * KL( softmax(z_t / tau) || softmax(z_s / tau) )               z: logits [B, K], mean over the batch
    z_k = (1 - eta) * z_t + eta * n_k,  n_k ~ N(0, 1)                              k = 1 ... P: the perturbed teachers
    L = weight * KD(z_t) + perturbed_weight * sum_k KD(z_k)

This is the paper's form on logits; its form on features (CRD on perturbed features) is not part of it. Defaults are
those of the authors' program on CIFAR-100 (mdimtiazh/TeKAP, commit 279d380): `distiller_zoo/Ours_TeKAP_L.py` weighs
each of P = 3 copies by 0.8 (eta 0.1), and `train_student.py` the sum with the teacher's term by the README's `-a 0.9`,
so 0.9 and 0.9 * 0.8 = 0.72; tau 4, task weight 0.1.

Deviations: the noise is not drawn from a generator but computed from (image index, progress, copy, class), by a hash
of integers. The same step of the same image gets the same noise in every batch, order, process and device, under every
training seed and after a resume; nothing waits for the device.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from heterokd.domains import Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods.kd import kd_loss
from heterokd.outputs import Batch, Losses, Outputs

WORD = 2**32 - 1
UNIFORM_BITS = 23
"""Bits of a uniform number in (0, 1) whose ends and middle float32 holds exactly; normal numbers end at about 5.3."""


def perturbed_loss(student_logits: Tensor, perturbed_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Compute sum_k KD(z_k) for student logits [B, K] and perturbed logits [P, B, K]; mean over the batch, a scalar."""
    student_log = F.log_softmax(student_logits.float() / temperature, dim=1).expand(perturbed_logits.shape)
    teacher_log = F.log_softmax(perturbed_logits.detach().float() / temperature, dim=2)
    divergence_PB = F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(dim=2)
    return divergence_PB.mean(dim=1).sum() * temperature**2


# One argument for each symbol of the equation.
def tekap_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    noise: Tensor,
    noise_share: float = 0.1,
    weight: float = 0.9,
    perturbed_weight: float = 0.72,
    temperature: float = 4.0,
) -> Tensor:
    """Compute both terms, weighted.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K]; takes no gradient.
        noise: [P, B, K], see `normal_noise`.
        noise_share: eta.
        weight: multiplies the teacher's term.
        perturbed_weight: multiplies the sum over its perturbed copies.
        temperature: tau.

    Returns:
        A scalar, the mean over the batch.
    """
    perturbed = perturb(teacher_logits, noise, noise_share)
    return weight * kd_loss(student_logits, teacher_logits, temperature) + perturbed_weight * perturbed_loss(
        student_logits, perturbed, temperature
    )


def perturb(teacher_logits: Tensor, noise: Tensor, noise_share: float = 0.1) -> Tensor:
    """Return z_k of teacher logits [B, K] and noise [P, B, K], in float32, [P, B, K]."""
    return (1 - noise_share) * teacher_logits.float() + noise_share * noise


def normal_noise(index: Tensor, progress: float, copies: int, num_classes: int) -> Tensor:
    """Return standard normal numbers [P, B, K] that depend on nothing but their image, progress, copy and class.

    Args:
        index: [B] positions in the training split.
        progress: fraction of the training that is done, in [0, 1]; at most 2**32 distinct steps.
        copies: P.
        num_classes: K.
    """
    place = torch.arange(copies * num_classes, device=index.device).view(copies, 1, num_classes)
    image_B1 = _hash(_hash(index.long() & WORD) ^ (round(progress * WORD) & WORD)).unsqueeze(1)
    words_PBK = _hash(_hash(place) ^ image_B1)
    uniform_PBK = ((words_PBK >> (32 - UNIFORM_BITS)).float() + 0.5) / 2**UNIFORM_BITS
    return math.sqrt(2) * torch.erfinv(2 * uniform_PBK - 1)


def _hash(words: Tensor) -> Tensor:
    """Scramble 32-bit words kept in int64 (`lowbias32` of https://github.com/skeeto/hash-prospector).

    The constant is added because the hash keeps 0, the first image, the first class and the first step.
    """
    words = (words + 0x9E3779B9) & WORD
    words = ((words ^ (words >> 16)) * 0x7FEB352D) & WORD
    words = ((words ^ (words >> 15)) * 0x846CA68B) & WORD
    return words ^ (words >> 16)


class TeKAP(Method):
    """Follow the teacher and several noisy copies of its logits, as if there were several teachers."""

    verification = Verification(
        program="mdimtiazh/TeKAP",
        commit="279d380",
        file="distiller_zoo/Ours_TeKAP_L.py",
        value=3e-08,
        gradient=4e-10,
        open_readings="the noise is drawn differently",
        defaults="program, README",
    )

    class Params(MethodParams):
        """Parameters of TeKAP."""

        temperature: Annotated[float, Float(1, 8, log=True)] = Field(
            4.0, gt=0, description="tau: divides both networks' logits; larger values show more of the small classes"
        )
        weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            0.9, ge=0, description="multiplies the term of the teacher as it is"
        )
        perturbed_weight: Annotated[float, Float(0.1, 3, log=True)] = Field(
            0.72, ge=0, description="multiplies the sum over the teacher's perturbed copies"
        )
        noise_share: Annotated[float, Float(0.02, 0.5, log=True)] = Field(
            0.1, ge=0, le=1, description="eta: share of standard normal noise in a perturbed copy's logits"
        )
        copies: int = Field(3, ge=1, description="P: so many perturbed copies of the teacher in every step")

    params: Params

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `kd` and `perturbed`."""
        noise = normal_noise(batch.index, progress, self.params.copies, teacher.logits.shape[1])
        copies = perturb(teacher.logits, noise, self.params.noise_share)
        kd = kd_loss(student.logits, teacher.logits, self.params.temperature)
        perturbed = perturbed_loss(student.logits, copies, self.params.temperature)
        return {"kd": self.params.weight * kd, "perturbed": self.params.perturbed_weight * perturbed}
