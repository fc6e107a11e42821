"""CAT-KD: match where in the image each class is seen.

Guo, Yan, Li, Lin: "Class Attention Transfer Based Knowledge Distillation", CVPR 2023, https://arxiv.org/abs/2304.12777

    C the class maps [B, K, H, W]: the classifier at every position, before the average over positions
    A = C averaged to r x r positions,  a_k = A_k / ||A_k||_2                      one vector of r r numbers per class
    L = weight * mean_{b, k, r r} (a_s - a_t)^2

Defaults: weight 400, r 2. The authors' CIFAR configurations normalise with weights up to 600 (r 4 for ResNet32x4 to
ShuffleNetV1), or compare A itself with smaller weights (15 for ResNet32x4 to ResNet8x4, r 2); their ImageNet
configurations compare A itself with weight 0.5, r 4.

Both networks must give class maps: global average pooling, then one linear layer. Deviations: r is never more than
either map has positions per side. Where that leaves one position a normalised map is only a sign, which no gradient
moves, so `build` refuses such a pair with `normalise: true`; with `normalise: false` the logits are compared.
Class maps shorter than `SHORTEST` are divided by it instead of by their length: a classifier that starts at zero, as
timm's MLP-Mixer does, would otherwise get gradients of 1e12 in its first step.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from heterokd.domains import Choice, Float
from heterokd.errors import PairError
from heterokd.method import Method, MethodParams, Verification
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal

SHORTEST = 1e-2
"""Shorter maps are not stretched to length 1: gradients grow with the stretch, without end for a map of zeros."""


def cat_kd_loss(
    student_class_maps: Tensor, teacher_class_maps: Tensor, resolution: int = 2, normalise: bool = True
) -> Tensor:
    """Compute the mean squared difference of both networks' coarse class maps.

    Args:
        student_class_maps: [B, K, H, W].
        teacher_class_maps: [B, K, h, w]; takes no gradient.
        resolution: r, positions per side.
        normalise: whether maps are normalised to length 1 per class.

    Returns:
        A scalar.
    """
    side = min(resolution, *student_class_maps.shape[2:], *teacher_class_maps.shape[2:])
    student, teacher = (
        F.adaptive_avg_pool2d(maps.float(), side).flatten(2)
        for maps in (student_class_maps, teacher_class_maps.detach())
    )
    if normalise:
        student, teacher = (F.normalize(maps, dim=2, eps=SHORTEST) for maps in (student, teacher))
    return F.mse_loss(student, teacher)


class CATKD(Method):
    """Match where in the image each class is seen."""

    verification = Verification(
        program="GzyAftermath/CAT-KD",
        commit="4467073",
        file="distillers/CAT_KD.py",
        value=8e-08,
        gradient=1e-08,
        defaults="program, CIFAR-100",
    )

    class Params(MethodParams):
        """Parameters of CAT-KD."""

        weight: Annotated[float, Float(0.5, 1000, log=True)] = Field(
            400.0, ge=0, description="multiplies the term; maps that are not normalised want smaller values"
        )
        resolution: Annotated[int, Choice(2, 4)] = Field(
            2, ge=1, description="r: class maps are averaged to this many positions per side, never more than they have"
        )
        normalise: Annotated[bool, Choice(True, False)] = Field(
            True, description="compare maps of length 1, so that only where a class is seen counts, not how strongly"
        )

    student_needs = Signal.CLASS_MAPS
    teacher_needs = Signal.CLASS_MAPS
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Check the pair; there is nothing to learn.

        Raises:
            PairError: either network has no class maps, or normalised maps would have one position.
        """
        for owner, spec in (("student", student), ("teacher", teacher)):
            if Signal.CLASS_MAPS not in spec.serves:
                raise PairError(
                    f"cat_kd compares where each class is seen, which needs global average pooling before one linear "
                    f"layer; this {spec.kind} {owner} ends otherwise"
                )
            side = min(self.params.resolution, spec.side(len(spec.stages)))
            if self.params.normalise and side == 1:
                raise PairError(
                    f"cat_kd compares where each class is seen, and one position says nothing of it (the {owner} at "
                    f"{spec.image_size} pixels); use larger images, or normalise: false"
                )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the term `class_maps`."""
        maps = student.class_maps, teacher.class_maps
        return {"class_maps": self.params.weight * cat_kd_loss(*maps, self.params.resolution, self.params.normalise)}
