"""Random numbers as a pure function of their use, from a counter-based generator.

Philox 4x32-10; Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The counter is
(index, view, block, stream), and the key is a hash of the generator's name; there is no state.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from heterokd.datasets.views.policy import AugmentPolicy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Draws = dict[str, NDArray[np.float64]]
"""Uniform draws in (0, 1), [B] for each name."""

# Streams: the fourth word of the counter, so that different uses of a key have different numbers.
STREAM_VIEW, STREAM_ORDER, STREAM_TURN, STREAM_OPERATION, STREAM_NOISE, STREAM_MIX = range(6)

# The position of a draw does not depend on the policy; four draws are one Philox block.
DRAWS = (
    *("scale", "ratio", "crop_x", "crop_y"),
    *("translate_x", "translate_y", "rotation", "flip"),
    *("brightness", "contrast", "saturation", "erase_y"),
    *("erase", "erase_area", "erase_ratio", "erase_x"),
)
# A block that is drawn only for policies with `hue`.
LATER_DRAWS = ("hue",)

MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Compute four random 32-bit words for each counter (Philox 4x32-10).

    Args:
        counter: [..., 4] words below 2**32.
        key: two words below 2**32.

    Returns:
        [..., 4] words below 2**32, in 64-bit integers.
    """
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    shape = counter.shape
    words = np.ascontiguousarray(counter.reshape(-1, 4).T)
    even, odd = words[0::2], words[1::2]  # words 0 and 2, words 1 and 3: [2, N]
    multipliers = MULTIPLIERS[:, None]
    for keys in _round_keys(key):
        product = even * multipliers
        even = (product >> half)[::-1] ^ odd ^ keys
        odd = product[::-1] & mask
    return np.stack((even[0], odd[0], even[1], odd[1]), axis=-1).reshape(shape)


@lru_cache(maxsize=256)
def _round_keys(key: tuple[int, int]) -> NDArray[np.uint64]:
    """Return the key of each round, [10, 2, 1]."""
    rounds = [[(word + turn * step) & 0xFFFFFFFF for word, step in zip(key, WEYL, strict=True)] for turn in range(10)]
    return np.array(rounds, np.uint64)[:, :, None]


def philox_key(*parts: object) -> tuple[int, int]:
    """Hash the parts of a generator's name, such as a policy's hash and a seed, into its key."""
    digest = hashlib.sha256(":".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


@lru_cache(maxsize=64)
def view_key(policy: AugmentPolicy, seed: int) -> tuple[int, int]:
    """Return the key of a policy's views."""
    return philox_key(policy.hash, seed)


def random_words(
    key: tuple[int, int], stream: int, index: NDArray[np.int64], number: NDArray[np.int64] | int, blocks: int = 1
) -> NDArray[np.uint64]:
    """Return random 32-bit words [N, 4 * blocks] for positions `index` [N]; `number` is a view or an epoch."""
    counter = np.empty((len(index), blocks, 4), np.uint64)
    counter[..., 0] = np.asarray(index, np.uint64)[:, None]
    counter[..., 1] = np.asarray(number, np.uint64)[..., None]
    counter[..., 2] = np.arange(blocks, dtype=np.uint64)
    counter[..., 3] = stream
    return philox(counter, key).reshape(len(index), 4 * blocks)


def uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Convert random words to numbers in (0, 1)."""
    return np.asarray((words.astype(np.float64) + 0.5) / 2.0**32)


def permutation(length: int, number: int, *seeds: object) -> NDArray[np.int64]:
    """Return a seeded permutation, the same on every machine and with every version of numpy.

    Args:
        length: number of elements.
        number: number of the permutation, such as an epoch or a class.
        seeds: parts of the generator's name, see `philox_key`.
    """
    words = random_words(philox_key("order", *seeds), STREAM_ORDER, np.arange(length), number)
    return np.argsort((words[:, 0] << np.uint64(32)) | words[:, 1], kind="stable").astype(np.int64)


def view_draws(policy: AugmentPolicy, seed: int, index: NDArray[np.int64], view: NDArray[np.int64] | int) -> Draws:
    """Return the uniform draws in (0, 1) of each view, [B] for each name of `DRAWS` (and of `LATER_DRAWS`)."""
    names = (*DRAWS, *LATER_DRAWS) if policy.hue else DRAWS
    words = random_words(view_key(policy, seed), STREAM_VIEW, index, view, blocks=-(-len(names) // 4))
    # A contiguous row for each name.
    return dict(zip(names, np.ascontiguousarray(uniform(words).T), strict=False))


def to_device(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """Move a small array to a device, without waiting for a GPU."""
    import torch  # lazily: experiments are checked without torch

    return torch.from_numpy(values).to(device, non_blocking=True)


def spread(draw: NDArray[np.float64], size: float) -> NDArray[np.float64]:
    """Map draws in (0, 1) to (-size, size)."""
    return (2 * draw - 1) * size


def between(draw: NDArray[np.float64], bounds: tuple[float, float]) -> NDArray[np.float64]:
    """Map draws in (0, 1) to the range between two bounds."""
    return bounds[0] + draw * (bounds[1] - bounds[0])


def between_log(draw: NDArray[np.float64], bounds: tuple[float, float]) -> NDArray[np.float64]:
    """Map draws in (0, 1) to the range between two bounds, on a log scale."""
    return np.asarray(np.exp(between(draw, (float(np.log(bounds[0])), float(np.log(bounds[1]))))))
