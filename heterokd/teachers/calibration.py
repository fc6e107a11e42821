"""Calibration of a teacher: the temperature that fits its probabilities to val, and its confidence on train and val.

Temperature scaling: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017,
https://arxiv.org/abs/1706.04599. A teacher that is far more confident on its training images than on val has memorised
them: there, its outputs say little more than the labels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

TEMPERATURES = (0.05, 20.0)
"""Range of the temperature; predictions that are all right, or all uniform, have no optimum."""

STEPS = 60
"""Steps of the golden-section search: more than float32 can tell apart."""


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature within `TEMPERATURES` with the lowest cross-entropy of logits [N, K] and labels [N]."""

    def loss(inverse: float) -> float:  # convex in the inverse temperature
        return float(F.cross_entropy(logits.double() * inverse, labels))

    golden = (5**0.5 - 1) / 2
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    for _ in range(STEPS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return 2 / (low + high)


def confidence(logits: Tensor) -> float:
    """Return the mean of the largest probability of logits [N, K]."""
    return float(logits.softmax(dim=1).amax(dim=1).mean())
