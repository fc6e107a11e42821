"""DIST: correlate with the teacher's probabilities instead of equalling them.

Huang, You, Wang, Qian, Xu: "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022,
https://arxiv.org/abs/2205.10536

    p = softmax(z / tau)                                          z: logits [B, K]; rho: Pearson's correlation
    inter = tau^2 * (1 - mean over images  b of rho(p_s[b, :], p_t[b, :]))      the classes of one image
    intra = tau^2 * (1 - mean over classes c of rho(p_s[:, c], p_t[:, c]))      the images of one batch
    L = beta * inter + gamma * intra

Defaults are those of the ImageNet and of the heterogeneous tables (beta 1, gamma 1, tau 1); the CIFAR tables use beta
2, gamma 2, tau 4.

Data-parallel workers: `intra` compares the images of one worker's batch, so its value depends on the batch size of a
worker; `gather: true` compares those of all workers.

Deviations: a constant row or column has no correlation; it counts as 0, as in the authors' code, but passes no
gradient, where theirs divides by 1e-8 and a student with a zero classifier would take an enormous step. A batch of one
image has no `intra`: the term is 0.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from heterokd.distributed import gathered
from heterokd.domains import Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.outputs import Batch, Losses, Outputs

# Sum of squared deviations under which float32 probabilities are constant up to rounding.
CONSTANT = 1e-12


def correlation(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along `dim`: two tensors [B, K] give [B] for dim 1 and [K] for dim 0; 0 if constant."""
    return (_unit(student, dim) * _unit(teacher, dim)).sum(dim)


def inter_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute tau^2 * (1 - correlation over the classes of an image); logits [B, K], mean over the batch, a scalar."""
    student, teacher = _probabilities(student_logits, teacher_logits, temperature)
    return (1 - correlation(student, teacher, dim=1).mean()) * temperature**2


def intra_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute tau^2 * (1 - correlation over the images of a class); logits [B, K], mean over classes, 0 for B = 1."""
    student, teacher = _probabilities(student_logits, teacher_logits, temperature)
    if len(student) < 2:
        return student.sum() * 0
    return (1 - correlation(student, teacher, dim=0).mean()) * temperature**2


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Compute both terms, weighted by beta and gamma; logits [B, K], the teacher's take no gradient, a scalar."""
    inter = inter_loss(student_logits, teacher_logits, temperature)
    intra = intra_loss(student_logits, teacher_logits, temperature)
    return inter_weight * inter + intra_weight * intra


def _unit(values: Tensor, dim: int) -> Tensor:
    """Centred and scaled to length 1 along `dim`; all 0 where constant."""
    centred = values - values.mean(dim, keepdim=True)
    squares = centred.square().sum(dim, keepdim=True)
    return centred * torch.where(squares > CONSTANT, squares.clamp_min(CONSTANT).rsqrt(), 0.0)


def _probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Softened probabilities of both, [B, K] in float32."""
    student = F.softmax(student_logits.float() / temperature, dim=1)
    return student, F.softmax(teacher_logits.detach().float() / temperature, dim=1)


class DIST(Method):
    """Correlate with the teacher's probabilities instead of equalling them."""

    verification = Verification(
        program="Hao840/OFAKD",
        commit="f7bb896",
        file="distillers/dist.py",
        value=2e-06,
        gradient=9e-06,
        defaults="OFA's configurations",
    )

    class Params(MethodParams):
        """Parameters of DIST."""

        inter_weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="beta: multiplies the term over the classes of one image"
        )
        intra_weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="gamma: multiplies the term over the images of one batch"
        )
        temperature: Annotated[float, Float(1, 8, log=True)] = Field(
            1.0, gt=0, description="tau: divides both networks' logits; larger values show more of the small classes"
        )
        gather: bool = Field(
            False, description="true compares the images of all workers' batches in `intra`, false of each alone"
        )

    params: Params

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `inter` and `intra`."""
        inter = inter_loss(student.logits, teacher.logits, self.params.temperature)
        logits = student.logits, teacher.logits.detach()
        if self.params.gather:
            logits = gathered(logits[0]), gathered(logits[1])
        intra = intra_loss(*logits, self.params.temperature)
        return {"inter": self.params.inter_weight * inter, "intra": self.params.intra_weight * intra}
