"""Minibatch CKA: similarity of the maps of two networks of any widths, accumulated over batches.

Nguyen, Raghu, Kornblith: "Do Wide and Deep Networks Learn the Same Things?", ICLR 2021, https://arxiv.org/abs/2010.15327

    K~, L~ Gram matrices of the same n images in two networks with their diagonals set to 0
    HSIC_1(K, L) = [ tr(K~ L~) + (1'K~1 1'L~1) / ((n-1)(n-2)) - 2/(n-2) 1'K~L~1 ] / (n (n-3))                   Eq. 3
    CKA = sum_b HSIC_1(K_b, L_b) / sqrt( sum_b HSIC_1(K_b, K_b) sum_b HSIC_1(L_b, L_b) )   over batches b       Eq. 2

HSIC_1 is unbiased (Song et al., Feature Selection via Dependence Maximization, JMLR 2012), so the mean over small
batches tends to the value of all images at once. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MIN_IMAGES = 4
"""Minimum number of images of a batch for which HSIC_1 is defined."""


def gram(features: Tensor) -> Tensor:
    """Return the inner products [B, B] of features [B, ...], in float64, with a diagonal of zeros."""
    flat = features.flatten(1).double()
    return (flat @ flat.T).fill_diagonal_(0)


def unbiased_hsic(first: Tensor, second: Tensor) -> Tensor:
    """Return HSIC_1, a scalar, of two matrices that `gram` made of the same B >= 4 images."""
    n = len(first)
    if n < MIN_IMAGES:
        raise ValueError(f"HSIC_1 needs at least {MIN_IMAGES} images, got {n}")
    row_sums, other_sums = first.sum(dim=1), second.sum(dim=1)
    trace = (first * second).sum()  # both are symmetric
    product = row_sums.sum() * other_sums.sum() / ((n - 1) * (n - 2))
    return (trace + product - 2 / (n - 2) * (row_sums @ other_sums)) / (n * (n - 3))


class MinibatchCKA:
    """CKA of every map of a network (`rows`) with every map of another network (`columns`)."""

    def __init__(self, rows: int, columns: int) -> None:
        self._cross = torch.zeros(rows, columns, dtype=torch.float64)
        self._rows = torch.zeros(rows, dtype=torch.float64)
        self._columns = torch.zeros(columns, dtype=torch.float64)

    def add(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Add a batch: maps [B, ...] of both networks; a batch of fewer than `MIN_IMAGES` images is skipped."""
        if len(first[0]) < MIN_IMAGES:
            return
        rows, columns = [gram(features) for features in first], [gram(features) for features in second]
        self._rows += torch.stack([unbiased_hsic(row, row) for row in rows]).cpu()
        self._columns += torch.stack([unbiased_hsic(column, column) for column in columns]).cpu()
        self._cross += torch.stack(
            [torch.stack([unbiased_hsic(row, column) for column in columns]) for row in rows]
        ).cpu()

    def matrix(self) -> Tensor:
        """Return [rows, columns]: 1 for maps that are equal up to rotation and scale, about 0 for unrelated maps.

        Values of unrelated maps may lie slightly below 0; the value is 0 where a map does not depend on the image.
        """
        scale = (self._rows.clamp(min=0)[:, None] * self._columns.clamp(min=0)).sqrt()
        return torch.where(scale > 0, self._cross / scale.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
