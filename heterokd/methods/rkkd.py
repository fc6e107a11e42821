"""RKKD: order the classes as the teacher does, by a smooth Kendall's tau, in addition to matching its probabilities.

Guan, Cheng, Liu, Yuan: "Enhancing Logits Distillation with Plug&Play Kendall's tau Ranking Loss", ICML 2025,
https://arxiv.org/abs/2409.17823 (first version: "Kendall's tau Coefficient for Logits Distillation", which names RKKD)

    concordance = 2 / (K * (K - 1)) * sum_{i<j} tanh(k * (z_s,i - z_s,j)) * tanh(k * (z_t,i - z_t,j))
    rank = 1 - concordance                     z: logits [B, K] of one image; in [0, 2], mean over the batch
    L = weight * tau^2 * KL( softmax(z_t / tau) || softmax(z_s / tau) ) + gamma * rank

With k large, tanh is the sign and the concordance Kendall's tau: 1 for the same order, -1 for the opposite order. With
finite k it rewards spread, too: an identical student has a rank term above 0.

Not verified: the tanh form, k, gamma, and the weight and temperature of the KD term; the authors' code was not at hand.
The defaults are choices of this project: k 1, gamma 1, and the KD term as in `kd` (tau 1, weight 1).

There are K^2 pairs an image (a million for ImageNet). They are visited a block at a time, with the gradient computed
along and the pairs forgotten: at most `LIVE_TENSORS` float32 tensors of one block exist at once (48 MiB on a GPU, 1.5
MiB on a CPU), whatever the batch size and the number of classes. The term has no second derivative.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from heterokd.domains import Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods.kd import kd_loss
from heterokd.outputs import Batch, Losses, Outputs

BLOCK = 2**22
"""Pairs visited at once on a GPU: four images of 1000 classes."""
CPU_BLOCK = 2**17
"""Block size on a CPU, where a block larger than the cache takes several times as long."""
LIVE_TENSORS = 3
"""Tensors of a block that exist at once: the student's, the teacher's, and their product."""


class _Concordance(torch.autograd.Function):
    """Concordance of every image, [B], from float32 logits [B, K]; the gradient is made on the way forward."""

    @staticmethod
    def forward(ctx: Any, student_BK: Tensor, teacher_BK: Tensor, steepness: float, size: int) -> Tensor:
        batch_size, num_classes = student_BK.shape
        value_B, slope_BK = student_BK.new_zeros(batch_size), torch.zeros_like(student_BK)
        # Made once and filled again for each block: fresh memory for every block costs more than the arithmetic.
        memory = student_BK.new_empty(LIVE_TENSORS, min(batch_size * num_classes**2, max(size, num_classes)))
        for images, rows in blocks(batch_size, num_classes, size):
            student_bK, teacher_bK = student_BK[images], teacher_BK[images]
            shape = len(student_bK), len(range(num_classes)[rows]), num_classes
            student_brK, teacher_brK, product_brK = memory[:, : math.prod(shape)].view(LIVE_TENSORS, *shape)
            for logits_bK, steps_brK in ((student_bK, student_brK), (teacher_bK, teacher_brK)):
                torch.sub(logits_bK[:, rows, None], logits_bK[:, None, :], out=steps_brK).mul_(steepness).tanh_()
            value_B[images] += torch.mul(student_brK, teacher_brK, out=product_brK).sum(dim=(1, 2))
            if ctx.needs_input_grad[0]:
                # tanh' = 1 - tanh^2. Every pair stands in two rows, (i, j) and (j, i): a class gets twice its row.
                student_brK.square_().neg_().add_(1).mul_(teacher_brK)
                slope_BK[images, rows] = 2 * steepness * student_brK.sum(dim=2)
        ordered_pairs = num_classes * (num_classes - 1)
        ctx.save_for_backward(slope_BK / ordered_pairs)
        return value_B / ordered_pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor, None, None, None]:
        (slope_BK,) = ctx.saved_tensors
        return grad_B.unsqueeze(1) * slope_BK, None, None, None


def blocks(batch_size: int, num_classes: int, size: int) -> list[tuple[slice, slice]]:
    """(images, first classes of the pairs) that cover all pairs, at most `size` pairs a block (but at least a row)."""
    rows = min(num_classes, max(1, size // num_classes))
    images = max(1, size // (rows * num_classes))
    return [
        (slice(image, image + images), slice(row, row + rows))
        for image in range(0, batch_size, images)
        for row in range(0, num_classes, rows)
    ]


def rank_loss(
    student_logits: Tensor, teacher_logits: Tensor, steepness: float = 1.0, block: int | None = None
) -> Tensor:
    """Compute 1 - concordance of the class orders.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K]; takes no gradient.
        steepness: k.
        block: pairs visited at once; what suits the device when left out.

    Returns:
        A scalar in [0, 2], the mean over the batch; differentiable once.
    """
    size = block or (CPU_BLOCK if student_logits.device.type == "cpu" else BLOCK)
    concordance: Tensor = _Concordance.apply(student_logits.float(), teacher_logits.detach().float(), steepness, size)
    return 1 - concordance.mean()


def rkkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    steepness: float = 1.0,
    weight: float = 1.0,
    rank_weight: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Compute both terms, weighted; logits [B, K], the teacher's take no gradient, a scalar."""
    kd = kd_loss(student_logits, teacher_logits, temperature)
    return weight * kd + rank_weight * rank_loss(student_logits, teacher_logits, steepness)


class RKKD(Method):
    """Order the classes as the teacher does, by a smooth Kendall's tau, in addition to matching its probabilities."""

    verification = Verification(
        open_readings="steepness, weights and the form of the surrogate: no program could be had",
        defaults="none published",
    )

    class Params(MethodParams):
        """Parameters of RKKD."""

        temperature: Annotated[float, Float(1, 8, log=True)] = Field(
            1.0, gt=0, description="tau of the KD term: divides both networks' logits; not verified"
        )
        weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="multiplies the KD term; not verified"
        )
        rank_weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="gamma: multiplies the term of the order of the classes; not verified"
        )
        steepness: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, gt=0, description="k: how sharply a difference of logits counts as an order; not verified"
        )

    params: Params

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `kd` and `rank`."""
        kd = kd_loss(student.logits, teacher.logits, self.params.temperature)
        rank = rank_loss(student.logits, teacher.logits, self.params.steepness)
        return {"kd": self.params.weight * kd, "rank": self.params.rank_weight * rank}
