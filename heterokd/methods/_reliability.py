"""Reliability of class scores at labelled pixels: the two mechanisms of HeteroAKD and its loss, on maps of scores.

    y one-hot labels, z scores [B, K, H, W] before any squashing, t teacher, s student, c a class, (h, w) a pixel
    H(z)_c = -[ y_c log sigma(z_c) + (1 - y_c) log(1 - sigma(z_c)) ]            reliability: small is good      Eq. 5
    S = H(z_s) / (H(z_t) + H(z_s))                                              the teacher's share             Eq. 6
    zhat = S z_t + (1 - S) z_s                                                  mixed knowledge (KMM)           Eq. 7
    dH = ReLU( H(z_s) - H(zhat) )                                               what the student can gain       Eq. 8
    W = softmax over valid pixels of H(z_s) + dH                                where it matters most (KEM)     Eq. 9

Equations are numbered as in heterokd/methods/heteroakd.py, which lists our readings. All is computed in float32, also
under autocast. Pixels whose label is IGNORE have H = 0 and W = 0.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from heterokd.outputs import IGNORE, labels_at

Reliability = Literal["bce_sigmoid", "bce_softmax", "ce_pixel"]
Axis = Literal["space", "class"]
Form = Literal["bernoulli", "softmax", "literal"]

LEAST_ENTROPY = 1e-30
"""Added to both entropies in Eq. 6: two certain networks share evenly, and no gradient divides by zero."""


def valid_pixels(labels_BHW: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Return which pixels are valid on a grid of `size`, boolean [B, 1, H, W]."""
    valid: Tensor = (labels_at(labels_BHW, size) != IGNORE).unsqueeze(1)
    return valid


def per_class_entropy(z_BKHW: Tensor, labels_BHW: Tensor, reliability: Reliability = "bce_sigmoid") -> Tensor:
    """Compute H of Eq. 5, the cross-entropy with the label, for every class of every pixel.

    Args:
        z_BKHW: scores before squashing.
        labels_BHW: class numbers of any height and width, resized to the grid by nearest neighbour.
        reliability: `bce_sigmoid` is the binary cross-entropy of each class; `bce_softmax` the same with softmax's
            probabilities; `ce_pixel` assigns a pixel's softmax cross-entropy to all its classes.

    Returns:
        Float32 [B, K, H, W], at least 0; 0 where the label is IGNORE.
    """
    z = z_BKHW.float()
    classes_BHW = labels_at(labels_BHW, z.shape[-2:])
    valid = (classes_BHW != IGNORE).unsqueeze(1)
    classes = classes_BHW.unsqueeze(1).masked_fill(~valid, 0).long()
    if reliability == "ce_pixel":
        entropy = F.cross_entropy(z, classes.squeeze(1), reduction="none").unsqueeze(1).expand_as(z)
    elif reliability == "bce_softmax":
        present, absent = _log_softmax_and_rest(z)
        entropy = -absent.scatter(1, classes, present.gather(1, classes))
    else:  # log(1 + exp(-z)) of the label's class, log(1 + exp(z)) of the others: no probability is ever rounded to 1
        entropy = F.softplus(z.scatter(1, classes, -z.gather(1, classes)))
    return entropy.masked_fill(~valid, 0.0)


def _log_softmax_and_rest(z: Tensor) -> tuple[Tensor, Tensor]:
    """Compute log p and log(1 - p), p the softmax over classes; both are exact also where p rounds to 1."""
    total = z.logsumexp(dim=1, keepdim=True)
    log_p = z - total
    largest = torch.zeros_like(z, dtype=torch.bool).scatter_(1, z.argmax(dim=1, keepdim=True), True)
    others = z.masked_fill(largest, -torch.inf).logsumexp(dim=1, keepdim=True) - total
    small = torch.log1p(-log_p.masked_fill(largest, -1.0).exp())  # p <= 1/2 of every class but the largest
    return log_p, torch.where(largest, others, small)


