"""Images that each epoch draws, and the weight of each image in the task loss.

With `uniform` sampling an epoch draws each image once. With `balanced` sampling every class has the same number of
draws: the images of a class are passed through again and again, each pass in a new order, and an epoch goes on where
the last one ended. So an image of a rare class is drawn several times in an epoch, and some images of a frequent class
in none. The draws are a pure function of (seed, epoch).

With images without labels, each batch has a fixed number of them, and an epoch has as many batches as one over all
images. Labelled and unlabelled images are passed through separately, each pass in a new order, and an epoch goes on
where the last one ended.

The t-th draw of an image, counted from 0 since the training began, shows the view number of turn t (`TrainLoader`).
With `uniform` sampling of labelled images alone, this is the epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from heterokd.datasets.io.split import Split, Splits
from heterokd.datasets.views.random import permutation
from heterokd.errors import DataError, did_you_mean

Sampling = Literal["uniform", "balanced"]
ClassWeights = Literal["none", "inverse", "effective"] | Mapping[str, float]

EFFECTIVE_BETA = 0.999
"""Overlap of the images of a class, beta of Cui et al.; its paper's values are 0.9 to 0.9999."""


@dataclass(frozen=True)
class Mixture:
    """Images without labels in each batch.

    Attributes:
        images: number of images without labels; they follow the labelled images of the split.
        batch: number of images of a batch.
        part: number of images without labels in a batch.
    """

    images: int
    batch: int
    part: int

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """Whether each place of a batch [B] has a labelled image; any run of n places has their share of n, +- 1."""
        ends = np.arange(self.batch + 1) * (self.batch - self.part) // self.batch
        return np.diff(ends).astype(np.bool_)


