"""Random numbers that are a function of image, progress and place, so that a resumed training draws the same ones."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 2**32 - 1
WORDS_AT_ONCE = 2**16
"""Words that fit into a processor's cache."""


def random_words(index: Tensor, progress: float, count: int) -> Tensor:
    """Return numbers below 2^32, [B, count], that depend on nothing but their image, progress and place.

    Args:
        index: [B] positions in the training split.
        progress: fraction of the training that is done, in [0, 1]; at most 2^32 distinct steps.
        count: numbers per image.
    """
    return _crossed(*_seeds(index, progress, count)).long() & WORD


def _seeds(index: Tensor, progress: float, count: int) -> tuple[Tensor, Tensor]:
    """Return the inputs of `_crossed`: a word per place [count] and per image [B, 1].

    Words are the bits of int32, whose products wrap: half as much to move as in int64.
    """
    image_B1 = _hash(_hash(index.to(torch.int32)) ^ _signed(round(progress * WORD))).unsqueeze(1)
    return _hash(torch.arange(count, dtype=torch.int32, device=index.device)), image_B1


def _crossed(place: Tensor, image_B1: Tensor) -> Tensor:
    """Combine the words of images [B, 1] and places [count] to [B, count]."""
    return _hash(place ^ image_B1)


def draw_counts(index: Tensor, progress: float, count: int, choices_B1: Tensor, width: int) -> Tensor:
    """Count how often each number occurs if each image draws `count` numbers below its limit.

    Args:
        index: [B] positions in the training split.
        progress: fraction of the training that is done.
        count: draws of each image: `random_words` modulo the limit.
        choices_B1: the limits, [B, 1], at least 1.
        width: the largest possible limit.

    Returns:
        [B, width], float32.
    """
    place, image_B1 = _seeds(index, progress, count)
    counts_BN = torch.zeros(len(index), width, device=index.device)
    unit = torch.ones((), device=index.device)
    # On a CPU a few images at a time, so that their words stay in the cache.
    some = max(1, WORDS_AT_ONCE // count) if index.is_cpu else len(index)
    for start in range(0, len(index), some):
        image_b1, choices_b1 = image_B1[start : start + some], choices_B1[start : start + some].double()
        # The remainder in float64, which holds every product here exactly: several times as fast as in integers.
        words_bK = _crossed(place, image_b1).view(torch.uint32).double()
        drawn_bK = words_bK.addcmul_((words_bK / choices_b1).floor_(), choices_b1, value=-1).long()
        counts_BN[start : start + some].scatter_add_(1, drawn_bK, unit.expand(drawn_bK.shape))
    return counts_BN


def _hash(words: Tensor) -> Tensor:
    """Scramble 32-bit words kept in int32 (`lowbias32` of https://github.com/skeeto/hash-prospector)."""
    words = words + _signed(0x9E3779B9)  # the hash alone keeps 0: the first image, the first place
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words.bitwise_xor_(_shifted(words, shift)).mul_(_signed(factor))
    return words.bitwise_xor_(_shifted(words, 16))


def _shifted(words: Tensor, shift: int) -> Tensor:
    """Shift words right logically, filling with zeros instead of the sign."""
    return (words >> shift).bitwise_and_((1 << (32 - shift)) - 1)


def _signed(word: int) -> int:
    """Return the int32 with a word's bits."""
    return (word + 2**31) % 2**32 - 2**31
