"""RSD: keep what student and teacher embeddings share, dimension by dimension, and decorrelate the rest.

Zhang, Liu, Ran, Ma: "Cross-Architecture Distillation Made Simple with Redundancy Suppression", ICCV 2025,
https://arxiv.org/abs/2507.21844

    h = Linear(D_s, width) - BatchNorm - GELU - Linear(width, D_t)          a projector of the student's embedding f_s
    P = correlation of h(f_s) and f_t over the batch, dimension against dimension, [D_t, D_t]
    L = lambda * ( sum_i (P_ii - 1)^2 + kappa * sum_{i != j} P_ij^2 )

The projector keeps the objective away from the student's embedding; it is dropped after training.
P is as large as the teacher's embedding squared (768 dimensions: 2 MiB).

Defaults are those of the authors' program (VISION-SJTU/RSD, commit be825ae, `distillers/rsd.py` and `train.py`), which
runs all its CIFAR-100 pairs with them: lambda 0.1, the entries of P summed, kappa 0.01, a hidden layer twice as wide as
the student's embedding, both layers drawn from a truncated normal distribution of deviation 0.02. The sum grows with
D_t: at 768 dimensions the term's gradient on the student is about 20 times that of the cross-entropy. `reduction: mean`
divides by D_t, so that a lambda serves teachers of every width; the same strength then needs lambda = 0.1 D_t.

Data-parallel workers: P is of one worker's batch, and so are the projector's batch statistics; `gather: true` takes
both over the images of all workers.

Deviations: a dimension that is constant over the batch has no correlation; it counts as 0 and passes no gradient, where
the program divides by its standard deviation plus 1e-5. A batch of a single image has no correlations: the term is 0.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from heterokd.distributed import gathered
from heterokd.domains import Choice, Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods._projectors import initialise
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal

# Variance under which a dimension is constant up to rounding.
CONSTANT = 1e-10


def cross_correlation(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Correlation over the batch of every student dimension with every teacher dimension.

    Args:
        student_embedding: [B, D_s].
        teacher_embedding: [B, D_t].

    Returns:
        [D_s, D_t] in [-1, 1]; 0 for dimensions that are constant over the batch.
    """
    student_BD = _standardise(student_embedding.float())
    teacher_BD = _standardise(teacher_embedding.float())
    with torch.autocast(student_BD.device.type, enabled=False):  # bf16 would round a correlation of 0.999 to 1
        return student_BD.T @ teacher_BD / len(student_BD)


def rsd_loss(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    off_diagonal_weight: float = 0.01,
    reduction: Literal["mean", "sum"] = "sum",
) -> Tensor:
    """Pull the diagonal of the cross-correlation to 1 and the rest to 0.

    Args:
        student_embedding: projected, [B, D].
        teacher_embedding: [B, D]; takes no gradient.
        off_diagonal_weight: kappa.
        reduction: "sum" over the entries, or "mean": the sum divided by D.

    Returns:
        A scalar.
    """
    correlation = cross_correlation(student_embedding, teacher_embedding.detach())
    diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - diagonal.square().sum()
    total = (diagonal - 1).square().sum() + off_diagonal_weight * off_diagonal
    return total / len(diagonal) if reduction == "mean" else total


def _standardise(embedding_BD: Tensor) -> Tensor:
    """Mean 0 and (biased) variance 1 over the batch; all 0 where constant."""
    centred = embedding_BD - embedding_BD.mean(0)
    variance = centred.square().mean(0)
    return centred * torch.where(variance > CONSTANT, variance.clamp_min(CONSTANT).rsqrt(), 0.0)


class RSD(Method):
    """Keep what student and teacher embeddings share, dimension by dimension, and decorrelate the rest."""

    verification = Verification(
        program="VISION-SJTU/RSD",
        commit="be825ae",
        file="distillers/rsd.py",
        value=3e-06,
        gradient=2e-05,
        defaults="program",
    )

    student_needs = Signal.EMBEDDING
    teacher_needs = Signal.EMBEDDING

    class Params(MethodParams):
        """Parameters of RSD."""

        weight: Annotated[float, Float(1e-3, 1, log=True)] = Field(0.1, ge=0, description="lambda: multiplies the term")
        off_diagonal_weight: Annotated[float, Float(1e-3, 1e-1, log=True)] = Field(
            0.01, ge=0, description="kappa: multiplies the part that decorrelates unlike dimensions"
        )
        hidden_ratio: Annotated[int, Choice(1, 2, 4)] = Field(
            2, ge=1, description="width of the projector's hidden layer, in widths of the student's embedding"
        )
        hidden_dim: int | None = Field(
            None, ge=1, description="width of the projector's hidden layer in units; null: that of hidden_ratio"
        )
        # No domain: the two differ by a constant factor, which `weight` already searches.
        reduction: Literal["mean", "sum"] = Field(
            "sum", description="sum adds the entries up; mean divides that sum by the teacher's embedding_dim"
        )
        initialisation: Literal["truncated_normal", "uniform"] = Field(
            "truncated_normal",
            description="how the projector's weights start: truncated_normal with deviation 0.02, or uniform as "
            "PyTorch's linear layers do",
        )
        gather: bool = Field(
            False, description="true correlates over the images of all workers' batches, false of each alone"
        )

    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build the projector from the student's to the teacher's embedding."""
        width = self.params.hidden_dim or self.params.hidden_ratio * student.embedding_dim
        # No biases: the normalisation after each of the two layers would subtract them again.
        self.projector = nn.Sequential(
            nn.Linear(student.embedding_dim, width, bias=False),
            nn.BatchNorm1d(width),
            nn.GELU(),
            nn.Linear(width, teacher.embedding_dim, bias=False),
        )
        if self.params.initialisation == "truncated_normal":
            initialise(self.projector)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the term `rsd`."""
        embedding, target = student.embedding.float(), teacher.embedding.detach()
        if self.params.gather:
            embedding, target = gathered(embedding), gathered(target)
        if len(embedding) < 2:
            return {"rsd": embedding.sum() * 0}
        loss = rsd_loss(self.projector(embedding), target, self.params.off_diagonal_weight, self.params.reduction)
        return {"rsd": self.params.weight * loss}
