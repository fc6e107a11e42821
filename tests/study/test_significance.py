"""Paired comparisons against scipy, against slow references, and on a study's files."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import fabricated
import numpy as np
import pytest
from command_line import Run
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from heterokd.report.page import write_report
from heterokd.report.study_data import read_study
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.study.significance import Comparison, compare, compare_trials, fresh_values, holm, power_of, seeds_needed
from heterokd.study.trial_view import read_trials

SEEDS = range(7)


def scattered(count: int, seeds: range = SEEDS, spread: float = 0.02) -> dict[str, dict[int, float]]:
    """Values with an effect of configuration and of seed."""
    generator = np.random.default_rng(count)
    common = generator.normal(0, 0.05, len(seeds))
    return {
        f"m{number}": {
            seed: 0.8 + 0.01 * number + common[place] + generator.normal(0, spread) for place, seed in enumerate(seeds)
        }
        for number in range(count)
    }


@pytest.mark.parametrize("pooled", [False, True])
def test_two_configurations_are_a_paired_t_test(pooled: bool) -> None:
    values = scattered(2)
    (found,) = compare(values, pooled=pooled)
    first, second = ([values[name][seed] for seed in SEEDS] for name in ("m0", "m1"))
    truth = stats.ttest_rel(first, second)
    interval = truth.confidence_interval(0.95)
    assert found.p == pytest.approx(truth.pvalue, rel=1e-9)
    assert found.p_holm == found.p
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    differences = np.subtract(first, second)
    cohen = differences.mean() / differences.std(ddof=1)
    assert found.effect == pytest.approx(cohen * (1 - 3 / (4 * 6 - 1)), rel=5e-3)  # Hedges' own approximation


def test_only_common_seeds_count() -> None:
    values = scattered(2)
    more = {"m0": {**values["m0"], 99: 0.1}, "m1": {**values["m1"], 77: 0.9, 78: math.nan}}
    assert compare(more) == compare(values)


def test_less_is_better() -> None:
    values = scattered(3)
    turned = {name: {seed: -value for seed, value in own.items()} for name, own in values.items()}
    assert compare(turned, maximise=False) == compare(values)


def least_squares(values: dict[str, dict[int, float]], first: str, second: str) -> tuple[float, float]:
    """Difference and p of a pair by the textbook: dummies against the first configuration and seed, full rank."""
    names, seeds = sorted(values), sorted({seed for own in values.values() for seed in own})
    rows, measured = [], []
    for name, own in values.items():
        for seed, value in own.items():
            row = [1.0, *(float(name == other) for other in names[1:]), *(float(seed == other) for other in seeds[1:])]
            rows.append(row)
            measured.append(value)
    design, target = np.array(rows), np.array(measured)
    inverse = np.linalg.inv(design.T @ design)
    weights = inverse @ design.T @ target
    freedom = len(rows) - design.shape[1]
    variance = ((target - design @ weights) ** 2).sum() / freedom
    contrast = np.zeros(design.shape[1])
    for name, sign in ((first, 1), (second, -1)):
        if name != names[0]:
            contrast[names.index(name)] += sign
    difference = contrast @ weights
    error = math.sqrt(variance * contrast @ inverse @ contrast)
    return difference, 2 * stats.t.sf(abs(difference) / error, freedom)


@pytest.mark.parametrize("is_complete", [True, False])
def test_pooled_noise_against_the_textbook(is_complete: bool) -> None:
    values = scattered(4)
    if not is_complete:  # a search that gives its leaders unequal numbers of seeds
        values = {name: dict(list(own.items())[: 7 - place]) for place, (name, own) in enumerate(values.items())}
    for found in compare(values, pooled=True):
        difference, p = least_squares(values, found.first, found.second)
        assert found.difference == pytest.approx(difference, abs=1e-12)
        assert found.p == pytest.approx(p, rel=1e-7)


def test_pooling_sees_what_a_pairs_own_deviation_cannot() -> None:
    values = scattered(6, range(3), spread=0.004)
    apart, together = (compare(values, pooled=pooled) for pooled in (False, True))
    assert sum(one.verdict == "tie" for one in together) < sum(one.verdict == "tie" for one in apart)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.999))
def test_holm_rejects_what_its_steps_reject(p_values: list[float], level: float) -> None:
    rejected = set()
    for step, (p, number) in enumerate(sorted((p, number) for number, p in enumerate(p_values))):
        if p * (len(p_values) - step) > level:
            break
        rejected.add(number)
    assert {number for number, p in enumerate(holm(p_values)) if p <= level} == rejected


@pytest.mark.parametrize(("effect", "seeds"), [(1.0, 5), (0.4, 12), (-1.5, 3), (2.5, 4)])
def test_power_against_simulation(effect: float, seeds: int) -> None:
    generator = np.random.default_rng(seeds)
    draws = generator.normal(effect, 1, (20_000, seeds))
    share = (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean()
    assert power_of(effect, seeds) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 20_000) + 1e-3)


@pytest.mark.parametrize("effect", [0.05, 0.5, 2.0, 8.0, 40.0])
def test_power_against_an_integral(effect: float) -> None:
    """P(|T| > q) = 1 - integral over the deviation s of P(|z + effect sqrt(n)| < q s): chi density, by the sum."""
    for seeds in (2, 3, 10, 100):
        freedom, shift = seeds - 1, effect * math.sqrt(seeds)
        quantile = stats.t.ppf(0.975, freedom)
        s = np.linspace(1e-9, 6, 200_001)
        inside = stats.norm.cdf(quantile * s - shift) - stats.norm.cdf(-quantile * s - shift)
        density = stats.chi.pdf(s * math.sqrt(freedom), freedom) * math.sqrt(freedom)
        assert power_of(effect, seeds) == pytest.approx(1 - np.trapezoid(inside * density, s), abs=1e-4)


def test_seeds_needed_is_the_first_number_that_is_enough() -> None:
    for effect in (0.2, 0.7, 1.3, 4.0, 40.0):
        needed = seeds_needed(effect)
        assert needed is not None
        powers = [power_of(effect, seeds) for seeds in range(2, needed + 1)]
        assert all(power < 0.8 for power in powers[:-1])
        assert powers[-1] >= 0.8
    assert seeds_needed(0.0) is None
    assert seeds_needed(0.01) is None
    assert (seeds_needed(0.7, 0.01) or 0) > (seeds_needed(0.7) or 0)


def test_one_seed_and_no_seed_say_nothing() -> None:
    for found in compare({"a": {1: 0.9}, "b": {1: 0.5}, "c": {2: 0.7}}):
        assert found.verdict == "unknown"
        assert found.low is found.high is found.effect is found.seeds_needed is None
        assert "train both on more" in found.sentence()


def test_differences_that_coincide_are_no_certainty() -> None:
    same = {"a": {1: 0.9, 2: 0.7}, "b": {1: 0.8, 2: 0.6}}  # 0.9 - 0.8 is not 0.7 - 0.6 to the last bit
    for pooled in (False, True):
        (found,) = compare(same, pooled=pooled)
        assert (found.verdict, found.p, found.difference) == ("tie", 1.0, pytest.approx(0.1))


def test_false_alarms_are_as_rare_as_announced() -> None:
    """All configurations alike: Holm over six pairs cries wolf in at most one report of twenty."""
    generator = np.random.default_rng(0)
    alarms = 0
    for _ in range(400):
        seed_effect = generator.normal(0, 1, 3)
        values = {
            name: {seed: seed_effect[seed] + generator.normal(0, 1) for seed in range(3)}
            for name in ("a", "b", "c", "d")
        }
        alarms += any(one.verdict in ("better", "worse") for one in compare(values, pooled=True))
    assert alarms / 400 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def made_study(folder: Path) -> StudyFolder:
    """Two leaders of one method and scratch, each found on seed 0 and repeated on fresh ones; a start beside them."""
    question = fabricated.experiment()
    study = fabricated.study(Workspace(folder / "runs"), question)
    values = {0: ("scratch", 0.70), 1: ("kd", 0.80), 2: ("kd", 0.79), 3: ("kd", 0.95)}
    number = len(values)
    for found, (method, value) in values.items():
        trial = fabricated.trial(study, question, found, method)
        fabricated.change(trial, metrics={"val/top1": value + 0.1})
        for seed in (1000, 2000, 3000) if found < 3 else ():
            sample = trial.snapshot.sample
            repeat = study.trial(number)
            snapshot = TrialSnapshot(TrialStatus.COMPLETE, "confirm", found, sample)
            noise = 0.01 * math.sin(seed) + 0.001 * math.cos(number)
            repeat.start(question.recipe(sample, seed=seed), replace(snapshot, metrics={"val/top1": value + noise}))
            number += 1
    return study


def test_a_studys_fresh_seeds(tmp_path: Path) -> None:
    study = made_study(tmp_path)
    values = fresh_values(read_trials(study, "val/top1"))
    assert list(values) == ["scratch", "kd (trial 1)", "kd (trial 2)"]  # trial 3 was found by luck, and never repeated
    assert all(sorted(own) == [1000, 2000, 3000] for own in values.values())  # seed 0, on which they were found, is out
    found = compare_trials(read_trials(study, "val/top1"))
    assert [(one.first, one.second) for one in found] == list(
        itertools.combinations(["kd (trial 1)", "kd (trial 2)", "scratch"], 2)
    )
    assert [one.verdict for one in found] == ["better"] * 3
    assert fresh_values(read_trials(study, "val/loss")) == {}


def test_the_command_and_the_page(cli: Run, tmp_path: Path) -> None:
    study = made_study(tmp_path)
    found = compare_trials(read_trials(study, "val/top1"))
    for more in ([], ["--json"]):
        code, out, _ = cli("compare", "tiny", "--root", tmp_path / "runs", *more)
        assert code == 0
        if more:
            rows = json.loads(out)["comparisons"]
            assert [(row["first"], row["second"], row["verdict"]) for row in rows] == [
                (one.first, one.second, one.verdict) for one in found
            ]
        else:
            assert "scratch                 val/top1 0.7" in out
            assert all(one.sentence() in out for one in found)
    fabricated.summary(fabricated.ranked(1, "kd", 0.8, 0.01)).write(study)
    write_report(read_study(study, fabricated.experiment()))
    page = study.report.read_text()
    assert "Significance of differences" in page
    for one in found:
        assert f"<td>{one.first}</td><td>{one.second}</td>" in page
        assert f"{one.difference:+.4f}" in page


def test_sentences() -> None:
    tie = Comparison("kd", "scratch", (1, 2), 0.01, -0.02, 0.04, 0.3, 0.6, 0.5, "tie", 9)
    assert tie.sentence() == (
        "kd ties with scratch: +0.0100, p 0.600 (Holm), 95 % interval -0.0200 to +0.0400; "
        "about 9 seeds would decide it (2 so far)."
    )
