"""VkD: match the teacher's layer-normalised embedding through an orthogonal projection.

Miles, Elezi, Deng: "VkD: Improving Knowledge Distillation using Orthogonal Projections", CVPR 2024,
https://arxiv.org/abs/2403.06213

    P [D_t, D_s], all singular values 1: distances among the student's embeddings stay what they are
    L = weight * smooth_l1(P f_s, layer_norm(f_t)) + logit_weight * tau^2 * KL(softmax(z_t / tau) || softmax(z_s / tau))

f_s [B, D_s] and f_t [B, D_t] are embeddings, z logits [B, K]; smooth_l1 is Huber's loss with threshold 1, mean over all
entries; layer_norm has no weights. P is dropped after training. Defaults are those of the authors' program
(RegNetY-16GF -> DeiT): both weights 1, tau 1.

P is a product of Householder reflections, so it stays orthogonal whatever weight decay does to their vectors. (The
authors use PyTorch's parametrization, which truncates a decayed diagonal to zeros.)

Deviations: their students have a second token and classifier for z_s, and f_s is the mean over the patch tokens; here
both belong to the student as it is shipped. If D_s > D_t no projection keeps all distances: P has orthonormal rows.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from heterokd.domains import Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods.kd import kd_loss
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal


def vkd_loss(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Compute Huber's loss of the projected student to the layer-normalised teacher, [B, D] each; a scalar."""
    target = F.layer_norm(teacher_embedding.detach().float(), teacher_embedding.shape[1:])
    return F.smooth_l1_loss(student_embedding.float(), target)


class OrthogonalProjection(nn.Module):
    """Linear map [B, D_in] -> [B, D_out] whose singular values are all 1, at any value of its parameter."""

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(max(input_dim, output_dim), min(input_dim, output_dim)))
        self.widens = output_dim >= input_dim

    def matrix(self) -> Tensor:
        """Return P, [D_out, D_in]: the product of the reflections at the columns, whose diagonal counts as 1."""
        below = self.vectors.float().tril(-1)
        tall: Tensor = torch.linalg.householder_product(below, 2 / (1 + below.square().sum(dim=0)))
        return tall if self.widens else tall.T

    def forward(self, x: Tensor) -> Tensor:
        """[B, D_in] -> [B, D_out], float32."""
        with torch.autocast(x.device.type, enabled=False):  # reflections have no bfloat16 form
            return x.float() @ self.matrix().T


class VkD(Method):
    """Match the teacher's layer-normalised embedding through an orthogonal projection."""

    verification = Verification(
        program="roymiles/VkD", commit="6f8a507", file="engine.py", value=4e-08, gradient=3e-08, defaults="program"
    )

    student_needs = Signal.LOGITS | Signal.EMBEDDING
    teacher_needs = Signal.LOGITS | Signal.EMBEDDING

    class Params(MethodParams):
        """Parameters of VkD."""

        weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="alpha: multiplies the term on embeddings"
        )
        logit_weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="gamma: multiplies the KL divergence of the logits"
        )
        temperature: Annotated[float, Float(1, 8, log=True)] = Field(
            1.0, gt=0, description="tau: divides both networks' logits"
        )

    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build the orthogonal projection from the student's to the teacher's embedding."""
        self.projector = OrthogonalProjection(student.embedding_dim, teacher.embedding_dim)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `embedding` and `logits`."""
        params = self.params
        projected = self.projector(student.embedding)
        return {
            "embedding": params.weight * vkd_loss(projected, teacher.embedding),
            "logits": params.logit_weight * kd_loss(student.logits, teacher.logits, params.temperature),
        }
