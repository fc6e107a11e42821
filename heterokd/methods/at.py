"""AT: match where each stage is active, whatever its channels are.

Zagoruyko, Komodakis: "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks
via Attention Transfer", ICLR 2017, https://arxiv.org/abs/1612.03928

    F_i the map of stage i [B, C, H, W], s student, t teacher, both averaged to the smaller of their two grids
    Q_i = sum_c |F_i,c|^p                                     the attention map, a vector of N = H W positions   Eq. 1
    q_i = Q_i / ||Q_i||_2
    code form     L = weight * sum_{i in stages} mean_{b, n} (q_s^i - q_t^i)^2
    paper form    L = sum_{i in stages} beta_i / 2 * sum_b ||q_s^i - q_t^i||_2,  beta_i = weight / (N B)         Eq. 2

The paper says of beta that it is 10^3 divided by the number of positions and the batch size; so both forms share the
default weight of 1000, which is also that of CRD's and later CIFAR tables. The authors' code has the code form.
p = 2 is the paper's best.

Segmentation compares a single map, that before the classifier, in place of the stages, as CIRKD's code does (Yang et
al., "Cross-Image Relational Knowledge Distillation for Semantic Segmentation", CVPR 2022): code form, p = 2, weight
10000, which is `weight` times `segmentation_factor`. Positions whose label is IGNORE are excluded there.

No projector: attention maps have no channels. Deviations: grids of different size are averaged before the powers are
taken, as later tables do. A stage whose smaller grid is 1x1 has q = 1 on both sides and teaches nothing; `build`
refuses a pair where that holds for all chosen stages. Maps are divided by their largest entry before the power, which
cancels in q and keeps large activations finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from heterokd.domains import Choice, Float
from heterokd.errors import PairError
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods._projectors import to_smaller_grid
from heterokd.outputs import IGNORE, Batch, Losses, Outputs, OutputSpec, Signal, labels_at

SMALLEST = 1e-6
"""Smaller largest entries count as this: a map of zeros gets a gradient of zero, not of zero times infinity."""


def attention_map(map_BCHW: Tensor, power: float = 2.0) -> Tensor:
    """Compute q of Eq. 2: sum_c |F_c|^p as a unit vector over positions, float32 [B, H W]; zeros for a map of zeros."""
    magnitude = map_BCHW.float().abs()
    largest = magnitude.detach().amax(dim=(1, 2, 3), keepdim=True).clamp_min(SMALLEST)
    return F.normalize((magnitude / largest).pow(power).sum(dim=1).flatten(1), dim=1)


def at_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    power: float = 2.0,
    form: Literal["code", "paper"] = "code",
    labels_BHW: Tensor | None = None,
) -> Tensor:
    """Sum the distances between attention maps over stages, in either form, with weight 1.

    Args:
        student_maps: [B, C, H, W] each.
        teacher_maps: [B, c, h, w] each; take no gradient.
        power: p.
        form: mean squared differences, or halved norms divided by the number of positions.
        labels_BHW: class numbers of any height and width; positions with IGNORE are excluded. None: all count.

    Returns:
        A scalar, the mean over the batch; 0 where no position is valid.
    """
    losses = []
    for maps in zip(student_maps, teacher_maps, strict=True):
        student_map, teacher_map = to_smaller_grid(*maps)
        if labels_BHW is not None:
            losses.append(_valid_distance(student_map, teacher_map.detach(), power, form, labels_BHW))
            continue
        difference_BN = attention_map(student_map, power) - attention_map(teacher_map.detach(), power)
        if form == "code":
            losses.append(difference_BN.square().mean())
        else:
            losses.append(torch.linalg.vector_norm(difference_BN, dim=1).mean() / (2 * difference_BN.shape[1]))
    return torch.stack(losses).sum()


def _valid_distance(
    student_map: Tensor, teacher_map: Tensor, power: float, form: Literal["code", "paper"], labels: Tensor
) -> Tensor:
    """Compute the distance of two attention maps of the same grid over the positions with a label."""
    valid_BHW = labels_at(labels, student_map.shape[-2:]) != IGNORE
    student_map, teacher_map = (each * valid_BHW.unsqueeze(1) for each in (student_map, teacher_map))
    difference_BN = attention_map(student_map, power) - attention_map(teacher_map, power)
    if form == "code":
        mean: Tensor = difference_BN.square().sum() / valid_BHW.sum().clamp_min(1)
        return mean
    norms_B = torch.linalg.vector_norm(difference_BN, dim=1) / (2 * valid_BHW.flatten(1).sum(dim=1).clamp_min(1))
    return torch.mean(norms_B)


class AT(Method):
    """Match where each stage is active, whatever its channels are."""

    verification = Verification(
        program="megvii-research/mdistiller",
        commit="a08d46f",
        file="distillers/AT.py",
        value=8e-08,
        gradient=2e-07,
        defaults="program",
    )

    tasks = frozenset({"classification", "segmentation"})

    class Params(MethodParams):
        """Parameters of AT."""

        weight: Annotated[float, Float(10, 10000, log=True)] = Field(
            1000.0, ge=0, description="beta before it is divided by positions and batch size: multiplies the sum"
        )
        power: Annotated[float, Choice(1.0, 2.0, 4.0)] = Field(
            2.0, ge=1, description="p: exponent of activations; larger values look at the most active positions only"
        )
        stages: Annotated[str, Choice("1234", "234", "34")] = Field(
            "1234",
            pattern="^1?2?3?4?$",
            min_length=1,
            coerce_numbers_to_str=True,
            description="the stages that are compared, shallow to deep, one digit each; none in segmentation",
        )
        form: Literal["code", "paper"] = Field(
            "code", description="mean squared differences as in the authors' code, or norms as the paper prints"
        )
        segmentation_factor: float = Field(
            10.0, ge=0, description="multiplies the weight in segmentation, where the published weight is 10000"
        )

    student_needs = Signal.EMBEDDING | Signal.STAGES
    teacher_needs = Signal.EMBEDDING | Signal.STAGES
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Choose the signals: a single map in segmentation, the stages in classification; nothing is learned.

        Raises:
            PairError: all compared maps of either network have a single position.
        """
        self.compares_stages = student.logits_stride is None
        self.student_needs = self.teacher_needs = Signal.STAGES if self.compares_stages else Signal.EMBEDDING
        if not self.compares_stages:
            if min(-(-spec.image_size // (spec.logits_stride or 1)) for spec in (student, teacher)) == 1:
                raise PairError(
                    "at: a map of one position has no attention, and the map before the classifier has no more in one "
                    "of the two networks at this image size; choose larger images"
                )
            return
        if all(min(student.side(int(digit)), teacher.side(int(digit))) == 1 for digit in self.params.stages):
            raise PairError(
                f"at: a map of one position has no attention, and stages {self.params.stages} have no more in one of "
                "the two networks at this image size; choose shallower stages or larger images"
            )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the term `attention`."""
        params = self.params
        if not self.compares_stages:
            loss = at_loss([student.embedding], [teacher.embedding], params.power, params.form, batch.labels)
            return {"attention": params.segmentation_factor * params.weight * loss}
        chosen = [int(digit) - 1 for digit in params.stages]
        student_maps, teacher_maps = ([outputs.stages[i] for i in chosen] for outputs in (student, teacher))
        return {"attention": params.weight * at_loss(student_maps, teacher_maps, params.power, params.form)}
