"""Splits by group: all images of a patient, a video or a shop are in the same split."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from heterokd.datasets.views.random import permutation
from heterokd.errors import DataError


def groups_of(names: Sequence[str], pattern: str) -> list[str]:
    """Return the group of each path: the first group of a regular expression's match, or the whole match.

    Raises:
        DataError: a path does not match.
    """
    found = []
    for name in names:
        match = re.search(pattern, name)
        if match is None:
            raise DataError(f"data.group: {pattern!r} does not match {name!r}; every path needs a group, change it")
        found.append(match.group(1 if match.re.groups else 0) or "")
    return found


def grouped_split(
    labels: NDArray[np.int64], groups: Sequence[str], shares: Sequence[float], seed: int
) -> tuple[NDArray[np.int64], ...]:
    """Split positions into parts without dividing a group, each class close to its shares.

    Large groups are placed first, each where it leaves the classes closest to their shares; groups of equal size in a
    seeded order. The same on every machine.

    Args:
        labels: [N] class numbers.
        groups: group of each position.
        shares: share of each part; they sum to 1.
        seed: seed of the split.

    Raises:
        DataError: there are fewer groups than parts.
    """
    names, member_of = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < len(shares):
        raise DataError(f"data.group: makes {len(names)} group(s), too few for {len(shares)} splits; name smaller ones")
    counts = np.zeros((len(names), int(labels.max()) + 1))
    np.add.at(counts, (member_of, labels), 1)
    wanted = np.outer(shares, counts.sum(0))  # [parts, K]
    scale = 1 / np.maximum(counts.sum(0), 1)  # a rare class counts as much as a frequent one
    order = permutation(len(names), 0, "groups", seed)
    order = order[np.argsort(-counts.sum(1)[order], kind="stable")]
    part_of = np.zeros(len(names), np.int64)
    filled = np.zeros_like(wanted)
    for place, group in enumerate(order):
        empty = np.flatnonzero(filled.sum(1) == 0)
        left = len(order) - place
        choices = empty if left <= len(empty) else np.arange(len(shares))  # no part stays empty
        before = np.square((filled - wanted) * scale).sum(1)
        after = np.square((filled + counts[group] - wanted) * scale).sum(1)
        part = choices[np.argmin((after - before)[choices])]
        part_of[group] = part
        filled[part] += counts[group]
    return tuple(np.flatnonzero(part_of[member_of] == part) for part in range(len(shares)))


def rounded_counts(total: int, shares: Sequence[float]) -> NDArray[np.int64]:
    """Round `total * shares` to positive integers that sum to `total`, largest remainders first."""
    exact = total * np.asarray(shares)
    counts = np.floor(exact + 1e-9).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    while counts.min() == 0:
        counts[counts.argmin()] += 1
        counts[counts.argmax()] -= 1
    return counts
