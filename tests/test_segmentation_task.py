"""The task loss, the decisions and the metrics of segmentation, against slow and obvious ones."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from heterokd.outputs import IGNORE, Batch, labels_at
from heterokd.tasks import Inference
from heterokd.training.evaluation import evaluate, image_results
from heterokd.training.meters import iou_per_class, named_metrics
from heterokd.training.task_modules import SegmentationTask

K = 5


def label_maps(*shape: int, seed: int = 0) -> Tensor:
    labels = torch.randint(0, K, shape, generator=torch.Generator().manual_seed(seed))
    labels[..., :2, :] = IGNORE
    return labels


def scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


class Fixed(nn.Module):
    """Decides by the image's own channels: scores at a quarter of its size, so that both sizes matter."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(scores(K, 3, seed=9), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.einsum("kc,bchw->bkhw", self.mix, F.avg_pool2d(images, 4))


def batches(count: int = 7, size: int = 3, side: int = 16) -> list[Batch]:
    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))
    labels = label_maps(count, side, side, seed=2)
    labels[0] = IGNORE
    return [
        Batch(images[start : start + size], labels[start : start + size], torch.arange(count)[start : start + size])
        for start in range(0, count, size)
    ]


def test_loss_is_the_mean_over_pixels_that_count() -> None:
    logits, labels = scores(2, K, 4, 4), label_maps(2, 8, 8)
    enlarged = F.interpolate(logits.double(), (8, 8), mode="bilinear", align_corners=False)
    expected = [
        -math.log(math.exp(enlarged[b, labels[b, y, x], y, x]) / enlarged[b, :, y, x].exp().sum())
        for b in range(2)
        for y in range(8)
        for x in range(8)
        if labels[b, y, x] != IGNORE
    ]
    assert SegmentationTask(K)(logits, labels).item() == pytest.approx(np.mean(expected), abs=1e-5)


