"""FitNet: match the teacher's stage maps through a 1x1 convolution on the student's.

Romero, Ballas, Ebrahimi Kahou, Chassang, Gatta, Bengio: "FitNets: Hints for Thin Deep Nets", ICLR 2015,
https://arxiv.org/abs/1412.6550

    F_i the map of stage i [B, C, H, W], s student, t teacher; r_i a 1x1 convolution from C_s to C_t channels
    g_i(.) = average pooling to the smaller of both grids of stage i                              nothing when equal
    L = weight * sum_{i in stages} mean( (r_i(g_i(F_s^i)) - g_i(F_t^i))^2 )          the mean over all four axes

Defaults are those of the heterogeneous tables (OFA's configurations: all four stages, weight 1); the CIFAR tables of
CRD use the second stage alone with weight 100.

Segmentation compares a single map, that before the classifier, in place of the stages, as CIRKD's code does (Yang et
al., "Cross-Image Relational Knowledge Distillation for Semantic Segmentation", CVPR 2022): weight 10, which is `weight`
times `segmentation_factor`. Positions whose label is IGNORE are excluded there.

Deviations: the hint is a term of the only training, as in every table since, where the paper trains up to the hint
first. The paper's regressor is a convolution that shrinks the grid and has a non-linearity; here it is linear, as in
OFA's code. That code compares convolutional networks only; for the other pairs its authors posted a variant that
cuts all maps into patches until both have one token grid (issue 10 of their repository). Here the finer grid is
averaged to the coarser grid instead, which needs no projector as wide as a patch, fits grids whose ratio is not whole,
and is the plain method where grids are equal. Class tokens are not used: stages are maps.
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
from heterokd.methods._projectors import initialise, to_smaller_grid
from heterokd.outputs import IGNORE, Batch, Losses, Outputs, OutputSpec, Signal, labels_at

MAP = "map"
"""The regressor's key in segmentation, where the map before the classifier is compared."""


def fitnet_loss(
    student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], labels_BHW: Tensor | None = None
) -> Tensor:
    """Sum the mean squared differences over stages, each on the smaller of both grids.

    Args:
        student_maps: [B, C, H, W] each, already as many channels as the teacher's.
        teacher_maps: [B, C, h, w] each; take no gradient.
        labels_BHW: class numbers of any height and width; positions with IGNORE are excluded. None: all count.

    Returns:
        A scalar; 0 where no position is valid.
    """
    losses = []
    for student_map, teacher_map in zip(student_maps, teacher_maps, strict=True):
        pooled, target = to_smaller_grid(student_map, teacher_map.detach())
        if labels_BHW is None:
            losses.append(F.mse_loss(pooled.float(), target.float()))
        else:
            valid_BHW = labels_at(labels_BHW, pooled.shape[-2:]) != IGNORE
            squares_BHW = (pooled.float() - target.float()).square().mean(dim=1)
            losses.append((squares_BHW * valid_BHW).sum() / valid_BHW.sum().clamp_min(1))
    return torch.stack(losses).sum()


class FitNet(Method):
    """Match the teacher's stage maps through a 1x1 convolution on the student's."""

    verification = Verification(
        open_readings="maps of token networks: no program compares them", defaults="OFA's configurations"
    )

    tasks = frozenset({"classification", "segmentation"})

    class Params(MethodParams):
        """Parameters of FitNet."""

        weight: Annotated[float, Float(0.01, 100, log=True)] = Field(
            1.0, ge=0, description="multiplies the sum over the stages"
        )
        stages: Annotated[str, Choice("1234", "234", "34", "4", "3", "2")] = Field(
            "1234",
            pattern="^1?2?3?4?$",
            min_length=1,
            coerce_numbers_to_str=True,
            description="the stages that are compared, shallow to deep, one digit each; none in segmentation",
        )
        segmentation_factor: float = Field(
            10.0, ge=0, description="multiplies the weight in segmentation, where the published weight is 10"
        )

    student_needs = Signal.EMBEDDING | Signal.STAGES
    teacher_needs = Signal.EMBEDDING | Signal.STAGES
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build a 1x1 convolution per chosen stage; in segmentation only for the map before the classifier."""
        if student.logits_stride is None:
            self.student_needs = self.teacher_needs = Signal.STAGES
            channels = {
                digit: (student.stages[int(digit) - 1].channels, teacher.stages[int(digit) - 1].channels)
                for digit in self.params.stages
            }
        else:
            self.student_needs = self.teacher_needs = Signal.EMBEDDING
            channels = {MAP: (student.embedding_dim, teacher.embedding_dim)}
        self.regressors = nn.ModuleDict({key: nn.Conv2d(*widths, 1) for key, widths in channels.items()})
        initialise(self.regressors)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the term `hint`."""
        student_maps, teacher_maps = [], []
        if MAP in self.regressors:
            pooled, target = to_smaller_grid(student.embedding, teacher.embedding)
            loss = fitnet_loss([self.regressors[MAP](pooled)], [target], batch.labels)
            return {"hint": self.params.segmentation_factor * self.params.weight * loss}
        for digit, regressor in self.regressors.items():
            # A linear map of single positions commutes with averaging them: pooling first reduces the computation.
            pooled, target = to_smaller_grid(student.stages[int(digit) - 1], teacher.stages[int(digit) - 1])
            student_maps.append(regressor(pooled))
            teacher_maps.append(target)
        return {"hint": self.params.weight * fitnet_loss(student_maps, teacher_maps)}
