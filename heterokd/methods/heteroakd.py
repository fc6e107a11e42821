"""HeteroAKD: teacher and student meet as class scores, are mixed by who is right, and teach where the student is not.

Huang, Hu, Zhang, Chen, Gao: "Distilling Knowledge from Heterogeneous Architectures for Semantic Segmentation",
AAAI 2025, https://arxiv.org/abs/2504.07691

    F a map before the classifier, p logits, t teacher, s student, tau the temperature, c a class, (h, w) a pixel
    L_kd = mean over pixels of tau^2 KL( softmax(p_t / tau) || softmax(p_s / tau) )                              Eq. 1
    Z_t = G_t(F_t), Z_s = G_s(F_s)        projectors to K scores a pixel, dropped after training                 Eq. 4
    H, S, Zhat, dH, W                     reliability, mixing (KMM), evaluation (KEM): `_reliability.py`         Eq. 5-9
    L_hakd = - sum over h, w, c of W sigma(Zhat / tau) log sigma(Z_s / tau)                                     Eq. 10
    L = L_task + lambda1 L_kd + lambda2 L_hakd                                                                  Eq. 11

The paper names no program, and none was found, tried twice. Readings of the text, most of them a parameter:
- H asks of every class by itself (sigmoid), so that classes other than the label have a reliability too.
- W is normalised over an image's valid pixels for each class, which makes both cases of Eq. 9 one softmax. What W sums
  to 1 over is summed in Eq. 10, over the rest it is the mean: a pixel's share does not depend on the map's size.
- Eq. 10 as printed only rewards large scores; both sides of the Bernoulli cross-entropy are taken.
- S, Zhat and W are targets and weights: no gradient passes them. What trains the projectors, the teacher's above all,
  is the mean over valid pixels of the sum over classes of H, the term `projectors`, which reaches the student as well.
- The printed projector ends in ReLU, after which no class can be called absent; the default ends in batch norm.

Deviations: maps stay at the student's stride instead of the image's size, where every K-class map is what makes the
method expensive. Labels are brought there by nearest, the teacher's Z, narrow and so cheap to move, by bilinear
interpolation; the student's is never resized to the teacher's grid. `resolution: label` computes at the labels' size
and keeps no map of that size for the backward pass. Before `warmup` the student follows the labels alone: only
`projectors` differs from 0. Projectors and all terms are computed in float32, whatever autocast says.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heterokd.domains import Choice, Float
from heterokd.errors import PairError
from heterokd.method import Method, MethodFigure, MethodParams, Panel, Verification
from heterokd.methods._projectors import initialise, resize_map
from heterokd.methods._reliability import (
    Axis,
    Reliability,
    evaluate,
    knowledge_evaluation,
    knowledge_mixing,
    mix,
    per_class_entropy,
    valid_pixels,
)
from heterokd.methods.pixel_kd import Direction, pixel_kd_loss
from heterokd.outputs import IGNORE, Batch, Losses, Outputs, OutputSpec, Signal, labels_at

__all__ = [
    "HeteroAKD",
    "heteroakd_loss",
    "knowledge_evaluation",
    "knowledge_mixing",
    "logit_projector",
    "per_class_entropy",
    "pixel_kd_loss",
    "projector_loss",
    "transfer_loss",
]

Form = Literal["bernoulli", "softmax", "literal"]


def logit_projector(channels: int, num_classes: int, form: str = "conv-bn") -> nn.Sequential:
    """Eq. 4: G, a map [B, channels, H, W] to scores [B, num_classes, H, W]; `form` names its layers in order."""
    layers: list[nn.Module] = [nn.Conv2d(channels, num_classes, 1, bias=False), nn.BatchNorm2d(num_classes)]
    if form != "conv-bn":
        layers.append(nn.ReLU())
    if form == "conv-bn-relu-conv1x1":
        layers.append(nn.Conv2d(num_classes, num_classes, 1))
    projector = nn.Sequential(*layers)
    initialise(projector)
    return projector


# One argument for each symbol of the equation.
def transfer_loss(
    student_z_BKHW: Tensor,
    hybrid_z_BKHW: Tensor,
    weights_BKHW: Tensor,
    valid_B1HW: Tensor,
    temperature: float = 1.0,
    form: Form = "bernoulli",
    axis: Axis = "space",
) -> Tensor:
    """Eq. 10: the weighted cross-entropy of the student's scores with the mixed ones.

    Args:
        student_z_BKHW: Z_s.
        hybrid_z_BKHW: Zhat, the target.
        weights_BKHW: W, 0 where a pixel does not count.
        valid_B1HW: whether it counts.
        temperature: tau.
        form: `bernoulli` has both sides of the sigmoid's cross-entropy, `literal` only the printed side, `softmax` is
            the cross-entropy over classes.
        axis: what W sums to 1 over.

    Returns:
        A float32 scalar: the sum over `axis`, the mean over the rest (batch and classes, or valid pixels).
    """
    student, target = student_z_BKHW.float() / temperature, hybrid_z_BKHW.float() / temperature
    if form == "bernoulli":
        cost = F.binary_cross_entropy_with_logits(student, target.sigmoid(), reduction="none")
    elif form == "softmax":
        cost = -target.softmax(dim=1) * student.log_softmax(dim=1)
    else:
        cost = -target.sigmoid() * F.logsigmoid(student)
    B, K = student.shape[:2]
    count = B * K if axis == "space" else valid_B1HW.sum().clamp_min(1)
    return (weights_BKHW * cost).sum() / count


def heteroakd_loss(
    student_z_BKHW: Tensor, teacher_z_BKHW: Tensor, labels_BHW: Tensor, params: HeteroAKD.Params | None = None
) -> Tensor:
    """Compute L_hakd, Eq. 5-10 on projected scores of one grid, not yet multiplied by lambda2.

    Args:
        student_z_BKHW: Z_s.
        teacher_z_BKHW: Z_t.
        labels_BHW: class numbers of any height and width, resized to the grid by nearest neighbour; pixels with IGNORE
            are excluded.
        params: temperature, readings and `detach`; None: the defaults.

    Returns:
        A float32 scalar; 0 where no pixel is valid.
    """
    params = params or HeteroAKD.Params()
    with torch.no_grad() if params.detach else nullcontext():
        student_entropy = per_class_entropy(student_z_BKHW, labels_BHW, params.reliability)
        teacher_entropy = per_class_entropy(teacher_z_BKHW, labels_BHW, params.reliability)
    return _transferred(student_z_BKHW, teacher_z_BKHW, student_entropy, teacher_entropy, labels_BHW, params)


def _transferred(
    student_z: Tensor,
    teacher_z: Tensor,
    student_entropy: Tensor,
    teacher_entropy: Tensor,
    labels: Tensor,
    params: HeteroAKD.Params,
) -> Tensor:
    """Eq. 6-10 when H of both is known."""
    valid = valid_pixels(labels, student_z.shape[-2:])
    with torch.no_grad() if params.detach else nullcontext():
        _, hybrid_z = mix(student_z, teacher_z, student_entropy, teacher_entropy)
        hybrid_entropy = per_class_entropy(hybrid_z, labels, params.reliability)
        _, weights = evaluate(student_entropy, hybrid_entropy, valid, params.kem_axis)
    return transfer_loss(student_z, hybrid_z, weights, valid, params.temperature, params.form, params.kem_axis)


def projector_loss(entropy_BKHW: Tensor, labels_BHW: Tensor, reliability: Reliability = "bce_sigmoid") -> Tensor:
    """Compute a projector's loss: H summed over classes (`ce_pixel`: a single value), mean over valid pixels."""
    copies = entropy_BKHW.shape[1] if reliability == "ce_pixel" else 1
    return entropy_BKHW.sum() / (copies * valid_pixels(labels_BHW, entropy_BKHW.shape[-2:]).sum().clamp_min(1))


