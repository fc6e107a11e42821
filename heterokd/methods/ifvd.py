"""IFVD: match how far each pixel is from the mean of its class.

Wang, Zhou, Jiang, Bai, Xu: "Intra-class Feature Variation Distillation for Semantic Segmentation", ECCV 2020,
https://doi.org/10.1007/978-3-030-58571-6_21

    f_i the vector at position i of the map before the classifier [B, D, h, w], y_i its label
    p_c = mean over the positions with y_i = c of f_i                            the prototype of a class in one image
    M_i = cos(f_i, p_{y_i})                                                      the variation map
    variation = mean over valid positions of (M_s,i - M_t,i)^2
    L = kd_weight * PixelKD + variation_weight * variation + adversarial_weight * G + discriminator_weight * D

G and D are the hinge terms of `_discriminator.py`; PixelKD is that of `pixel_kd.py` with tau 1. Defaults are
those of CIRKD's program (Yang et al., CVPR 2022; winycg/CIRKD, commit dab64db, `losses/ifvd.py`): 1, 20, 0.001, 0.1.

`label_pixel`: a position of the coarse map takes the label of a pixel under it; `corner` the upper left pixel, as the
program does (PyTorch's `nearest`), `centre` the middle pixel (`nearest-exact`), which is less shifted. Both agree where
the map is as fine as the labels.

Deviations: maps of different grids are averaged to the smaller grid first. Positions whose label is IGNORE are left
out; the code counts them with a difference of 0.
"""

from __future__ import annotations

from typing import Annotated, Literal

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

LabelPixel = Literal["corner", "centre"]


def variation_map(map_BDHW: Tensor, labels_BHW: Tensor, num_classes: int) -> Tensor:
    """Compute M, each position's cosine similarity with the mean vector of its class in the same image.

    Args:
        map_BDHW: [B, D, H, W].
        labels_BHW: class numbers on the map's grid; IGNORE positions give 0.
        num_classes: K.

    Returns:
        [B, H W] in float32.
    """
    valid_BN = (labels_BHW != IGNORE).flatten(1)
    members_BNK = F.one_hot(labels_BHW.flatten(1).where(valid_BN, 0), num_classes) * valid_BN.unsqueeze(2)
    with torch.autocast(map_BDHW.device.type, enabled=False):
        members = members_BNK.float()
        counts_B1K = members.sum(dim=1, keepdim=True).clamp_min(1)
        prototypes_BDK = map_BDHW.float().flatten(2) @ members / counts_B1K
        prototype_BDN = unit_positions(prototypes_BDK.unsqueeze(3)) @ members.transpose(1, 2)
        return (unit_positions(map_BDHW) * prototype_BDN).sum(dim=1)


def coarse_labels(labels_BHW: Tensor, size: tuple[int, int] | torch.Size, pixel: LabelPixel = "corner") -> Tensor:
    """Resize label maps [B, H, W] to [B, h, w]: the label of each cell's upper left or middle pixel."""
    if pixel == "centre":
        return labels_at(labels_BHW, size)
    corner = F.interpolate(labels_BHW[:, None].float(), size=tuple(size), mode="nearest")
    return corner[:, 0].to(labels_BHW.dtype)


def intra_class_loss(
    student_map_BDHW: Tensor,
    teacher_map_BDHW: Tensor,
    labels_BHW: Tensor,
    num_classes: int,
    label_pixel: LabelPixel = "corner",
) -> Tensor:
    """Compute the mean squared difference of variation maps over valid positions.

    Args:
        student_map_BDHW: [B, D, H, W].
        teacher_map_BDHW: [B, d, h, w]; takes no gradient.
        labels_BHW: class numbers of any height and width; positions with IGNORE are excluded.
        num_classes: K.
        label_pixel: whose label a position takes, see `coarse_labels`.

    Returns:
        A float32 scalar; 0 where no position is valid.
    """
    student_map, teacher_map = to_smaller_grid(student_map_BDHW.float(), teacher_map_BDHW.detach().float())
    labels = coarse_labels(labels_BHW, student_map.shape[-2:], label_pixel)
    difference_BN = variation_map(student_map, labels, num_classes) - variation_map(teacher_map, labels, num_classes)
    return difference_BN.square().sum() / (labels != IGNORE).sum().clamp_min(1)


def ifvd_loss(
    student_map: Tensor,
    teacher_map: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    params: IFVD.Params | None = None,
) -> Tensor:
    """Compute both terms without discriminator, weighted: maps [B, D, h, w], logits [B, K, h, w], labels [B, H, W]."""
    params = params or IFVD.Params()
    variation = intra_class_loss(student_map, teacher_map, labels, student_logits.shape[1], params.label_pixel)
    kd = pixel_kd_loss(student_logits, teacher_logits, labels)
    return params.kd_weight * kd + params.variation_weight * variation


class IFVD(Method):
    """Match how far each pixel is from the mean of its class."""

    verification = Verification(
        program="winycg/CIRKD",
        commit="dab64db",
        file="losses/ifvd.py",
        value=9e-08,
        gradient=2e-07,
        open_readings="discriminator: read, not run",
        defaults="program",
    )

    tasks = frozenset({"segmentation"})

    class Params(MethodParams):
        """Parameters of IFVD."""

        kd_weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="multiplies the divergence of class probabilities at every pixel"
        )
        variation_weight: Annotated[float, Float(1, 200, log=True)] = Field(
            20.0, ge=0, description="multiplies the term of variation maps"
        )
        adversarial_weight: Annotated[float, Choice(0.0, 0.001, 0.01)] = Field(
            0.001, ge=0, description="multiplies the generator's term; 0 builds no discriminator"
        )
        discriminator_weight: float = Field(0.1, gt=0, description="multiplies the loss of the discriminator")
        label_pixel: LabelPixel = Field(
            "corner", description="the pixel whose label a position of the map takes: of its cell the corner or centre"
        )

    student_needs = Signal.LOGITS | Signal.EMBEDDING
    teacher_needs = Signal.LOGITS | Signal.EMBEDDING
    reads_labels = "all"
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build the discriminator, unless its weight is 0."""
        self.num_classes = student.num_classes
        self.discriminator = Discriminator(student) if self.params.adversarial_weight else None

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `kd` and `variation`, with a discriminator also `generator` and `discriminator`."""
        params, labels = self.params, batch.labels
        maps = student.embedding, teacher.embedding
        variation = intra_class_loss(*maps, labels, self.num_classes, params.label_pixel)
        losses = {
            "kd": params.kd_weight * pixel_kd_loss(student.logits, teacher.logits, labels),
            "variation": params.variation_weight * variation,
        }
        if self.discriminator is not None:
            generator, discriminator = self.discriminator.losses(student.logits, teacher.logits, labels)
            losses["generator"] = params.adversarial_weight * generator
            losses["discriminator"] = params.discriminator_weight * discriminator
        return losses
