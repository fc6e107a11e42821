"""Queues of unit vectors, one of pixels and one of means for each class: the memory of CIRKD."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heterokd.methods._random_words import random_words


class ClassQueues(nn.Module):
    """A ring buffer of unit vectors per class, [K, S, D] in half precision, and the next position to write, [K].

    The buffer holds their bits as bytes: what copies buffers between workers under autocast on a processor takes no
    half precision.

    Args:
        num_classes: K.
        size: S.
        width: D.
    """

    bits: Tensor
    pointers: Tensor

    def __init__(self, num_classes: int, size: int, width: int) -> None:
        super().__init__()
        vectors = F.normalize(torch.randn(num_classes, size, width), dim=2).half()
        self.register_buffer("bits", vectors.view(torch.uint8))
        self.register_buffer("pointers", torch.zeros(num_classes, dtype=torch.long))

    @property
    def vectors(self) -> Tensor:
        """The vectors, a view of `bits`."""
        return self.bits.view(torch.float16)

    @torch.no_grad()
    def push(self, vectors_ND: Tensor, classes_N: Tensor) -> None:
        """Remember vectors [N, D] in their order; those of class K (no class) are left out."""
        num_classes, size = self.vectors.shape[:2]
        classes, order = classes_N.sort(stable=True)
        rank, counts_K = rank_in_class(classes, num_classes)
        # Of more vectors than a ring holds, the last stay: written twice, a place would keep either.
        kept = classes < num_classes
        kept = kept & (rank >= torch.cat((counts_K - size, counts_K[:1]))[classes])
        classes, rank, order = classes[kept], rank[kept], order[kept]
        self.vectors[classes, (self.pointers[classes] + rank) % size] = vectors_ND[order].to(self.vectors.dtype)
        self.pointers.copy_((self.pointers + counts_K) % size)

    @torch.no_grad()
    def sample(self, count: int, progress: float, stream: int) -> Tensor:
        """Return unit vectors [K * count, D] in float32: the same `count` places of every ring, at most all.

        Args:
            count: number of vectors per class.
            progress: fraction of the training that is done, so that every step has other positions.
            stream: number that distinguishes the draws of a step.
        """
        num_places = self.vectors.shape[1]
        words = random_words(torch.tensor([stream], device=self.vectors.device), progress, num_places)[0]
        places = words.argsort(stable=True)[:count]
        return self.vectors[:, places].flatten(0, 1).float()


def rank_in_class(sorted_classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return each element's rank in its class, [N], and the class counts, [K], of classes in ascending order."""
    numbers = torch.arange(num_classes + 1, device=sorted_classes.device)
    starts = torch.searchsorted(sorted_classes, numbers)
    rank = torch.arange(len(sorted_classes), device=sorted_classes.device) - starts[sorted_classes]
    return rank, starts.diff()
