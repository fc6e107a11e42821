"""ReviewKD: the student's deep stages review its shallow ones, and each fused map is matched to the teacher's.

Chen, Liu, Zhao, Jia: "Distilling Knowledge via Knowledge Review", CVPR 2021, https://arxiv.org/abs/2104.09044

    F_1..F_4 the maps of the stages, F_5 the embedding as a map of one position; s student, t teacher
    ABF, from deep to shallow, with R_5 = conv1x1(F_s^5) and every convolution followed by batch norm:
        x_i = conv1x1(F_s^i),  y_i = R_{i+1} enlarged to the grid of x_i             (nearest neighbour)
        a, b = sigmoid( conv1x1([x_i ; y_i]) )                                      a weight per position each
        R_i = (a x_i + b y_i) on the teacher's grid,  G_i = conv3x3(R_i)             as many channels as F_t^i
    HCL(G, F) = ( MSE(G, F) + sum_{l in 4, 2, 1; l < H} w_l MSE(pool_l(G), pool_l(F)) ) / (1 + sum_l w_l)
        w_l = 1/2, 1/4, 1/8 in the order of those l that are smaller than the grid
    L = weight * min(1, progress / warmup) * sum_{i = 1..5} HCL(G_i, F_t^i)

Defaults are those of the CIFAR tables (weight 1, warm-up 20 of 240 epochs, at most 512 channels in the fusion);
ResNet50 to MobileNet on ImageNet uses weight 8 and 1 epoch of 100.

Deviations: maps are the stages as they are, where the authors read the teacher's before the last ReLU, which attention
and MLP networks do not have. Grids of any two sizes are joined by nearest neighbours; where the teacher's grid is finer
than the student's, the student's is repeated. Token grids of equal size are fused without enlarging.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from heterokd.domains import Choice, Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal

LEVELS = (4, 2, 1)
"""Sides that HCL pools to."""


def hierarchical_context_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """HCL of one stage: mean squared differences at full size and pooled to 4, 2 and 1; maps [B, C, H, W], a scalar."""
    fused, target = student_map.float(), teacher_map.float()
    loss, share, shares = F.mse_loss(fused, target), 1.0, 1.0
    for side in (level for level in LEVELS if level < fused.shape[2]):
        share /= 2
        pooled = F.adaptive_avg_pool2d(fused, side), F.adaptive_avg_pool2d(target, side)
        loss, shares = loss + share * F.mse_loss(*pooled), shares + share
    return loss / shares


def review_kd_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Sum HCL over the fused maps of the student and the teacher's maps, [B, C, H, W] pair by pair; a scalar."""
    pairs = zip(student_maps, teacher_maps, strict=True)
    return torch.stack([hierarchical_context_loss(fused, target.detach()) for fused, target in pairs]).sum()


def _conv_norm(channels: int, width: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.BatchNorm2d(width))


def _enlarge(map_BCHW: Tensor, size: torch.Size) -> Tensor:
    return map_BCHW if map_BCHW.shape[-2:] == size else F.interpolate(map_BCHW, size, mode="nearest")


class AttentionFusion(nn.Module):
    """ABF: one level's map and what came from the deeper level, weighed position by position.

    Args:
        channels: of the student's map.
        width: of the fused map R.
        target_channels: of the teacher's map.
        fuses: False for the deepest level, which has nothing to fuse with.
    """

    def __init__(self, channels: int, width: int, target_channels: int, fuses: bool) -> None:
        super().__init__()
        self.enter = _conv_norm(channels, width, 1)
        self.attend = nn.Conv2d(2 * width, 2, 1) if fuses else None
        self.leave = _conv_norm(width, target_channels, 3)

    def forward(self, student_map: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """R, [B, width, *size], for the next level, and G, [B, target_channels, *size], for the teacher's map."""
        fused = self.enter(student_map)
        if self.attend is not None and deeper is not None:
            deeper = _enlarge(deeper, fused.shape[-2:])
            share_B2HW = self.attend(torch.cat((fused, deeper), dim=1)).sigmoid()
            fused = share_B2HW[:, :1] * fused + share_B2HW[:, 1:] * deeper
        fused = _enlarge(fused, size)
        return fused, self.leave(fused)


class ReviewKD(Method):
    """Fuse the student's stages from deep to shallow and match each fused map to the teacher's."""

    verification = Verification(
        program="megvii-research/mdistiller",
        commit="a08d46f",
        file="distillers/ReviewKD.py",
        value=6e-08,
        gradient=7e-08,
        open_readings="maps of token networks: the program has none",
        defaults="program, CIFAR-100",
    )

    class Params(MethodParams):
        """Parameters of ReviewKD."""

        weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="multiplies the sum over the levels"
        )
        warmup: Annotated[float, Float(0, 0.3)] = Field(
            20 / 240, ge=0, le=1, description="fraction of the training over which the term grows from zero"
        )
        width: Annotated[int, Choice(64, 128, 256, 512)] = Field(
            512, ge=1, description="most channels of the fused maps; never more than the student's embedding has"
        )

    student_needs = Signal.STAGES | Signal.EMBEDDING
    teacher_needs = Signal.STAGES | Signal.EMBEDDING
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build a fusion per stage and for the embedding, shallow to deep."""
        channels, target_channels = (
            [*(stage.channels for stage in spec.stages), spec.embedding_dim] for spec in (student, teacher)
        )
        width = min(self.params.width, student.embedding_dim)
        deepest = len(channels) - 1
        self.fusions = nn.ModuleList(
            AttentionFusion(*pair, fuses=level < deepest)
            for level, pair in enumerate(
                (incoming, width, target) for incoming, target in zip(channels, target_channels, strict=True)
            )
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the term `review`."""
        student_maps, teacher_maps = (
            [*outputs.stages, outputs.embedding[:, :, None, None]] for outputs in (student, teacher)
        )
        deeper: Tensor | None = None
        fused_maps: list[Tensor] = []
        for level in reversed(range(len(student_maps))):
            deeper, fused = self.fusions[level](student_maps[level], deeper, teacher_maps[level].shape[-2:])
            fused_maps.insert(0, fused)
        warm = min(1.0, progress / self.params.warmup) if self.params.warmup > 0 else 1.0
        return {"review": warm * self.params.weight * review_kd_loss(fused_maps, teacher_maps)}
