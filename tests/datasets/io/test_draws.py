"""Uneven classes: what an epoch draws, which views it shows, and how much each image counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from heterokd.datasets.io.draws import EFFECTIVE_BETA, Draws, make_draws
from heterokd.datasets.io.images import ArrayImages
from heterokd.datasets.io.loaders import TrainLoader, Worker
from heterokd.datasets.io.split import Split
from heterokd.datasets.views.policy import POLICIES, ViewSpec
from heterokd.datasets.views.random import permutation
from heterokd.errors import DataError
from heterokd.training.task_modules import build_task

NAMES = ("cat", "dog", "fox")
COUNTS = (40, 15, 5)


def uneven(weights: np.ndarray | None = None) -> Split:
    """40, 15 and 5 images of three classes, in a mixed order."""
    labels = np.repeat(np.arange(3), COUNTS)[permutation(60, 0, "mixed")]
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
    return Split(ArrayImages(pixels), labels, "train", weights=weights)


def test_uniform_sampling_is_the_permutation_of_the_epoch() -> None:
    order, turns = Draws(uneven().labels).epoch(3, seed=7)
    assert order.tolist() == permutation(60, 3, 7).tolist()
    assert set(turns.tolist()) == {3}


def test_balanced_sampling_draws_every_class_alike_and_every_image_of_a_class_alike() -> None:
    split = uneven()
    draws = make_draws(split, NAMES, "balanced")
    seen = np.zeros(60, np.int64)
    for epoch in range(12):
        order, turns = draws.epoch(epoch, seed=1)
        assert len(order) == 60
        assert np.bincount(split.labels[order]).tolist() == [20, 20, 20]
        for image in np.unique(order):
            mine = np.sort(turns[order == image])
            assert mine.tolist() == list(range(seen[image], seen[image] + len(mine)))  # the t-th draw shows view t
            seen[image] += len(mine)
    for number, count in enumerate(COUNTS):
        per_image = seen[split.labels == number]
        assert per_image.max() - per_image.min() <= 1
        assert per_image.sum() == 12 * 20
        assert per_image.mean() == pytest.approx(240 / count)


def test_balanced_draws_are_those_of_the_seed_and_the_epoch_alone() -> None:
    draws = make_draws(uneven(), NAMES, "balanced")
    once, again = draws.epoch(5, seed=2), draws.epoch(5, seed=2)
    assert all((one == two).all() for one, two in zip(once, again, strict=True))
    assert (draws.epoch(5, seed=3)[0] != once[0]).any()


@pytest.mark.parametrize("views", [None, 4])
def test_workers_share_balanced_batches_and_views_repeat_after_the_last(views: int | None) -> None:
    split, spec = uneven(), ViewSpec(POLICIES["digits"], 0, views)
    draws = make_draws(split, NAMES, "balanced")

    def shown(worker: Worker) -> list[np.ndarray]:
        loader = TrainLoader(split, spec, 12, num_classes=3, worker=worker, draws=draws)
        return [batch.shown.numpy() for epoch in (0, 4) for batch in loader.epoch(epoch)]  # type: ignore[union-attr]

    whole = shown(Worker())
    parts = zip(shown(Worker(0, 2)), shown(Worker(1, 2)), strict=True)
    assert all((np.concatenate(pair) == one).all() for pair, one in zip(parts, whole, strict=True))
    numbers = np.concatenate(whole)[:, 1]
    assert numbers.max() == 3 if views else numbers.max() >= 19  # a rare image is at its 20th turn in the fifth epoch


def test_inverse_weights_make_every_class_count_the_same() -> None:
    split = uneven()
    weights = make_draws(split, NAMES, class_weights="inverse").weights
    assert weights is not None
    assert weights.dtype == np.float32
    assert np.bincount(split.labels, weights) == pytest.approx([20, 20, 20], rel=1e-6)


def test_effective_weights_are_those_of_the_paper() -> None:
    split = uneven()
    weights = make_draws(split, NAMES, class_weights="effective").weights
    assert weights is not None
    of_class = np.array([weights[split.labels == number][0] for number in range(3)])
    expected = np.array([(1 - EFFECTIVE_BETA) / (1 - EFFECTIVE_BETA**count) for count in COUNTS])
    assert of_class / of_class[0] == pytest.approx(expected / expected[0], rel=1e-6)


def test_given_weights_of_classes_and_images_multiply_and_average_to_one() -> None:
    own = np.linspace(0, 2, 60).astype(np.float32)
    split = uneven(own)
    weights = make_draws(split, NAMES, class_weights={"fox": 3.0, "cat": 0.5}).weights
    assert weights is not None
    assert weights.mean() == pytest.approx(1)
    expected = own * np.array([0.5, 1.0, 3.0])[split.labels]
    assert weights == pytest.approx(expected / expected.mean(), rel=1e-5)


def test_balanced_sampling_and_inverse_weights_have_the_mean_one_over_the_draws() -> None:
    split = uneven()
    draws = make_draws(split, NAMES, "balanced", "inverse")
    assert draws.weights is not None
    drawn = [draws.weights[draws.epoch(epoch, 0)[0]].mean() for epoch in range(40)]
    assert np.mean(drawn) == pytest.approx(1, rel=0.01)
    balanced = make_draws(split, NAMES, "balanced").importance
    inverse = make_draws(split, NAMES, class_weights="inverse").importance
    assert balanced == pytest.approx(inverse, rel=1e-6)


@pytest.mark.parametrize(
    ("split", "weights", "says"),
    [
        (uneven(), {"dgo": 2.0}, "training.class_weights: the data set has no class 'dgo'; did you mean 'dog'"),
        (uneven(np.zeros(60, np.float32)), "none", "the weight of every training image is 0"),
    ],
)
def test_wrong_weights_are_refused(split: Split, weights: object, says: str) -> None:
    with pytest.raises(DataError, match=says):
        make_draws(split, NAMES, class_weights=weights)  # type: ignore[arg-type]


def test_the_task_loss_weighs_images_and_parts_add_up() -> None:
    logits, labels = torch.randn(10, 3), torch.arange(10) % 3
    weights = torch.linspace(0, 2, 10)
    task = build_task("classification", 3, label_smoothing=0.1)
    whole = task(logits, labels, weights)
    each = torch.stack([F.cross_entropy(logits[i], labels[i], label_smoothing=0.1) for i in range(10)])
    torch.testing.assert_close(whole, (each * weights).sum() / 10)
    parts = [0.4 * task(logits[:4], labels[:4], weights[:4]), 0.6 * task(logits[4:], labels[4:], weights[4:])]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(task(logits, labels, torch.ones(10)), task(logits, labels))


def test_a_mixed_view_has_the_mixed_weight() -> None:
    split = uneven(np.linspace(0.5, 2, 60).astype(np.float32))
    policy = POLICIES["digits"].model_copy(update={"mixup": 0.8})
    draws = make_draws(split, NAMES)
    loader = TrainLoader(split, ViewSpec(policy, 0), 20, num_classes=3, draws=draws)
    batch = next(iter(loader.epoch(0)))
    assert batch.weights is not None
    assert draws.weights is not None
    low, high = float(draws.weights.min()), float(draws.weights.max())
    assert low <= float(batch.weights.min())
    assert float(batch.weights.max()) <= high
    assert not np.isin(batch.weights.numpy(), draws.weights).all()
