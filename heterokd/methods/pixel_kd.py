"""PixelKD: match the teacher's class probabilities at every pixel.

Liu, Chen, Liu, Qin, Luo, Wang: "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019,
https://arxiv.org/abs/1903.04197 (its pixel-wise term; after Hinton et al., https://arxiv.org/abs/1503.02531)

    L = weight * tau^2 * mean over valid pixels of KL( softmax(z_t / tau) || softmax(z_s / tau) )     z: [B, K, h, w]

Both logits are compared at the decoder's stride, before any upsampling to the image, as in the code of CIRKD
(Yang et al., CVPR 2022), whose weight and tau of 1 are the defaults. Where the two grids differ, the teacher's logits
are interpolated (bilinear) to the student's.

Deviation: pixels whose label is IGNORE are excluded; the code averages over all of them.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from heterokd.domains import Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods._projectors import resize_map
from heterokd.outputs import IGNORE, Batch, Losses, Outputs, Signal, labels_at

Direction = Literal["teacher_student", "student_teacher"]


def pixel_kd_loss(
    student_logits_BKHW: Tensor,
    teacher_logits_BKHW: Tensor,
    labels_BHW: Tensor | None = None,
    temperature: float = 1.0,
    direction: Direction = "teacher_student",
) -> Tensor:
    """Compute tau^2 * KL(teacher || student) of softened probabilities, a mean over valid pixels.

    Args:
        student_logits_BKHW: [B, K, H, W]; its grid is where both are compared.
        teacher_logits_BKHW: [B, K, h, w], interpolated (bilinear) to the student's grid; takes no gradient.
        labels_BHW: class numbers of any height and width, resized to the grid by nearest neighbour; pixels with IGNORE
            are excluded. None: all count.
        temperature: tau.
        direction: "student_teacher" exchanges the two sides of the divergence.

    Returns:
        A float32 scalar; 0 where no pixel is valid.
    """
    size = student_logits_BKHW.shape[-2], student_logits_BKHW.shape[-1]
    student_log = F.log_softmax(student_logits_BKHW.float() / temperature, dim=1)
    teacher_log = F.log_softmax(resize_map(teacher_logits_BKHW.detach(), size) / temperature, dim=1)
    if direction == "student_teacher":
        student_log, teacher_log = teacher_log, student_log
    divergence_BHW = F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(dim=1)
    if labels_BHW is None:
        return divergence_BHW.mean() * temperature**2
    valid_BHW = labels_at(labels_BHW, size) != IGNORE
    return (divergence_BHW * valid_BHW).sum() / valid_BHW.sum().clamp_min(1) * temperature**2


class PixelKD(Method):
    """Match the teacher's class probabilities at every pixel."""

    verification = Verification(
        program="winycg/CIRKD", commit="dab64db", file="losses/kd.py", value=4e-08, gradient=1e-07, defaults="program"
    )

    tasks = frozenset({"segmentation"})

    class Params(MethodParams):
        """Parameters of PixelKD."""

        temperature: Annotated[float, Float(1, 8, log=True)] = Field(
            1.0, gt=0, description="tau: divides both networks' logits; larger values show more of the small classes"
        )
        weight: Annotated[float, Float(0.1, 10, log=True)] = Field(1.0, ge=0, description="multiplies the term")

    student_needs = Signal.LOGITS
    teacher_needs = Signal.LOGITS
    reads_labels = "all"
    params: Params

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the term `kd`."""
        loss = pixel_kd_loss(student.logits, teacher.logits, batch.labels, self.params.temperature)
        return {"kd": self.params.weight * loss}
