"""Repetitions where they can change the decision: what is believed of noisy values, and how a budget is divided."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heterokd.config.experiment import Experiment
from heterokd.methods import BASELINE
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.assignment import Assignment
from heterokd.study.confirmation import LARGEST_SHARE, share, share_after
from heterokd.study.leaderboard import Leaderboard
from heterokd.study.options import StudyOptions
from heterokd.study.posterior import EARLY, Population, Posterior, best_repetition, expected_offsets, fit_population
from heterokd.study.study import Study

NOISE = 0.02


def make_experiment(**search: Any) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "confirming",
            "data": {"dataset": "digits"},
            "teacher": {"network": "resnet18"},
            "student": {"network": "resnet10t"},
            "training": {"epochs": 27},
            "search": {"space": {"methods": ["scratch", "kd"]}, **search},
        }
    )


def truth(assignment: Assignment) -> float:
    if assignment.recipe.method == BASELINE:
        return 0.8
    params = assignment.recipe.params
    return 0.9 - 0.02 * abs(math.log(params["temperature"] / 4)) - 0.02 * abs(math.log(params["weight"] / 2))


def noisy(assignment: Assignment) -> float:
    return truth(assignment) + random.Random(assignment.recipe.hash).gauss(0, NOISE)


def search(
    experiment: Experiment, workers: int = 1, value_of: Callable[[Assignment], float] = noisy
) -> tuple[Study, list[Assignment], list[int]]:
    """A whole search in memory; its assignments, and how many ran at each decision to wait."""
    study = Study.open(experiment, StudyFolder(Path("nowhere")), StudyOptions(storage="memory", clock=lambda: 0.0))
    running: list[Assignment] = []
    done: list[Assignment] = []
    waits = []
    while True:
        step = study.next() if len(running) < workers else "wait"
        if isinstance(step, Assignment):
            running.append(step)
            done.append(step)
            continue
        if step == "wait" and len(running) < workers:
            waits.append(len(running))
        if not running:
            assert step is None
            return study, done, waits
        one = running.pop(0)
        value, ended = value_of(one), False
        for rung in one.rungs:
            early = truth(one) + random.Random(f"{one.recipe.hash} {rung}").gauss(0, NOISE)
            if not study.report(one.number, rung, {"val/top1": early * rung / 27}):
                study.finish(one.number, "pruned", {"epoch": rung})
                ended = True
                break
        if not ended:
            study.finish(one.number, "complete", {"val/top1": value})


# --- posteriors


def test_a_posterior_is_that_of_two_normals() -> None:
    """Against a grid: prior times likelihood, normalised."""
    searched, fresh = 0.93, [0.90, 0.94]
    grid = np.linspace(0.7, 1.1, 40001)
    density = -0.5 * ((grid - 0.88) / 0.03) ** 2
    for value in (searched, *fresh):
        density = density - 0.5 * ((value - grid) / 0.02) ** 2
    weight = np.exp(density - density.max())
    weight /= weight.sum()
    mean = float((weight * grid).sum())
    found = Population(0.88, 0.03, 0.02).posterior(searched, fresh)
    assert found.mean == pytest.approx(mean, abs=1e-6)
    assert found.deviation == pytest.approx(math.sqrt(float((weight * (grid - mean) ** 2).sum())), rel=1e-4)


def test_pending_values_reduce_the_deviation_and_keep_the_mean() -> None:
    known = Population(0.88, 0.03, 0.02)
    now, then, measured = known.posterior(0.9), known.posterior(0.9, pending=2), known.posterior(0.9, [0.9, 0.9])
    assert then.mean == now.mean
    assert then.deviation == pytest.approx(measured.deviation)
    assert then.deviation < now.deviation


def test_a_population_recovers_noise_spread_and_the_bias_of_the_search() -> None:
    rng = np.random.default_rng(1)
    true = rng.normal(0.9, 0.03, 400)
    searched = dict(enumerate((true + 0.01 + rng.normal(0, 0.02, 400)).tolist()))
    repeated = {key: (true[key] + rng.normal(0, 0.02, 3)).tolist() for key in range(100)}
    found = fit_population(searched, repeated)
    assert found is not None
    assert found.noise == pytest.approx(0.02, rel=0.15)
    assert found.spread == pytest.approx(0.03, rel=0.25)
    assert found.mean == pytest.approx(0.91, abs=0.006)
    assert found.bias == pytest.approx(0.01, abs=0.004)


def test_first_epochs_say_where_a_configuration_may_end() -> None:
    ends = {0: 0.1, 1: 0.2, 2: 0.8, 3: 0.82, 4: 0.84, 5: 0.86}
    begins = {0: 0.9, 1: 0.1, 2: 0.4, 3: 0.5, 4: 0.5, 5: 0.6}
    found = expected_offsets(ends, begins)
    # By the better half (3, 4, 5), and the obvious formula.
    scale = EARLY * statistics.pstdev([0.82, 0.84, 0.86]) / statistics.pstdev([0.5, 0.5, 0.6])
    middle = statistics.fmean([0.5, 0.5, 0.6])
    assert found[5] == pytest.approx(scale * (0.6 - middle))
    assert found[0] == pytest.approx(scale * (0.9 - middle))
    # No worse than the worst of the better half, whatever it began with.
    assert found[1] == found[2] == found[3] == pytest.approx(scale * (0.5 - middle))


def test_first_epochs_say_nothing_of_few_alike_or_unknown_ones() -> None:
    assert expected_offsets({0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.1, 1: 0.2, 2: 0.3}) == {0: 0.0, 1: 0.0, 2: 0.0}
    assert set(expected_offsets({key: key / 10 for key in range(6)}, dict.fromkeys(range(6), 0.5)).values()) == {0.0}
    found = expected_offsets(
        {key: key / 10 for key in range(6)} | {6: -math.inf}, {key: key / 9 for key in range(5)} | {5: math.nan, 6: 0.5}
    )
    assert found[5] == found[6] == 0.0
    assert found[4] > 0 > found[0]


def test_of_two_equal_ends_the_faster_learner_has_the_higher_posterior(tmp_path: Path) -> None:
    study = Study.open(make_experiment(trials=8, prune=False), StudyFolder(tmp_path))
    for number in range(8):
        one = study.next()
        assert isinstance(one, Assignment)
        for rung in one.rungs:
            early = 0.5 + 0.02 * number - (0.1 if number == 6 else 0.0)
            study.report(one.number, rung, {"val/top1": early}, [{"val/top1": early}])
        study.finish(one.number, "complete", {"val/top1": 0.7 + 0.01 * min(number, 6)})
    leaderboard = Leaderboard(study._trials, study.experiment)
    slow, fast = leaderboard.posterior(6), leaderboard.posterior(7)
    assert slow is not None
    assert fast is not None
    assert slow.mean < fast.mean


def test_a_single_configuration_has_no_posterior() -> None:
    assert fit_population({0: 0.9}, {}) is None
    assert fit_population({0: 0.9, 1: -math.inf}, {0: [0.8]}) is None


def test_a_configuration_that_diverges_is_worth_nothing() -> None:
    assert Population(0.9, 0.1, 0.1).posterior(0.95, [-math.inf]).mean == -math.inf


def test_the_gain_of_a_repetition_is_what_a_simulation_finds() -> None:
    posteriors = {1: Posterior(0.90, 0.010), 2: Posterior(0.89, 0.020), 3: Posterior(0.80, 0.005)}
    noise = 0.02
    rng = np.random.default_rng(1)
    gains = {}
    for number, known in posteriors.items():
        others = max(other.mean for key, other in posteriors.items() if key != number)
        value = rng.normal(known.mean, math.hypot(known.deviation, noise), 400_000)
        weight = known.deviation**2 / (known.deviation**2 + noise**2)
        gains[number] = float(np.maximum(known.mean + weight * (value - known.mean), others).mean()) - 0.90
    number, gain = best_repetition(posteriors, noise)
    assert number == max(gains, key=lambda key: gains[key]) == 2
    assert gain == pytest.approx(gains[2], rel=0.02)
    assert gains[3] < 1e-6


# --- how much


@pytest.mark.parametrize(("total", "expected"), [(5, 0), (12, 0), (21, 0.2), (30, 0.4), (300, 0.4)])
def test_the_share_grows_with_the_budget(total: float, expected: float) -> None:
    assert share(make_experiment(), total, is_warm=False) == pytest.approx(expected)


def test_warm_starts_are_worth_repeating_sooner_and_a_number_is_taken_as_it_is() -> None:
    assert share(make_experiment(), 12, is_warm=True) > 0
    assert share(make_experiment(confirm_share=0.25), 3, is_warm=False) == 0.25
    assert share(make_experiment(confirm_share=0.0), 300, is_warm=True) == 0


def test_without_a_budget_the_share_is_of_searching_and_repeating_together() -> None:
    for searched in (5.0, 12.0, 16.0, 24.0):
        part = share_after(make_experiment(), searched, is_warm=False)
        assert part == pytest.approx(share(make_experiment(), searched / (1 - part), is_warm=False), abs=1e-3)


# --- in a search


def test_a_budget_of_trainings_is_spent_and_never_passed() -> None:
    for budget in (5, 12, 20, 40):
        study, done, _ = search(make_experiment(budget={"trainings": budget}), workers=3)
        spent = study.spending
        assert budget - 1.01 < spent.trainings <= budget + 1e-6
        assert spent.confirmation <= LARGEST_SHARE * budget + 1
        assert (spent.confirmation > 0) == (budget > 12)
        assert study.progress().finished
        assert len(done) == spent.begun


def test_repetitions_go_where_they_can_change_the_decision() -> None:
    study, done, _ = search(make_experiment(budget={"trainings": 40}))
    repeats = [one for one in done if one.origin == "confirm"]
    counts = {one.confirms: sum(other.confirms == one.confirms for other in repeats) for one in repeats}
    leaders = study.leaders()
    assert leaders[0].confirmed
    assert leaders[0].method == "kd"
    best = [leader.number for leader in leaders[:6]]
    assert sum(counts.get(number, 0) for number in best) >= 0.6 * len(repeats)
    assert len(set(counts.values())) > 1  # not the same for each
    scratch = next(leader for leader in leaders if leader.method == BASELINE)
    assert len(scratch.seeds) == 2
    assert scratch.low is not None
    seeds = {(one.confirms, one.recipe.training.seed) for one in repeats}
    assert len(seeds) == len(repeats)
    assert all(one.recipe.training.seed % 1000 == 0 and one.recipe.training.seed for one in repeats)
    assert all(one.rungs for one in repeats)  # checkpoints to resume from; they are never stopped
    assert len(study.leaders()[0].values) == counts[leaders[0].number]


def test_workers_do_not_idle_between_search_and_repetitions() -> None:
    _, done, waits = search(make_experiment(trials=60), workers=4)
    assert [one.origin for one in done].index("confirm") == 60
    # With four at a time somebody waits only at the very end, where what remains is fewer than the workers.
    assert len(waits) <= 4


@pytest.mark.thorough
def test_what_is_reported_is_not_the_luckiest_value() -> None:
    """Over many searches: the value to expect is close to the truth, the best single value is far above it."""
    lucky, expected = [], []
    for seed in range(30):
        experiment = make_experiment(budget={"trainings": 30}, seed=seed)
        experiment = experiment.model_copy(
            update={"training": experiment.training.model_copy(update={"seed": 10_000 * seed})}
        )
        study, done, _ = search(experiment)
        leader = study.leaders()[0]
        true = truth(next(one for one in done if one.number == leader.number))
        expected.append((leader.expected - true) / NOISE)
        lucky.append((max(one.search_value for one in study.leaders()) - true) / NOISE)
    assert abs(statistics.fmean(expected)) < 0.3
    assert statistics.fmean(lucky) > 0.8


def test_a_summary_looks_at_few_configurations_and_says_the_same() -> None:
    """Also at each moment of a search with repetitions underway: whoever leads, leads among all."""
    experiment = make_experiment(budget={"trainings": 60}, prune=False)
    study = Study.open(experiment, StudyFolder(Path("nowhere")), StudyOptions(storage="memory", clock=lambda: 0.0))
    lengths = []
    while isinstance(one := study.next(), Assignment):
        study.finish(one.number, "complete", {"val/top1": round(noisy(one), 2)})  # ties, too
        everyone, leaderboard = study.leaders(), Leaderboard(study._trials, experiment)
        assert leaderboard.leaders(1)[0] == everyone[0]
        assert leaderboard.leaders(5)[:5] == everyone[:5]
        said = study.summary().leaders
        assert [leader.number for leader in said] == [leader.number for leader in everyone[: len(said)]]
        scratch = [
            next(all_ for all_ in some if all_.method == BASELINE) for some in (everyone, leaderboard.leaders(1))
        ]
        assert scratch[0] == scratch[1]
        lengths.append((len(leaderboard.candidates(5)), len(everyone)))
    assert lengths[-1][0] < lengths[-1][1] / 2


def test_a_search_without_confirmation_repeats_nothing() -> None:
    for settings in ({"confirm_leaders": 0}, {"confirm_share": 0.0}):
        _, done, _ = search(make_experiment(trials=40, **settings))
        assert {one.origin for one in done} == {"published", "sampled"}


def test_repetitions_that_fail_are_given_up() -> None:
    study = Study.open(make_experiment(trials=40), StudyFolder(Path("nowhere")), StudyOptions(storage="memory"))
    begun = 0
    while isinstance(step := study.next(), Assignment):
        begun += 1
        if step.origin == "confirm":
            study.finish(step.number, "failed", {}, "out of memory")
        else:
            study.finish(step.number, "complete", {"val/top1": noisy(step)})
    assert step is None
    assert begun < 40 + 40
    assert study.progress().finished


def test_a_repetition_that_diverges_puts_its_configuration_last() -> None:
    study = Study.open(make_experiment(trials=40), StudyFolder(Path("nowhere")), StudyOptions(storage="memory"))
    broken = None
    while isinstance(step := study.next(), Assignment):
        if step.origin == "confirm" and (broken is None or step.confirms == broken):
            broken = step.confirms
            study.finish(step.number, "diverged", {"epoch": 3}, "not finite")
        else:
            study.finish(step.number, "complete", {"val/top1": noisy(step)})
    repeated = [leader for leader in study.leaders() if leader.confirmed]
    assert repeated[-1].number == broken
    assert len(repeated) > 2


# --- references of the winner


def distilled(assignment: Assignment) -> float:
    """LSKD is the best method, above all at a temperature of 4; nothing is better than its published setting by far."""
    bonus = {"scratch": -0.1, "kd": 0.0, "lskd": 0.03}[assignment.recipe.method]
    off = abs(math.log(assignment.recipe.params.get("temperature", 4.0) / 4))
    return 0.85 + bonus - 0.02 * off + random.Random(assignment.recipe.hash).gauss(0, NOISE)


def compared(study: Study) -> dict[str, int]:
    """Trials of the winner and of its references, by their role."""
    winner = study.leaders()[0]
    found = {"winner": winner.number}
    for method in (BASELINE, "kd", winner.method):
        published = next(record for record in study._trials.search if record.method == method)
        if published.number != winner.number:
            found[method] = published.number
    found[BASELINE] = next(leader.number for leader in study.leaders() if leader.method == BASELINE)
    return found


def repetitions(study: Study) -> dict[str, int]:
    return {role: len(study._trials.confirmations.get(number, ())) for role, number in compared(study).items()}


def referring(**search: Any) -> Experiment:
    return make_experiment(space={"methods": ["scratch", "kd", "lskd"]}, prune=False, **search)


@pytest.mark.parametrize(
    "settings", [{"trials": 16}, {"trials": 30}, {"trials": 12, "confirm_seeds": 3}, {"budget": {"trainings": 40}}]
)
@pytest.mark.parametrize("workers", [1, 3])
def test_references_are_repeated_as_often_as_the_winner(settings: dict[str, Any], workers: int) -> None:
    study, done, _ = search(referring(**settings), workers, distilled)
    numbers, counts = compared(study), repetitions(study)
    assert counts["winner"]
    # A budget may end before the last of them.
    missing = sum(counts["winner"] - min(count, counts["winner"]) for count in counts.values())
    assert missing <= (2 if "budget" in settings else 0), counts
    assert study.progress().confirmations_planned == sum(one.origin == "confirm" for one in done)
    assert study.spending.trainings <= (settings.get("budget") or {}).get("trainings", math.inf)

    without, fewer, _ = search(referring(**settings, confirm_references=False), workers, distilled)
    before = repetitions(without)
    assert sum(before["winner"] - min(count, before["winner"]) for count in before.values()) > missing
    if workers == 1 and "trials" in settings:
        pairs = zip_longest(*([(one.origin, one.sample, one.confirms) for one in found] for found in (done, fewer)))
        place = next(place for place, (mine, other) in enumerate(pairs) if mine != other)
        assert done[place].confirms in numbers.values(), "all decisions before the first repetition of a reference"


def test_a_search_that_repeats_nothing_repeats_no_reference() -> None:
    for settings in ({"trials": 8}, {"trials": 30, "confirm_share": 0.0}, {"trials": 30, "confirm_leaders": 0}):
        _, done, _ = search(referring(**settings), value_of=distilled)
        assert {one.origin for one in done} == {"published", "sampled"}


def test_a_small_budget_goes_to_the_decision() -> None:
    """As many repetitions of leaders as without references; what is left is theirs."""
    found = []
    for asked in (False, True):
        study, done, _ = search(referring(budget={"trainings": 20}, confirm_references=asked), value_of=distilled)
        found.append([(one.origin, one.sample, one.confirms) for one in done])
        assert study.spending.trainings <= 20
    assert found[0] == found[1][: len(found[0])]


def test_a_reference_that_fails_is_given_up() -> None:
    study = Study.open(referring(trials=30), StudyFolder(Path("nowhere")), StudyOptions(storage="memory"))
    failed = 0
    while isinstance(step := study.next(), Assignment):
        if step.origin == "confirm" and step.recipe.method == "kd":
            failed += 1
            study.finish(step.number, "failed", {}, "out of memory")
        else:
            study.finish(step.number, "complete", {"val/top1": distilled(step)})
    counts = repetitions(study)
    assert failed
    assert min(counts[BASELINE], counts["lskd"]) >= counts["winner"] > 0, counts
    assert study.progress().finished
