"""SKD: match which pixels are alike, and let a discriminator compare whole label maps.

Liu, Chen, Liu, Qin, Luo, Wang: "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019,
https://arxiv.org/abs/1903.04197

    F the map before the classifier [B, D, h, w], after 2x2 max-pooling; f_i its vector at position i
    a_ij = f_i . f_j / (|f_i| |f_j|)                                     cosine similarity of two positions of an image
    pairwise = mean_ij (a_s,ij - a_t,ij)^2
    L = kd_weight * PixelKD + pairwise_weight * pairwise + adversarial_weight * G + discriminator_weight * D

G and D are the hinge terms of `heterokd/methods/_discriminator.py` (holistic distillation); PixelKD is that of
`pixel_kd.py` with tau 1. Defaults are those of CIRKD's code (Yang et al., CVPR 2022): 1, 10, 0.001, 0.1.

With P the pooled unit vectors as columns, the similarities are P^T P, and |P_s^T P_s - P_t^T P_t|^2 equals
|P_s P_s^T|^2 - 2 |P_s P_t^T|^2 + |P_t P_t^T|^2: the same number from D x D matrices, so memory does not grow with the
square of the positions.

Deviations: maps of different grids are averaged to the smaller grid first. Positions whose label is IGNORE are left
out; the code counts all.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from heterokd.domains import Choice, Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods._discriminator import Discriminator
from heterokd.methods._projectors import to_smaller_grid, unit_positions
from heterokd.methods.pixel_kd import pixel_kd_loss
from heterokd.outputs import IGNORE, Batch, Losses, Outputs, OutputSpec, Signal, labels_at


def pairwise_loss(
    student_map_BDHW: Tensor, teacher_map_BDHW: Tensor, labels_BHW: Tensor | None = None, pool: int = 2
) -> Tensor:
    """Compute the mean squared difference of cosine similarities over all pairs of valid positions of an image.

    Args:
        student_map_BDHW: [B, D, H, W].
        teacher_map_BDHW: [B, d, h, w]; takes no gradient.
        labels_BHW: class numbers of any height and width; positions with IGNORE are excluded. None: all count.
        pool: side of the max-pooling's window.

    Returns:
        A float32 scalar; 0 where no position is valid.
    """
    both = to_smaller_grid(student_map_BDHW.float(), teacher_map_BDHW.detach().float())
    student_map, teacher_map = (F.max_pool2d(each, pool, ceil_mode=True) for each in both)
    student_BDN, teacher_BDN = unit_positions(student_map), unit_positions(teacher_map)
    pairs = torch.tensor(float(len(student_BDN) * student_BDN.shape[2] ** 2), device=student_BDN.device)
    if labels_BHW is not None:
        valid_B1N = (labels_at(labels_BHW, student_map.shape[-2:]) != IGNORE).flatten(1).unsqueeze(1).float()
        student_BDN, teacher_BDN = student_BDN * valid_B1N, teacher_BDN * valid_B1N
        pairs = valid_B1N.sum(dim=2).square().sum().clamp_min(1)
    with torch.autocast(student_BDN.device.type, enabled=False):  # three large numbers that nearly cancel
        student, cross, teacher = (
            (left @ right.transpose(1, 2)).square().sum()
            for left, right in (
                (student_BDN, student_BDN),
                (student_BDN, teacher_BDN),
                (teacher_BDN, teacher_BDN),
            )
        )
    return (student - 2 * cross + teacher) / pairs


# One argument for each symbol of the equation.
def skd_loss(
    student_map: Tensor,
    teacher_map: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    kd_weight: float = 1.0,
    pairwise_weight: float = 10.0,
) -> Tensor:
    """Compute both terms without discriminator, weighted: maps [B, D, h, w], logits [B, K, h, w], labels [B, H, W]."""
    kd = pixel_kd_loss(student_logits, teacher_logits, labels)
    return kd_weight * kd + pairwise_weight * pairwise_loss(student_map, teacher_map, labels)


class SKD(Method):
    """Match which pixels are alike, and let a discriminator compare whole label maps."""

    verification = Verification(
        program="winycg/CIRKD",
        commit="dab64db",
        file="losses/skd.py",
        value=3e-06,
        gradient=6e-08,
        open_readings="discriminator: read, not run",
        defaults="program",
    )

    tasks = frozenset({"segmentation"})

    class Params(MethodParams):
        """Parameters of SKD."""

        kd_weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="multiplies the divergence of class probabilities at every pixel"
        )
        pairwise_weight: Annotated[float, Float(1, 100, log=True)] = Field(
            10.0, ge=0, description="multiplies the term of similarities between positions"
        )
        adversarial_weight: Annotated[float, Choice(0.0, 0.001, 0.01)] = Field(
            0.001, ge=0, description="multiplies the generator's term; 0 builds no discriminator"
        )
        discriminator_weight: float = Field(0.1, gt=0, description="multiplies the loss of the discriminator")
        pool: int = Field(2, ge=1, description="side of the windows that are max-pooled before pairs are compared")

    student_needs = Signal.LOGITS | Signal.EMBEDDING
    teacher_needs = Signal.LOGITS | Signal.EMBEDDING
    reads_labels = "all"
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build the discriminator, unless its weight is 0."""
        self.discriminator = Discriminator(student) if self.params.adversarial_weight else None

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `kd` and `pairwise`, with a discriminator also `generator` and `discriminator`."""
        params, labels = self.params, batch.labels
        losses = {
            "kd": params.kd_weight * pixel_kd_loss(student.logits, teacher.logits, labels),
            "pairwise": params.pairwise_weight
            * pairwise_loss(student.embedding, teacher.embedding, labels, params.pool),
        }
        if self.discriminator is not None:
            generator, discriminator = self.discriminator.losses(student.logits, teacher.logits, labels)
            losses["generator"] = params.adversarial_weight * generator
            losses["discriminator"] = params.discriminator_weight * discriminator
        return losses
