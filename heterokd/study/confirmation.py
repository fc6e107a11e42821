"""Who is trained again on a fresh seed, and how much of a search that may take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from heterokd.config.experiment import Experiment
from heterokd.methods import BASELINE
from heterokd.study.assignment import SEED_STEP
from heterokd.study.leaderboard import Leaderboard, metric
from heterokd.study.posterior import Posterior, most_telling
from heterokd.study.trials import TrialRecord, Trials

LARGEST_SHARE = 0.4
"""Of all training, repetitions included; what a pilot on exhaustive tables found best at 40 full trainings."""

COLD = (12.0, 30.0)
"""Full trainings below which nothing is repeated, since one more sample is worth more, and from which the largest share
is; in between it grows evenly."""

WARM = (6.0, 24.0)
"""The same where the search begins at settings that are known to be good: then there are leaders sooner."""

SETTLED = 0.01
"""Expected gain of one more repetition, in seed deviations, below which the decision counts as made."""

FEWEST = 6
"""Repetitions before a decision may count as made: until then, how much seeds scatter is hardly known."""

LEADER_SEEDS = 2
"""Fresh seeds of whoever leads, before others are looked at: none wins by a single lucky repetition."""

BASELINE_SEEDS = 2
"""Fresh seeds of scratch, so that the gain over it has an interval."""

BASELINE_EVERY = 6
"""Repetitions in all for each of scratch's."""

CONTENDERS = 100
"""Configurations without a repetition that are looked at for one: the gain falls with their value."""

MOST_FAILURES = 2
"""Repetitions of a configuration that failed, after which it is left alone."""


@dataclass(frozen=True)
class Repetition:
    """One training of a known configuration on a fresh seed."""

    number: int
    seed: int


def share(experiment: Experiment, total: float, *, is_warm: bool) -> float:
    """Share of `total` full trainings that repeats leaders.

    Args:
        experiment: `search.confirm_share` says how much, or `auto`.
        total: full trainings of the whole search, repetitions included.
        is_warm: whether it begins at settings that are known to be good.
    """
    asked = experiment.search.confirm_share
    if asked != "auto":
        return asked
    low, high = WARM if is_warm else COLD
    return LARGEST_SHARE * min(max((total - low) / (high - low), 0.0), 1.0)


def share_after(experiment: Experiment, searched: float, *, is_warm: bool) -> float:
    """The share in a search without a budget, which follows from what its samples cost."""
    part = 0.0
    for _ in range(20):  # total = searched / (1 - share(total)), iterated to its fixed point
        part = share(experiment, searched / (1 - part), is_warm=is_warm)
    return part


def next_repetition(
    trials: Trials, leaderboard: Leaderboard, capacity: int, students: Sequence[str] = ()
) -> Repetition | None:
    """The repetition that can still change the decision most; None when none can.

    Args:
        trials: of the study so far.
        leaderboard: what they say.
        capacity: repetitions that there is room for in all.
        students: on the Pareto front, where there is one: the best of each is a decision of its own.
    """
    begun = sum(map(len, trials.confirmations.values()))
    if begun >= capacity:
        return None
    baseline = _best(leaderboard, [one for one in leaderboard.complete.values() if one.method == BASELINE])
    if baseline is not None:
        wanted = min(BASELINE_SEEDS, capacity // BASELINE_EVERY)
        done = len(trials.confirmations.get(baseline.number, ()))
        if done < wanted and begun >= 2 * (done + 1) and not _is_hopeless(trials, baseline.number):
            return _again(trials, baseline)
    done_of = dict.fromkeys(students or ("",), 0)
    for number, repeats in trials.confirmations.items():
        group = leaderboard.group(trials[number])
        if group in done_of:
            done_of[group] += len(repeats)
    for group in sorted(done_of, key=lambda group: done_of[group]):
        repetition = _in_group(trials, leaderboard, group, done_of[group])
        if repetition is not None:
            return repetition
    return None


def _in_group(trials: Trials, leaderboard: Leaderboard, group: str, begun: int) -> Repetition | None:
    """The repetition that can still change most who is best of a group; None when none can."""
    population = leaderboard.population(group)
    beliefs: dict[int, Posterior] = {}
    for one in leaderboard.foremost(CONTENDERS):
        if leaderboard.group(one) != group:
            continue
        belief = leaderboard.belief(
            one.number, sum(other.is_running for other in trials.confirmations.get(one.number, ()))
        )
        if belief is not None and not _is_hopeless(trials, one.number):
            beliefs[one.number] = belief
    if len(beliefs) < 2 or population is None:
        return None
    noise = population.noise
    leader = max(beliefs, key=lambda one: (beliefs[one].mean, -one))
    if len(trials.confirmations.get(leader, ())) < LEADER_SEEDS:
        return _again(trials, leaderboard.complete[leader])
    number, gain = most_telling(beliefs, noise)
    is_open = gain > SETTLED * noise or begun < FEWEST
    return _again(trials, leaderboard.complete[number]) if is_open else None


def fixed_repetitions(trials: Trials, leaderboard: Leaderboard) -> list[Repetition]:
    """Every repetition that a finished search with `confirm_leaders` deserves and has not got yet.

    The leading trials by their search value, and scratch's best, each on the same number of fresh seeds.
    """
    settings = leaderboard.experiment.search
    found = [one for one in leaderboard.complete.values() if math.isfinite(metric(one))]
    found.sort(key=lambda one: (-leaderboard.sign * metric(one), one.number))
    chosen = found[: settings.confirm_leaders]
    baseline = [one for one in found if one.method == BASELINE]
    if chosen and baseline and baseline[0] not in chosen:
        chosen.append(baseline[0])
    # Seed by seed, not leader by leader: a search that is cut short has still repeated each of them.
    return [
        Repetition(one.number, seed)
        for repetition in range(1, settings.confirm_seeds + 1)
        for one in chosen
        if (seed := one.seed + SEED_STEP * repetition)
        not in [made.seed for made in trials.confirmations.get(one.number, ())]
    ]


def _best(leaderboard: Leaderboard, found: list[TrialRecord]) -> TrialRecord | None:
    finite = [one for one in found if math.isfinite(metric(one))]
    return max(finite, key=lambda one: (leaderboard.sign * metric(one), -one.number), default=None)


def _again(trials: Trials, found: TrialRecord) -> Repetition:
    return Repetition(found.number, found.seed + SEED_STEP * (1 + len(trials.confirmations.get(found.number, ()))))


def _is_hopeless(trials: Trials, number: int) -> bool:
    group = trials.confirmations.get(number, ())
    failures = [one for one in group if one.status.is_final and not one.is_complete]
    return len(failures) >= MOST_FAILURES
