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
- Eq. 10 sums over all classes, also those without a pixel in an image, which are most of K: every pixel then teaches
  that they are absent. `absent_classes: skip` compares the others alone, as the weights of a class are only argued from
  its pixels.
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
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heterokd.domains import Choice, Float
from heterokd.errors import PairError
from heterokd.method import Method, MethodFigure, MethodParams, Panel, Verification
from heterokd.methods._projectors import initialise, resize_map
from heterokd.methods._reliability import (
    Axis,
    Form,
    Reliability,
    evaluate,
    knowledge_evaluation,
    knowledge_mixing,
    mix,
    per_class_entropy,
    present_classes,
    projector_loss,
    transfer_loss,
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
        scale: Tensor | float = 1.0
        if params.absent_classes == "skip":
            present = present_classes(labels, student_z.shape[1])
            weights = weights * present
            if params.kem_axis == "space":  # the mean over images and classes is one over those that are present
                scale = present.numel() / present.sum().clamp_min(1)
    loss = transfer_loss(student_z, hybrid_z, weights, valid, params.temperature, params.form, params.kem_axis)
    return scale * loss


def maps_of_labels(maps_BKHW: Tensor, classes_B1HW: Tensor) -> Tensor:
    """Return the values [B, H, W] of each pixel's class."""
    return maps_BKHW.gather(1, classes_B1HW)[:, 0]


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
        absent_classes: Literal["count", "skip"] = Field(
            "count",
            description="classes without a pixel in an image: Eq. 10 sums over all classes; skip leaves them out there",
        )
        detach: bool = Field(True, description="keep targets and weights of Eq. 10 from taking gradient")
        tap: Literal["embedding", "stage4", "stage3", "stage2", "stage1"] = Field(
            "embedding", description="the map of both networks that is projected; embedding enters the classifier"
        )
        resolution: Literal["map", "label"] = Field(
            "map", description="grid of L_hakd: the student's map, or the labels' size as in the paper"
        )
        teacher_grid: Literal["native", "student"] = Field(
            "native",
            description="with resolution: label, the grid from which the teacher's scores are brought to the labels' "
            "size; student: they are resized to the student's map first (experiments before schema 5)",
        )

        @property
        def unread(self) -> frozenset[str]:
            """`teacher_grid` on the student's map, where the teacher's scores are resized once."""
            return frozenset({"teacher_grid"} if self.resolution == "map" else ())

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
    reads_labels = "all"
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
        """Draw S of each pixel's label, and W as the loss sums it, with the projectors of this training."""
        share, weight = (maps.double() for maps in self.reliability_maps(student, teacher, labels))
        labels = labels_at(labels, share.shape[-2:])
        ignored = labels == IGNORE
        known = labels.masked_fill(ignored, 0)[:, None]
        shares = maps_of_labels(share, known)
        if self.params.kem_axis == "space":
            # W of a class sums to 1 over an image's valid pixels: a pixel's sum over classes, relative to the average.
            counted = weight.new_ones(weight.shape[:2])[..., None, None]
            if self.params.absent_classes == "skip":
                counted = present_classes(labels, weight.shape[1]).double()
            valid = (~ignored).sum(dim=(1, 2), keepdim=True)
            weights = (weight * counted).sum(dim=1) * valid / counted.sum(dim=1).clamp_min(1)
            what = "how much more than the average pixel it counts, over all classes (W, 1 is the average)"
        else:
            weights = weight.shape[1] * maps_of_labels(weight, known)
            what = "how much its class counts there among the classes (W, 1 is the average)"
        shares, weights = (maps.masked_fill(ignored, float("nan")) for maps in (shares, weights))
        top = max(2.0, float(weights.nanquantile(0.99))) if weights.isfinite().any() else 2.0
        return MethodFigure(
            f"whose scores the mixture follows for each pixel's class (S), and {what}",
            (
                Panel("S: who is followed", shares, "PuOr", ((0, "student"), (0.5, "both"), (1, "teacher"))),
                Panel("W: what a pixel counts", weights, "cividis", ((0, "0"), (1, "1"), (top, f"{top:.1f}"))),
            ),
        )

    def _projected(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        """Return Z_s and Z_t [B, K, h, w], on the student's grid, or Z_t on its native one.

        The teacher's map gets no gradient.
        """
        student_map, teacher_map = (
            outputs.stages[self.stage - 1] if self.stage else outputs.embedding for outputs in (student, teacher)
        )
        student_z: Tensor = self.student_projector(student_map.float())
        teacher_z: Tensor = self.teacher_projector(teacher_map.detach().float())
        at_once = self.params.resolution == "label" and self.params.teacher_grid == "native"
        return student_z, teacher_z if at_once else resize_map(teacher_z, _grid(student_z))

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
