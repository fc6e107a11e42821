"""SRD: match standardised embeddings by the logarithm of a high power of their differences.

Miles, Mikolajczyk: "Understanding the Role of the Projector in Knowledge Distillation", AAAI 2024,
https://arxiv.org/abs/2303.11098

    g = BN(Linear(f_s)), h = BN(f_t)          f [B, D] embeddings; BN over the batch, without weights, eps 1e-4
    L_feature = log( sum over b, d of |g - h|^p )                            form "difference"
    L_feature = log( sum over d of (1 - mean over b of g h)^p )              form "correlation"
    L = weight * L_feature + logit_weight * KL(softmax(z_t) || softmax(z_s))

The logarithm makes the gradient relative: p times that of the largest differences, whatever their number. The
projector is dropped after training. Defaults are those of the authors' program on ImageNet (ResNet34 -> ResNet18):
difference, p 4, weight 2, logit_weight 1, temperature 1; with DeiT students it has the form "correlation", weight 1.

Deviations: 1e-5 is added inside the logarithm, as the authors do with DeiT, so that equal embeddings have a finite
loss. A batch of one image has no statistics: the term is 0.

Data-parallel workers: BN and the sum are those of one worker's batch; `gather: true` takes the images of all workers.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from heterokd.distributed import gathered
from heterokd.domains import Float, Int
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods.kd import kd_loss
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal

BN_EPS = 1e-4
LOG_EPS = 1e-5


def srd_loss(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    power: float = 4.0,
    form: Literal["difference", "correlation"] = "difference",
) -> Tensor:
    """Compute L_feature.

    Args:
        student_embedding: projected, [B, D], B > 1, before BN.
        teacher_embedding: [B, D]; takes no gradient.
        power: p.
        form: "difference" or "correlation", see above.

    Returns:
        A scalar; it may be negative.
    """
    student, teacher = (
        F.batch_norm(x.float(), None, None, training=True, eps=BN_EPS)
        for x in (student_embedding, teacher_embedding.detach())
    )
    gap = student - teacher if form == "difference" else 1 - (student * teacher).mean(dim=0)
    return (gap.abs().pow(power).sum() + LOG_EPS).log()


class SRD(Method):
    """Match standardised embeddings by the logarithm of a high power of their differences."""

    verification = Verification(
        program="roymiles/Simple-Recipe-Distillation",
        commit="31e8477",
        file="single.py",
        value=2e-08,
        gradient=1e-07,
        open_readings="form correlation: eps 1e-4 in place of 0",
        defaults="program, ImageNet",
    )

    student_needs = Signal.LOGITS | Signal.EMBEDDING
    teacher_needs = Signal.LOGITS | Signal.EMBEDDING

    class Params(MethodParams):
        """Parameters of SRD."""

        weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            2.0, ge=0, description="multiplies the term on embeddings"
        )
        logit_weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="multiplies the KL divergence of the logits, at temperature 1"
        )
        power: Annotated[int, Int(2, 6)] = Field(4, ge=1, description="p: exponent of the differences")
        form: Literal["difference", "correlation"] = Field(
            "difference", description="compare entries of the embeddings, or correlate dimension by dimension"
        )
        gather: bool = Field(
            False, description="true standardises over the images of all workers' batches, false of each alone"
        )

    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build the linear projector from the student's to the teacher's embedding."""
        # No bias: BN would subtract it.
        self.projector = nn.Linear(student.embedding_dim, teacher.embedding_dim, bias=False)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `embedding` and `logits`."""
        params = self.params
        embedding, target = student.embedding.float(), teacher.embedding.detach()
        if params.gather:
            embedding, target = gathered(embedding), gathered(target)
        if len(embedding) < 2:
            feature = embedding.sum() * 0
        else:
            feature = srd_loss(self.projector(embedding), target, params.power, params.form)
        return {
            "embedding": params.weight * feature,
            "logits": params.logit_weight * kd_loss(student.logits, teacher.logits, 1.0),
        }
