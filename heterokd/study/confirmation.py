"""Confirmation: which configurations are repeated on fresh seeds, and with which share of a search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from heterokd.config.experiment import Experiment
from heterokd.methods import BASELINE
from heterokd.study.assignment import SEED_STEP
from heterokd.study.leaderboard import Leaderboard, metric
from heterokd.study.posterior import Posterior, best_repetition
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
