"""HCD: the student's stages and the teacher's embedding give sub-logits together, which then teach the student.

Xu, Zheng, Wang, Xu, Cheng: "Heterogeneous Complementary Distillation", AAAI 2026, https://arxiv.org/abs/2511.10942

    F_t the teacher's embedding [B, d_t], F_s^i the student's map of stage i, z logits, tau the temperature
    fhat^i = Pool(convolutions(F_s^i))                                          a vector of d_s numbers         Eq. 2
    Z^i = FC2( ReLU( FC1([fhat^i ; F_t]) ) ) = [Z_1^i ... Z_n^i]                the CFM: n sub-logit vectors   Eq. 3-5
    Q_j^i = a Z_j^i + b z_t                                                     fused sub-logits                Eq. 6-7
    L_SKL = sum_i 1/n sum_j tau^2 KL( softmax(Q_j^i/tau) || softmax(z_s/tau) )                                  Eq. 8
    L_SCE = sum_i 1/n sum_j CE(Q_j^i, y)                                                                        Eq. 9
    u_j = normalised( Q_j * (1 - onehot(y)) + eps ),  G = U U^T                                                Eq. 10-13
    L_OL = sum_i mean_{b, j != k} ReLU(G_jk - theta)^2                                                          Eq. 14
    L = L_SCE + alpha L_KL + beta L_SKL + gamma L_OL,  L_KL = tau^2 KL(z_t || z_s) at temperature tau           Eq. 15

Defaults are the CIFAR-100 ResNet-18 row (1, 10, 8) at tau 4; MobileNetV2 uses (1, 1, 2). Which printed number belongs
to which of the last two terms is a reading: the text prints 1, 10, 8, a table 1, 8, 10.

Deviations and readings: the label's entry is masked with 0 as Eq. 10 says; a mask of -1e6, known from a port, makes all
cosines 1 and the gradient of L_OL vanish. Convolutions are separable blocks, 4 - i at stage i and one 1x1 at stage 4;
attention and MLP students get the same blocks on their maps. d_s = max of both embeddings. Mixed labels are masked at
their argmax; L_SCE takes them as they are.

The authors' program (https://github.com/yema-web/HCD) could not be had, tried twice. A third party's port that follows
it supports these readings: L_SKL moves the sub-logits, too (`detach_sublogits`), and stages are added
(`stage_reduction`). It has label smoothing 0.1 in L_SCE, as in the student's cross-entropy; the paper mentions none, so
`sub_ce_smoothing` is 0. Its weights (6 for L_SKL, 1 for L_OL, tau 1) are not those that the paper prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from heterokd.domains import Choice, Float, Scalar
from heterokd.method import Method, MethodParams, StageSimilarity, Verification, label_scale, labelled_rows, similar
from heterokd.methods._projectors import ConvProjector, initialise
from heterokd.methods.kd import kd_loss
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal, hard_labels

MASK_EPS = 1e-8
"""eps of Eq. 10: keeps a masked row of zeros from having no direction."""


def sub_logits(shared_logits: Tensor, num_sublogits: int) -> Tensor:
    """Eq. 5: shared logits [B, n K] cut into n vectors of K columns, [B, n, K]."""
    return shared_logits.reshape(len(shared_logits), num_sublogits, -1)


def fuse(sub_logits_BnK: Tensor, teacher_logits: Tensor, sub_scale: float = 1.0, teacher_scale: float = 1.0) -> Tensor:
    """Eq. 6: every sub-logit vector plus the teacher's logits [B, K], each scaled; float32 [B, n, K]."""
    return sub_scale * sub_logits_BnK.float() + teacher_scale * teacher_logits.float().unsqueeze(1)


def sub_kl_loss(student_logits: Tensor, fused_BnK: Tensor, temperature: float = 4.0) -> Tensor:
    """Eq. 8 of one stage: tau^2 KL(fused || student), the mean over sub-logits and batch; a scalar.

    Not `kd_loss`: the fused sub-logits take gradient too, unless the caller detaches them.
    """
    student_log = F.log_softmax(student_logits.float() / temperature, dim=1).unsqueeze(1)
    fused_log = F.log_softmax(fused_BnK.float() / temperature, dim=2)
    return (fused_log.exp() * (fused_log - student_log)).sum(dim=2).mean() * temperature**2


