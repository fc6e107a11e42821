"""TeKAP-F: CRD with the teacher and with noisy copies of its embedding, as if there were several teachers.

Hossain, Akhter, Hong, Huh: "Single Teacher, Multiple Perspectives: Teacher Knowledge Augmentation for Enhanced
Knowledge Distillation", ICLR 2025, https://openreview.net/forum?id=DmEHmZ89iB

    f_k = (1 - eta) * f_t + eta * sigma * n_k,  n_k ~ N(0, 1)          k = 1 ... P: the perturbed teachers' embeddings
    CRD(f_s, f) = mean_i ( NCE(e_s,i, m_t) + NCE(e_i, m_s) )           `crd.py`; e embeds f, m_s and m_t are remembered
    L = weight * CRD(f_s, f_t) + perturbed_weight * sum_k CRD(f_s, f_k)

The form on logits is `tekap`. Defaults are those of the authors' code (https://github.com/mdimtiazh/TeKAP): eta 0.1,
sigma 0.1, P 1, and 0.8 for CRD's settings and both weights. As in that code all copies share CRD's two linear layers,
its memory and its negatives, and the student's direction, NCE(e_s,i, m_t), is the same in every CRD; and each copy's
CRD updates the memory once more, with the copy and with the student's embedding again, so that e_i of a copy finds the
student's embedding of this step in m_s. `memory_updates: once`, which versions before schema 2 ran, remembers the
teacher as it is, with the momentum that is set; the loss differs by up to 7 % in ten steps of a small pair.

What differs from the code: the noise is computed from (image, progress) as in `tekap`, so that it is the same after a
resume and on any number of workers; and all that `crd` says of itself.

Data-parallel workers: as `crd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from heterokd.domains import Float, Int
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods.crd import Contrast, ContrastMemory, Similarities, crd_loss
from heterokd.methods.tekap import normal_noise, perturb
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal


def tekap_feature_loss(
    student: Similarities,
    teacher: Similarities,
    perturbed: Sequence[Similarities],
    counts: Tensor,
    weight: float = 0.8,
    perturbed_weight: float = 0.8,
) -> Tensor:
    """Compute both terms, weighted.

    Args:
        student: of the student's embeddings with the teacher's memory.
        teacher: of the teacher's embeddings with the student's memory.
        perturbed: of each perturbed teacher's embeddings with the student's memory.
        counts: how often each row of the memory is a negative of each image, [B, N].
        weight: multiplies the term of the teacher as it is.
        perturbed_weight: multiplies the sum over its perturbed copies.

    Returns:
        A scalar, the mean over the batch.
    """
    return weight * crd_loss(student, teacher, counts) + perturbed_weight * perturbed_loss(student, perturbed, counts)


def perturbed_loss(student: Similarities, perturbed: Sequence[Similarities], counts: Tensor) -> Tensor:
    """Compute sum_k CRD(f_s, f_k) from similarities, see `tekap_feature_loss`; a scalar."""
    return torch.stack([crd_loss(student, copy, counts) for copy in perturbed]).sum()


class TeKAPFeature(Method):
    """CRD with the teacher and with noisy copies of its embedding, as if there were several teachers."""

    verification = Verification(
        program="mdimtiazh/TeKAP",
        commit="279d380",
        file="crd/criterion.py, memory.py",
        value=1e-6,
        gradient=2e-7,
        open_readings="an empty memory, draws, noise: by design; given the same, 10 steps agree",
        defaults="program mdimtiazh/TeKAP at 279d380",
    )

    student_needs = Signal.EMBEDDING
    teacher_needs = Signal.EMBEDDING
    memories = ("contrast.memory",)

    class Params(MethodParams):
        """Parameters of TeKAP on features."""

        weight: Annotated[float, Float(0.1, 3, log=True)] = Field(
            0.8, ge=0, description="multiplies the term of the teacher as it is"
        )
        perturbed_weight: Annotated[float, Float(0.1, 3, log=True)] = Field(
            0.8, ge=0, description="multiplies the sum over the teacher's perturbed copies"
        )
        noise_share: Annotated[float, Float(0.02, 0.5, log=True)] = Field(
            0.1, ge=0, le=1, description="eta: share of noise in a perturbed copy's embedding"
        )
        noise_scale: float = Field(0.1, ge=0, description="sigma: standard deviation of the noise before it is shared")
        copies: int = Field(1, ge=1, description="P: so many perturbed copies of the teacher in every step")
        temperature: float = Field(0.07, ge=0.01, description="tau of CRD: divides similarities")
        negatives: Annotated[int, Int(256, 16384, log=True)] = Field(
            16384, ge=1, description="K of CRD: remembered images of other classes that an image is distinguished from"
        )
        width: int = Field(128, ge=1, description="common width of the embeddings that are compared")
        momentum: float = Field(0.5, ge=0, le=1, description="share of an image's old memory in its new memory")
        bank_size: int = Field(
            16384, ge=2, description="images that are remembered; the paper remembers all: give their number"
        )
        memory_updates: Literal["each", "once"] = Field(
            "each", description="each: every copy's CRD updates the memory; once: only the teacher's does"
        )
        gather: bool = Field(False, description="true lets every worker remember the images of all workers")

    reads_labels = "all"
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build CRD's two linear layers and its memory."""
        params = self.params
        memory = ContrastMemory(params.bank_size, params.width, params.temperature, params.momentum)
        self.contrast = Contrast(
            student.embedding_dim, teacher.embedding_dim, params.width, memory, params.negatives, params.gather
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `crd` and `perturbed`."""
        params, embedding = self.params, teacher.embedding.detach().float()
        noise_PBD = params.noise_scale * normal_noise(batch.index, progress, params.copies, embedding.shape[1])
        teachers = [embedding, *perturb(embedding, noise_PBD, params.noise_share)]
        ours, (theirs, *perturbed), counts = self.contrast(
            student.embedding, teachers, batch, progress, update_each=params.memory_updates == "each"
        )
        return {
            "crd": params.weight * crd_loss(ours, theirs, counts),
            "perturbed": params.perturbed_weight * perturbed_loss(ours, perturbed, counts),
        }