def mix(
    student_z: Tensor, teacher_z: Tensor, student_entropy: Tensor, teacher_entropy: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute S and zhat of Eq. 6-7 from scores and their H, all [B, K, H, W]."""
    student_part, teacher_part = student_entropy + LEAST_ENTROPY, teacher_entropy + LEAST_ENTROPY
    share = student_part / (student_part + teacher_part)
    return share, torch.lerp(student_z.float(), teacher_z.float(), share)


def evaluate(
    student_entropy: Tensor, hybrid_entropy: Tensor, valid_B1HW: Tensor, axis: Axis = "space"
) -> tuple[Tensor, Tensor]:
    """Compute dH and W of Eq. 8-9 from H of the student's and the mixed scores, all [B, K, H, W]."""
    gain = (student_entropy - hybrid_entropy).relu()
    # The lowest finite number, not -inf: a softmax over only -inf is NaN, and so is its gradient.
    urgency = (student_entropy + gain).masked_fill(~valid_B1HW, torch.finfo(torch.float32).min)
    shared = urgency.flatten(2).softmax(dim=2).view_as(urgency) if axis == "space" else urgency.softmax(dim=1)
    return gain, shared.masked_fill(~valid_B1HW, 0.0)


def knowledge_mixing(
    student_z_BKHW: Tensor, teacher_z_BKHW: Tensor, labels_BHW: Tensor, reliability: Reliability = "bce_sigmoid"
) -> tuple[Tensor, Tensor]:
    """Mix both networks' scores by their reliability (KMM, Eq. 5-7); differentiable.

    Args:
        student_z_BKHW: the student's projected scores.
        teacher_z_BKHW: the teacher's, on the same grid.
        labels_BHW: class numbers of any height and width, resized to the grid by nearest neighbour.
        reliability: the reading of Eq. 5, see `per_class_entropy`.

    Returns:
        S, the teacher's share in [0, 1] (1/2 where the label is IGNORE), and zhat, both float32 [B, K, H, W].
    """
    student_entropy, teacher_entropy = (
        per_class_entropy(z, labels_BHW, reliability) for z in (student_z_BKHW, teacher_z_BKHW)
    )
    return mix(student_z_BKHW, teacher_z_BKHW, student_entropy, teacher_entropy)


def knowledge_evaluation(
    student_z_BKHW: Tensor,
    hybrid_z_BKHW: Tensor,
    labels_BHW: Tensor,
    reliability: Reliability = "bce_sigmoid",
    axis: Axis = "space",
) -> tuple[Tensor, Tensor]:
    """Weight pixels by the student's entropy and the gain of the mixed scores (KEM, Eq. 8-9); differentiable.

    Args:
        student_z_BKHW: the student's projected scores.
        hybrid_z_BKHW: zhat of `knowledge_mixing`.
        labels_BHW: class numbers of any height and width, resized to the grid by nearest neighbour.
        reliability: the reading of Eq. 5, see `per_class_entropy`.
        axis: `space` normalises the weights of a class over an image's valid pixels; `class` those of a pixel over its
            classes.

    Returns:
        dH, at least 0, and W, 0 where the label is IGNORE; both float32 [B, K, H, W].
    """
    student_entropy, hybrid_entropy = (
        per_class_entropy(z, labels_BHW, reliability) for z in (student_z_BKHW, hybrid_z_BKHW)
    )
    return evaluate(student_entropy, hybrid_entropy, valid_pixels(labels_BHW, student_z_BKHW.shape[-2:]), axis)


# One argument for each symbol of the equation.
def transfer_loss(
    student_z_BKHW: Tensor,
    hybrid_z_BKHW: Tensor,
    weights_BKHW: Tensor,
    valid_B1HW: Tensor,
    temperature: float = 1.0,
    form: Form = "bernoulli",
    axis: Axis = "space",
) -> Tensor:
    """Eq. 10: the weighted cross-entropy of the student's scores with the mixed ones.

    Args:
        student_z_BKHW: Z_s.
        hybrid_z_BKHW: Zhat, the target.
        weights_BKHW: W, 0 where a pixel does not count.
        valid_B1HW: whether it counts.
        temperature: tau.
        form: `bernoulli` has both sides of the sigmoid's cross-entropy, `literal` only the printed side, `softmax` is
            the cross-entropy over classes.
        axis: what W sums to 1 over.

    Returns:
        A float32 scalar: the sum over `axis`, the mean over the rest (batch and classes, or valid pixels).
    """
    student, target = student_z_BKHW.float() / temperature, hybrid_z_BKHW.float() / temperature
    if form == "bernoulli":
        cost = F.binary_cross_entropy_with_logits(student, target.sigmoid(), reduction="none")
    elif form == "softmax":
        cost = -target.softmax(dim=1) * student.log_softmax(dim=1)
    else:
        cost = -target.sigmoid() * F.logsigmoid(student)
    B, K = student.shape[:2]
    count = B * K if axis == "space" else valid_B1HW.sum().clamp_min(1)
    return (weights_BKHW * cost).sum() / count


def projector_loss(entropy_BKHW: Tensor, labels_BHW: Tensor, reliability: Reliability = "bce_sigmoid") -> Tensor:
    """Compute a projector's loss: H summed over classes (`ce_pixel`: a single value), mean over valid pixels."""
    copies = entropy_BKHW.shape[1] if reliability == "ce_pixel" else 1
    return entropy_BKHW.sum() / (copies * valid_pixels(labels_BHW, entropy_BKHW.shape[-2:]).sum().clamp_min(1))


def present_classes(labels_BHW: Tensor, num_classes: int) -> Tensor:
    """Return 1 for classes that an image has a valid pixel of, otherwise 0: float32 [B, K, 1, 1]."""
    classes = labels_BHW.masked_fill(labels_BHW == IGNORE, num_classes).flatten(1).long()
    present = torch.zeros(len(classes), num_classes + 1, device=classes.device).scatter_(1, classes, 1.0)
    return present[:, :num_classes, None, None]
