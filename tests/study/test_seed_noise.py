"""Noise over seeds: the prior from the number of validation images, and intervals before any repetition."""

from __future__ import annotations

import math

import fabricated
import numpy as np
import pytest
from scipy import stats

from heterokd.study.seed_noise import DECAY, FREEDOM, MOST_FREEDOM, RATIO, NoisePrior, half_widths, noise_prior


def test_the_prior_is_the_binomial_variance() -> None:
    prior = NoisePrior(400)
    assert prior.variance(0.5) == pytest.approx(RATIO * 0.25 / 400)
    # A score of 0 or 1 counts as half an image away from it.
    expected = pytest.approx(RATIO * (0.5 / 400) * (399.5 / 400) / 400)
    assert [prior.variance(score) for score in (0.0, 1.0)] == [expected, expected]
    assert NoisePrior().variance(0.5) == NoisePrior(400).variance(1.7) == 0


def test_without_prior_and_repetitions_nothing_is_known() -> None:
    assert half_widths([], NoisePrior(), 0.5)(1) is None
    assert half_widths([[0.5], [0.6]], NoisePrior(), 0.5)(1) is None
    assert half_widths([], NoisePrior(100), None)(1) is None


def test_single_trainings_have_the_interval_of_the_prior() -> None:
    """0.5361 against 0.5294 on 748 images, one seed each, is a tie."""
    half = half_widths([], NoisePrior(748), 0.5361)(1)
    assert half == pytest.approx(stats.t.ppf(0.975, FREEDOM) * math.sqrt(RATIO * 0.5361 * 0.4639 / 748))
    assert math.sqrt(2) * half / 4 > 0.5361 - 0.5294


def test_repetitions_and_prior_are_pooled() -> None:
    groups = [[0.90, 0.92], [0.80, 0.83, 0.86]]
    squares = sum(np.var(group) * len(group) for group in groups)
    prior = NoisePrior(300)
    expected = (squares + FREEDOM * prior.variance(0.9)) / (3 + FREEDOM)
    half = half_widths(groups, prior, 0.9)
    assert half(3) == pytest.approx(stats.t.ppf(0.975, 3 + FREEDOM) * math.sqrt(expected / 3))
    alone = half_widths(groups, NoisePrior(), 0.9)
    assert alone(1) == pytest.approx(stats.t.ppf(0.975, 3) * math.sqrt(squares / 3))


def test_finished_studies_update_the_prior() -> None:
    assert noise_prior(300, [fabricated.summary(val_images=300)]) == NoisePrior(300)
    leaders = [fabricated.ranked(n, "kd", 0.9, values=(0.9,) * 5) for n in range(3)]
    found = noise_prior(300, [fabricated.summary(*leaders, val_images=300)])
    assert found.freedom == FREEDOM + 3 * 4 * DECAY
    assert found.ratio == pytest.approx(RATIO * FREEDOM / found.freedom)
    many = [fabricated.summary(*leaders, val_images=300)] * 20
    assert noise_prior(300, many).freedom == MOST_FREEDOM
    # The studies of a version that did not record the number of images say nothing.
    assert noise_prior(300, [fabricated.summary(*leaders)]) == NoisePrior(300)