def sub_ce_loss(fused_BnK: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Eq. 9 of one stage: cross-entropy of every fused sub-logit vector, labels [B] or [B, K]; a scalar."""
    repeated = labels.repeat_interleave(fused_BnK.shape[1], dim=0)
    return F.cross_entropy(fused_BnK.float().flatten(0, 1), repeated, label_smoothing=smoothing)


def sub_logit_cosines(fused_BnK: Tensor, labels: Tensor) -> Tensor:
    """Eq. 10-12: G [B, n, n], the cosines between sub-logit vectors whose entry at the label is masked to zero."""
    is_label = F.one_hot(hard_labels(labels), fused_BnK.shape[2]).to(torch.float32).unsqueeze(1)
    unit = F.normalize(fused_BnK.float() * (1 - is_label) + MASK_EPS, dim=2)
    with torch.autocast(unit.device.type, enabled=False):  # products of unit vectors need more than bf16's 3 digits
        return unit @ unit.transpose(1, 2)


def orthogonality_loss(fused_BnK: Tensor, labels: Tensor, threshold: float = 0.5) -> Tensor:
    """Eq. 14 of one stage: the mean of ReLU(cosine - theta)^2 over the batch and the n (n-1) pairs; 0 when n = 1."""
    cosines = sub_logit_cosines(fused_BnK, labels)
    B, n, _ = cosines.shape
    others = ~torch.eye(n, dtype=torch.bool, device=cosines.device)
    return ((cosines - threshold).relu().square() * others).sum() / (B * max(1, n * (n - 1)))


def hcd_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    stage_sub_logits: Sequence[Tensor],
    labels: Tensor,
    params: HCD.Params,
) -> Losses:
    """Compute the four weighted terms of Eq. 15, from the sub-logits [B, n, K] of every stage."""
    fused, stages = _fused(teacher_logits, stage_sub_logits, params), len(stage_sub_logits)
    transfer = _transfer_terms(student_logits, teacher_logits, fused, params)
    return transfer | _label_terms(fused, torch.cat([labels] * stages), stages, params)


def _fused(teacher_logits: Tensor, stage_sub_logits: Sequence[Tensor], params: HCD.Params) -> Tensor:
    """Fuse the stages as one batch, [stages B, n, K]: a function's mean over it is the mean over the stages."""
    teachers = teacher_logits.repeat(len(stage_sub_logits), 1)
    return fuse(torch.cat(list(stage_sub_logits)), teachers, params.sub_logit_scale, params.teacher_logit_scale)


def _transfer_terms(student_logits: Tensor, teacher_logits: Tensor, fused: Tensor, params: HCD.Params) -> Losses:
    """Compute the two weighted terms without labels, from the fused sub-logits [stages B, n, K]."""
    stages = len(fused) // len(student_logits)
    target = fused.detach() if params.detach_sublogits else fused
    times = stages if params.stage_reduction == "sum" else 1
    sub_kl = times * sub_kl_loss(student_logits.repeat(stages, 1), target, params.temperature)
    return {
        "kl": params.kl_weight * kd_loss(student_logits, teacher_logits, params.temperature),
        "sub_kl": params.sub_kl_weight * sub_kl,
    }


def _label_terms(fused: Tensor, labels: Tensor, stages: int, params: HCD.Params) -> Losses:
    """Compute the two weighted terms with labels, from the fused sub-logits [stages B, n, K] and their labels."""
    times = stages if params.stage_reduction == "sum" else 1
    sub_ce = times * sub_ce_loss(fused, labels, params.sub_ce_smoothing)
    orthogonality = times * orthogonality_loss(fused, labels, params.threshold)
    return {
        "sub_ce": params.sub_ce_weight * sub_ce,
        "orthogonality": params.orthogonality_weight * orthogonality,
    }


def hcd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    stage_sub_logits: Sequence[Tensor],
    labels: Tensor,
    params: HCD.Params | None = None,
) -> Tensor:
    """Compute Eq. 15 without the student's cross-entropy: the sum of `hcd_terms`; a scalar.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K].
        stage_sub_logits: [B, n, K] for every stage, before the teacher's logits are added.
        labels: [B] or [B, K].
        params: weights and scales; None: the defaults.
    """
    terms = hcd_terms(student_logits, teacher_logits, stage_sub_logits, labels, params or HCD.Params())
    return torch.stack(list(terms.values())).sum()


