"""OFA: every stage of the student predicts the classes through a branch, and the teacher's target class is amplified.

Hao, Guo, Han, Tang, Hu, Wang, Xu: "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge
Distillation", NeurIPS 2023, https://arxiv.org/abs/2310.19444

    p_t = softmax(z_t / tau), p_s = softmax(z_s / tau), y the label, m = onehot(y); the mean over the batch
    code form     OFA(z_s, z_t) = - sum_c ( (p_t + m)_c^eps - m_c ) log p_s,c               eps = 1: CE(p_t, p_s)
    paper form    OFA(z_s, z_t) = (1 + p_t,y)^eps log(p_t,y / p_s,y) + sum_{c != y} p_t,c log(p_t,c / p_s,c)

    L = weight * OFA(z_s, z_t) + stage_weight * sum_{i in stages} OFA(branch_i(F_i), z_t)       F_i: the map of stage i

The authors' code runs the code form; the paper (and FBT, Eq. 3a) prints the other, where the label's cross-entropy
is absorbed into the target weight. eps is called gamma in print. No tau^2 factor in either.

Branches follow the code: separable convolutions for a convolutional stage (width: the larger of both embeddings);
patch merging and transformer blocks for an attention or MLP stage (width: the student's embedding), with a GELU after
the first merge and no bias of queries, keys and values (Hao840/OFAKD, commit f7bb896, `distillers/ofa.py`; the block is
timm's, whose default is none); then a mean and a linear head. `merge_activation: between` and `qkv_bias: true` are what
versions before schema 2 ran: a GELU only where another merge follows, and the bias.

Deviations: token branches average the patch tokens where the code reads a class token, because stages are maps; one eps
serves all exits (the code takes a list; its published values are equal for all); mixed labels give m = onehot(argmax).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from heterokd.domains import Choice, Float, Scalar
from heterokd.method import Method, MethodParams, StageSimilarity, Verification, similar
from heterokd.methods._projectors import ConvProjector, TokenProjector, initialise
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal, hard_labels


def ofa_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, eps: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """Compute the code form: cross-entropy with the target (p_t + m)^eps - m.

    Logits [B, K], labels [B] or [B, K], mean over the batch.
    """
    student_log = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher_probabilities = F.softmax(teacher_logits.float() / temperature, dim=1)
    mask = F.one_hot(hard_labels(labels), student_logits.shape[1]).to(student_log)
    target = (teacher_probabilities + mask) ** eps - mask
    return -(target * student_log).sum(dim=1).mean()


def ofa_paper_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, eps: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """Compute the printed form: KL(teacher || student) whose target class weighs (1 + p_t,y)^eps instead of p_t,y.

    Logits [B, K], labels [B] or [B, K], mean over the batch.
    """
    student_log = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher_log = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    teacher_probabilities = teacher_log.exp()
    is_label = F.one_hot(hard_labels(labels), student_logits.shape[1]).bool()
    class_weight = ((1 + teacher_probabilities) ** eps).where(is_label, teacher_probabilities)
    return (class_weight * (teacher_log - student_log)).sum(dim=1).mean()


FORMS = {"code": ofa_loss, "paper": ofa_paper_loss}


class OFA(Method):
    """Train every stage of the student to predict the classes as the teacher does."""

    verification = Verification(
        program="Hao840/OFAKD",
        commit="f7bb896",
        file="distillers/ofa.py",
        value=1e-07,
        gradient=4e-08,
        open_readings="branches: read next to the program, not run",
        defaults="program",
    )

    class Params(MethodParams):
        """Parameters of OFA."""

        temperature: float = Field(
            1.0, gt=0, description="tau: divides all logits; the loss is not multiplied by its square"
        )
        eps: Annotated[float, Float(1.0, 1.6)] = Field(
            1.0, ge=1, description="eps (gamma in print): exponent that amplifies the target class, for all exits"
        )
        weight: float = Field(1.0, ge=0, description="multiplies the term of the student's logits")
        stage_weight: Annotated[float, Choice(0.1, 1.0)] = Field(
            1.0, ge=0, description="multiplies the sum over the stages' branches; 0.1 in the authors' CIFAR-100 runs"
        )
        stages: Annotated[str, Choice("1234", "234", "34", "4")] = Field(
            "1234",
            pattern="^1?2?3?4?$",
            min_length=1,
            coerce_numbers_to_str=True,
            description="the stages that get a branch, shallow to deep, one digit each",
        )
        form: Literal["code", "paper"] = Field(
            "code", description="the loss of the authors' code, or the form that the paper prints"
        )
        merge_activation: Literal["first", "between"] = Field(
            "first",
            description="where token branches have a GELU: after the first of the merges, or only between two merges",
        )
        qkv_bias: bool = Field(False, description="bias of queries, keys and values in token branches")

    has_initial_settings = True
    student_needs = Signal.LOGITS | Signal.STAGES
    reads_labels = "all"
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build a branch per chosen stage: a projector, then a linear head."""
        self.branches = nn.ModuleDict()
        for digit in self.params.stages:
            stage = int(digit)
            if student.stages[stage - 1].kind == "cnn":
                width = max(student.embedding_dim, teacher.embedding_dim)
                projector: nn.Module = ConvProjector(student, stage, width)
            else:
                width = student.embedding_dim
                projector = TokenProjector(
                    student,
                    stage,
                    width,
                    merge_activation=self.params.merge_activation,
                    qkv_bias=self.params.qkv_bias,
                )
            head = nn.Linear(width, student.num_classes)
            initialise(head)
            self.branches[digit] = nn.Sequential(projector, head)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `logits`, the student's exit, and `stages`, the sum over the branches."""
        params, teacher_logits = self.params, teacher.logits.detach()
        loss = FORMS[params.form]
        exits = [branch(student.stages[int(digit) - 1]) for digit, branch in self.branches.items()]
        # The branches' logits form a single batch, since the loss is a mean over it.
        teachers, labels = teacher_logits.repeat(len(exits), 1), torch.cat([batch.labels] * len(exits))
        stages = len(exits) * loss(torch.cat(exits), teachers, labels, params.eps, params.temperature)
        return {
            "logits": params.weight
            * loss(student.logits, teacher_logits, batch.labels, params.eps, params.temperature),
            "stages": params.stage_weight * stages,
        }

    @classmethod
    def initial_settings(cls, similarity: StageSimilarity) -> Sequence[dict[str, Scalar]]:
        """Return exits from the first stage that is similar to the teacher's last stage, which decides."""
        last = len(similarity.values)
        first = min(similar([row[-1] for row in similarity.values]), default=last)
        return ({"stages": "".join(map(str, range(first, last + 1)))},)