def _grid(of: Tensor) -> tuple[int, int]:
    return of.shape[-2], of.shape[-1]


class HeteroAKD(Method):
    """Mix teacher's and student's class maps by who is right, and teach where the student is wrong."""

    verification = Verification(
        open_readings="all readings of the file: no program was found", defaults="quoted from the paper"
    )

    tasks = frozenset({"segmentation"})
    has_figure = True

    class Params(MethodParams):
        """Parameters of HeteroAKD."""

        weight: Annotated[float, Float(1, 10, log=True)] = Field(
            1.0, ge=0, description="lambda2: multiplies the transfer of mixed knowledge, L_hakd; 1 or 10 in the paper"
        )
        kd_weight: Annotated[float, Float(0.03, 1, log=True)] = Field(0.1, ge=0, description="lambda1, weight of L_kd")
        temperature: Annotated[float, Float(0.7, 1.0)] = Field(
            1.0, gt=0, description="tau: divides the logits of L_kd and the projected scores of L_hakd"
        )
        warmup: Annotated[float, Float(0.0, 0.3)] = Field(
            0.25, ge=0, le=1, description="fraction of the training in which only labels teach, student and projectors"
        )
        projector_weight: float = Field(0.05, ge=0, description="of the term `projectors` in warm-up; not the paper's")
        projector_weight_after: float = Field(
            0.05, ge=0, description="multiplies the loss of the projectors after warm-up; not the paper's"
        )
        projector: Annotated[
            Literal["conv-bn", "conv-bn-relu-conv1x1", "conv-bn-relu"],
            Choice("conv-bn", "conv-bn-relu-conv1x1", "conv-bn-relu"),
        ] = Field("conv-bn", description="layers that turn a map into class scores; the paper prints conv-bn-relu")
        kem_axis: Annotated[Axis, Choice("space", "class")] = Field(
            "space",
            description="whether the weights of one class sum to 1 over pixels, or those of one pixel over classes",
        )
        reliability: Reliability = Field(
            "bce_sigmoid",
            description="how right a score is: every class by itself, the same from softmax, or per pixel",
        )
        form: Form = Field(
            "bernoulli", description="cross-entropy of Eq. 10: both sides of the sigmoid's, over classes, or as printed"
        )
        direction: Direction = Field(
            "teacher_student",
            description="sides of the divergence in L_kd; a report of the paper prints student_teacher",
        )
        detach: bool = Field(True, description="keep targets and weights of Eq. 10 from taking gradient")
        tap: Literal["embedding", "stage4", "stage3", "stage2", "stage1"] = Field(
            "embedding", description="the map of both networks that is projected; embedding enters the classifier"
        )
        resolution: Literal["map", "label"] = Field(
            "map", description="grid of L_hakd: the student's map, or the labels' size as in the paper"
        )

        @model_validator(mode="after")
        def _teacher_projector_learns(self) -> HeteroAKD.Params:
            if self.detach and not (self.projector_weight > 0 and self.projector_weight_after > 0):
                raise ValueError(
                    "projector_weight and projector_weight_after must be above 0 while detach is true: "
                    "nothing else trains the teacher's projector"
                )
            return self

    student_needs = Signal.LOGITS | Signal.EMBEDDING | Signal.STAGES
    teacher_needs = Signal.LOGITS | Signal.EMBEDDING | Signal.STAGES
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build a projector for each network; only the tapped map and the logits are read.

        Raises:
            PairError: a network has no such stage, or the two tell different numbers of classes apart.
        """
        if student.num_classes != teacher.num_classes:
            raise PairError(
                f"heteroakd: student and teacher must have the same classes, "
                f"they have {student.num_classes} and {teacher.num_classes}"
            )
        self.stage = 0 if self.params.tap == "embedding" else int(self.params.tap.removeprefix("stage"))
        self.student_needs = self.teacher_needs = Signal.LOGITS | (Signal.STAGES if self.stage else Signal.EMBEDDING)
        channels = []
        for owner, spec in (("student", student), ("teacher", teacher)):
            if self.stage > len(spec.stages):
                raise PairError(f"heteroakd: tap {self.params.tap}: the {owner} has {len(spec.stages)} stages")
            channels.append(spec.at(self.stage).channels if self.stage else spec.embedding_dim)
        self.student_projector, self.teacher_projector = (
            logit_projector(width, student.num_classes, self.params.projector) for width in channels
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `kd`, `hakd` and `projectors`; the first two are 0 during warm-up."""
        params = self.params
        warm = progress < params.warmup
        with torch.autocast(batch.labels.device.type, enabled=False):
            student_z, teacher_z = self._projected(student, teacher)
            if params.resolution == "label":  # maps of the labels' size are computed again in the backward pass
                arguments = student_z, teacher_z, batch.labels, warm
                projectors, transferred = checkpoint(
                    self._compared, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                labels = labels_at(batch.labels, student_z.shape[-2:])
                projectors, transferred = self._compared(student_z, teacher_z, labels, warm)
            if warm:
                kd = projectors.new_zeros(())
            else:
                kd = pixel_kd_loss(student.logits, teacher.logits, batch.labels, params.temperature, params.direction)
        return {
            "kd": params.kd_weight * kd,
            "hakd": params.weight * transferred,
            "projectors": (params.projector_weight if warm else params.projector_weight_after) * projectors,
        }

    @torch.no_grad()
    def reliability_maps(self, student: Outputs, teacher: Outputs, labels_BHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return S, the teacher's share, and W, the weights; the projectors' running statistics are used.

        Args:
            student: outputs with the tapped map.
            teacher: the same of the teacher.
            labels_BHW: class numbers at the images' size.

        Returns:
            Two float32 tensors [B, K, h, w], on the student's grid or, with `resolution: label`, the labels'.
        """
        was_training = self.training
        self.eval()
        try:
            with torch.autocast(labels_BHW.device.type, enabled=False):
                projected = self._projected(student, teacher)
        finally:
            self.train(was_training)
        size = _grid(labels_BHW if self.params.resolution == "label" else projected[0])
        student_z, teacher_z = (resize_map(z, size) for z in projected)
        labels = labels_at(labels_BHW, size)
        share, hybrid_z = knowledge_mixing(student_z, teacher_z, labels, self.params.reliability)
        _, weights = knowledge_evaluation(student_z, hybrid_z, labels, self.params.reliability, self.params.kem_axis)
        return share, weights

    def figure(self, student: Outputs, teacher: Outputs, labels: Tensor) -> MethodFigure | None:
        """Draw S and W of each pixel's label, with the projectors of this training."""
        share, weight = (maps.double() for maps in self.reliability_maps(student, teacher, labels))
        labels = labels_at(labels, share.shape[-2:])
        ignored = labels == IGNORE
        # W sums to 1 over an image's valid pixels, or over the classes: shown in multiples of the average.
        valid = (~ignored).sum(dim=(1, 2), keepdim=True)
        weight = weight * (valid[:, None] if self.params.kem_axis == "space" else weight.shape[1])
        known = labels.masked_fill(ignored, 0)[:, None]
        shares, weights = (maps.gather(1, known)[:, 0].masked_fill(ignored, float("nan")) for maps in (share, weight))
        top = max(2.0, float(weights.nanquantile(0.99))) if weights.isfinite().any() else 2.0
        return MethodFigure(
            "each pixel for its label's class: whose scores the mixture follows (S), and how much more than the "
            "average pixel it counts (W, 1 is the average)",
            (
                Panel("S: who is followed", shares, "PuOr", ((0, "student"), (0.5, "both"), (1, "teacher"))),
                Panel("W: what a pixel counts", weights, "cividis", ((0, "0"), (1, "1"), (top, f"{top:.1f}"))),
            ),
        )

    def _projected(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        """Return Z_s and Z_t [B, K, h, w] on the student's grid; the teacher's map gets no gradient."""
        student_map, teacher_map = (
            outputs.stages[self.stage - 1] if self.stage else outputs.embedding for outputs in (student, teacher)
        )
        student_z: Tensor = self.student_projector(student_map.float())
        teacher_z: Tensor = self.teacher_projector(teacher_map.detach().float())
        return student_z, resize_map(teacher_z, _grid(student_z))

    def _compared(self, student_z: Tensor, teacher_z: Tensor, labels: Tensor, warm: bool) -> tuple[Tensor, Tensor]:
        """Compute the projectors' loss and L_hakd (0 during warm-up) on the grid of `labels`; H is computed once."""
        size, reliability = _grid(labels), self.params.reliability
        student_z, teacher_z = resize_map(student_z, size), resize_map(teacher_z, size)
        student_entropy = per_class_entropy(student_z, labels, reliability)
        teacher_entropy = per_class_entropy(teacher_z, labels, reliability)
        projectors = projector_loss(student_entropy, labels, reliability) + projector_loss(
            teacher_entropy, labels, reliability
        )
        if warm:
            return projectors, projectors.new_zeros(())
        return projectors, _transferred(student_z, teacher_z, student_entropy, teacher_entropy, labels, self.params)
