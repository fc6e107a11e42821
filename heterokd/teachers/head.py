"""Solve a network's classifier on its frozen features: multinomial logistic regression by L-BFGS.

Features of the training images are computed once, of the plain image and, where the views flip, of its mirror image.
They are standardised for the regression, and the solution is folded back into the classifier. The weight of the L2
penalty is that of `PENALTIES` with the lowest cross-entropy on a part of train that is held out by class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from heterokd.datasets.io.loaders import open_split
from heterokd.datasets.io.split import Split, stratified_split
from heterokd.networks.network import AnyNetwork
from heterokd.outputs import Signal
from heterokd.training.evaluation import inference
from heterokd.training.precision import Precision

PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Weights of half the squared norm of the classifier's weights, per image, on standardised features."""

HELD_OUT = 0.2
"""Share of train on which the penalty is chosen."""

WORSE = 1.1
"""Ratio of held-out cross-entropies above which smaller penalties are not tried."""

ITERATIONS, GRADIENT, HISTORY = 100, 1e-5, 10
"""Of L-BFGS: maximum iterations, the gradient's largest component at which it has converged, and remembered steps."""

EPSILON = 1e-6
"""Standard deviation below which a feature counts as constant."""

FEATURE_BATCH = 64
FEATURE_BYTES = 2**31
"""Maximum size of the features; of a larger training split, evenly spaced images are used."""


@dataclass(frozen=True)
class SolvedHead:
    """A solved classifier.

    Attributes:
        weight: [K, D].
        bias: [K].
        penalty: weight of the L2 penalty.
    """

    weight: Tensor
    bias: Tensor
    penalty: float


def linear_head(network: AnyNetwork) -> nn.Linear | None:
    """Return the network's classifier if it is a single linear layer on the embedding, otherwise None."""
    head = network.head
    is_linear = type(head) is nn.Linear and head.in_features == network.spec.embedding_dim
    return head if is_linear and isinstance(head, nn.Linear) else None


def solve_head(
    network: AnyNetwork,
    split: Split,
    *,
    flip: bool,
    seed: int,
    precision: Precision,
    importance: NDArray[np.float32] | None = None,
) -> SolvedHead:
    """Solve the classifier of a network on its frozen features; the network is not changed.

    Args:
        network: network whose embedding is read, on its device.
        split: training images.
        flip: also use the mirror image of each image.
        seed: seed of the part that is held out.
        precision: number format of the forward pass.
        importance: [N] weight of each image, see `Draws.importance`; None: all are 1.
    """
    row = 4 * network.spec.embedding_dim * (2 if flip else 1)
    step = -(-len(split) * row // FEATURE_BYTES)
    index = np.arange(0, len(split), step)
    chosen = split.chosen(index)
    weights = None if importance is None else torch.from_numpy(importance[index])
    features = frozen_features(network, chosen, flip=flip, precision=precision)
    return solve(features, torch.from_numpy(chosen.labels).long(), network.spec.num_classes, seed, weights)


def frozen_features(network: AnyNetwork, split: Split, *, flip: bool, precision: Precision) -> Tensor:
    """Return the embedding of plain images, and of their mirror images with `flip`: [V, N, D] float32 on the CPU."""
    device = next(network.parameters()).device
    views: list[list[Tensor]] = [[], []] if flip else [[]]
    with inference(network), precision.autocast(device):
        for batch in open_split(split, network.spec.num_classes, FEATURE_BATCH, device=device):
            for view, images in zip(views, (batch.images, batch.images.flip(3)), strict=False):
                view.append(network(images, Signal.EMBEDDING).embedding.float().cpu())
    return torch.stack([torch.cat(view) for view in views])


def solve(features: Tensor, labels: Tensor, num_classes: int, seed: int, weights: Tensor | None = None) -> SolvedHead:
    """Solve the regression with the best penalty on a held-out part of the images.

    Args:
        features: [V, N, D] features of V views of each image.
        labels: [N] class numbers.
        num_classes: K.
        seed: seed of the part that is held out.
        weights: [N] weight of each image; None: all are 1.
    """
    penalty = _best_penalty(features, labels, num_classes, seed, weights)
    mean, std = _statistics(features)
    start = torch.zeros(num_classes, features.shape[2] + 1)
    weight, bias = _regression((features - mean) / std, labels, start, penalty, weights)
    return SolvedHead(weight / std, bias - weight @ (mean / std), penalty)


def _best_penalty(features: Tensor, labels: Tensor, num_classes: int, seed: int, weights: Tensor | None) -> float:
    """Return the penalty with the lowest cross-entropy on held-out plain images; the largest if there are none."""
    fitted, held_out = _held_out(labels.numpy(), seed)
    if len(held_out) == 0:
        return PENALTIES[-1]
    mean, std = _statistics(features[:, fitted])
    known, unknown = (features[:, fitted] - mean) / std, (features[0, held_out] - mean) / std
    start, losses = torch.zeros(num_classes, features.shape[2] + 1), dict[float, float]()
    for penalty in reversed(PENALTIES):  # each starts from the solution of the next larger penalty
        of_fitted = None if weights is None else weights[fitted]
        weight, bias = _regression(known, labels[fitted], start, penalty, of_fitted)
        start = torch.cat([weight, bias[:, None]], dim=1)
        of_held_out = None if weights is None else weights[held_out]
        losses[penalty] = float(_cross_entropy(unknown @ weight.T + bias, labels[held_out], of_held_out))
        best = min(losses, key=lambda penalty: losses[penalty])
        if losses[penalty] > WORSE * losses[best]:  # smaller penalties overfit more, and take longest
            break
    return best


def _held_out(labels: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split positions into those that are fitted and those held out; a class with one image is not held out."""
    counts = np.bincount(labels)
    several = np.flatnonzero(counts[labels] > 1)
    if len(several) == 0:
        return np.arange(len(labels)), several
    _, held_out = stratified_split(labels[several], (1 - HELD_OUT, HELD_OUT), seed)
    return np.setdiff1d(np.arange(len(labels)), several[held_out]), several[held_out]


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each feature, [D]; 1 for a feature that does not vary."""
    std, mean = torch.std_mean(features.flatten(0, 1), dim=0)
    return mean, torch.where(std > EPSILON, std, 1.0)


def _cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return F.cross_entropy(logits, labels)
    return (weights * F.cross_entropy(logits, labels, reduction="none")).mean()


def _regression(
    features: Tensor, labels: Tensor, start: Tensor, penalty: float, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return weight [K, D] and bias [K] that minimise cross-entropy + penalty / 2 * ||weight||^2.

    Args:
        features: [V, N, D], standardised.
        labels: [N].
        start: [K, D + 1] initial weight and bias.
        penalty: weight of the L2 penalty.
        weights: [N] weight of each image; None: all are 1.
    """
    rows, classes = features.flatten(0, 1), labels.repeat(len(features))
    of_rows = None if weights is None else weights.repeat(len(features))
    weight, bias = start[:, :-1].clone().requires_grad_(), start[:, -1:].clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        tolerance_grad=GRADIENT,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )

    def loss() -> float:
        solver.zero_grad()
        value = _cross_entropy(rows @ weight.T + bias.T, classes, of_rows) + penalty / 2 * weight.square().sum()
        torch.autograd.backward(value)
        return float(value.detach())

    solver.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach().squeeze(1)
