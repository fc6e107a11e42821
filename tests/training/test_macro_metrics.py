"""Metrics that count every class the same, against scikit-learn's; their use as a metric of results."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn import metrics as sklearn

from heterokd.training.macro_metrics import MACRO_METRICS, auroc, macro_score
from heterokd.training.meters import Answer
from heterokd.training.paired_tests import ImageLogits, wilson
from heterokd.training.task_modules import build_task


def uneven(classes: int, count: int, *, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(classes)
    labels = np.concatenate((np.arange(classes), rng.geometric(0.4, count - classes).clip(1, classes) - 1))
    logits = rng.normal(size=(count, classes)) + 1.5 * (labels[:, None] == np.arange(classes))
    return torch.from_numpy(np.round(logits) if ties else logits).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [2, 7])
def test_metrics_are_those_of_scikit_learn(classes: int, ties: bool) -> None:
    logits, labels = uneven(classes, 300, ties=ties)
    predicted, shares = logits.argmax(1).numpy(), logits.double().softmax(1).numpy()
    expected = {
        "balanced_accuracy": sklearn.balanced_accuracy_score(labels, predicted),
        "macro_f1": sklearn.f1_score(labels, predicted, average="macro"),
        "auroc": np.mean([sklearn.roc_auc_score(labels == number, shares[:, number]) for number in range(classes)]),
    }
    assert {name: macro_score(name, logits, labels) for name in MACRO_METRICS} == pytest.approx(expected)
    meter = build_task("classification", classes).meter()
    for part in (slice(0, 100), slice(100, None)):
        meter.update(Answer(logits[part], labels[part], labels[part]))
    measured = {name: float(value) for name, value in meter.compute()}
    assert {name: measured[name] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", MACRO_METRICS)
def test_an_image_that_counts_twice_is_as_two(name: str) -> None:
    logits, labels = uneven(4, 60)
    times = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (2, 60)))
    for counts, score in zip(times, MACRO_METRICS[name](logits, labels, times), strict=True):
        assert float(score) == pytest.approx(
            macro_score(name, logits.repeat_interleave(counts, 0), labels.repeat_interleave(counts))
        )


def test_absent_classes_do_not_count() -> None:
    logits, labels = uneven(5, 80)
    kept = labels != 3
    assert 0 < macro_score("balanced_accuracy", logits[kept], labels[kept]) < 1
    assert 0 < macro_score("auroc", logits[kept], labels[kept]) < 1
    assert math.isnan(float(auroc(logits[:1], labels[:1], torch.ones(1, 1))[0])), "nothing to compare with"
    assert "auroc" not in dict(_metrics(101)), "too many classes to sort"


def _metrics(classes: int) -> list[tuple[str, torch.Tensor]]:
    meter = build_task("classification", classes).meter()
    meter.update(Answer(torch.eye(classes), torch.arange(classes), torch.arange(classes)))
    return list(meter.compute())


def test_results_are_compared_by_the_metric() -> None:
    """A network that is right only for the frequent class has the better top-1 and the worse balanced accuracy."""
    labels = torch.tensor([0] * 90 + [1] * 10)
    always = torch.tensor([[2.0, 1.0]]).repeat(100, 1)
    fair = torch.tensor([[2.0, 1.0]] * 70 + [[1.0, 2.0]] * 30)
    found = {}
    for metric in ("top1", "balanced_accuracy"):
        task = build_task("classification", 2, metric=metric)
        found[metric] = [task.image_results([Answer(logits, labels, labels)]) for logits in (always, fair)]
    assert found["top1"][0].score > found["top1"][1].score
    first, second = found["balanced_accuracy"]
    assert isinstance(second, ImageLogits)
    assert (first.score, second.score) == pytest.approx((0.5, (70 / 90 + 1) / 2))
    test = second.compared(first)
    assert (test.score, test.gain) == pytest.approx((0.5, second.score - 0.5))
    assert 0 < test.low < test.gain < test.high
    assert test.p_value < 0.01
    low, high = second.interval()
    assert low < second.score < high


@pytest.mark.parametrize(
    ("correct", "count"), [(0, 1), (1, 1), (0, 33), (33, 33), (11, 33), (361, 362), (5000, 10_000)]
)
def test_the_interval_of_a_share_is_that_of_scipy(correct: int, count: int) -> None:
    known = binomtest(correct, count).proportion_ci(0.95, method="wilson")
    assert wilson(correct, count) == pytest.approx((known.low, known.high), abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)
