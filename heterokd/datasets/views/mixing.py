"""Mixing: a view that shows two images, by mixup or by cutmix, and has shares of two classes.

Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, https://arxiv.org/abs/1710.09412; Yun et al.,
"CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019,
https://arxiv.org/abs/1905.04899. With both, each is half of the views, as timm's.

The partner comes from the same generator as the view, not from the batch: which image, which view of it, and how much.
So a mixed view is still named by (index, view), in any batch.
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
from heterokd.datasets.views.random import STREAM_MIX, as_numbers, random_words, to_device, uniform, view_key

# Three Philox blocks; a draw keeps its place.
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
        pieces: [B] whether a piece of the partner is put in (cutmix), not blended (mixup).
        share: [B] of the view that is its own image's, as drawn.
        middle: [2, B] x and y of the piece's middle, as shares of the sides.
    """

    index: NDArray[np.int64]
    view: NDArray[np.int64]
    pieces: NDArray[np.bool_]
    share: NDArray[np.float64]
    middle: NDArray[np.float64]


def draw_mix(
    policy: AugmentPolicy,
    index: NDArray[np.int64] | Tensor,
    view: NDArray[np.int64] | Tensor | int,
    count: int,
    seed: int = 0,
) -> Mix:
    """The partners of views, and how much of them is seen.

    Args:
        policy: one that mixes.
        index: [B] the images' positions in the training split.
        view: [B] view numbers, or one for all.
        count: images of the training split; partners are drawn from all of them, an image itself too.
        seed: of the views.
    """
    words = random_words(view_key(policy, seed), STREAM_MIX, as_numbers(index), as_numbers(view), blocks=3)
    draws = dict(zip(MIX_DRAWS, np.ascontiguousarray(uniform(words).T), strict=False))
    pieces = draws["kind"] < (0.5 if policy.mixup else 1.0) if policy.cutmix else np.zeros(len(words), np.bool_)
    concentration = np.where(pieces, policy.cutmix, policy.mixup)
    return Mix(
        index=((words[:, MIX_DRAWS.index("partner")] * np.uint64(count)) >> np.uint64(32)).astype(np.int64),
        view=(words[:, MIX_DRAWS.index("partner_view")] >> np.uint64(1)).astype(np.int64),
        pieces=pieces,
        share=symmetric_beta(concentration, *(draws[name] for name in ("radius", "angle", "boost", "partner_boost"))),
        middle=np.stack((draws["piece_x"], draws["piece_y"])),
    )


def symmetric_beta(
    concentration: NDArray[np.float64],
    radius: NDArray[np.float64],
    angle: NDArray[np.float64],
    boost: NDArray[np.float64],
    partner_boost: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Beta(a, a) of any a > 0 from four uniform draws, in closed form and without rejection.

    Ulrich's formula gives Beta(a + 1, a + 1) as the quotient of two Gamma(a + 1) variables; each becomes one of
    Gamma(a) when it is multiplied by a uniform draw to the power 1 / a (Devroye, Non-Uniform Random Variate Generation,
    1986, chapter IX).
    """
    above = concentration + 1
    larger = (1 + np.sqrt(1 - radius ** (2 / (2 * above - 1))) * np.cos(2 * np.pi * angle)) / 2
    odds = np.log(larger) - np.log1p(-larger) + (np.log(boost) - np.log(partner_boost)) / concentration
    return np.asarray(0.5 + 0.5 * np.tanh(odds / 2))


def mix_views(views: Tensor, partners: Tensor, mix: Mix) -> tuple[Tensor, NDArray[np.float64]]:
    """Mixed views.

    Args:
        views: [B, 3, H, W] float in [0, 1].
        partners: the views [B, 3, H, W] that `mix` names.
        mix: see `draw_mix`.

    Returns:
        [B, 3, H, W] in [0, 1], and the share [B] of each that is its own image's: where a piece is put in, that of the
        pixels left. A piece has the drawn area around a middle anywhere in the view, and is cut at the border.
    """
    height, width = views.shape[2:]
    side = np.sqrt(1 - mix.share) / 2
    left, top = mix.middle - side
    right, bottom = mix.middle + side
    inside = rectangles(left, top, right, bottom, (height, width)) & mix.pieces[:, None, None, None]
    share = np.where(mix.pieces, 1 - inside.sum(axis=(1, 2, 3)) / (height * width), mix.share)
    # A piece's pixels are the partner's alone, the others of that view its own.
    own = column(np.where(mix.pieces, 1.0, mix.share), views)
    mixed = (views * own).add_(partners * (1 - own)).clamp_(0, 1)
    if mix.pieces.any():
        mixed = torch.where(to_device(inside, views.device), partners, mixed)
    return mixed, share


def mix_labels(
    labels: NDArray[np.int64], partners: NDArray[np.int64], share: NDArray[np.float64], num_classes: int
) -> Tensor:
    """Class shares [B, K] float32 of mixed views; they sum to 1.

    Args:
        labels: [B] class numbers.
        partners: [B] class numbers of the partners.
        share: [B] of each view that is its own image's.
        num_classes: K.
    """
    own = torch.from_numpy(share)[:, None]
    first, second = (F.one_hot(torch.from_numpy(classes), num_classes).double() for classes in (labels, partners))
    return (first * own + second * (1 - own)).float()
