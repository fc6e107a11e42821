"""CC: let the student's embeddings relate to each other, image to image, as the teacher's do.

Peng, Jin, Liu, Zhou, Wu, Liu, Li, Zhang: "Correlation Congruence for Knowledge Distillation", ICCV 2019,
https://arxiv.org/abs/1904.01802

    e = W f + b                       both embeddings f [B, D], by a linear layer each, to a common width
    kind "adjacent":  L = weight * mean_b sum_d delta[b, d] * delta[b + 1, d],    delta = |e_s - e_t|,  b = 1 ... B - 1
    kind "kernel":    L = weight * mean_ij ( k(e_s[i], e_s[j]) - k(e_t[i], e_t[j]) )^2,    all images i, j of the batch
                      k(x, y) = exp(-2 gamma) * sum_{p = 0}^{P} (2 gamma)^p / p! * (x . y)^p            |x| = |y| = 1

"kernel" is the paper: the Taylor series, to order P, of the Gaussian kernel exp(-gamma |x - y|^2) between unit vectors.
"adjacent" is the code that the authors gave to CRD's authors, which every table since has used, the heterogeneous
ones too; it is the default, with their weight 0.02 and width 128. gamma 0.4 and P 2 are the paper's. The two kinds have
different magnitudes: 0.02 belongs to "adjacent", and no weight of "kernel" in these tables is known.

Deviations: batches are shuffled images; the paper's samplers, which put images of a class next to each other, are not
part of it. Both linear layers learn, as in that code, so a part of L can fall without the student. A batch of one image
has no pairs: the term is 0.

Data-parallel workers: L compares the images of one worker's batch; `gather: true` those of all workers.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from heterokd.distributed import gathered
from heterokd.domains import Float, Int
from heterokd.method import Method, MethodParams, Verification
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal

Kind = Literal["adjacent", "kernel"]


def adjacent_loss(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Products of the errors of neighbouring images; two [B, D], mean over B - 1 neighbours, 0 for B = 1."""
    delta = (student_embedding.float() - teacher_embedding.float()).abs()
    if len(delta) < 2:
        return delta.sum() * 0
    return (delta[:-1] * delta[1:]).sum(dim=1).mean()


def kernel_matrix(embedding: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Compute the Gaussian kernel's Taylor series between all directions of a batch: [B, D] gives [B, B]."""
    unit = F.normalize(embedding.float(), dim=1)
    with torch.autocast(unit.device.type, enabled=False):
        cosine = unit @ unit.T
    terms = [(2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(order + 1)]
    return math.exp(-2 * gamma) * torch.stack(terms).sum(dim=0)


def cc_loss(
    student_embedding: Tensor, teacher_embedding: Tensor, kind: Kind = "adjacent", gamma: float = 0.4, order: int = 2
) -> Tensor:
    """Compute the difference of the relations between images, unweighted.

    Args:
        student_embedding: [B, D], of the common width.
        teacher_embedding: [B, D].
        kind: "adjacent" or "kernel".
        gamma: of the kernel.
        order: P of the kernel.

    Returns:
        A scalar.
    """
    if kind == "adjacent":
        return adjacent_loss(student_embedding, teacher_embedding)
    student, teacher = (kernel_matrix(x, gamma, order) for x in (student_embedding, teacher_embedding))
    return (student - teacher).square().mean()


class CC(Method):
    """Let the student's embeddings relate to each other, image to image, as the teacher's do."""

    verification = Verification(
        program="Hao840/OFAKD",
        commit="f7bb896",
        file="distillers/correlation.py",
        value=3e-09,
        gradient=5e-08,
        defaults="program",
    )

    student_needs = Signal.EMBEDDING
    teacher_needs = Signal.EMBEDDING

    class Params(MethodParams):
        """Parameters of CC."""

        weight: Annotated[float, Float(1e-3, 1, log=True)] = Field(0.02, ge=0, description="multiplies the term")
        width: Annotated[int, Int(32, 512, log=True)] = Field(
            128, ge=1, description="common width of the embeddings that are compared"
        )
        # No domain: the two kinds have different magnitudes, so that no range of `weight` fits both.
        kind: Kind = Field(
            "adjacent", description="adjacent multiplies the errors of neighbouring images; kernel is the paper's form"
        )
        gamma: float = Field(0.4, gt=0, description="gamma of the Gaussian kernel; read with kind kernel")
        order: int = Field(2, ge=1, description="P: order of the kernel's Taylor series; read with kind kernel")
        gather: bool = Field(False, description="true compares the images of all workers' batches, false of each alone")

    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build a linear layer for each network."""
        self.embed_student = nn.Linear(student.embedding_dim, self.params.width)
        self.embed_teacher = nn.Linear(teacher.embedding_dim, self.params.width)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the term `cc`."""
        embeddings = self.embed_student(student.embedding), self.embed_teacher(teacher.embedding.detach())
        if self.params.gather:
            embeddings = gathered(embeddings[0]), gathered(embeddings[1])
        return {"cc": self.params.weight * cc_loss(*embeddings, self.params.kind, self.params.gamma, self.params.order)}