@dataclass(frozen=True, eq=False)
class Draws:
    """Images that each epoch of a split draws.

    Attributes:
        labels: [N] class numbers of the labelled images.
        sampling: `uniform` or `balanced`, see the module.
        weights: [N] float32 weight of each image in the task loss, 1 on average over the draws; None: all are 1.
        mixture: images without labels that are drawn as well; None without.
    """

    labels: NDArray[np.int64]
    sampling: Sampling = "uniform"
    weights: NDArray[np.float32] | None = None
    mixture: Mixture | None = None

    def epoch(self, epoch: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the positions [N] that an epoch draws, in order, and the turn [N] of each draw."""
        count = len(self.labels)
        if self.mixture is not None:
            return self._mixed_epoch(self.mixture, epoch, seed)
        if self.sampling == "balanced":
            return self._balanced(count, epoch, seed)
        return permutation(count, epoch, seed), np.full(count, epoch, np.int64)

    def _balanced(self, count: int, epoch: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        classes = np.unique(self.labels)
        draws = -(-count // len(classes))
        pairs = [
            _walk(np.flatnonzero(self.labels == number), draws, epoch, ("balanced", number, seed)) for number in classes
        ]
        positions, turns = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        mixed = permutation(len(positions), epoch, seed)[:count]
        return positions[mixed], turns[mixed]

    def _mixed_epoch(self, mixture: Mixture, epoch: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        count, batch = len(self.labels), mixture.batch
        steps = max(1, (count + mixture.images) // batch)
        draws = steps * (batch - mixture.part)
        labelled = (
            self._balanced(draws, epoch, seed)
            if self.sampling == "balanced"
            else _walk(np.arange(count), draws, epoch, ("labelled", seed))
        )
        others = np.arange(count, count + mixture.images)
        unlabelled = _walk(others, steps * mixture.part, epoch, ("unlabelled", seed))
        is_labelled = np.tile(mixture.labelled, steps)
        drawn = np.empty((2, steps * batch), np.int64)
        drawn[:, is_labelled], drawn[:, ~is_labelled] = np.stack(labelled), np.stack(unlabelled)
        return drawn[0], drawn[1]

    @property
    def batch_weights(self) -> NDArray[np.float32] | None:
        """Weight of each image, with images without labels, in the mean over a batch that is the task loss.

        Those without labels have the weight 0, the others the inverse of their share: the sum over parts of a batch is
        then the mean over its labelled images.
        """
        mixture = self.mixture
        if mixture is None or not mixture.part:
            return self.weights
        weights = np.ones(len(self.labels)) if self.weights is None else self.weights
        scaled = weights * (mixture.batch / (mixture.batch - mixture.part))
        return np.concatenate((scaled, np.zeros(mixture.images))).astype(np.float32)

    @property
    def importance(self) -> NDArray[np.float32] | None:
        """Weight of each image [N] in the expected task loss of an epoch, 1 on average; None: all are 1."""
        if self.sampling == "uniform":
            return self.weights
        shares = _draw_shares(self.labels, self.sampling)
        return (shares if self.weights is None else shares * self.weights).astype(np.float32)


def make_draws(
    split: Split,
    class_names: tuple[str, ...],
    sampling: Sampling = "uniform",
    class_weights: ClassWeights = "none",
    mixture: Mixture | None = None,
) -> Draws:
    """Return the draws of a split of training images.

    The weight of an image is that of its class times its own (`Split.weights`). They are scaled so that the mean over
    the expected draws is 1, so that the learning rate keeps its meaning.

    Args:
        split: labelled training images.
        class_names: name of each class number.
        sampling: how often the images of each class are drawn.
        class_weights: none; inverse: of the number of the class's images; effective: of its effective number of images,
            (1 - beta^n) / (1 - beta), Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR
            2019, https://arxiv.org/abs/1901.05555; or a weight by class name, 1 for classes that it leaves out.
        mixture: images without labels that are drawn as well.

    Raises:
        DataError: label maps; a class that does not exist; all weights are 0.
    """
    if split.label_maps is not None and (sampling != "uniform" or class_weights != "none"):
        raise DataError("training.sampling and training.class_weights count images of a class, not label maps")
    if class_weights == "none" and split.weights is None:
        return Draws(split.labels, sampling, mixture=mixture)
    weights = _class_weights(split.labels, class_names, class_weights)[split.labels]
    if split.weights is not None:
        weights = weights * split.weights
    mean = (weights * _draw_shares(split.labels, sampling)).mean()
    if not mean > 0:
        raise DataError("training.class_weights: the weight of every training image is 0; raise some")
    return Draws(split.labels, sampling, (weights / mean).astype(np.float32), mixture)


def _class_weights(
    labels: NDArray[np.int64], class_names: tuple[str, ...], class_weights: ClassWeights
) -> NDArray[np.float64]:
    """Return the weight of each class, [K]."""
    if isinstance(class_weights, Mapping):
        check_class_names(class_weights, class_names, "training.class_weights")
        return np.array([class_weights.get(name, 1.0) for name in class_names], np.float64)
    counts = np.maximum(np.bincount(labels, minlength=len(class_names)), 1).astype(np.float64)
    if class_weights == "effective":
        return np.asarray((1 - EFFECTIVE_BETA) / (1 - EFFECTIVE_BETA**counts))
    return 1 / counts if class_weights == "inverse" else np.ones(len(class_names))


def check_class_names(given: Mapping[str, float], class_names: tuple[str, ...], key: str) -> None:
    """Raise DataError if a setting names a class that the data set does not have."""
    for name in given:
        if name not in class_names:
            raise DataError(f"{key}: the data set has no class {name!r}; {did_you_mean(name, class_names)}")


def _draw_shares(labels: NDArray[np.int64], sampling: Sampling) -> NDArray[np.float64]:
    """Return how often each image is drawn in an epoch on average, [N]; the mean is 1."""
    if sampling == "uniform":
        return np.ones(len(labels))
    counts = np.bincount(labels)
    shares: NDArray[np.float64] = len(labels) / (np.count_nonzero(counts) * counts[labels])
    return shares


def _walk(
    members: NDArray[np.int64], draws: int, epoch: int, name: tuple[object, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the draws of an epoch from a class: positions and turns, [draws] each.

    Draw number n of a training is in pass n // len(members), so its turn is the number of its pass.
    """
    numbers = np.arange(epoch * draws, (epoch + 1) * draws)
    turns, places = np.divmod(numbers, len(members))
    positions = np.empty(draws, np.int64)
    for turn in np.unique(turns).tolist():
        inside = turns == turn
        positions[inside] = members[permutation(len(members), turn, *name)[places[inside]]]
    return positions, turns


def make_mixture(splits: Splits, batch_size: int, share: float) -> Mixture | None:
    """Return how batches mix labelled and unlabelled images; None if the data set has no images without labels.

    Args:
        splits: the data set.
        batch_size: images of a batch.
        share: share of a batch without labels; 0: batches of labelled images, as many as with other shares.

    Raises:
        DataError: a share above 0 of a batch is no image, or leaves no labelled image.
    """
    if splits.unlabelled is None:
        return None
    batch = min(batch_size, len(splits.seen))
    part = round(batch * share)
    if share and not 0 < part < batch:
        says = "no image" if not part else "every image"
        raise DataError(f"training.unlabelled_share: {share:g} of a batch of {batch} images is {says}; change it")
    return Mixture(len(splits.unlabelled), batch, part)
