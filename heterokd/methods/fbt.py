"""FBT: a fused network, front of one network and back of the other, is taught by the teacher and teaches the student.

Li, Wang, Yan, Ding, Gao, Xia: "Fuse Before Transfer: Knowledge Fusion for Heterogeneous Distillation", ICCV 2025,
https://arxiv.org/abs/2410.12342

    f embedding, p = softmax(z) class probabilities, t teacher, s student, f fused, y the label, K_i = {f_i, p_i}
    p_f = back stages j..fc ( L2G ( front stages 1..k (x) ) ),  L2G = patch embedding, then window attention    Eq. 2
    L = L(K_t, K_s) + L(K_t, K_f) + L(K_f, K_s)                  the first teaches the second               Eq. 1
    L(K_a, K_b) = L_InfoNCE(f_b, f_a) + L_OFA(p_a, p_b)
    L_OFA = (1 + p_a,y)^gamma log(p_a,y / p_b,y) + sum_{c != y} p_a,c log(p_a,c / p_b,c)                        Eq. 3a
    L_InfoNCE = - log( exp(f_b . f_a+ / tau_2) / sum_{a' in batch} exp(f_b . f_a' / tau_2) )                    Eq. 3b

The front is convolutional where the pair allows it: a CNN teacher of an attention or MLP student lends its stages and
the student's last stages are the back; in every other pair the student's stages are the front and the teacher's
frozen last stages the back, through which the gradient reaches the student. Weights are shared with both networks, not
copied, and both run once: the fused path branches off their maps. So the class declares the union of what pairs read,
and `build` narrows `student_needs` and `teacher_needs` to what this pair reads.

Readings of what the text leaves open: embeddings are normalised for InfoNCE; 1 / tau_2 is learned from 1 / 0.07 and
never exceeds 100; embeddings of different width are compared after a linear layer, student width -> teacher width; the
fused network is detached where it teaches; L2G has one unshifted Swin block with window 7 and width / 32 heads; eps of
OFA, here gamma, is 1. The authors' program (https://github.com/liguopeng0923/FBT) could not be had, tried twice. So
those that may change a result are parameters (`normalise_embeddings`, `temperature`, `detach_fused`, `bridge_blocks`,
`window`, `gamma`), and defaults are what the text builds on has: CLIP's InfoNCE, OFA's eps, Swin's block. With
`ofa_form: code` the loss of OFA's authors' code replaces Eq. 3a, and the fused logits get the cross-entropy with the
labels that Eq. 3a contains.

The task loss: Eq. 1 has none. Its label is in Eq. 3a, where (1 + p_a,y)^gamma log(1 / p_b,y) is a cross-entropy of
weight 1 and more. So by default the student's cross-entropy is not added, whatever `training.task_weight` says;
`task_loss: true` adds it, as versions before schema 2 did, and so does `ofa_form: code`, which has no label's term.

Data-parallel workers: negatives of InfoNCE are the other images of one worker's batch; `gather: true` takes those of
all workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from heterokd.distributed import gathered
from heterokd.domains import Choice, Float, Int, Scalar
from heterokd.errors import PairError
from heterokd.method import Method, MethodParams, StageSimilarity, Verification, label_scale, labelled_rows
from heterokd.methods._projectors import Bridge
from heterokd.methods.ofa import FORMS
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal

MAX_LOGIT_SCALE = 100.0
"""CLIP's bound on 1 / tau_2."""

LAYOUTS = 2
"""Number of layouts that `FBT.initial_settings` returns."""


def info_nce(
    student_embedding: Tensor, teacher_embedding: Tensor, logit_scale: Tensor | float, normalise: bool = True
) -> Tensor:
    """Eq. 3b: find the teacher's embedding of the same image among those of the batch.

    Args:
        student_embedding: [B, D], the queries.
        teacher_embedding: [B, D], the candidates.
        logit_scale: 1 / tau_2.
        normalise: compare directions only.

    Returns:
        The mean over the batch, a scalar; 0 for a batch of a single image.
    """
    query, candidate = student_embedding.float(), teacher_embedding.float()
    if normalise:
        query, candidate = F.normalize(query, dim=1), F.normalize(candidate, dim=1)
    with torch.autocast(query.device.type, enabled=False):  # a scale of 100 would magnify bf16's rounding
        similarity = logit_scale * (query @ candidate.T)
    return F.cross_entropy(similarity, torch.arange(len(query), device=query.device))


