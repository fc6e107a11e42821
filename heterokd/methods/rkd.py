"""RKD: keep the distances between images and the angles among them that the teacher's embeddings have.

Park, Kim, Lu, Cho: "Relational Knowledge Distillation", CVPR 2019, https://arxiv.org/abs/1904.05068

    f embedding [B, D]; h Huber's loss with threshold 1 (smooth L1)
    d_ij = |f_i - f_j| / mu,          mu the mean of |f_i - f_j| over all i != j of the batch
    a_ijk = cos of the angle at i between f_j and f_k = u_ij . u_ik,          u_ij = (f_j - f_i) / |f_j - f_i|, u_ii = 0
    L = weight_d * mean_ij h(d_ij(f_s) - d_ij(f_t)) + weight_a * mean_ijk h(a_ijk(f_s) - a_ijk(f_t))

Only relations are compared, so embeddings of different width need no projector, and only the student is trained.
Defaults 25 and 50 are those of the published code on CIFAR and of the heterogeneous tables.

Deviations: means run over all B^2 pairs and B^3 triples, the zeros of equal indices included, as in the published
code. Two images whose embeddings coincide (no further apart than 1e-6) have no direction: u is 0 and passes no
gradient. A batch of one image has no relations, and two images have no relative distance: the terms are 0.

Memory: differences take B^2 D and angles B^3 numbers for each network, a few times over with gradients. At 256 images
of 768 dimensions that is 200 MB and 67 MB; at 1024 images it is 3.2 GB and 4.3 GB.

Data-parallel workers: L relates the images of one worker's batch; `gather: true` those of all workers, each of which
then needs the memory of the whole batch.
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
from heterokd.outputs import Batch, Losses, Outputs, Signal

CLOSEST = 1e-6
"""Distance at which images coincide: the square root of the published code' 1e-12."""


def relations(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Relative distances and cosines of angles among the images of a batch.

    Args:
        embedding: [B, D], B > 1.

    Returns:
        d [B, B], with mean 1 off its diagonal of zeros, and a [B, B, B], the angle's corner first.
    """
    x = embedding.float()
    B = len(x)
    difference_BBD = x.unsqueeze(0) - x.unsqueeze(1)
    squares_BB = difference_BBD.square().sum(dim=2)
    distance_BB = squares_BB.clamp_min(CLOSEST**2).sqrt()
    apart_BB1 = (squares_BB > CLOSEST**2).unsqueeze(2)
    unit_BBD = torch.where(apart_BB1, difference_BBD / distance_BB.unsqueeze(2), 0.0)
    distance_BB = distance_BB * (1 - torch.eye(B, device=x.device))
    with torch.autocast(x.device.type, enabled=False):
        cosine_BBB = torch.bmm(unit_BBD, unit_BBD.transpose(1, 2))
    return distance_BB / (distance_BB.sum() / (B * (B - 1))), cosine_BBB


def rkd_terms(student_embedding: Tensor, teacher_embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the distance and the angle term, unweighted scalars, for [B, D_s] and [B, D_t]; both 0 for B = 1."""
    if len(student_embedding) < 2:
        zero = student_embedding.float().sum() * 0
        return zero, zero
    with torch.no_grad():
        teacher_distance, teacher_cosine = relations(teacher_embedding)
    distance, cosine = relations(student_embedding)
    return F.smooth_l1_loss(distance, teacher_distance), F.smooth_l1_loss(cosine, teacher_cosine)


def rkd_loss(
    student_embedding: Tensor, teacher_embedding: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0
) -> Tensor:
    """Compute both terms, weighted; [B, D_s] and [B, D_t], the teacher's takes no gradient, a scalar."""
    distance, angle = rkd_terms(student_embedding, teacher_embedding)
    return distance_weight * distance + angle_weight * angle


class RKD(Method):
    """Keep the distances between images and the angles among them that the teacher's embeddings have."""

    verification = Verification(
        program="megvii-research/mdistiller",
        commit="a08d46f",
        file="distillers/RKD.py",
        value=6e-08,
        gradient=3e-08,
        defaults="program, CIFAR-100",
    )

    student_needs = Signal.EMBEDDING
    teacher_needs = Signal.EMBEDDING

    class Params(MethodParams):
        """Parameters of RKD."""

        distance_weight: Annotated[float, Float(1, 100, log=True)] = Field(
            25.0, ge=0, description="multiplies the term on distances between two images"
        )
        angle_weight: Annotated[float, Float(1, 100, log=True)] = Field(
            50.0, ge=0, description="multiplies the term on angles among three images"
        )
        gather: bool = Field(False, description="true relates the images of all workers' batches, false of each alone")

    params: Params

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `distance` and `angle`."""
        embeddings = student.embedding, teacher.embedding.detach()
        if self.params.gather:
            embeddings = gathered(embeddings[0]), gathered(embeddings[1])
        distance, angle = rkd_terms(*embeddings)
        return {"distance": self.params.distance_weight * distance, "angle": self.params.angle_weight * angle}
