"""CRD: tell an image's embedding in the other network from thousands of other images' remembered embeddings.

Tian, Krishnan, Isola: "Contrastive Representation Distillation", ICLR 2020, https://arxiv.org/abs/1910.10699

    e = (W f + b) / |W f + b|          both embeddings f, by a linear layer each, as unit vectors of a common width
    m_s[i], m_t[i]                     memory: what both networks gave for image i; after each step
                                       m[i] <- m[i] * momentum + e_i * (1 - momentum), as a unit vector again
    q(e, m) = exp(e . m / tau) / c     c the mean of exp(e . m / tau) in the first step of each direction
    h(e, m) = q / (q + K)              "they are of one image", against K remembered images of other classes
    NCE(e_i, m) = - log h(e_i, m[i]) - sum_{k = 1}^{K} log(1 - h(e_i, m[n_k]))
    L = weight * mean_i ( NCE(e_s,i, m_t) + NCE(e_t,i, m_s) )

Defaults are those of the authors' code on CIFAR-100, which the heterogeneous tables use too: weight 0.8, width 128, K
16384, tau 0.07, momentum 0.5. Both linear layers learn.

What differs from the authors' code. There the memory has a row for each training image, filled with random vectors. How
many images there are is not known here, so the memory has `bank_size` rows and image i uses row i modulo `bank_size`:

- A row says whose it is. With at least as many rows as images none is shared, as in the paper. With fewer, the image
  that came last keeps the row, and an image that finds another's there is compared with the other network's present
  embedding of itself, as is an image that comes for the first time. Random vectors are never used. With a memory that
  is filled before, and in a first epoch whose images find themselves in the program's memory, losses, weights and
  memories are the program's (tests/methods/test_golden_steps.py).
- Negatives are drawn, with replacement, from the rows that are filled; the authors draw from all images of other
  classes. K is at most `bank_size` - 1. A batch is written before negatives are drawn, so that the first has some;
  the program compares with its images as they were before.
- Negatives are computed from (image, progress) by a hash of integers, not drawn from a generator: a training that is
  resumed goes on with the same ones, whatever the device and the number of workers.
- c times the number of images is their Z; the number cancels out of h. Their 1e-7 in h's denominator is left out, for
  the logarithms are computed without the quotient.
- With mixed labels an image's class is that of its largest share.

Memory and marks are buffers, so that a checkpoint resumes exactly: 16 MiB with 16384 rows of width 128.

Data-parallel workers: each compares its images. `gather: true` writes the images of all workers to every worker's
memory, which gives what a single process would. Otherwise a worker remembers only its images. The memory is in the
checkpoint, which the first worker writes, so that all go on from its memory; it is not copied between workers at every
step.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from heterokd.distributed import gathered
from heterokd.domains import Float, Int
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods._random_words import draw_counts
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal, hard_labels

NOBODY = -1
"""The owner and the class of an empty row."""


class Similarities(NamedTuple):
    """Similarities e . m / tau of a batch's images in one direction of the comparison, and log c.

    Attributes:
        positive: with what the other network gave for the same image, [B].
        bank: with every row of the other network's memory, [B, N].
        log_mean: log c, a scalar.
    """

    positive: Tensor
    bank: Tensor
    log_mean: Tensor


def crd_loss(student: Similarities, teacher: Similarities, counts: Tensor) -> Tensor:
    """Compute both directions, unweighted.

    Args:
        student: of the student's embeddings with the teacher's memory.
        teacher: of the teacher's embeddings with the student's memory.
        counts: how often each row is a negative of each image, [B, N].

    Returns:
        A scalar, the mean over the batch.
    """
    return nce_loss(student, counts) + nce_loss(teacher, counts)


def nce_loss(similarities: Similarities, counts: Tensor) -> Tensor:
    """NCE in one direction, the mean over the batch, a scalar; an image without negatives counts as 0."""
    drawn_B = counts.sum(dim=1)
    shift_B = similarities.log_mean + drawn_B.clamp_min(1).log()
    positive_B = F.logsigmoid(similarities.positive - shift_B)
    negative_B = (counts * F.logsigmoid(shift_B.unsqueeze(1) - similarities.bank)).sum(dim=1)
    return -torch.where(drawn_B > 0, positive_B + negative_B, 0.0).mean()


class ContrastMemory(nn.Module):
    """Embeddings of both networks for the images seen so far, a row per image: two tables [N, D], owners, classes.

    Args:
        rows: N; image i uses row i modulo N.
        width: D.
        temperature: tau.
        momentum: share of the old row in the new row.
    """

    student: Tensor
    teacher: Tensor
    owners: Tensor
    classes: Tensor
    log_means: Tensor

    def __init__(self, rows: int, width: int, temperature: float = 0.07, momentum: float = 0.5) -> None:
        super().__init__()
        self.rows, self.temperature, self.momentum = rows, temperature, momentum
        self.register_buffer("student", torch.zeros(rows, width))
        self.register_buffer("teacher", torch.zeros(rows, width))
        self.register_buffer("owners", torch.full((rows,), NOBODY))
        self.register_buffer("classes", torch.full((rows,), NOBODY))
        self.register_buffer("log_means", torch.full((2,), math.nan))  # nan until the first step

    @torch.no_grad()
    def recall(self, student_BD: Tensor, teacher_BD: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return both networks' remembered embeddings of the images `index` [B]; the given ones if there are none."""
        row = index % self.rows
        knsame_B1 = (self.owners[row] == index).unsqueeze(1)
        student = torch.where(knsame_B1, self.student[row], student_BD.detach())
        return student, torch.where(knsame_B1, self.teacher[row], teacher_BD.detach())

    @torch.no_grad()
    def write(self, student_BD: Tensor, teacher_BD: Tensor, labels: Tensor, index: Tensor) -> None:
        """Remember a batch: embeddings [B, D], classes and positions [B]."""
        row = index % self.rows
        before = self.recall(student_BD, teacher_BD, index)
        # Of two images with the same row the last is written for both, since scattered writes have no fixed order.
        place = torch.arange(len(index), device=index.device)
        last = torch.zeros_like(self.owners).scatter_reduce(0, row, place, "amax", include_self=False)[row]
        for table, old, new in zip((self.student, self.teacher), before, (student_BD, teacher_BD), strict=True):
            mixed = F.normalize(self.momentum * old + (1 - self.momentum) * new, dim=1)
            table[row] = mixed[last]
        self.owners[row], self.classes[row] = index[last], labels[last]

    def used(self) -> int:
        """Return how many of the first rows hold all filled ones; all rows on a GPU, since counting would wait."""
        if not self.owners.is_cpu:
            return self.rows
        return int((self.owners != NOBODY).nonzero().amax()) + 1

    @torch.no_grad()
    def draw(self, labels: Tensor, index: Tensor, progress: float, count: int, rows: int | None = None) -> Tensor:
        """Count how often each of the first `rows` rows (default: all) is a negative of each image, [B, rows].

        `count` draws from the rows of other classes; all 0 for an image when no row holds another class.
        """
        classes_N = self.classes[:rows]
        in_order, order = classes_N.sort(stable=True)
        rank_N = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        empty = torch.searchsorted(in_order, NOBODY, right=True)
        same_B = torch.searchsorted(in_order, labels, right=True) - torch.searchsorted(in_order, labels)
        same_B1, labels_B1 = same_B.unsqueeze(1), labels.unsqueeze(1)
        others_B1 = len(order) - empty - same_B1
        # Each image draws among the rows that are not empty and not of its class, counted by class, then by number.
        counts_BN = draw_counts(index, progress, count, others_B1.clamp_min(1), len(order))
        place_BN = rank_N - empty - same_B1 * (classes_N > labels_B1)
        others_BN = (classes_N != NOBODY) & (classes_N != labels_B1)
        return counts_BN.gather(1, place_BN.clamp_min_(0)).mul_(others_BN)

    def compare(self, embedding: Tensor, positive: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
        """Compute similarities / tau of embeddings [B, D] with positives [B, D] and a bank [N, D]: [B] and [B, N]."""
        with torch.autocast(embedding.device.type, enabled=False):  # tau would magnify bf16's rounding
            embedding = embedding / self.temperature
            return (embedding * positive).sum(dim=1), embedding @ bank.T

    @torch.no_grad()
    def log_mean(self, direction: int, positive: Tensor, bank: Tensor, counts: Tensor, gather: bool) -> Tensor:
        """Return log c in a direction; the value of the first step with negatives is kept.

        Args:
            direction: 0 for the student's embeddings, 1 for the teacher's.
            positive: similarities [B].
            bank: similarities [B, N].
            counts: how often each is a negative [B, N].
            gather: take the mean over all workers.
        """
        kept = self.log_means[direction].clone()
        if kept.is_cpu and not kept.isnan():  # would synchronise on a GPU
            return kept
        drawn = counts.sum()
        found = torch.cat((positive.flatten(), (bank + counts.log()).flatten())).logsumexp(0)
        found = found - (len(positive) + drawn).log()
        if gather:
            workers = gathered(torch.stack((found, drawn)).unsqueeze(0))
            found, drawn = workers[:, 0].logsumexp(0) - math.log(len(workers)), workers[:, 1].sum()
        value = torch.where(kept.isnan(), found, kept)
        self.log_means[direction] = torch.where(drawn > 0, value, kept)
        return value


class Contrast(nn.Module):
    """A step of CRD: two linear layers and a memory, called once per step with the batch and the progress.

    Args:
        student_dim: width of the student's embedding.
        teacher_dim: width of the teacher's embedding.
        width: common width.
        memory: the memory.
        negatives: K.
        gather: whether every worker remembers the images of all.
    """

    def __init__(
        self, student_dim: int, teacher_dim: int, width: int, memory: ContrastMemory, negatives: int, gather: bool
    ) -> None:
        super().__init__()
        self.embed_student = nn.Linear(student_dim, width)
        self.embed_teacher = nn.Linear(teacher_dim, width)
        self.memory = memory
        self.negatives = min(negatives, max(memory.rows - 1, 1))
        self.gather = gather

    def forward(
        self, student: Tensor, teachers: list[Tensor], batch: Batch, progress: float, update_each: bool = False
    ) -> tuple[Similarities, list[Similarities], Tensor]:
        """Compare, and remember the batch.

        Args:
            student: embeddings [B, D_s].
            teachers: embeddings [B, D_t]; all are compared with the student's memory.
            batch: labels and index.
            progress: fraction of the training that is done.
            update_each: update the memory with each of the teachers in turn, and with the student each time, before
                the teacher is compared; otherwise with the first alone.

        Returns:
            The student's similarities, each teacher's, and `counts` [B, N].
        """
        student_BD = F.normalize(self.embed_student(student).float(), dim=1)
        teachers_BD = [F.normalize(self.embed_teacher(teacher.detach()).float(), dim=1) for teacher in teachers]
        labels, index = hard_labels(batch.labels), batch.index
        positives = self._update(student_BD, teachers_BD[0], labels, index)
        rows = self.memory.used()
        counts = self.memory.draw(labels, index, progress, self.negatives, rows)

        compare, log_mean = self.memory.compare, self.memory.log_mean
        ours = compare(student_BD, positives[1], self._bank(self.memory.teacher, rows, update_each))
        theirs = []
        for k, teacher_BD in enumerate(teachers_BD):
            if update_each and k > 0:
                positives = self._update(student_BD, teacher_BD, labels, index)
            theirs.append(compare(teacher_BD, positives[0], self._bank(self.memory.student, rows, update_each)))
        log_means = log_mean(0, *ours, counts, self.gather), log_mean(1, *theirs[0], counts, self.gather)
        return Similarities(*ours, log_means[0]), [Similarities(*compared, log_means[1]) for compared in theirs], counts

    def _update(self, student_BD: Tensor, teacher_BD: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Remember a batch; return what the memory had for its images before, as `ContrastMemory.recall`."""
        before = self.memory.recall(student_BD, teacher_BD, index)
        news = student_BD.detach(), teacher_BD.detach(), labels, index
        self.memory.write(*(gathered(new) for new in news) if self.gather else news)
        return before

    @staticmethod
    def _bank(table: Tensor, rows: int, update_each: bool) -> Tensor:
        """Return the first rows of a table; a copy if a later update may change them before the backward pass."""
        return table[:rows].clone() if update_each else table[:rows]


class CRD(Method):
    """Distinguish an image's embedding in the other network from those of thousands of remembered images."""

    verification = Verification(
        program="megvii-research/mdistiller",
        commit="a08d46f",
        file="distillers/CRD.py",
        value=1e-6,
        gradient=2e-7,
        open_readings="the memory begins empty, other draws: by design; given the same, 10 steps agree to 6e-07",
        defaults="program, CIFAR-100",
    )

    student_needs = Signal.EMBEDDING
    teacher_needs = Signal.EMBEDDING
    memories = ("contrast.memory",)

    class Params(MethodParams):
        """Parameters of CRD."""

        weight: Annotated[float, Float(0.1, 3, log=True)] = Field(0.8, ge=0, description="multiplies the term")
        temperature: Annotated[float, Float(0.04, 0.5, log=True)] = Field(
            0.07, ge=0.01, description="tau: divides similarities; smaller values look at the closest negatives only"
        )
        negatives: Annotated[int, Int(256, 16384, log=True)] = Field(
            16384, ge=1, description="K: remembered images of other classes that an image is distinguished from"
        )
        width: int = Field(128, ge=1, description="common width of the embeddings that are compared")
        momentum: float = Field(0.5, ge=0, le=1, description="share of an image's old memory in its new memory")
        bank_size: int = Field(
            16384,
            ge=2,
            description="images that are remembered; the paper remembers all: give their number",
        )
        gather: bool = Field(False, description="true lets every worker remember the images of all workers")

    reads_labels = "all"
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build the two linear layers and the memory."""
        params = self.params
        memory = ContrastMemory(params.bank_size, params.width, params.temperature, params.momentum)
        self.contrast = Contrast(
            student.embedding_dim, teacher.embedding_dim, params.width, memory, params.negatives, params.gather
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the term `crd`."""
        ours, theirs, counts = self.contrast(student.embedding, [teacher.embedding], batch, progress)
        return {"crd": self.params.weight * crd_loss(ours, theirs[0], counts)}
