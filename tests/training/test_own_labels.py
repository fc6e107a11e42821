"""Pixels are counted at the size of each label map: by evaluation, by the page and promotion, from an ONNX file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from heterokd.config.data import DataSettings
from heterokd.config.services import PromotionSettings
from heterokd.datasets.io.loaders import open_split
from heterokd.errors import DataError
from heterokd.networks.network import build_network
from heterokd.outputs import IGNORE
from heterokd.students.export.format import ToWrite
from heterokd.students.export.formats import FORMATS
from heterokd.students.promotion.gates import iou_gates
from heterokd.tasks import Inference
from heterokd.training.data import open_splits
from heterokd.training.evaluation import evaluate, image_results
from heterokd.training.meters import Answer, PixelMeter, classes_at, near_boundaries, upsample
from heterokd.training.paired_tests import ImageConfusions
from heterokd.training.task_modules import SegmentationTask, build_task

CLASSES = ("ground", "tree", "house")
CANVAS = 160
SIZES = ((200, 300), (100, 140), (330, 90), (160, 160), (140, 400))
"""Heights and widths: shrunk and not, with a side below 128, of the canvas' size."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of `SIZES` with smooth label maps, in every split."""
    folder, rng = tmp_path_factory.mktemp("sizes"), np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for number, (height, width) in enumerate(SIZES):
            labels = Image.fromarray(rng.integers(0, len(CLASSES), (5, 5), dtype=np.uint8))
            labels = labels.resize((width, height), Image.Resampling.NEAREST)
            truth = np.asarray(labels).copy()
            truth[:4] = IGNORE
            pixels = 60 * np.asarray(labels)[..., None] + rng.integers(0, 90, (height, width, 3))
            for kind, array in (("images", pixels.astype(np.uint8)), ("masks", truth)):
                (folder / split / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / split / kind / f"{number}.png")
    return folder


def settings(root: Path, **more: object) -> DataSettings:
    masks = {"classes": list(CLASSES)}
    return DataSettings.model_validate(
        {"dataset": "mask_folder", "root": root, "image_size": CANVAS, "masks": masks, **more}
    )


def network(mean: float | None = None) -> nn.Module:
    torch.manual_seed(0)
    built = build_network("fpn-test_resnet", len(CLASSES), image_size=CANVAS)
    if mean is not None:
        built.mean.fill_(mean)
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return built.eval()


def enlarged(scores: NDArray[np.float32], height: int, width: int) -> NDArray[np.float64]:
    """Resize [K, h, w] bilinearly with half-pixel centres, row by row and column by column."""
    rows = (np.arange(height) + 0.5) * scores.shape[1] / height - 0.5
    columns = (np.arange(width) + 0.5) * scores.shape[2] / width - 0.5
    tall = np.stack(
        [[np.interp(rows, np.arange(len(line)), line) for line in part.T] for part in scores.astype(np.float64)]
    ).swapaxes(1, 2)
    return np.stack([[np.interp(columns, np.arange(len(line)), line) for line in part] for part in tall])


@pytest.mark.parametrize("mean", [None, 0.9])
def test_an_independent_count_from_an_onnx_file_gives_the_same_miou(
    root: Path, tmp_path: Path, mean: float | None
) -> None:
    student, data = network(mean), settings(root)
    kind = FORMATS["onnx"]()
    kind.write(ToWrite(student, torch.rand(2, 3, CANVAS, CANVAS), any_size=True, card={}), tmp_path)
    run = kind.open(tmp_path).run
    both, of_label, of_guess = (np.zeros(len(CLASSES)) for _ in range(3))
    for number, (height, width) in enumerate(SIZES):
        truth = np.asarray(Image.open(root / "val/masks" / f"{number}.png"))
        scale = min(1, CANVAS / height, CANVAS / width)
        inside = round(height * scale), round(width * scale)
        small = Image.open(root / "val/images" / f"{number}.png").resize(inside[::-1], Image.Resampling.BILINEAR)
        canvas = student.mean.expand(1, 3, max(128, inside[0]), max(128, inside[1])).clone()
        canvas[0, :, : inside[0], : inside[1]] = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255
        logits = run(canvas)[0].numpy()
        guess = enlarged(logits[:, : inside[0], : inside[1]], height, width).argmax(0)
        for label in range(len(CLASSES)):
            both[label] += ((truth == label) & (guess == label)).sum()
            of_label[label] += (truth == label).sum()
            of_guess[label] += ((truth != IGNORE) & (guess == label)).sum()
    expected = np.mean(both / (of_label + of_guess - both))
    splits = open_splits(data)
    task = build_task("segmentation", len(CLASSES))
    loader = open_split(splits.val, len(CLASSES))
    assert dict(evaluate(student, loader, task))["miou"] == pytest.approx(expected, abs=1e-5)
    results = image_results(student, loader, task)
    assert results.score == pytest.approx(expected, abs=1e-5)
    shapes = [height * width - 4 * width for height, width in SIZES]
    assert results.images.sum(dim=(1, 2)).tolist() == shapes, "each image at its place, each labelled pixel once"


