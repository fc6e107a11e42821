"""SDD: match class probabilities region by region, and more where a region and the whole image disagree.

Wei, Luo, Luo: "Scaled Decoupled Distillation" (on arXiv: "Scale Decoupled Distillation"), CVPR 2024,
https://arxiv.org/abs/2403.13512

    C the class maps [B, K, H, W]: the classifier at every position, whose mean over positions is the logits
    z_r = the mean of C over region r, for the 1 + 4 + 16 regions of the scales 1x1, 2x2 and 4x4; n of them in all
    D(z_s,r, z_t,r) = KD's or DKD's loss of one region of one image, tau^2 included
    region r of an image is complementary when the teacher is right on r and wrong on the whole image, or the other
    way round; else it is consistent (the whole image always is)
    L = weight / n * sum_r mean_b w D(z_s,r, z_t,r),  w = 1 where consistent, beta where complementary

Defaults: scales 1, 2, 4 (the authors use 1, 2 for ResNet34 to ResNet18), beta 2, and tau 4, alpha 1, beta 8 of DKD's
CIFAR tables, whose code the authors' extends; its DKD warms up over 20 of 240 epochs, its KD does not.

Both networks must give class maps: global average pooling, then one linear layer. Deviations: a scale that is finer
than one of the two maps is left out, so at 32 pixels, where the last map of most networks has one position, the method
is KD (or DKD). The authors' code overwrites values that are not finite with 0; here training ends with a sentence.
Mixed labels count as their largest share.
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
from heterokd.methods.dkd import others, target_or_not
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal, hard_labels


def region_logits(class_maps: Tensor, scales: Sequence[int]) -> Tensor:
    """Class maps [B, K, H, W] averaged over the regions of each scale, float32 [n, B, K]."""
    regions = [F.adaptive_avg_pool2d(class_maps.float(), scale).flatten(2) for scale in scales]
    return torch.cat(regions, dim=2).permute(2, 0, 1)


def complementary_regions(teacher_nBK: Tensor, labels: Tensor) -> Tensor:
    """Return where the teacher is right on a region but wrong on the image (the first region) or vice versa, [n, B]."""
    right_nB = teacher_nBK.argmax(dim=2) == hard_labels(labels)
    return right_nB != right_nB[:1]


def _divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute KL(teacher || student) of every row of [rows, K] logits, [rows]."""
    student_log, teacher_log = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(dim=1)


def sdd_terms(student_class_maps: Tensor, teacher_class_maps: Tensor, labels: Tensor, params: SDD.Params) -> Losses:
    """Compute the weighted terms `consistent` and `complementary`, without warm-up, from class maps [B, K, H, W]."""
    smallest = min(*student_class_maps.shape[2:], *teacher_class_maps.shape[2:])
    scales = [int(digit) for digit in params.scales if int(digit) <= smallest]
    student_nBK = region_logits(student_class_maps, scales)
    teacher_nBK = region_logits(teacher_class_maps.detach(), scales)
    student, teacher = student_nBK.flatten(0, 1), teacher_nBK.flatten(0, 1)
    if params.kind == "kd":
        losses = _divergence(student, teacher, params.temperature)
    else:
        repeated = hard_labels(labels).repeat(len(student_nBK))
        binary = [target_or_not(logits, repeated, params.temperature) for logits in (student, teacher)]
        rest = [others(logits, repeated) for logits in (student, teacher)]
        # The binary rows are logarithms of probabilities already: their softmax changes nothing.
        losses = params.target_weight * _divergence(binary[0], binary[1])
        losses = losses + params.non_target_weight * _divergence(rest[0], rest[1], params.temperature)
    losses = losses * (params.weight * params.temperature**2)
    complementary = complementary_regions(teacher_nBK, labels).flatten()
    return {
        "consistent": (losses * ~complementary).mean(),
        "complementary": params.complementary_weight * (losses * complementary).mean(),
    }


def sdd_loss(
    student_class_maps: Tensor, teacher_class_maps: Tensor, labels: Tensor, params: SDD.Params | None = None
) -> Tensor:
    """Compute the sum of `sdd_terms`: a scalar.

    Args:
        student_class_maps: [B, K, H, W].
        teacher_class_maps: [B, K, h, w]; takes no gradient.
        labels: [B] or [B, K].
        params: weights, temperature, scales and kind; None: the defaults.
    """
    terms = sdd_terms(student_class_maps, teacher_class_maps, labels, params or SDD.Params())
    return torch.stack(list(terms.values())).sum()


class SDD(Method):
    """Match class probabilities region by region, and more where a region and the whole image disagree."""

    verification = Verification(
        program="shicaiwei123/SDD-CVPR2024",
        commit="e412036",
        file="distillers/SDD_DKD.py",
        value=1e-07,
        gradient=9e-09,
        defaults="program",
    )

    class Params(MethodParams):
        """Parameters of SDD."""

        kind: Annotated[Literal["kd", "dkd"], Choice("kd", "dkd")] = Field(
            "kd", description="the loss of one region: KD's or DKD's"
        )
        scales: Annotated[str, Choice("12", "124")] = Field(
            "124",
            pattern="^12?4?$",
            coerce_numbers_to_str=True,
            description="regions per side of the image, one digit each, the whole image first; scales finer than the "
            "class maps are left out",
        )
        temperature: Annotated[float, Float(1, 8, log=True)] = Field(
            4.0, gt=0, description="tau: divides both networks' logits; the loss is multiplied by its square"
        )
        weight: Annotated[float, Float(0.1, 10, log=True)] = Field(1.0, ge=0, description="multiplies both terms")
        complementary_weight: float = Field(
            2.0,
            ge=0,
            description="beta: multiplies regions on which the teacher is right and wrong on the whole image"
            " or vice versa",
        )
        target_weight: float = Field(
            1.0, ge=0, description="DKD's alpha: the target class against all others; read with kind dkd"
        )
        non_target_weight: float = Field(
            8.0, ge=0, description="DKD's beta: the other classes among themselves; read with kind dkd"
        )
        warmup: float = Field(
            20 / 240,
            ge=0,
            le=1,
            description="share of the training over which the terms grow from zero; read with kind dkd",
        )

    student_needs = Signal.CLASS_MAPS
    teacher_needs = Signal.CLASS_MAPS
    reads_labels = "all"
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Check the pair; there is nothing to learn.

        Raises:
            PairError: either network has no class maps.
        """
        for owner, spec in (("student", student), ("teacher", teacher)):
            if Signal.CLASS_MAPS not in spec.serves:
                raise PairError(
                    f"sdd asks the classifier about regions of the image, which needs global average pooling before "
                    f"one linear layer; this {spec.kind} {owner} ends otherwise"
                )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `consistent` and `complementary`."""
        params = self.params
        warm = min(1.0, progress / params.warmup) if params.kind == "dkd" and params.warmup > 0 else 1.0
        terms = sdd_terms(student.class_maps, teacher.class_maps, batch.labels, params)
        return {name: warm * term for name, term in terms.items()}
