"""Confirmation: which configurations are repeated on fresh seeds, and with which share of a search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from heterokd.config.experiment import Experiment
from heterokd.methods import BASELINE, VANILLA_KD
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.assignment import SEED_STEP
from heterokd.study.leaderboard import Leaderboard, metric
from heterokd.study.posterior import Posterior, best_repetition
from heterokd.study.summary import SUMMARY_LEADERS
from heterokd.study.trial_view import published_trial
from heterokd.study.trials import TrialRecord, Trials

LARGEST_SHARE = 0.4
"""Maximum share of all training, with repetitions: the best at 40 full trainings in a pilot on exhaustive tables."""

COLD = (12.0, 30.0)
"""Full trainings up to which nothing is repeated, since another sample is worth more, and from which the share is
largest; in between it grows linearly."""

WARM = (6.0, 24.0)
"""The same for a search that starts from settings known to be good, which has leaders sooner."""

SETTLED = 0.01
"""Expected gain of another repetition, in seed deviations, below which the decision is made."""

FEWEST = 6
"""Minimum number of repetitions before a decision is made: with fewer, the variance over seeds is hardly known."""

LEADER_SEEDS = 2
"""Fresh seeds of the leader before others are considered, so that none wins by a single lucky repetition."""

BASELINE_SEEDS = 2
"""Fresh seeds of scratch, so that the gain over it has an interval."""

BASELINE_EVERY = 6
"""Number of repetitions for each of scratch's."""

CONTENDERS = 100
"""Number of configurations without a repetition that are considered: the gain decreases with their value."""

REFERENCES_FROM = COLD[1]
"""Full trainings of a budget from which the winner's references take a part of the repetitions. In simulated searches
with 40, the regret is the same within its standard error (0.041 instead of 0.037, mean of three tables); with 20 it
would be 0.091 instead of 0.064."""

MOST_FAILURES = 2
"""Failed repetitions of a configuration after which it is repeated no more."""


@dataclass(frozen=True)
class Repetition:
    """A training of trial `number`'s configuration on a fresh seed."""

    number: int
    seed: int


def share(experiment: Experiment, total: float, *, is_warm: bool) -> float:
    """Return the share of `total` full trainings that repeats leaders.

    Args:
        experiment: `search.confirm_share` is the share, or `auto`.
        total: full trainings of the whole search, repetitions included.
        is_warm: whether it starts from settings known to be good.
    """
    asked = experiment.search.confirm_share
    if asked != "auto":
        return asked
    low, high = WARM if is_warm else COLD
    return LARGEST_SHARE * min(max((total - low) / (high - low), 0.0), 1.0)


def share_after(experiment: Experiment, searched: float, *, is_warm: bool) -> float:
    """Return the share in a search without a budget, given the full trainings of its samples."""
    part = 0.0
    for _ in range(20):  # total = searched / (1 - share(total)), iterated to its fixed point
        part = share(experiment, searched / (1 - part), is_warm=is_warm)
    return part