def test_the_canvas_is_counted_where_a_setting_says_so(root: Path) -> None:
    splits = open_splits(settings(root, evaluation_size="canvas"))
    assert splits.val.own_labels is None
    results = image_results(network(), open_split(splits.val, 3), build_task("segmentation", 3))
    assert results.images.sum() < CANVAS**2 * len(SIZES)
    assert open_splits(settings(root)).fingerprint == splits.fingerprint


def test_agreement_and_loss_are_of_the_canvas(root: Path) -> None:
    splits, student, task = open_splits(settings(root)), network(), build_task("segmentation", 3)
    loader = open_split(splits.val, 3)
    maps = [task.logits(lambda images: student(images).logits, batch.images).argmax(1) for batch in loader]
    agreed = dict(evaluate(student, loader, task, teacher_classes=torch.cat(maps).to(torch.uint8)))["agreement"]
    assert 0.9 < agreed <= 1, "images are seen without the padding of the canvas, so border pixels may differ"


def test_large_maps_are_resized_a_few_classes_at_a_time() -> None:
    scores = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(0))
    size = (20, 30)
    for classes in (1, 2, 5, 7):
        found = classes_at(scores, size, at_once=classes * 20 * 30)
        assert torch.equal(found, upsample(scores[None], size)[0].argmax(0))


def test_views_of_a_test_are_averaged() -> None:
    images = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    mix = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1))

    def scores(x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, mix, padding=1)

    task = SegmentationTask(4, inference=Inference(flip=True, scales=(1.0, 0.5)))
    total = torch.zeros(2, 4, 24, 32)
    for size in ((24, 32), (12, 16)):
        view = upsample(images, size)
        for seen, back in ((view, False), (view.flip(-1), True)):
            found = scores(seen).flip(-1) if back else scores(seen)
            total += upsample(found, (24, 32)).softmax(1) / 4
    torch.testing.assert_close(task.logits(scores, images), total.log(), atol=1e-5, rtol=1e-5)
    assert torch.equal(SegmentationTask(4).logits(scores, images), scores(images))


def test_boundaries_are_pixels_close_to_another_class() -> None:
    labels = torch.zeros(40, 60, dtype=torch.long)
    labels[:, 30:], labels[:3] = 1, IGNORE
    band = near_boundaries(labels)
    assert not band[:3].any(), "ignored pixels are no class"
    assert band[3:].any(0).nonzero().flatten().tolist() == [29, 30], "2 % of the diagonal is a pixel"
    wide = torch.zeros(200, 100, dtype=torch.long)
    wide[100:] = 1
    assert near_boundaries(wide).any(1).nonzero().flatten().tolist() == list(range(96, 104))
    meter = PixelMeter(2)
    logits = torch.nn.functional.one_hot(wide, 2).permute(2, 0, 1)[None].float()
    logits[:, :, :96] = logits[:, :, :96].flip(1)  # wrong, but far from the boundary
    meter.update(Answer(logits, wide[None], torch.zeros(1, dtype=torch.long)))
    found = dict(meter.compute())
    assert found["boundary_iou"] == 1
    assert found["miou"] < 0.5


def test_the_iou_of_a_class_is_a_gate(root: Path) -> None:
    splits = open_splits(settings(root))
    results = image_results(network(), open_split(splits.val, 3), build_task("segmentation", 3))
    assert isinstance(results, ImageConfusions)
    counts = results.images.sum(0)
    iou = [float(counts[k, k] / (counts[k].sum() + counts[:, k].sum() - counts[k, k])) for k in range(3)]
    best = int(np.argmax(iou))
    required = {CLASSES[best]: iou[best] * 0.9, CLASSES[best - 1]: 0.99}
    promotion = PromotionSettings.model_validate({"min_iou": required})
    classes, first, second = iou_gates(results, splits.class_names, promotion)
    assert (classes.measured, classes.passed) == (3, None)
    assert (first.name, first.passed) == (f"IoU of {CLASSES[best]} on test", True)
    assert first.measured == pytest.approx(iou[best])
    assert second.passed is False
    with pytest.raises(DataError, match=r"promotion\.min_iou: the data set has no class 'lake'"):
        list(iou_gates(results, splits.class_names, PromotionSettings.model_validate({"min_iou": {"lake": 0.5}})))
