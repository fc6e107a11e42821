"""Mixup and cutmix: a view of two images, with shares of two classes as its label.

Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, https://arxiv.org/abs/1710.09412; Yun et al.,
"CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019,
https://arxiv.org/abs/1905.04899. With both, each applies to half of the views, as in timm.

The partner image, its view and its share are drawn from the view's generator, not from the batch. So a mixed view too
is a function of (index, view).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from heterokd.datasets.views.color import column
from heterokd.datasets.views.erasing import rectangles
from heterokd.datasets.views.policy import AugmentPolicy
from heterokd.datasets.views.random import STREAM_MIX, random_words, to_device, uniform, view_key
from heterokd.outputs import UNLABELLED

# Three Philox blocks; the position of a draw never changes.
MIX_DRAWS = (
    *("partner", "partner_view", "kind", "piece_x"),
    *("piece_y", "radius", "angle", "boost"),
    *("partner_boost",),
)


@dataclass(frozen=True, eq=False)
class Mix:
    """How each view of a batch is mixed.

    Attributes:
        index: [B] the partners' positions in the training split.
        view: [B] the partners' view numbers.
        pieces: [B] whether a piece of the partner is inserted (cutmix), not blended (mixup).
        share: [B] drawn share of the view's image, as opposed to its partner's.
        centre: [2, B] x and y of the piece's centre, as shares of the sides.
    """

    index: NDArray[np.int64]
    view: NDArray[np.int64]
    pieces: NDArray[np.bool_]
    share: NDArray[np.float64]
    centre: NDArray[np.float64]


def draw_mix(
    policy: AugmentPolicy,
    index: NDArray[np.int64],
    view: NDArray[np.int64] | int,
    count: int,
    seed: int = 0,
    unlabelled: int = 0,
) -> Mix:
    """Draw the partners of views, and their shares.

    A labelled image has a labelled partner, and an unlabelled image an unlabelled one.

    Args:
        policy: augmentation policy that mixes images.
        index: [B] positions of the images in the training split.
        view: [B] view numbers, or one for all images.
        count: number of images of the training split; an image may be its own partner.
        seed: seed of the views.
        unlabelled: number of images without a label, the last of the split.
    """
    words = random_words(view_key(policy, seed), STREAM_MIX, index, view, blocks=3)
    draws = dict(zip(MIX_DRAWS, np.ascontiguousarray(uniform(words).T), strict=False))
    pieces = draws["kind"] < (0.5 if policy.mixup else 1.0) if policy.cutmix else np.zeros(len(words), np.bool_)
    concentration = np.where(pieces, policy.cutmix, policy.mixup)
    has_label = (index < count - unlabelled) | (unlabelled == 0)
    among = np.where(has_label, count - unlabelled, unlabelled).astype(np.uint64)
    partner = ((words[:, MIX_DRAWS.index("partner")] * among) >> np.uint64(32)).astype(np.int64)
    return Mix(
        index=np.where(has_label, partner, count - unlabelled + partner),
        view=(words[:, MIX_DRAWS.index("partner_view")] >> np.uint64(1)).astype(np.int64),
        pieces=pieces,
        share=symmetric_beta(concentration, *(draws[name] for name in ("radius", "angle", "boost", "partner_boost"))),
        centre=np.stack((draws["piece_x"], draws["piece_y"])),
    )


def symmetric_beta(
    concentration: NDArray[np.float64],
    radius: NDArray[np.float64],
    angle: NDArray[np.float64],
    boost: NDArray[np.float64],
    partner_boost: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Draw from Beta(a, a), for any a > 0, with four uniform draws, in closed form and without rejection.

    Ulrich's formula gives Beta(a + 1, a + 1) as the quotient of two Gamma(a + 1) variables; multiplied by a uniform
    draw to the power 1 / a, each becomes a Gamma(a) variable (Devroye, Non-Uniform Random Variate Generation,
    1986, chapter IX).
    """
    above = concentration + 1
    larger = (1 + np.sqrt(1 - radius ** (2 / (2 * above - 1))) * np.cos(2 * np.pi * angle)) / 2
    odds = np.log(larger) - np.log1p(-larger) + (np.log(boost) - np.log(partner_boost)) / concentration
    return np.asarray(0.5 + 0.5 * np.tanh(odds / 2))


def mix_views(views: Tensor, partners: Tensor, mix: Mix) -> tuple[Tensor, NDArray[np.float64]]:
    """Mix views with their partners.

    Args:
        views: [B, 3, H, W] float in [0, 1].
        partners: views [B, 3, H, W] of the partners in `mix`.
        mix: see `draw_mix`.

    Returns:
        Mixed views [B, 3, H, W] in [0, 1], and the share [B] of the first image in each: with cutmix the share of its
        remaining pixels. A piece has the drawn area, its centre anywhere in the view, and is cut at the border.
    """
    height, width = views.shape[2:]
    side = np.sqrt(1 - mix.share) / 2
    left, top = mix.centre - side
    right, bottom = mix.centre + side
    inside = rectangles(left, top, right, bottom, (height, width)) & mix.pieces[:, None, None, None]
    share = np.where(mix.pieces, 1 - inside.sum(axis=(1, 2, 3)) / (height * width), mix.share)
    # Views with an inserted piece are not blended.
    weight = column(np.where(mix.pieces, 1.0, mix.share), views)
    mixed = (views * weight).add_(partners * (1 - weight)).clamp_(0, 1)
    if mix.pieces.any():
        mixed = torch.where(to_device(inside, views.device), partners, mixed)
    return mixed, share


def mix_labels(
    labels: NDArray[np.int64], partners: NDArray[np.int64], share: NDArray[np.float64], num_classes: int
) -> Tensor:
    """Return the class shares [B, K] float32 of mixed views; they sum to 1, or to 0 for images without labels.

    Args:
        labels: [B] class numbers; `UNLABELLED` for an image without a label, whose partner has none either.
        partners: [B] class numbers of the partners.
        share: [B] share of the first image in each view.
        num_classes: K.
    """
    weight = torch.from_numpy(share)[:, None]
    has_label = torch.from_numpy(labels != UNLABELLED)[:, None]
    known = (torch.from_numpy(np.where(classes == UNLABELLED, 0, classes)) for classes in (labels, partners))
    first, second = (F.one_hot(classes, num_classes).double() for classes in known)
    return ((first * weight + second * (1 - weight)) * has_label).float()