# The two networks' logits and embeddings are four tensors.
def fbt_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float = 1 / 0.07,
    params: FBT.Params | None = None,
) -> Tensor:
    """Compute L(K_a, K_b), a in the teacher's role and b in the student's: OFA on logits, InfoNCE on embeddings.

    Args:
        student_logits: [B, K] of b.
        teacher_logits: [B, K] of a.
        student_embedding: [B, D] of b, already as wide as a's.
        teacher_embedding: [B, D] of a.
        labels: [B] or [B, K].
        logit_scale: 1 / tau_2.
        params: weights, gamma, the form of OFA and where negatives come from; None: the defaults.
    """
    params = params or FBT.Params()
    ofa = params.ofa_weight * FORMS[params.ofa_form](student_logits, teacher_logits, labels, params.gamma)
    return ofa + _contrast(student_embedding, teacher_embedding, logit_scale, params)


def _contrast(student: Tensor, teacher: Tensor, logit_scale: Tensor | float, params: FBT.Params) -> Tensor:
    """Compute the weighted InfoNCE loss of embeddings [B, D]."""
    if params.gather:
        student, teacher = gathered(student), gathered(teacher)
    return params.infonce_weight * info_nce(student, teacher, logit_scale, params.normalise_embeddings)


class FBT(Method):
    """Teach through a fused network made of the student's and the teacher's stages."""

    verification = Verification(
        open_readings="gamma, InfoNCE's scale, detaching, bridge: liguopeng0923/FBT could not be had", defaults="paper"
    )

    class Params(MethodParams):
        """Parameters of FBT."""

        front_stage: Annotated[int, Int(1, 4)] = Field(
            3, description="k: the fused network starts with stages 1 to k of the front network"
        )
        back_stage: Annotated[int, Choice(2, 3, 4, 5)] = Field(
            4,
            description="j: it goes on with stage j (2, 3 or 4) to the classifier of the back network; 5 (the "
            "papers' fc) is its final norm and classifier alone",
        )
        gamma: Annotated[float, Float(1.0, 1.6)] = Field(
            1.0, ge=1, description="gamma: exponent that amplifies the target class in the OFA loss"
        )
        ofa_form: Literal["paper", "code"] = Field(
            "paper", description="OFA as Eq. 3a prints it, or as the code of OFA's authors runs it"
        )
        ofa_weight: float = Field(1.0, ge=0, description="multiplies the OFA loss in all three pairs")
        infonce_weight: Annotated[float, Float(0.1, 2.0, log=True)] = Field(
            1.0, ge=0, description="multiplies the InfoNCE loss in all three pairs"
        )
        temperature: float = Field(
            0.07, ge=0.01, description="tau_2: divides similarities in InfoNCE; learned, this is where it starts"
        )
        normalise_embeddings: bool = Field(True, description="compare directions only in InfoNCE")
        teacher_student_weight: float = Field(1.0, ge=0, description="multiplies L(K_t, K_s): teacher to student")
        teacher_fused_weight: float = Field(1.0, ge=0, description="multiplies L(K_t, K_f): teacher to fused network")
        fused_student_weight: float = Field(1.0, ge=0, description="multiplies L(K_f, K_s): fused network to student")
        fused_task_weight: float = Field(
            1.0, ge=0, description="multiplies the fused logits' cross-entropy with the labels; read with the code form"
        )
        task_loss: Annotated[bool, Choice(False, True)] = Field(
            False,
            description="add the student's cross-entropy with the labels, times training.task_weight; Eq. 3a contains "
            "it, the code form does not and always adds it",
        )
        detach_fused: Annotated[bool, Choice(True, False)] = Field(
            True, description="stop L(K_f, K_s) from moving the fused network towards the student"
        )
        bridge_blocks: int = Field(1, ge=0, description="window-attention blocks of the bridge L2G")
        window: int = Field(7, ge=1, description="side of an attention window in the bridge, in tokens")
        gather: bool = Field(
            False, description="true finds negatives of InfoNCE in all workers' batches, false in each alone"
        )

    has_initial_settings = True
    student_needs = Signal.LOGITS | Signal.EMBEDDING | Signal.STAGES | Signal.TAIL
    teacher_needs = Signal.LOGITS | Signal.EMBEDDING | Signal.STAGES | Signal.TAIL
    reads_labels = "some"
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Choose the front and the back, then make the bridge, the aligning layer and the learnable scale.

        Raises:
            PairError: no such layout: `front_stage` is not 1 to 4, or `back_stage` not 2 to 5.
        """
        k, j = self.params.front_stage, self.params.back_stage
        for key, stage, low, high in (("front_stage", k, 1, 4), ("back_stage", j, 2, 5)):
            if not low <= stage <= high:
                raise PairError(f"fbt: {key} must be {low} to {high}, got {stage}")
        for owner, spec in (("student", student), ("teacher", teacher)):
            if len(spec.stages) != 4:
                raise PairError(f"fbt: the {owner} must have 4 stages to be fused, it has {len(spec.stages)}")

        self.uses_task_loss = self.params.task_loss or self.params.ofa_form == "code"
        self.front_is_teacher = teacher.kind == "cnn" and student.kind != "cnn"
        front, back = (teacher, student) if self.front_is_teacher else (student, teacher)
        both = Signal.LOGITS | Signal.EMBEDDING
        self.student_needs = both | (Signal.TAIL if self.front_is_teacher else Signal.STAGES)
        self.teacher_needs = both | (Signal.STAGES if self.front_is_teacher else Signal.TAIL)

        expected = back.stages[j - 2]  # the fused map replaces what stage j - 1 of the back network gives
        self.bridge = Bridge(
            front.stages[k - 1].channels,
            front.side(k),
            expected.channels,
            back.side(j - 1),
            blocks=self.params.bridge_blocks,
            window=self.params.window,
        )
        # The fused embedding is as wide as the back's, so at most one pair of widths differs.
        unlike = student.embedding_dim != teacher.embedding_dim
        self.align = nn.Linear(student.embedding_dim, teacher.embedding_dim) if unlike else None
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / self.params.temperature)))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute three terms, named teacher first, and `fused_task` with the code form of OFA."""
        params = self.params
        with torch.no_grad():  # not a clamp of its exponential: beyond that bound no gradient would bring it back
            self.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        if self.front_is_teacher:
            front, tail = teacher.stages[params.front_stage - 1].detach(), student.tail
        else:
            front, tail = student.stages[params.front_stage - 1], teacher.tail
        fused = tail.outputs(self.bridge(front), params.back_stage)
        source = fused.map(Tensor.detach) if params.detach_fused else fused
        frozen = Outputs(teacher.logits.detach(), teacher.embedding.detach())
        terms = {
            "teacher_student": params.teacher_student_weight * self._pair(student, frozen, batch),
            "teacher_fused": params.teacher_fused_weight * self._pair(fused, frozen, batch),
            "fused_student": params.fused_student_weight * self._pair(student, source, batch),
        }
        if params.ofa_form == "code":
            logits, labels = (labelled_rows(batch, values) for values in (fused.logits.float(), batch.labels))
            terms["fused_task"] = params.fused_task_weight * label_scale(batch) * F.cross_entropy(logits, labels)
        return terms

    @classmethod
    def initial_settings(cls, similarity: StageSimilarity) -> Sequence[dict[str, Scalar]]:
        """Return the `LAYOUTS` layouts whose front stage k is most similar to the replaced stage j - 1 of the back."""
        values = similarity.values
        front_is_teacher = similarity.teacher_kind == "cnn" and similarity.student_kind != "cnn"
        # Deeper fronts first where several are equally similar.
        layouts = {
            (front + 1, back + 2): values[back][front] if front_is_teacher else values[front][back]
            for front in range(len(values))
            for back in range(len(values[0]))
        }
        ordered = sorted(layouts, key=lambda layout: (-layouts[layout], -layout[0], layout[1]))
        return [{"front_stage": k, "back_stage": j} for k, j in ordered[:LAYOUTS]]

    def _pair(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute L(K_a, K_b) for whichever two networks play teacher and student."""
        embedding = student.embedding
        if self.align is not None and embedding.shape[1] != teacher.embedding.shape[1]:
            embedding = self.align(embedding)
        params = self.params
        ours, theirs = (labelled_rows(batch, values) for values in (student.logits, teacher.logits))
        ofa = (
            label_scale(batch)
            * params.ofa_weight
            * FORMS[params.ofa_form](ours, theirs, labelled_rows(batch, batch.labels), params.gamma)
        )
        return ofa + _contrast(embedding, teacher.embedding, self.logit_scale.exp(), params)
