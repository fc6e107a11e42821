"""MLDR-KD: align class and image relations of logits, at every stage and after a learned fusion of the stages.

Yang, Ye, Lin, Li, Wen, Hao, Chen: "Multi-Level Decoupled Relational Distillation for Heterogeneous Architectures",
2025, https://arxiv.org/abs/2502.06189

    s, t: logits [B, K], divided by tau
    A(z)_b = z_b z_b^T / sqrt(K)    relations of the classes of image b, [K, K], softmax over each column
    R(z)_k = z_k z_k^T / sqrt(K)    relations of the images for class k, [B, B], softmax over each column
    D(s, t) = KL(A(t) || A(s)) + KL(R(t) || R(s)) + alpha * KL(softmax(t) || softmax(s))       mean over columns
    y_j = Linear(d_j), d_j = projector_j(stage j of the student)                               logits of stage j
    y = sum_j w_j * y_j, w = softmax over the stages of MLP(d_j)                               w_j: [B, K]
    L = weight * D(s, t) + stage_weight * sum_j D(y_j, t) + fused_weight * D(y, t)

Projectors, linear layers and the MLP are dropped after training. Defaults are those of the authors' configurations
(CIFAR-100, students ResNet18 and ResNet101): tau 1, alpha 2, all weights 1, projectors as wide as the wider of the two
embeddings, an MLP with 4 K hidden units.

Deviations: the authors' program has CNN students only; token maps pass the same convolutions, with strides down to
about 7x7 tokens. The 1x1 convolution of a CNN's last stage has a bias; the last layer of the MLP has none, since the
softmax over the stages would cancel it.

Memory: for each of the six pairs of logits, A takes B K^2 and R takes K B^2 numbers, a few times over with gradients:
512 MB each for 128 images and 1000 classes.

Data-parallel workers: R relates the images of one worker's batch, as in the authors' program; `gather: true` those of
all workers.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from heterokd.distributed import gathered
from heterokd.domains import Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods._projectors import ConvProjector, initialise
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal


def mldr_kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, alpha: float = 2.0
) -> Tensor:
    """Compute D: class relations, image relations and alpha times the KL of the probabilities.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K]; takes no gradient.
        temperature: tau; the loss is not multiplied by its square.
        alpha: weight of the probabilities' term.

    Returns:
        A scalar.
    """
    student, teacher = student_logits.float() / temperature, teacher_logits.detach().float() / temperature
    scale = student.shape[1] ** -0.5
    relations = relation_divergence(student, teacher, scale) + relation_divergence(student.T, teacher.T, scale)
    probabilities = F.kl_div(
        F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1), reduction="batchmean", log_target=True
    )
    return relations + alpha * probabilities


def relation_divergence(student_NM: Tensor, teacher_NM: Tensor, scale: float) -> Tensor:
    """Compute KL(teacher || student) of the relations among the M entries of each row; mean over N and M columns."""
    student_log, teacher_log = (
        F.log_softmax(x.unsqueeze(2) * x.unsqueeze(1) * scale, dim=1) for x in (student_NM, teacher_NM)
    )
    return (teacher_log.exp() * (teacher_log - student_log)).sum(dim=1).mean()


class MLDRKD(Method):
    """Align class and image relations of logits, at every stage and after a learned fusion of the stages."""

    verification = Verification(
        program="Ethan-Yang02/MLDR-KD",
        commit="0db65bc",
        file="dfra.py",
        value=5e-08,
        gradient=5e-08,
        defaults="program, CIFAR-100",
    )

    student_needs = Signal.LOGITS | Signal.STAGES

    class Params(MethodParams):
        """Parameters of MLDR-KD."""

        temperature: Annotated[float, Float(1, 4, log=True)] = Field(1.0, gt=0, description="tau: divides all logits")
        alpha: Annotated[float, Float(0.5, 8, log=True)] = Field(
            2.0, ge=0, description="multiplies the KL of the probabilities within each comparison"
        )
        weight: Annotated[float, Float(0.1, 4, log=True)] = Field(
            1.0, ge=0, description="multiplies the comparison of the student's logits"
        )
        stage_weight: Annotated[float, Float(0.1, 4, log=True)] = Field(
            1.0, ge=0, description="multiplies the sum of the comparisons of the four stages' logits"
        )
        fused_weight: Annotated[float, Float(0.1, 4, log=True)] = Field(
            1.0, ge=0, description="multiplies the comparison of the fused logits"
        )
        gather: bool = Field(False, description="true relates the images of all workers' batches, false of each alone")

    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build a projector and a linear head per stage, and the MLP that weights the stages."""
        width, classes = max(student.embedding_dim, teacher.embedding_dim), student.num_classes
        self.projectors = nn.ModuleList(
            ConvProjector(student, stage, width) for stage in range(1, len(student.stages) + 1)
        )
        self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in student.stages)
        self.gate = nn.Sequential(nn.Linear(width, 4 * classes), nn.GELU(), nn.Linear(4 * classes, classes, bias=False))
        initialise(self.heads)
        initialise(self.gate)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `logits`, `stages` (summed over the stages) and `fused`."""
        vectors = [project(stage) for project, stage in zip(self.projectors, student.stages, strict=True)]
        stage_logits = [head(vector) for head, vector in zip(self.heads, vectors, strict=True)]
        share_BSK = self.gate(torch.stack(vectors, dim=1)).softmax(dim=1)
        fused = (share_BSK * torch.stack(stage_logits, dim=1)).sum(dim=1)
        params = self.params
        target = gathered(teacher.logits.detach()) if params.gather else teacher.logits

        def compare(logits: Tensor) -> Tensor:
            logits = gathered(logits) if params.gather else logits
            return mldr_kd_loss(logits, target, params.temperature, params.alpha)

        return {
            "logits": params.weight * compare(student.logits),
            "stages": params.stage_weight * torch.stack([compare(logits) for logits in stage_logits]).sum(),
            "fused": params.fused_weight * compare(fused),
        }