def next_repetition(
    trials: Trials, leaderboard: Leaderboard, capacity: int, students: Sequence[str] = ()
) -> Repetition | None:
    """Return the repetition with the largest expected effect on the decision; None if there is none.

    At most `capacity` repetitions are made. If `students` are given (those on the Pareto front), the best configuration
    of each is decided separately.
    """
    started = sum(map(len, trials.confirmations.values()))
    if started >= capacity:
        return None
    baseline = next((record for record in _ranked_records(leaderboard) if record.method == BASELINE), None)
    if baseline is not None:
        wanted = min(BASELINE_SEEDS, capacity // BASELINE_EVERY)
        done = len(trials.confirmations.get(baseline.number, ()))
        if done < wanted and started >= 2 * (done + 1) and not _fails(trials, baseline.number):
            return _repeat(trials, baseline)
    counts = dict.fromkeys(students or ("",), 0)
    for number, repeats in trials.confirmations.items():
        group = leaderboard.group(trials[number])
        if group in counts:
            counts[group] += len(repeats)
    found = (_in_group(trials, leaderboard, group, counts[group]) for group in sorted(counts, key=counts.__getitem__))
    return next((repetition for repetition in found if repetition is not None), None)


def _in_group(trials: Trials, leaderboard: Leaderboard, group: str, started: int) -> Repetition | None:
    """Return the repetition with the largest expected effect on the best of a group; None if the decision is made."""
    population = leaderboard.population(group)
    posteriors: dict[int, Posterior] = {}
    for number in (
        record.number for record in leaderboard.candidates(CONTENDERS) if leaderboard.group(record) == group
    ):
        running = sum(record.is_running for record in trials.confirmations.get(number, ()))
        found = leaderboard.posterior(number, running)
        if found is not None and not _fails(trials, number):
            posteriors[number] = found
    if len(posteriors) < 2 or population is None:
        return None
    leader = max(posteriors, key=lambda number: (posteriors[number].mean, -number))
    if len(trials.confirmations.get(leader, ())) < LEADER_SEEDS:
        return _repeat(trials, leaderboard.complete[leader])
    number, gain = best_repetition(posteriors, population.noise)
    is_open = gain > SETTLED * population.noise or started < FEWEST
    return _repeat(trials, leaderboard.complete[number]) if is_open else None


def references(trials: Trials, leaderboard: Leaderboard) -> list[TrialRecord]:
    """List the configurations that the winner is compared with, if they were trained to the end; empty without one.

    The best of scratch, plain KD with its published settings, and the winner's method with its published settings. A
    published setting that was stopped at a rung is not repeated: it was clearly behind.
    """
    leaders = leaderboard.leaders(SUMMARY_LEADERS)
    if not leaders:
        return []
    winner = leaders[0]
    scratch = next((leader.number for leader in leaders if leader.method == BASELINE), None)
    plain = VANILLA_KD[leaderboard.experiment.data.task]
    chosen = [published_trial(trials.search, method, winner.student) for method in (plain, winner.method)]
    numbers = [scratch, *(None if record is None else record.number for record in chosen)]
    known = [number for number in dict.fromkeys(numbers) if number in leaderboard.complete]
    return [trials[number] for number in known if number is not None and number != winner.number]


def reference_repetitions(trials: Trials, leaderboard: Leaderboard) -> list[Repetition]:
    """List the repetitions that the winner's references lack to be repeated as often as the winner, seed by seed."""
    found = references(trials, leaderboard)
    if not found:
        return []
    wanted = _kept(trials, leaderboard.leaders(SUMMARY_LEADERS)[0].number)
    missing = [
        (place, record)
        for record in found
        if not _fails(trials, record.number)
        for place in range(wanted - _kept(trials, record.number))
    ]
    made = {record.number: len(trials.confirmations.get(record.number, ())) for record in found}
    return [
        Repetition(record.number, record.seed + SEED_STEP * (made[record.number] + 1 + place))
        for place, record in sorted(missing, key=lambda found: found[0])
    ]


def _kept(trials: Trials, number: int) -> int:
    """Return the number of a configuration's repetitions that have not failed."""
    return sum(record.status != TrialStatus.FAILED for record in trials.confirmations.get(number, ()))


def most_references(experiment: Experiment, methods: Sequence[str]) -> int:
    """Return the maximum number of references with published settings."""
    return 1 + (VANILLA_KD[experiment.data.task] in methods) if experiment.search.confirm_references else 0


def expected_references(experiment: Experiment, methods: Sequence[str], repetitions: int) -> int:
    """Return the repetitions of references to expect on top of those of the decision.

    In simulated searches, the winner is repeated once or twice of four repetitions, and about three times of 13.
    """
    if not experiment.search.confirm_references or not repetitions:
        return 0
    seeds = min(max(1, repetitions // 2), LEADER_SEEDS + 1)
    scratch = max(0, seeds - BASELINE_SEEDS) if BASELINE in methods else 0
    return most_references(experiment, methods) * seeds + scratch


def beyond_decision(trials: Trials, leaderboard: Leaderboard) -> int:
    """Return the number of repetitions of references, without those of scratch that `next_repetition` asks for."""
    total = 0
    for record in references(trials, leaderboard):
        made = len(trials.confirmations.get(record.number, ()))
        total += max(0, made - BASELINE_SEEDS) if record.method == BASELINE else made
    return total


def fixed_repetitions(trials: Trials, leaderboard: Leaderboard) -> list[Repetition]:
    """List the repetitions that a finished search with `confirm_leaders` still lacks.

    The leading trials by their value of the search, and scratch's best, each on the same number of fresh seeds.
    """
    settings = leaderboard.experiment.search
    ranked = _ranked_records(leaderboard)
    chosen = ranked[: settings.confirm_leaders]
    baseline = [record for record in ranked if record.method == BASELINE]
    if chosen and baseline and baseline[0] not in chosen:
        chosen.append(baseline[0])
    # Seed by seed, not leader by leader: a search that is interrupted has repeated each of them.
    return [
        Repetition(record.number, seed)
        for repetition in range(1, settings.confirm_seeds + 1)
        for record in chosen
        if (seed := record.seed + SEED_STEP * repetition)
        not in [made.seed for made in trials.confirmations.get(record.number, ())]
    ]


def _ranked_records(leaderboard: Leaderboard) -> list[TrialRecord]:
    """Rank the complete trials by their value of the search."""
    finite = [record for record in leaderboard.complete.values() if math.isfinite(metric(record))]
    return sorted(finite, key=lambda record: (-leaderboard.sign * metric(record), record.number))


def _repeat(trials: Trials, found: TrialRecord) -> Repetition:
    return Repetition(found.number, found.seed + SEED_STEP * (1 + len(trials.confirmations.get(found.number, ()))))


def _fails(trials: Trials, number: int) -> bool:
    group = trials.confirmations.get(number, ())
    return sum(record.status.is_final and not record.is_complete for record in group) >= MOST_FAILURES