def test_batch_without_a_pixel_that_counts_costs_nothing_and_breaks_nothing() -> None:
    logits = scores(2, K, 4, 4).requires_grad_()
    loss = SegmentationTask(K)(logits, torch.full((2, 8, 8), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_metrics_are_torchmetrics_over_the_whole_split_and_not_a_mean_over_batches() -> None:
    network, task = Fixed(), SegmentationTask(K)
    measured = dict(evaluate(network, batches(), task))
    jaccard = MulticlassJaccardIndex(K, ignore_index=IGNORE)
    by_batch = []
    right = total = 0
    for batch in batches():
        decided = F.interpolate(network(batch.images), batch.labels.shape[-2:], mode="bilinear").argmax(1)
        jaccard.update(decided, batch.labels)
        one = MulticlassJaccardIndex(K, ignore_index=IGNORE)
        by_batch.append(float(one(decided, batch.labels)))
        counts = batch.labels != IGNORE
        right += int((decided == batch.labels)[counts].sum())
        total += int(counts.sum())
    assert measured["miou"] == pytest.approx(float(jaccard.compute()), abs=1e-6)
    assert measured["miou"] != pytest.approx(np.mean(by_batch), abs=1e-4)
    assert measured["pixel_accuracy"] == pytest.approx(right / total, abs=1e-6)
    of_classes = {f"iou/{label}" for label in range(K)}
    assert set(measured) == {*SegmentationTask.facts.metric_names, *of_classes} - {"agreement"}
    assert np.mean([measured[name] for name in of_classes]) == pytest.approx(measured["miou"], abs=1e-6)
    names = ("sky", "a/b", "Straße", "道", "道")
    named = named_metrics(measured.items(), names)
    assert {name for name in named if "iou/" in name} == {f"val/iou/{name}" for name in ("sky", "a_b", "Stra_e", 3, 4)}
    assert named["val/iou/a_b"] == measured["iou/1"]


def test_metrics_of_classes_are_means_over_those_that_occur() -> None:
    network, decided, labels = Fixed(), [], []
    for batch in batches():
        decided.append(F.interpolate(network(batch.images), batch.labels.shape[-2:], mode="bilinear").argmax(1))
        labels.append(torch.where(batch.labels == 1, IGNORE, batch.labels))  # a class that the labels lack
    lacking = [replace(batch, labels=truth) for batch, truth in zip(batches(), labels, strict=True)]
    measured = dict(evaluate(network, lacking, SegmentationTask(K)))
    counts = torch.cat(labels) != IGNORE
    truth, found = torch.cat(labels)[counts], torch.cat(decided)[counts]
    dice, accuracy = [], []
    for label in range(K):
        both, of_truth, of_found = (
            ((truth == label) & (found == label)).sum(),
            (truth == label).sum(),
            (found == label).sum(),
        )
        if of_truth + of_found:
            dice.append(float(2 * both / (of_truth + of_found)))
        if of_truth:
            accuracy.append(float(both / of_truth))
    assert measured["dice"] == pytest.approx(np.mean(dice), abs=1e-6)
    assert measured["mean_accuracy"] == pytest.approx(np.mean(accuracy), abs=1e-6)
    assert measured["iou_classes"] == len(dice)
    assert len(accuracy) == K - 1


def test_metrics_do_not_depend_on_the_batches() -> None:
    network, task = Fixed(), SegmentationTask(K)
    assert dict(evaluate(network, batches(size=2), task)) == pytest.approx(
        dict(evaluate(network, batches(size=7), task)), abs=1e-6
    )


def test_absent_classes_have_no_say_in_the_mean() -> None:
    confusion = torch.tensor([[8, 2, 0], [0, 10, 0], [0, 0, 0]])
    iou = iou_per_class(confusion)
    assert iou[:2].tolist() == pytest.approx([8 / 10, 10 / 12])
    assert iou[2].isnan()


def test_agreement_counts_pixels_where_teacher_and_student_coincide() -> None:
    network, task = Fixed(), SegmentationTask(K)
    decided = torch.cat(
        [F.interpolate(network(batch.images), (16, 16), mode="bilinear").argmax(1) for batch in batches()]
    ).to(torch.uint8)
    assert dict(evaluate(network, batches(), task, teacher_classes=decided))["agreement"] == 1
    labelled = torch.cat([batch.labels for batch in batches()]) != IGNORE
    assert not labelled[0].any()
    decided[0] = 250  # pixels without a label are not compared
    assert dict(evaluate(network, batches(), task, teacher_classes=decided))["agreement"] == 1
    decided[1] = 250
    expected = 1 - float(labelled[1].sum() / labelled.sum())
    found = dict(evaluate(network, batches(), task, teacher_classes=decided))["agreement"]
    assert found == pytest.approx(expected)


def test_confusions_of_images_sum_to_that_of_the_split() -> None:
    network, task = Fixed(), SegmentationTask(K)
    counts = image_results(network, batches(), task).images
    assert counts.shape == (7, K, K)
    assert not counts[0].any(), "an image that is ignored as a whole"
    measured = dict(evaluate(network, batches(), task))
    assert float(iou_per_class(counts.sum(0)).nanmean()) == pytest.approx(measured["miou"], abs=1e-6)


def test_sliding_windows_cover_every_pixel_and_average_where_they_overlap() -> None:
    images, network = batches()[0].images, Fixed()
    found = SegmentationTask(K, inference=Inference(window=(8, 12))).logits(network, images)
    total, count = torch.zeros_like(found), torch.zeros(16, 16)
    for top in (0, 5, 8):  # two thirds of the window on, the last flush with the end
        for left in (0, 4):
            window = network(images[:, :, top : top + 8, left : left + 12])
            total[:, :, top : top + 8, left : left + 12] += F.interpolate(window, (8, 12), mode="bilinear")
            count[top : top + 8, left : left + 12] += 1
    assert count.min() >= 1
    torch.testing.assert_close(found, total / count)


def test_window_larger_than_the_image_is_the_whole_image() -> None:
    images, network = batches()[0].images, Fixed()
    whole = SegmentationTask(K).logits(network, images)
    assert torch.equal(SegmentationTask(K, inference=Inference(window=(32, 32))).logits(network, images), whole)


def test_labels_are_resized_to_the_nearest_and_never_mixed() -> None:
    labels = label_maps(2, 16, 16)
    small = labels_at(labels, (5, 7))
    assert small.dtype == labels.dtype
    assert small.shape == (2, 5, 7)
    for y in range(5):
        for x in range(7):
            assert torch.equal(small[:, y, x], labels[:, int((y + 0.5) * 16 / 5), int((x + 0.5) * 16 / 7)])
    assert labels_at(labels, (16, 16)) is labels
