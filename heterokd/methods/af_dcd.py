"""Af-DCD: reconstruct the teacher's map from a masked student's, and distinguish its channel groups in small patches.

Fan, Li, Liu, Song, Yao: "Augmentation-Free Dense Contrastive Knowledge Distillation for Efficient Semantic
Segmentation", NeurIPS 2023, https://arxiv.org/abs/2312.04168

    S = G( mask * A(F_s) )               A: 1x1 convolution to the teacher's width; G: 3x3 convolution, ReLU, 3x3
                                         convolution; mask: a share of the pixels is 0, others in every step
    reconstruction = 1/B sum (S - F_t)^2                               over images, channels and pixels
    s, t                                 both maps max-pooled, cut into patches; a pixel's channels into M groups
    d(s_i, t_j) = - |s_i - t_j|_1 / tau  i, j: the groups at the pixels of one patch
    contrast = mean over pixels of the sum over groups i of - log( exp d(s_i, t_i) / (exp d(s_i, t_i) +
               sum over negatives j of exp d(s_i, t_j)) )
    L = kd_weight * pixel KD + reconstruction_weight * reconstruction + contrast_weight * contrast

Negatives are, as in the authors' code, the other groups at all pixels of the patch (`negatives: groups`). With
`negatives: all` they are everything else in the patch; then `groups: 1` is the paper's contrast of pixels, and
`patch: 1` its contrast of channels. Defaults are those of the authors' Cityscapes script.

`reconstruction` is a sum: its weight goes with the number of values in a map. `reduction: mean` multiplies the mean by
`PUBLISHED_VALUES` instead, so that the published weights mean the same on maps of any size.

Deviations. The paper compares the encoders' last maps (2048 channels at stride 8); here it is the maps that enter the
last classifiers, which every decoder has and a cache can keep. The code requires equal grids, widths that M divides
and sides that patches divide: here both maps are averaged to the smaller grid, M falls to the next divisor of the
width, pools and patches shrink to the map, and a rest at the lower and right border makes smaller patches. Pixels whose
label is IGNORE count in neither term. The mask is a hash of (image, progress), not a generator's: a resumed training
continues with the same mask. Gradients of A and G are not clipped apart (the code clips them at 15).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from heterokd.domains import Float
from heterokd.errors import PairError
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods._projectors import to_smaller_grid
from heterokd.methods._random_words import WORD, random_words
from heterokd.methods.pixel_kd import pixel_kd_loss
from heterokd.outputs import IGNORE, Batch, Losses, Outputs, OutputSpec, Signal, labels_at

Negatives = Literal["groups", "all"]
Reduction = Literal["sum", "mean"]

PUBLISHED_VALUES = 2048 * 64 * 128
"""Values of one teacher's map for the published weights: ResNet-101 at stride 8, crops of 512 x 1024."""


def af_dcd_loss(
    student_BDHW: Tensor,
    teacher_BDHW: Tensor,
    valid_BHW: Tensor | None = None,
    reconstruction_weight: float = 2e-6,
    contrast_weight: float = 0.005,
) -> Tensor:
    """Compute both feature terms in their published form, weighted; arguments as `contrastive_loss`, a scalar."""
    reconstruction = reconstruction_loss(student_BDHW, teacher_BDHW, valid_BHW)
    return reconstruction_weight * reconstruction + contrast_weight * contrastive_loss(
        student_BDHW, teacher_BDHW, valid_BHW
    )


def reconstruction_loss(
    student_BDHW: Tensor, teacher_BDHW: Tensor, valid_BHW: Tensor | None = None, reduction: Reduction = "sum"
) -> Tensor:
    """Compute the squared error over valid pixels, a scalar; 0 if there are none.

    Args:
        student_BDHW: the reconstruction [B, D, H, W].
        teacher_BDHW: [B, D, H, W]; takes no gradient.
        valid_BHW: truth values: which pixels count. None: all.
        reduction: "sum" over everything, divided by B; "mean" over everything, times `PUBLISHED_VALUES`.
    """
    errors_BHW = (student_BDHW.float() - teacher_BDHW.detach().float()).square().sum(dim=1)
    valid = torch.ones_like(errors_BHW) if valid_BHW is None else valid_BHW.float()
    total = (errors_BHW * valid).sum()
    if reduction == "sum":
        return total / len(errors_BHW)
    return total / (valid.sum() * student_BDHW.shape[1]).clamp_min(1) * PUBLISHED_VALUES