class HCD(Method):
    """Teach with sub-logits made from the student's stages and the teacher's embedding together."""

    verification = Verification(
        open_readings="order of the three coefficients, smoothing, projectors: yema-web/HCD could not be had",
        defaults="paper, CIFAR-100, ResNet18",
    )

    class Params(MethodParams):
        """Parameters of HCD."""

        kl_weight: float = Field(
            1.0, ge=0, description="alpha: multiplies plain distillation from the teacher's logits, L_KL"
        )
        sub_kl_weight: Annotated[float, Float(1, 10, log=True)] = Field(
            10.0, ge=0, description="beta: multiplies distillation from the fused sub-logits, L_SKL"
        )
        orthogonality_weight: Annotated[float, Float(1, 10, log=True)] = Field(
            8.0, ge=0, description="gamma: multiplies the term that keeps sub-logits unlike each other, L_OL"
        )
        sub_ce_weight: float = Field(
            1.0, ge=0, description="multiplies the cross-entropy of the fused sub-logits with the labels, L_SCE"
        )
        sub_ce_smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing in L_SCE")
        temperature: Annotated[float, Float(1, 8, log=True)] = Field(
            4.0, gt=0, description="tau: divides logits in L_KL and L_SKL, which are multiplied by its square"
        )
        num_sublogits: Annotated[int, Choice(1, 2, 4, 6)] = Field(
            4, ge=1, description="n: how many sub-logit vectors every stage gives"
        )
        threshold: float = Field(
            0.5, ge=-1, le=1, description="theta: cosines between sub-logits up to this value cost nothing"
        )
        sub_logit_scale: float = Field(1.0, gt=0, description="a: multiplies the sub-logits before the two are added")
        teacher_logit_scale: float = Field(
            1.0, ge=0, description="b: multiplies the teacher's logits before the two are added"
        )
        detach_sublogits: Annotated[bool, Choice(False, True)] = Field(
            False, description="stop L_SKL from moving the fused sub-logits towards the student"
        )
        stages: str = Field(
            "1234",
            pattern="^1?2?3?4?$",
            min_length=1,
            coerce_numbers_to_str=True,
            description="the student's stages that give sub-logits, shallow to deep, one digit each",
        )
        stage_reduction: Literal["sum", "mean"] = Field(
            "sum", description="how the terms of the stages are combined: the paper adds them"
        )

    has_initial_settings = True
    student_needs = Signal.LOGITS | Signal.STAGES
    teacher_needs = Signal.LOGITS | Signal.EMBEDDING
    reads_labels = "some"
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build for each stage a convolutional projector and the complementary feature mapper's two linear layers."""
        width = max(student.embedding_dim, teacher.embedding_dim)
        self.projectors = nn.ModuleDict()
        self.mappers = nn.ModuleDict()
        for digit in self.params.stages:
            self.projectors[digit] = ConvProjector(student, int(digit), width)
            self.mappers[digit] = nn.Sequential(
                nn.Linear(width + teacher.embedding_dim, teacher.embedding_dim),
                nn.ReLU(),
                nn.Linear(teacher.embedding_dim, self.params.num_sublogits * student.num_classes),
            )
        initialise(self.mappers)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `kl`, `sub_kl`, `sub_ce`, `orthogonality`."""
        embedding = teacher.embedding.detach()
        stage_sub_logits = []
        for digit, mapper in self.mappers.items():
            pooled = self.projectors[digit](student.stages[int(digit) - 1])
            shared_logits = mapper(torch.cat((pooled, embedding.to(pooled.dtype)), dim=1))
            stage_sub_logits.append(sub_logits(shared_logits, self.params.num_sublogits))
        params, teacher_logits, stages = self.params, teacher.logits.detach(), len(stage_sub_logits)
        if batch.labelled is None:
            return hcd_terms(student.logits, teacher_logits, stage_sub_logits, batch.labels, params)
        fused = _fused(teacher_logits, stage_sub_logits, params)
        transfer = _transfer_terms(student.logits, teacher_logits, fused, params)
        fused = torch.cat([labelled_rows(batch, part) for part in fused.chunk(stages)])
        labels = torch.cat([labelled_rows(batch, batch.labels)] * stages)
        of_labels, scale = _label_terms(fused, labels, stages, params), label_scale(batch)
        return transfer | {name: scale * value for name, value in of_labels.items()}

    @classmethod
    def initial_settings(cls, similarity: StageSimilarity) -> Sequence[dict[str, Scalar]]:
        """Return sub-logits from the student's stages that are similar to any of the teacher's."""
        stages = similar([max(row) for row in similarity.values])
        return ({"stages": "".join(map(str, stages))},)
