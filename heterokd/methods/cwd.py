"""CWD: match where each channel is active, as a distribution over positions.

Shu, Liu, Gao, Yan, Shen: "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021,
https://arxiv.org/abs/2011.13256

    phi(y)_{c,i} = exp(y_{c,i} / T) / sum_j exp(y_{c,j} / T)                  softmax over the positions of a channel
    channel(y_s, y_t) = T^2 / C * sum_c sum_i phi(y_t)_{c,i} log( phi(y_t)_{c,i} / phi(y_s)_{c,i} )
    L = kd_weight * PixelKD + map_weight * channel(r(F_s), F_t) + logit_weight * channel(z_s, z_t)
        + adversarial_weight * G + discriminator_weight * D

F is the map before the classifier, z the logits, C their channels, r a 1x1 convolution if the maps' channels
differ and nothing otherwise. G and D are the hinge terms of `heterokd/methods/_discriminator.py`; PixelKD is that of
`pixel_kd.py` with tau 1. Defaults are those of CIRKD's code (Yang et al., CVPR 2022) for DeepLabV3 students: T 4,
1, 50, 3, 0.001, 0.1; its SegFormer students take 5 for maps and 0.3 for logits.

Deviations: maps of different grids are averaged to the smaller grid first. C is the teacher's, which both have after
r; the code divides by the student's before r. Positions whose label is IGNORE have no share of a channel, and images
without any other do not count; the code counts all.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from heterokd.domains import Choice, Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods._discriminator import Discriminator
from heterokd.methods._projectors import initialise, to_smaller_grid
from heterokd.methods.pixel_kd import pixel_kd_loss
from heterokd.outputs import IGNORE, Batch, Losses, Outputs, OutputSpec, Signal, labels_at

NO_SHARE = -1e30
"""Stands for minus infinity, whose softmax over nothing else would be NaN."""


def channel_wise_loss(
    student_map_BCHW: Tensor, teacher_map_BCHW: Tensor, labels_BHW: Tensor | None = None, temperature: float = 4.0
) -> Tensor:
    """T^2 * KL(teacher || student) between the channels' distributions over valid positions, a mean over B and C.

    Args:
        student_map_BCHW: [B, C, H, W], already as many channels as the teacher's.
        teacher_map_BCHW: [B, C, h, w]; takes no gradient.
        labels_BHW: class numbers of any height and width; positions with IGNORE are excluded. None: all count.
        temperature: T.

    Returns:
        A float32 scalar, a mean over the images that have a valid position; 0 where none has.
    """
    student_map, teacher_map = to_smaller_grid(student_map_BCHW.float(), teacher_map_BCHW.detach().float())
    student_BCN, teacher_BCN = (each.flatten(2) / temperature for each in (student_map, teacher_map))
    images = float(len(student_BCN))
    if labels_BHW is not None:
        ignored_B1N = (labels_at(labels_BHW, student_map.shape[-2:]) == IGNORE).flatten(1).unsqueeze(1)
        student_BCN, teacher_BCN = (each.masked_fill(ignored_B1N, NO_SHARE) for each in (student_BCN, teacher_BCN))
    student_log, teacher_log = F.log_softmax(student_BCN, dim=2), F.log_softmax(teacher_BCN, dim=2)
    divergence_BCN = F.kl_div(student_log, teacher_log, reduction="none", log_target=True)
    if labels_BHW is None:
        return divergence_BCN.sum() / (images * divergence_BCN.shape[1]) * temperature**2
    counted = (~ignored_B1N).any(dim=2).sum().clamp_min(1)
    return divergence_BCN.masked_fill(ignored_B1N, 0).sum() / (counted * divergence_BCN.shape[1]) * temperature**2


# One argument for each symbol of the equation.
def cwd_loss(
    student_map: Tensor,
    teacher_map: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    map_weight: float = 50.0,
    logit_weight: float = 3.0,
    temperature: float = 4.0,
) -> Tensor:
    """Compute both terms, weighted: maps [B, C, h, w] of equal channels, logits [B, K, h, w], labels [B, H, W]."""
    maps = channel_wise_loss(student_map, teacher_map, labels, temperature)
    return map_weight * maps + logit_weight * channel_wise_loss(student_logits, teacher_logits, labels, temperature)


class CWD(Method):
    """Match where each channel is active, as a distribution over positions."""

    verification = Verification(
        program="winycg/CIRKD", commit="dab64db", file="losses/cwd.py", value=1e-06, gradient=4e-08, defaults="program"
    )

    tasks = frozenset({"segmentation"})

    class Params(MethodParams):
        """Parameters of CWD."""

        temperature: Annotated[float, Float(1, 8, log=True)] = Field(
            4.0, gt=0, description="T: divides maps and logits; larger values look at more of the map"
        )
        map_weight: Annotated[float, Float(1, 100, log=True)] = Field(
            50.0, ge=0, description="multiplies the term of the maps before the classifier"
        )
        logit_weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            3.0, ge=0, description="multiplies the term of the logits"
        )
        kd_weight: float = Field(
            1.0, ge=0, description="multiplies the divergence of class probabilities at every pixel"
        )
        adversarial_weight: Annotated[float, Choice(0.0, 0.001, 0.01)] = Field(
            0.001, ge=0, description="multiplies the generator's term; 0 builds no discriminator"
        )
        discriminator_weight: float = Field(0.1, gt=0, description="multiplies the loss of the discriminator")

    student_needs = Signal.LOGITS | Signal.EMBEDDING
    teacher_needs = Signal.LOGITS | Signal.EMBEDDING
    reads_labels = "all"
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build a 1x1 convolution if channels differ, and the discriminator, unless its weight is 0."""
        unlike = student.embedding_dim != teacher.embedding_dim
        self.regressor = (
            nn.Conv2d(student.embedding_dim, teacher.embedding_dim, 1, bias=False) if unlike else nn.Identity()
        )
        initialise(self.regressor)
        self.discriminator = Discriminator(student) if self.params.adversarial_weight else None

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `kd`, `maps` and `logits`, with a discriminator also `generator` and `discriminator`."""
        params, labels = self.params, batch.labels
        ours, theirs = to_smaller_grid(student.embedding, teacher.embedding)
        maps = channel_wise_loss(self.regressor(ours), theirs, labels, params.temperature)
        logits = channel_wise_loss(student.logits, teacher.logits, labels, params.temperature)
        losses = {
            "kd": params.kd_weight * pixel_kd_loss(student.logits, teacher.logits, labels),
            "maps": params.map_weight * maps,
            "logits": params.logit_weight * logits,
        }
        if self.discriminator is not None:
            generator, discriminator = self.discriminator.losses(student.logits, teacher.logits, labels)
            losses["generator"] = params.adversarial_weight * generator
            losses["discriminator"] = params.discriminator_weight * discriminator
        return losses