# One argument for each symbol of the equation.
def contrastive_loss(
    student_BDHW: Tensor,
    teacher_BDHW: Tensor,
    valid_BHW: Tensor | None = None,
    temperature: float = 0.07,
    groups: int = 16,
    patch: int = 4,
    pooling: int = 4,
    negatives: Negatives = "groups",
) -> Tensor:
    """Contrast the teacher's vector of the same pixel and channel group with the patch's others.

    Args:
        student_BDHW: the reconstruction [B, D, H, W].
        teacher_BDHW: [B, D, H, W]; takes no gradient.
        valid_BHW: truth values: which pixels count, as themselves and as negatives. None: all.
        temperature: tau.
        groups: M, a divisor of D.
        patch: side of a patch, in pooled pixels.
        pooling: side of the squares of pixels that are max-pooled first.
        negatives: "groups" are the patch's vectors of other groups, "all" all others.

    Returns:
        A scalar: the sum over groups, the mean over valid pooled pixels; 0 where none is valid.
    """
    student, teacher = student_BDHW.float(), teacher_BDHW.detach().float()
    valid = torch.ones_like(student[:, :1]) > 0 if valid_BHW is None else valid_BHW.unsqueeze(1)
    sides = student.shape[-2:]
    student, teacher = (_pool(each, valid, pooling) for each in (student, teacher))
    valid = F.max_pool2d(valid.float(), _fit(pooling, sides), ceil_mode=True) > 0
    count, sides = valid.sum().clamp_min(1), valid.shape[-2:]

    side = _fit(patch, sides)
    student_PVC, teacher_PVC = (_patches(each, groups, side) for each in (student, teacher))
    valid_PV = _patches(valid.float(), 1, side).squeeze(2).repeat_interleave(groups, dim=1) > 0
    vector = torch.arange(valid_PV.shape[1], device=valid.device)
    same_VV = vector.unsqueeze(1) == vector
    unlike_VV = vector.unsqueeze(1) % groups != vector % groups if negatives == "groups" else ~same_VV
    with torch.autocast(student.device.type, enabled=False):
        close_PVV = -torch.cdist(student_PVC, teacher_PVC, p=1) / temperature
    compared_PVV = same_VV | (unlike_VV & valid_PV.unsqueeze(1))
    whole_PV = close_PVV.masked_fill(~compared_PVV, -math.inf).logsumexp(dim=2)
    return torch.where(valid_PV, whole_PV - close_PVV.diagonal(dim1=1, dim2=2), 0.0).sum() / count


def _fit(side: int, sides: tuple[int, ...]) -> tuple[int, int]:
    """Return a square's height and width, at most the map's."""
    return min(side, sides[0]), min(side, sides[1])


def _pool(map_BDHW: Tensor, valid_B1HW: Tensor, pooling: int) -> Tensor:
    """Max-pool the valid pixels of each square; 0 where none is valid."""
    square = _fit(pooling, map_BDHW.shape[-2:])
    pooled = F.max_pool2d(map_BDHW.masked_fill(~valid_B1HW, -math.inf), square, ceil_mode=True)
    return pooled.masked_fill(pooled == -math.inf, 0.0)


