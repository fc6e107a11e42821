"""Minibatch CKA: how alike two networks' maps are, whatever their widths, from batch after batch.

Nguyen, Raghu, Kornblith: "Do Wide and Deep Networks Learn the Same Things?", ICLR 2021, https://arxiv.org/abs/2010.15327

    K~, L~ Gram matrices of the same n images in two networks with their diagonals set to 0
    HSIC_1(K, L) = [ tr(K~ L~) + (1'K~1 1'L~1) / ((n-1)(n-2)) - 2/(n-2) 1'K~L~1 ] / (n (n-3))                   Eq. 3
    CKA = sum_b HSIC_1(K_b, L_b) / sqrt( sum_b HSIC_1(K_b, K_b) sum_b HSIC_1(L_b, L_b) )   over batches b       Eq. 2

HSIC_1 is unbiased (Song et al., Feature Selection via Dependence Maximization, JMLR 2012), so the mean over small
batches tends to the value of all images at once. All is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FEWEST = 4
"""Images of a batch below which HSIC_1 is not defined."""


def gram(features: Tensor) -> Tensor:
    """Inner products [B, B] of features [B, ...], in float64, with a diagonal of zeros."""
    flat = features.flatten(1).double()
    return (flat @ flat.T).fill_diagonal_(0)


def unbiased_hsic(first: Tensor, second: Tensor) -> Tensor:
    """HSIC_1 of two matrices that `gram` made of the same B >= 4 images; a scalar."""
    n = len(first)
    if n < FEWEST:
        raise ValueError(f"HSIC_1 needs at least {FEWEST} images, got {n}")
    of_first, of_second = first.sum(dim=1), second.sum(dim=1)
    trace = (first * second).sum()  # both are symmetric
    whole = of_first.sum() * of_second.sum() / ((n - 1) * (n - 2))
    return (trace + whole - 2 / (n - 2) * (of_first @ of_second)) / (n * (n - 3))


class MinibatchCKA:
    """CKA of every map of one network with every map of another.

    Args:
        rows: maps of the first network.
        columns: maps of the second.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self._cross = torch.zeros(rows, columns, dtype=torch.float64)
        self._own = (torch.zeros(rows, dtype=torch.float64), torch.zeros(columns, dtype=torch.float64))

    def add(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Take in one batch: maps [B, ...] of both networks; one of fewer than `FEWEST` images says nothing."""
        if len(first[0]) < FEWEST:
            return
        grams = ([gram(one) for one in first], [gram(one) for one in second])
        for own, some in zip(self._own, grams, strict=True):
            own += torch.stack([unbiased_hsic(one, one) for one in some]).cpu()
        for row, one in enumerate(grams[0]):
            for column, other in enumerate(grams[1]):
                self._cross[row, column] += unbiased_hsic(one, other).cpu()

    def matrix(self) -> Tensor:
        """[rows, columns]: 1 for maps that are alike up to rotation and scale; about 0, and slightly below at times,
        for unrelated ones; 0 where a map does not depend on the image."""
        scale = (self._own[0].clamp(min=0)[:, None] * self._own[1].clamp(min=0)).sqrt()
        return torch.where(scale > 0, self._cross / scale.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
