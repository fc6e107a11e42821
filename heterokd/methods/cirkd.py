"""CIRKD: resemble the same pixels as the teacher's pixels do: those of other images, and those remembered per class.

Yang, Zhou, An, Jiang, Xu, Zhang: "Cross-Image Relational Knowledge Distillation for Semantic Segmentation", CVPR 2022,
https://arxiv.org/abs/2204.06986

    R(x; Y) = softmax over the vectors y of Y of (x . y / tau)           unit vectors; whom pixel x resembles
    minibatch = mean over images i, j of the batch, and over the pixels x of i, of KL( R(x_t; i's to j's, teacher)
                || R(x_s; i's to j's, student) )
    memory    = mean over pixels x of KL( R(x_t; V) || R(g(x_s); V) )    V: remembered vectors of the teacher
    L = kd_weight * pixel KD + minibatch_weight * minibatch + pixel_weight * memory(V_pixels) + region_weight *
        memory(V_regions)

x is a pixel of the embedding; g are two 1x1 convolutions with BatchNorm and ReLU between, to the teacher's width; both
sides of `minibatch` keep their width. Where the grids differ, both maps are averaged to the smaller grid. Every
class has two queues of the teacher's unit vectors: of each image, `PIXELS_PER_CLASS` pixels of the class, drawn at
random, and the mean of all of them. A step writes first; V are then the same places of all queues, as many as make up
the contrast size (`size // classes + 1`). Queues start with random unit vectors, as the authors' do, and these take
part until they are overwritten. A position takes the label of its cell's corner, as in the program (PyTorch's
`nearest`); `label_pixel: centre`, which versions before schema 2 ran, takes that of its middle. Defaults are those of
the authors' Cityscapes script.

Deviations from the authors' code:

- Pixels whose label is IGNORE are excluded from all terms; theirs counts them in `minibatch` and pixel KD.
- Their pixel queue of a class takes the first pixels of the image, whatever their class (a permutation indexes the
  image where it should index the class's pixels); here it takes the class's pixels, as the paper says.
- A queue is a ring: a write that reaches its end goes on at its start. Theirs moves back to fit, then starts over.
- Draws are a hash of (image, progress), not a generator's: a resumed training goes on with the same ones.
- Vectors are remembered in half precision (a relative error of 2e-4 in the terms, and the only difference that is left
  if the program is given the same draws, tests/methods/test_golden_steps.py): K * (20000 + 2000) * D * 2 bytes, 204 MiB
  for 19 classes and a width of 256, 4.7 GiB for 150 and 768, in every checkpoint too; `pixel_memory` decides.

Similarities of one image with a whole batch are held at a time, [HW, B, HW], and computed again for the gradient;
`pooling: 2` makes them 16 times smaller (the authors' option; off, as theirs).

Data-parallel workers: `gather: true` computes everything but pixel KD on the images of all workers, which gives what
a single process would. Otherwise each compares and remembers only its images. The queues are in the checkpoint, which
the first worker writes, so that all go on from its queues; they are not copied between workers at every step.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heterokd.distributed import gathered
from heterokd.domains import Float
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods._class_queues import ClassQueues, rank_in_class
from heterokd.methods._projectors import to_smaller_grid
from heterokd.methods._random_words import random_words
from heterokd.methods.ifvd import LabelPixel, coarse_labels
from heterokd.methods.pixel_kd import pixel_kd_loss
from heterokd.outputs import IGNORE, Batch, Losses, Outputs, OutputSpec, Signal

PIXELS_PER_CLASS = 16
"""Pixels of a class that one image gives to the pixel queue (the authors' `pixel_update_freq`)."""
STREAM_PIXELS, STREAM_REGIONS = -1, -2  # which places of the queues are compared: no image has these numbers


def cirkd_loss(
    student_ND: Tensor,
    teacher_ND: Tensor,
    student_keys_GMD: Tensor,
    teacher_keys_GMD: Tensor,
    valid_GM: Tensor,
    temperature: float = 0.1,
) -> Tensor:
    """Compute the KL of which vectors each vector resembles; all three relational terms are means of it.

    Args:
        student_ND: unit vectors [N, D_s].
        teacher_ND: unit vectors [N, D_t] of the same pixels.
        student_keys_GMD: what the student's are compared with: G groups of M unit vectors [G, M, D_s].
        teacher_keys_GMD: what the teacher's are compared with, [G, M, D_t].
        valid_GM: boolean, which of these are used.
        temperature: tau.

    Returns:
        The KL for each vector and group, float32 [N, G]; 0 for a group without valid vectors.
    """
    student_log = _log_resemblance(student_ND, student_keys_GMD, valid_GM, temperature)
    teacher_log = _log_resemblance(teacher_ND, teacher_keys_GMD, valid_GM, temperature)
    return F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(dim=2)


def _log_resemblance(x_ND: Tensor, keys_GMD: Tensor, valid_GM: Tensor, temperature: float) -> Tensor:
    """Compute log R, [N, G, M]; excluded vectors have probability 0 and a finite logarithm."""
    with torch.autocast(x_ND.device.type, enabled=False):  # tau would magnify bf16's rounding
        similar = (x_ND.float() @ keys_GMD.float().flatten(0, 1).T).view(len(x_ND), *valid_GM.shape)
        return F.log_softmax((similar / temperature).masked_fill(~valid_GM, -1e4), dim=2)


def _one_image(*tensors: Tensor, temperature: float) -> Tensor:
    """Compute `cirkd_loss`, storing only its inputs for the backward pass."""
    loss: Tensor = checkpoint(cirkd_loss, *tensors, temperature, use_reentrant=False, preserve_rng_state=False)
    return loss


def unit_pixels(map_BDHW: Tensor) -> Tensor:
    """Return every pixel as a unit vector, [B, HW, D] in float32."""
    return F.normalize(map_BDHW.float(), dim=1).flatten(2).transpose(1, 2)


def minibatch_loss(
    student_BDHW: Tensor,
    teacher_BDHW: Tensor,
    valid_BHW: Tensor | None = None,
    temperature: float = 0.1,
    pooling: int = 1,
) -> Tensor:
    """Compute the divergence of which pixels of each image of the batch the pixels resemble.

    Args:
        student_BDHW: [B, D_s, H, W].
        teacher_BDHW: [B, D_t, H, W]; takes no gradient.
        valid_BHW: boolean, which pixels are used, as queries and as keys. None: all.
        temperature: tau.
        pooling: side of the squares whose valid pixels are averaged first.

    Returns:
        A scalar: the mean over pairs of images of the mean over pixels; 0 where no pixel is valid.
    """
    valid = torch.ones_like(student_BDHW[:, 0]) if valid_BHW is None else valid_BHW.float()
    student, teacher = student_BDHW.float(), teacher_BDHW.detach().float()
    if pooling > 1:  # unit vectors follow: the sum over valid pixels does for their mean
        student, teacher = (
            F.avg_pool2d(each * valid.unsqueeze(1), pooling, ceil_mode=True) for each in (student, teacher)
        )
        valid = F.max_pool2d(valid.unsqueeze(1), pooling, ceil_mode=True).squeeze(1)
    student_BND, teacher_BND, valid_BN = unit_pixels(student), unit_pixels(teacher), valid.flatten(1) > 0
    share_BN = valid_BN / valid_BN.sum(dim=1, keepdim=True).clamp_min(1)
    total = student_BDHW.new_zeros((), dtype=torch.float32)
    for i in range(len(student_BND)):
        image = student_BND[i], teacher_BND[i], student_BND, teacher_BND, valid_BN
        total = total + (_one_image(*image, temperature=temperature).sum(dim=1) * share_BN[i]).sum()
    return total / valid_BN.any(dim=1).sum().clamp_min(1) ** 2


def memory_loss(
    student_BDHW: Tensor,
    teacher_BDHW: Tensor,
    remembered_MD: Tensor,
    valid_BHW: Tensor | None = None,
    temperature: float = 0.1,
) -> Tensor:
    """Compute the divergence of which remembered vectors the pixels resemble.

    Args:
        student_BDHW: [B, D, H, W], projected to the teacher's width.
        teacher_BDHW: [B, D, H, W]; takes no gradient.
        remembered_MD: unit vectors [M, D] of the teacher; they take no gradient.
        valid_BHW: boolean, which pixels are used. None: all.
        temperature: tau.

    Returns:
        A scalar, the mean over pixels; 0 where no pixel is valid.
    """
    student_BND, teacher_BND = unit_pixels(student_BDHW), unit_pixels(teacher_BDHW.detach())
    keys_1MD = remembered_MD.detach().unsqueeze(0)
    everybody = torch.ones(1, len(remembered_MD), dtype=torch.bool, device=remembered_MD.device)
    losses_BN = torch.cat(
        [
            _one_image(student_ND, teacher_ND, keys_1MD, keys_1MD, everybody, temperature=temperature).T
            for student_ND, teacher_ND in zip(student_BND, teacher_BND, strict=True)
        ]
    )
    if valid_BHW is None:
        return losses_BN.mean()
    valid_BN = valid_BHW.flatten(1)
    return (losses_BN * valid_BN).sum() / valid_BN.sum().clamp_min(1)


class Memory(nn.Module):
    """The teacher's pixels and regions of every class.

    Args:
        num_classes: K.
        width: D of the teacher's embedding.
        pixel_size: pixels of each class that are remembered.
        region_size: regions of each class that are remembered.
    """

    def __init__(self, num_classes: int, width: int, pixel_size: int, region_size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pixels = ClassQueues(num_classes, pixel_size, width)
        self.regions = ClassQueues(num_classes, region_size, width)

    @torch.no_grad()
    def write(self, teacher_BDHW: Tensor, labels_BHW: Tensor, index: Tensor, progress: float) -> None:
        """Remember a batch: maps [B, D, H, W], labels on the same grid, positions [B] in the training split."""
        teacher_BND, labels_BN = unit_pixels(teacher_BDHW), labels_BHW.flatten(1)
        classes_BN = labels_BN.masked_fill(labels_BN == IGNORE, self.num_classes)
        one_hot_BNK = F.one_hot(classes_BN, self.num_classes + 1)[..., :-1]
        # A product of matrices: scattered sums have no fixed order on a GPU, and unit vectors drop the count.
        with torch.autocast(teacher_BND.device.type, enabled=False):
            region_BKD = F.normalize(one_hot_BNK.transpose(1, 2).float() @ teacher_BND, dim=2)
        numbers_K = torch.arange(self.num_classes, device=labels_BN.device)
        region_classes_BK = torch.where(one_hot_BNK.any(dim=1), numbers_K, self.num_classes)
        self.regions.push(region_BKD.flatten(0, 1), region_classes_BK.flatten())
        self.pixels.push(teacher_BND.flatten(0, 1), self._chosen(classes_BN, index, progress))

    def _chosen(self, classes_BN: Tensor, index: Tensor, progress: float) -> Tensor:
        """Classes [B * N], K but for `PIXELS_PER_CLASS` random pixels of each class of each image."""
        images_B1 = torch.arange(len(index), device=index.device).unsqueeze(1)
        classes, groups = classes_BN.flatten(), (images_B1 * (self.num_classes + 1) + classes_BN).flatten()
        order = random_words(index, progress, classes_BN.shape[1]).flatten().argsort(stable=True)
        order = order[groups[order].argsort(stable=True)]
        rank, _ = rank_in_class(groups[order], len(index) * (self.num_classes + 1))
        chosen = torch.full_like(classes, self.num_classes)
        chosen[order] = torch.where(rank < PIXELS_PER_CLASS, classes[order], self.num_classes)
        return chosen


class CIRKD(Method):
    """Make pixels resemble the same pixels as the teacher's: those of other images, and those remembered per class."""

    verification = Verification(
        program="winycg/CIRKD",
        commit="dab64db",
        file="losses/cirkd_mini_batch.py, cirkd_memory.py",
        value=7e-08,
        gradient=3e-07,
        open_readings="draws: by design; given the same, 4 steps' queues agree to their half precision, losses to 2e-4",
        defaults="program, Cityscapes",
    )

    student_needs = Signal.EMBEDDING | Signal.LOGITS
    teacher_needs = Signal.EMBEDDING | Signal.LOGITS
    tasks = frozenset({"segmentation"})
    memories = ("memory",)

    class Params(MethodParams):
        """Parameters of CIRKD."""

        kd_weight: Annotated[float, Float(0.1, 10, log=True)] = Field(1.0, ge=0, description="multiplies pixel KD")
        minibatch_weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="multiplies the term over the pixels of the batch"
        )
        pixel_weight: Annotated[float, Float(0.01, 1, log=True)] = Field(
            0.1, ge=0, description="multiplies the term over remembered pixels"
        )
        region_weight: Annotated[float, Float(0.01, 1, log=True)] = Field(
            0.1, ge=0, description="multiplies the term over remembered regions"
        )
        temperature: Annotated[float, Float(0.05, 1, log=True)] = Field(
            0.1, ge=0.01, description="tau: divides similarities; smaller values look at the most similar pixels only"
        )
        kd_temperature: float = Field(1.0, gt=0, description="divides both networks' logits in pixel KD")
        pixel_memory: int = Field(20000, ge=1, description="pixels of each class that are remembered")
        region_memory: int = Field(2000, ge=1, description="regions of each class that are remembered")
        pixel_contrast: int = Field(
            4096, ge=1, description="remembered pixels that a pixel is compared with, shared evenly among classes"
        )
        region_contrast: int = Field(
            1024, ge=1, description="remembered regions that a pixel is compared with, shared evenly among classes"
        )
        pooling: int = Field(
            1, ge=1, description="side of the squares averaged before pixels of the batch are compared; saves memory"
        )
        label_pixel: LabelPixel = Field(
            "corner", description="the pixel whose label a position of the map takes: of its cell the corner or centre"
        )
        gather: bool = Field(False, description="true compares and remembers the images of all workers' batches")

    reads_labels = "all"
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build the projector of the student's pixels, and the queues."""
        params, width = self.params, teacher.embedding_dim
        self.projector = nn.Sequential(
            nn.Conv2d(student.embedding_dim, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
        )
        self.memory = Memory(teacher.num_classes, width, params.pixel_memory, params.region_memory)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `kd`, `minibatch`, `pixel` and `region`."""
        params, tau = self.params, self.params.temperature
        kd = pixel_kd_loss(student.logits, teacher.logits, batch.labels, params.kd_temperature)
        ours, theirs = to_smaller_grid(student.embedding, teacher.embedding.detach())
        labels, index = coarse_labels(batch.labels, ours.shape[-2:], params.label_pixel), batch.index
        if params.gather:
            ours, theirs, labels, index = gathered(ours), gathered(theirs), gathered(labels), gathered(index)
        valid, projected = labels != IGNORE, self.projector(ours)

        self.memory.write(theirs, labels, index, progress)
        num_classes = self.memory.num_classes
        pixels = self.memory.pixels.sample(params.pixel_contrast // num_classes + 1, progress, STREAM_PIXELS)
        regions = self.memory.regions.sample(params.region_contrast // num_classes + 1, progress, STREAM_REGIONS)
        return {
            "kd": params.kd_weight * kd,
            "minibatch": params.minibatch_weight * minibatch_loss(ours, theirs, valid, tau, params.pooling),
            "pixel": params.pixel_weight * memory_loss(projected, theirs, pixels, valid, tau),
            "region": params.region_weight * memory_loss(projected, theirs, regions, valid, tau),
        }