def _patches(map_BDHW: Tensor, groups: int, side: tuple[int, int]) -> Tensor:
    """Reshape [B, D, H, W] to patches, vectors (pixel by pixel, group by group) and channels, [P, V, D / groups].

    Borders are padded with 0.
    """
    height, width = map_BDHW.shape[-2:]
    padded = F.pad(map_BDHW, (0, -width % side[1], 0, -height % side[0]))
    B, D, H, W = padded.shape
    rows, columns = H // side[0], W // side[1]
    split = padded.reshape(B, groups, D // groups, rows, side[0], columns, side[1])
    return split.permute(0, 3, 5, 4, 6, 1, 2).reshape(B * rows * columns, side[0] * side[1] * groups, D // groups)


def random_mask(index: Tensor, progress: float, size: tuple[int, ...], ratio: float) -> Tensor:
    """Return 1 where a pixel is kept, [B, 1, H, W] in float32: about `ratio` of an image's pixels are 0.

    Args:
        index: [B] positions in the training split.
        progress: fraction of the training that is done, so that every step has another mask.
        size: H and W.
        ratio: fraction of masked pixels.
    """
    words = random_words(index, progress, size[0] * size[1])
    return (words >= ratio * (WORD + 1)).float().view(len(index), 1, size[0], size[1])


class AfDCD(Method):
    """Reconstruct the teacher's map from a masked student's, and distinguish its channel groups in small patches."""

    verification = Verification(
        program="OSVAI/Af-DCD",
        commit="5b086a7",
        file="losses/ocmgd.py",
        value=6e-08,
        gradient=4e-08,
        open_readings="masked reconstruction: read, not run",
        defaults="program, Cityscapes",
    )

    student_needs = Signal.EMBEDDING | Signal.LOGITS
    teacher_needs = Signal.EMBEDDING | Signal.LOGITS
    tasks = frozenset({"segmentation"})

    class Params(MethodParams):
        """Parameters of AfDCD."""

        kd_weight: Annotated[float, Float(0.1, 10, log=True)] = Field(1.0, ge=0, description="multiplies pixel KD")
        reconstruction_weight: Annotated[float, Float(1e-6, 4e-5, log=True)] = Field(
            2e-6, ge=0, description="multiplies the squared errors of the reconstruction"
        )
        contrast_weight: Annotated[float, Float(0.001, 0.04, log=True)] = Field(
            0.005, ge=0, description="multiplies the contrast of channel groups"
        )
        mask_ratio: Annotated[float, Float(0.25, 0.9)] = Field(
            0.75, ge=0, lt=1, description="share of the student's pixels that the reconstruction does without"
        )
        reduction: Reduction = Field(
            "sum", description="sum adds up squared errors as published; mean is free of the map's size"
        )
        temperature: float = Field(
            0.07, ge=0.01, description="tau: divides distances; smaller values look at the closest negatives only"
        )
        groups: int = Field(16, ge=1, description="groups that a pixel's channels are cut into")
        patch: int = Field(4, ge=1, description="side of the patches inside which vectors are compared")
        pooling: int = Field(4, ge=1, description="side of the squares that are max-pooled before the contrast")
        negatives: Negatives = Field(
            "groups", description="groups takes other channel groups of the patch as negatives, all also its group"
        )
        kd_temperature: float = Field(1.0, gt=0, description="divides both networks' logits in pixel KD")

    reads_labels = "all"
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build the alignment, if the widths differ, and the generator.

        Raises:
            PairError: no negatives: all channels fall into one group.
        """
        width = teacher.embedding_dim
        self.groups = max(M for M in range(1, min(self.params.groups, width) + 1) if width % M == 0)
        if self.groups == 1 and self.params.negatives == "groups":
            raise PairError(
                f"af_dcd takes other channel groups as negatives, but the teacher's {width} channels make one group "
                f"with method.groups={self.params.groups}: raise method.groups, or set method.negatives to all"
            )
        equal = student.embedding_dim == width
        self.align = nn.Identity() if equal else nn.Conv2d(student.embedding_dim, width, 1)
        self.generator = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `kd`, `reconstruction` and `contrast`."""
        params = self.params
        kd = pixel_kd_loss(student.logits, teacher.logits, batch.labels, params.kd_temperature)
        ours, theirs = to_smaller_grid(student.embedding, teacher.embedding.detach())
        valid = labels_at(batch.labels, ours.shape[-2:]) != IGNORE
        mask = random_mask(batch.index, progress, ours.shape[-2:], params.mask_ratio)
        rebuilt = self.generator(self.align(ours) * mask).float()
        contrast = contrastive_loss(
            rebuilt, theirs, valid, params.temperature, self.groups, params.patch, params.pooling, params.negatives
        )
        return {
            "kd": params.kd_weight * kd,
            "reconstruction": params.reconstruction_weight
            * reconstruction_loss(rebuilt, theirs, valid, params.reduction),
            "contrast": params.contrast_weight * contrast,
        }
