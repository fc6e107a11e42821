"""The classifier solved on frozen features, against an independent optimiser, and the calibration of its answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fabricated import random_student

from heterokd.datasets import load_dataset
from heterokd.networks.network import build_network
from heterokd.outputs import Signal
from heterokd.teachers.calibration import TEMPERATURES, best_temperature, confidence
from heterokd.teachers.head import PENALTIES, _regression, frozen_features, linear_head, solve, solve_head
from heterokd.training.precision import FP32


def blobs(images: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [1, N, 6] of three classes around fixed centres, on unequal scales, and labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % 3
    centres = torch.eye(3, 6)[labels]
    features = centres + noise * torch.randn(images, 6, generator=generator)
    return (features * torch.tensor([1.0, 100.0, 0.01, 1.0, 1.0, 1.0]))[None] + 5, labels


def test_the_solution_is_that_of_gradient_descent() -> None:
    features, labels = blobs(90, 0.8)
    solved = solve(features, labels, 3, seed=0)
    assert solved.penalty in PENALTIES
    rows = features[0]
    std, mean = torch.std_mean(rows, dim=0)
    x = ((rows - mean) / std).double()
    weight, bias = torch.zeros(3, 6, dtype=torch.double), torch.zeros(3, dtype=torch.double)
    for _ in range(3000):  # the slow, obvious version
        error = ((x @ weight.T + bias).softmax(dim=1) - F.one_hot(labels, 3)) / len(x)
        weight -= 0.5 * (error.T @ x + solved.penalty * weight)
        bias -= 0.5 * error.sum(dim=0)
    ours = rows @ solved.weight.T + solved.bias
    torch.testing.assert_close(ours.softmax(dim=1), (x @ weight.T + bias).softmax(dim=1).float(), atol=2e-3, rtol=0)


def test_images_count_as_often_as_their_importance_says() -> None:
    features, labels = blobs(60, 0.8)
    weights = torch.ones(60)
    weights[labels == 0] = 2
    twice = torch.cat([torch.arange(60), (labels == 0).nonzero().squeeze(1)])
    start, rows = torch.zeros(3, 7), (features - features.mean(dim=1)) / features.std(dim=1)
    weighted = _regression(rows, labels, start, 0.1, weights / weights.mean())
    repeated = _regression(rows[:, twice], labels[twice], start, 0.1, None)
    for one, two in zip(weighted, repeated, strict=True):
        torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)
    alike = solve(features, labels, 3, seed=0, weights=torch.ones(60))
    torch.testing.assert_close(alike.weight, solve(features, labels, 3, seed=0).weight, atol=1e-3, rtol=1e-3)


def test_noisy_features_get_a_larger_penalty() -> None:
    clean, noisy = (solve(*blobs(60, noise), 3, seed=0).penalty for noise in (0.1, 3.0))
    assert clean < noisy


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 0, 1, 1, 2]], ids=["single images", "a class of one"])
def test_few_images_are_solved(labels: list[int]) -> None:
    features, _ = blobs(len(labels), 0.01)
    features[0] = torch.eye(3, 6)[labels] + 0.01 * features[0]
    solved = solve(features, torch.tensor(labels), 3, seed=0)
    assert (features[0] @ solved.weight.T + solved.bias).argmax(dim=1).tolist() == labels


def test_a_constant_feature_has_no_influence() -> None:
    features, labels = blobs(30, 0.1)
    features[..., 5] = 7.0
    assert solve(features, labels, 3, seed=0).weight[:, 5].abs().max() < 1e-6


def test_features_are_those_of_plain_and_mirrored_images() -> None:
    splits = load_dataset("digits", labels_per_class=2)
    network = random_student()
    features = frozen_features(network, splits.train, flip=True, precision=FP32)
    images = torch.from_numpy(splits.train.images.read(np.arange(20))).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        for view, shown in zip(features, (images, images.flip(3)), strict=True):
            torch.testing.assert_close(view, network(shown, Signal.EMBEDDING).embedding)


def test_solving_changes_nothing_in_the_network() -> None:
    splits = load_dataset("digits", labels_per_class=6)
    network = random_student()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    solved = solve_head(network, splits.train, flip=False, seed=0, precision=FP32)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    features = frozen_features(network, splits.val, flip=False, precision=FP32)[0]
    predicted = (features @ solved.weight.T + solved.bias).argmax(dim=1).numpy()
    assert (predicted == splits.val.labels).mean() > 0.6, "of ten classes, with six images each"


def test_a_linear_classifier_is_recognised() -> None:
    assert linear_head(random_student()) is not None
    two_heads = build_network("deit_tiny_distilled_patch16_224", 10, {"img_size": 32, "patch_size": 16, "depth": 4})
    assert linear_head(two_heads) is None


def test_temperature_undoes_a_scale_and_confidence_is_the_mean_maximum() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 5, generator=generator)
    labels = torch.distributions.Categorical(logits=logits).probs.multinomial(1, generator=generator).squeeze(1)
    for scale in (0.5, 1.0, 3.0):
        assert best_temperature(scale * logits, labels) == pytest.approx(scale, rel=0.06)
    assert best_temperature(F.one_hot(labels, 5).float(), labels) == pytest.approx(TEMPERATURES[0], rel=1e-3)
    assert best_temperature(torch.zeros(4, 5), torch.zeros(4, dtype=torch.long)) in (
        pytest.approx(TEMPERATURES[0], rel=1e-3),
        pytest.approx(TEMPERATURES[1], rel=1e-3),
    )
    assert confidence(torch.tensor([[0.0, 0.0], [100.0, 0.0]])) == pytest.approx(0.75)
