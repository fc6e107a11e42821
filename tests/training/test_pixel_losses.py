"""Task losses of label maps against slow and obvious ones; weights of classes, the auxiliary head, learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from heterokd.config.data import DataSettings
from heterokd.config.experiment import Experiment
from heterokd.config.pixel_loss import read_pixel_loss
from heterokd.config.reading import load_experiment
from heterokd.config.training import TrainingSettings
from heterokd.datasets.io.images import ArrayImages
from heterokd.datasets.io.split import Split
from heterokd.errors import ConfigError, DataError
from heterokd.execution.check import check_experiment
from heterokd.networks.network import build_network
from heterokd.outputs import IGNORE
from heterokd.training.data import open_splits, recipe_loaders
from heterokd.training.optim import build_optimizer, build_schedule, training_groups
from heterokd.training.pixel_losses import PixelLoss, pixel_weights
from heterokd.training.teacher import LiveTeacher
from heterokd.training.train import TrainOptions, build_distiller, train

Write = Callable[..., Path]
K = 4
NAMES = ("road", "tree", "sign", "sky")


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, K, (2, 6, 8), generator=generator)
    labels[:, 0] = IGNORE
    return 2 * torch.randn(2, K, 6, 8, generator=generator), labels


def pixels(logits: Tensor, labels: Tensor) -> list[tuple[float, int]]:
    """Loss and class of each labelled pixel."""
    log_p = logits.double().log_softmax(1)
    places = [(b, y, x) for b in range(2) for y in range(6) for x in range(8) if labels[b, y, x] != IGNORE]
    return [(-float(log_p[b, labels[b, y, x], y, x]), int(labels[b, y, x])) for b, y, x in places]


def test_cross_entropy_weighs_pixels_by_their_class() -> None:
    logits, labels = batch()
    weights = np.array([0.5, 1, 4, 0], np.float32)
    loss = PixelLoss({"cross_entropy": 2.0}, K)
    plain = [value for value, _ in pixels(logits, labels)]
    assert float(loss(logits, labels)) == pytest.approx(2 * np.mean(plain), abs=1e-5)
    loss.weigh_classes(weights)
    each = [(weights[label] * value, weights[label]) for value, label in pixels(logits, labels)]
    expected = 2 * sum(value for value, _ in each) / sum(weight for _, weight in each)
    assert float(loss(logits, labels)) == pytest.approx(expected, abs=1e-5)
    assert not loss.state_dict(), "weights of classes are no weights of the training"


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_hard_examples_are_pixels_without_confidence_and_some_in_any_case(scale: float) -> None:
    logits, labels = batch()
    if scale > 1:  # all pixels are confident
        logits = scale * nn.functional.one_hot(labels.masked_fill(labels == IGNORE, 0), K).permute(0, 3, 1, 2).float()
        logits = logits + torch.rand(2, 1, 6, 8) * 0.1 * torch.arange(K).view(1, K, 1, 1)
    values = sorted((value for value, _ in pixels(logits, labels)), reverse=True)
    least = max(1, int(len(values) / 16))
    kept = [value for number, value in enumerate(values) if value >= -math.log(0.7) or number < least]
    assert float(PixelLoss({"ohem": 1.0}, K)(logits, labels)) == pytest.approx(np.mean(kept), abs=1e-5)
    assert (len(kept) == least) is (scale > 1)


def test_dice_is_one_minus_the_overlap_of_classes() -> None:
    logits, labels = batch()
    shares = logits.softmax(1)
    known = labels != IGNORE
    scores = []
    for label in range(K):
        truth = (labels == label) & known
        overlap = 2 * shares[:, label][truth].sum()
        scores.append(float(1 - overlap / (shares[:, label][known].sum() + truth.sum())))
    assert float(PixelLoss({"dice": 1.0}, K)(logits, labels)) == pytest.approx(np.mean(scores), abs=1e-5)


@pytest.mark.parametrize("name", ["cross_entropy", "ohem", "dice", "focal", "lovasz"])
def test_every_loss_learns_and_survives_a_batch_without_labels(name: str) -> None:
    logits, labels = batch()
    loss = PixelLoss({name: 1.0}, K)
    right = 24 * nn.functional.one_hot(labels.masked_fill(labels == IGNORE, 0), K).permute(0, 3, 1, 2).float() - 12
    assert loss(right, labels) < 0.1 * loss(logits, labels)
    logits = logits.clone().requires_grad_()
    nothing = loss(logits, torch.full_like(labels, IGNORE))
    nothing.backward()
    assert nothing.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()
    total = PixelLoss({name: 0.5, "cross_entropy" if name != "cross_entropy" else "ohem": 1.0}, K)
    assert torch.isfinite(total(logits, labels))


def test_sums_of_losses_are_read() -> None:
    assert read_pixel_loss("ohem + 0.5*dice") == {"ohem": 1.0, "dice": 0.5}
    for text, problem in {
        "dyce": "there is no loss 'dyce'; did you mean 'dice'?",
        "dice+": "there is no loss ''",
        "0*dice": "'0\\*dice': expected NUMBER\\*dice with a positive number",
        "x*dice": "expected NUMBER",
        "dice+dice": "'dice' is named twice",
    }.items():
        with pytest.raises(ValueError, match=problem):
            read_pixel_loss(text)


def split() -> Split:
    """Four pixels of road, one of tree, in a map; eight of road and two ignored ones in another."""
    maps = np.full((2, 2, 5), IGNORE, np.uint8)
    maps[0].flat[:5] = [0, 0, 0, 0, 1]
    maps[1].flat[:8] = 0
    images = ArrayImages(np.zeros((2, 2, 5, 3), np.uint8))
    return Split(images, np.zeros(2, np.int64), "train", ArrayImages(maps))


def test_weights_of_classes_follow_their_pixels() -> None:
    inverse, median = (pixel_weights(split(), NAMES, kind) for kind in ("inverse", "median"))
    assert inverse is not None
    assert median is not None
    assert inverse[1] / inverse[0] == pytest.approx(12)
    # Frequencies: road 12 of 13 pixels; tree 1 of the 5 pixels of the map that shows it; their median is 0.5615.
    assert median[1] / median[0] == pytest.approx((12 / 13) / (1 / 5))
    for weights in (inverse, median):
        assert (weights[:2] * [12, 1]).sum() / 13 == pytest.approx(1)
        assert weights[2:].tolist() == [1, 1], "train lacks these classes"
    given = pixel_weights(split(), NAMES, {"tree": 3.0})
    assert given is not None
    assert given[1] / given[0] == pytest.approx(3)
    assert pixel_weights(split(), NAMES, "none") is None
    with pytest.raises(DataError, match="gives every labelled pixel of train the weight 0"):
        pixel_weights(split(), NAMES, {"road": 0.0, "tree": 0.0})


SCENES = (
    "data={dataset: digit_scenes, image_size: 64, train_images: 16}",
    "teacher={network: fpn-test_resnet}",
    "student={network: fpn-test_resnet}",
    "search.space={methods: [scratch, pixel_kd]}",
)


def scenes(tiny_file: Write, *more: str) -> Experiment:
    return load_experiment(tiny_file(), [*SCENES, *more])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ((*SCENES, "training.class_weights=effective"), "training.class_weights: 'effective' counts images of a class"),
        ((*SCENES, "training.sampling=balanced"), "training.sampling: counts images of a class"),
        ((*SCENES, "training.pixel_loss=dyce"), "training.pixel_loss=dyce: there is no loss 'dyce'"),
        (("training.pixel_loss=dice",), "training.pixel_loss: is for label maps"),
        (("teacher.training.class_weights=median",), "teacher.training.class_weights: 'median' is for label maps"),
        (("search.space.shared={training.auxiliary_weight: {options: [0.1]}}",), "auxiliary_weight: is for label"),
        (("training={head_lr_scale: 10.0, layer_decay: 0.8}",), "head_lr_scale: layer_decay sets the learning rate"),
    ],
)
def test_settings_of_another_task_are_refused(tiny_file: Write, settings: Sequence[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_experiment(tiny_file(), settings)


def test_settings_of_the_loss_are_searched_and_change_no_hash_without_them(tiny_file: Write) -> None:
    options = "{options: [cross_entropy, ohem+0.5*dice]}"
    asked = scenes(tiny_file, f"search.space.shared={{training.pixel_loss: {options}}}")
    plain = asked.recipe({"method": "scratch", "training.pixel_loss": "cross_entropy"})
    assert plain.hash == scenes(tiny_file).recipe({"method": "scratch"}).hash
    other = asked.recipe({"method": "scratch", "training.pixel_loss": "ohem+0.5*dice"})
    assert other.hash != plain.hash
    assert build_distiller(other, None, 11).task.loss.factors == {"ohem": 1.0, "dice": 0.5}  # type: ignore[union-attr]


def test_a_training_has_an_auxiliary_head_and_weighs_classes(tiny_file: Write, tmp_path: Path) -> None:
    changes = "{pixel_loss: ohem+dice, class_weights: median, auxiliary_weight: 0.4, head_lr_scale: 10.0}"
    settings = ("epochs: 1", "batch_size: 8", "learning_rate: 0.01", "warmup_epochs: 0")
    asked = scenes(tiny_file, f"training={{{', '.join(settings)}, {changes[1:-1]}}}", "search.min_epochs=1")
    recipe = asked.recipe({"method": "scratch"})
    splits = open_splits(recipe.data)
    loaders = recipe_loaders(recipe, splits)
    assert loaders.pixel_weights is not None
    background = int(np.argmin(loaders.pixel_weights))
    assert splits.class_names[background] == "background"
    reported: list[dict[str, float]] = []

    def report(metrics: dict[str, float]) -> bool:
        reported.append(metrics)
        return True

    trained = train(recipe, None, loaders, report, TrainOptions(tmp_path / "checkpoint.pt"))
    assert reported[0]["train/auxiliary"] > 0
    assert reported[0]["train/loss"] == pytest.approx(reported[0]["train/task"] + reported[0]["train/auxiliary"])
    fresh = build_network("fpn-test_resnet", 11, image_size=64)
    assert trained.student.state_dict().keys() == fresh.state_dict().keys(), "the head is no part of the student"


def test_a_method_with_a_picture_saves_its_last_epoch(tiny_file: Write, tmp_path: Path) -> None:
    changes = "training={epochs: 1, batch_size: 8, warmup_epochs: 0}"
    asked = scenes(tiny_file, changes, "search.min_epochs=1", "search.space={methods: [heteroakd, pixel_kd]}")
    for method, drawn in (("heteroakd", True), ("pixel_kd", False)):
        recipe = asked.recipe({"method": method})
        teacher = LiveTeacher(build_network("fpn-test_resnet", 11, image_size=64))
        file = tmp_path / method / "checkpoint.pt"
        file.parent.mkdir()
        loaders = recipe_loaders(recipe, open_splits(recipe.data))
        train(recipe, teacher, loaders, lambda _: True, TrainOptions(file))
        assert file.exists() is drawn
        if drawn:
            assert torch.load(file, weights_only=True)["epoch"] == 1


def test_the_learning_rate_of_the_head_is_a_multiple_of_the_encoders() -> None:
    network = build_network("fpn-test_resnet", 3, image_size=64)
    whole = nn.ModuleDict({"student": network, "projector": nn.Conv2d(2, 2, 1)})
    settings = TrainingSettings(head_lr_scale=10.0, learning_rate=0.1, epochs=2, schedule="poly", warmup_epochs=1.0)
    groups = training_groups(whole, network, settings)
    assert groups is not None
    optimizer = build_optimizer(whole, "sgd", 0.1, 1e-4, 0.9, groups)
    schedule = build_schedule(optimizer, settings, 10)
    assert schedule is not None
    schedule.step_update(10)  # the end of warm-up
    rate_of = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
    assert [rate_of[id(each)] for each in network.encoder_parameters] == pytest.approx(
        [0.1] * len(network.encoder_parameters)
    )
    assert rate_of[id(whole["projector"].weight)] == pytest.approx(1.0)
    assert rate_of[id(network.head.weight)] == pytest.approx(1.0)
    assert len(rate_of) == len(list(whole.parameters()))
    decayed = {id(each) for group in optimizer.param_groups if group["weight_decay"] for each in group["params"]}
    assert decayed == {id(each) for each in whole.parameters() if each.ndim > 1}
    assert training_groups(whole, network, TrainingSettings()) is None


def test_a_student_without_stages_has_no_auxiliary_head(tiny_file: Write, tmp_path: Path) -> None:
    code = (
        "import torch\n\n\ndef make_net(num_classes):\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 4, 1), torch.nn.Conv2d(8, num_classes, 1))\n"
    )
    (tmp_path / "nets.py").write_text(code)
    asked = scenes(tiny_file, f"student={{network: '{tmp_path}/nets.py:make_net'}}", "training.auxiliary_weight=0.4")
    with pytest.raises(ConfigError, match=r"training\.auxiliary_weight: .*make_net gives no stages; name them"):
        check_experiment(asked)


def test_data_settings_of_label_maps_are_not_of_images() -> None:
    with pytest.raises(ValueError, match="test_time: is for segmentation"):
        DataSettings.model_validate({"dataset": "digits", "test_time": {"flip": True}})
