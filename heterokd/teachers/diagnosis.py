"""Measure what is wrong with a teacher: chance, confidence, classes that are never predicted, order of classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from heterokd.datasets.io.class_order import natural_order
from heterokd.datasets.io.loaders import open_split
from heterokd.datasets.io.split import Split, Splits
from heterokd.datasets.views.random import permutation
from heterokd.networks.combined import CombinedNetwork
from heterokd.networks.network import AnyNetwork
from heterokd.teachers.calibration import best_temperature, confidence
from heterokd.training.evaluation import predict

TRAIN_IMAGES = 512
"""Number of training images on which confidence is measured: standard error below 0.02."""
MOST_VAL = 10_000
"""Maximum number of images of val that are predicted for a diagnosis."""
CLEAR = 5
"""Standard errors by which another order of classes must be better."""


@dataclass(frozen=True)
class Diagnosis:
    """See the attributes of the same names of `heterokd.storage.teacher_card.TeacherCard`."""

    temperature: float | None = None
    val_confidence: float | None = None
    train_confidence: float | None = None
    train_score: float | None = None
    images: int | None = None
    chance: float | None = None
    never_predicted: tuple[str, ...] = ()
    class_order: str | tuple[str, ...] | None = None
    class_order_score: float | None = None


def diagnose(network: AnyNetwork, splits: Splits, device: str, folds: NDArray[np.int64] | None = None) -> Diagnosis:
    """Diagnose a teacher on val and on a sample of train; in segmentation nothing is measured.

    Args:
        network: the teacher.
        splits: its data; plain images are read, without augmentation.
        device: device to run it on.
        folds: [N] fold of each training image, of a cross-fitted teacher: each is answered as in training.
    """
    if splits.val.label_maps is not None or not len(splits.val) or not len(splits.train):
        return Diagnosis()
    val_logits, val_labels = _predictions(network, splits.val, splits.num_classes, MOST_VAL, device)
    train_logits, train_labels = _train_predictions(network, splits, device, folds)
    names = tuple(map(str, splits.class_names))
    predicted, labels = val_logits.argmax(dim=1).numpy(), val_labels.numpy()
    counts = np.bincount(labels, minlength=len(names))
    missing = np.flatnonzero((counts > 0) & (np.bincount(predicted, minlength=len(names)) == 0))
    order, score = fitting_order(predicted, labels, names)
    return Diagnosis(
        temperature=best_temperature(val_logits, val_labels),
        val_confidence=confidence(val_logits),
        train_confidence=confidence(train_logits),
        train_score=float((train_logits.argmax(dim=1) == train_labels).float().mean()),
        images=len(labels),
        chance=float(counts.max() / len(labels)),
        never_predicted=tuple(names[number] for number in missing),
        class_order=order,
        class_order_score=score,
    )


def _train_predictions(
    network: AnyNetwork, splits: Splits, device: str, folds: NDArray[np.int64] | None
) -> tuple[Tensor, Tensor]:
    """Return logits [N, K] and labels [N] of a sample of train, of each fold by the member that has not seen it."""
    if folds is None or not isinstance(network, CombinedNetwork):
        return _predictions(network, splits.train, splits.num_classes, TRAIN_IMAGES, device)
    most = -(-TRAIN_IMAGES // len(network.members))
    found = [
        _predictions(member, splits.train.chosen(np.flatnonzero(folds == fold)), splits.num_classes, most, device)
        for fold, member in enumerate(network.members)
    ]
    return torch.cat([logits for logits, _ in found]), torch.cat([labels for _, labels in found])


def _predictions(network: nn.Module, split: Split, num_classes: int, most: int, device: str) -> tuple[Tensor, Tensor]:
    """Return logits [N, K] and labels [N] of at most `most` images."""
    if len(split) > most:
        split = split.chosen(np.sort(permutation(len(split), 0, "diagnosis")[:most]))
    logits, labels = predict(network.to(device), open_split(split, num_classes, device=device), device)
    return logits, labels.cpu()


def fitting_order(
    predicted: NDArray[np.int64], labels: NDArray[np.int64], names: Sequence[str]
) -> tuple[str | tuple[str, ...] | None, float | None]:
    """Search an order of classes with which predictions fit the labels clearly better.

    First natural and sorted order, as of folders of other readers; then the permutation of the confusion matrix with
    the largest diagonal, found on half of the images and verified on the other half.

    Args:
        predicted: [N] predicted class numbers.
        labels: [N] labels, numbers in the order of `names`.
        names: K names in the data's order.

    Returns:
        `natural`, `sorted` or the names in the teacher's order, with the accuracy; (None, None) if none is better.
    """
    score = float(np.mean(predicted == labels))
    position = {name: number for number, name in enumerate(names)}
    named: tuple[str | tuple[str, ...] | None, float | None] = (None, None)
    best = score
    for kind, ordered in (("natural", natural_order(names)), ("sorted", sorted(names))):
        numbers = np.array([position[name] for name in ordered])
        fitting = float(np.mean(numbers[predicted] == labels))
        if _is_clear(score, fitting, len(labels)) and fitting > best:
            named, best = (kind, fitting), fitting
    first, second = slice(None, None, 2), slice(1, None, 2)
    numbers = _best_permutation(predicted[first], labels[first], len(names))
    held_out = float(np.mean(numbers[predicted[second]] == labels[second])) if len(labels) > 1 else 0.0
    if not _is_clear(best, held_out, len(labels) // 2):
        return named
    numbers = _best_permutation(predicted, labels, len(names))
    return tuple(names[number] for number in numbers), float(np.mean(numbers[predicted] == labels))


def _best_permutation(predicted: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Return the data's class of each of the teacher's classes, [K], that most predictions agree with."""
    from scipy.optimize import linear_sum_assignment  # takes a third of a second, and few commands fit a teacher

    confusion = np.bincount(predicted * classes + labels, minlength=classes**2).reshape(classes, classes)
    # The present order breaks ties, as between classes that are never predicted.
    gains = confusion.astype(np.float64) + 0.5 / classes * np.eye(classes)
    _, columns = linear_sum_assignment(gains, maximize=True)
    found: NDArray[np.int64] = columns.astype(np.int64)
    return found


def _is_clear(score: float, better: float, images: int) -> bool:
    """Whether a score is better by `CLEAR` standard errors of both."""
    if images < 1:
        return False
    error = math.sqrt((score * (1 - score) + better * (1 - better)) / images)
    return better - score > max(CLEAR * error, 1 / images)
