"""Which configurations lead, how surely, and which of them deserve to be trained again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from heterokd.config import Experiment
from heterokd.space import Scalar
from heterokd.study.assignments import BASELINE, SEED_STEP, Origin
from heterokd.study.trials import Trials, metric


@dataclass(frozen=True)
class Leader:
    """One configuration that was trained to the end: the trial that found it and its confirmations.

    Attributes:
        number: the trial that found it.
        method: its method.
        sample: its values.
        origin: how it came up.
        search_value: the metric of the trial that found it. The best of many noisy values overstates its
            configuration, so a confirmed leader's mean leaves it out.
        values: the metric on each fresh seed; the search value alone as long as it is not confirmed.
        seeds: of `values`.
        numbers: trials of `values`.
        mean: of `values`.
        low: lower end of the mean's 95 % interval; None without two confirmations of any one configuration.
        high: upper end.
        confirmed: whether `values` are fresh.
    """

    number: int
    method: str
    sample: dict[str, Scalar]
    origin: Origin
    search_value: float
    values: tuple[float, ...]
    seeds: tuple[int, ...]
    numbers: tuple[int, ...]
    mean: float
    low: float | None
    high: float | None
    confirmed: bool


def rank_leaders(trials: Trials, experiment: Experiment) -> list[Leader]:
    """Configurations that were trained to the end, best first (the order: `Study.leaders`).

    The interval is a t-interval of the mean with the seed standard deviation pooled over all confirmed
    configurations (each has two or three values, too few for a deviation of its own): it supposes that seeds
    scatter all of them alike. It ends where the metric does.
    """
    groups: dict[int, list[FrozenTrial]] = {}
    for trial in trials.confirmations():
        if trial.state == TrialState.COMPLETE:
            groups.setdefault(trial.user_attrs["assignment"]["confirms"], []).append(trial)
    half_width = _half_widths([[metric(trial) for trial in group] for group in groups.values()])
    leaders = [_leader(trial, groups.get(trial.number, []), half_width, experiment) for trial in _complete(trials)]
    return sorted(leaders, key=lambda leader: _rank(leader, experiment))


def confirmations(trials: Trials, experiment: Experiment) -> list[tuple[int, int]]:
    """Every repetition that a finished search deserves: (number of the trial, seed).

    The leading trials by their search value, and scratch's best, each on the same number of fresh seeds.
    """
    settings = experiment.search
    sign = 1 if experiment.maximise else -1
    found = [trial for trial in _complete(trials) if math.isfinite(metric(trial))]
    found.sort(key=lambda trial: (-sign * metric(trial), trial.number))
    chosen = found[: settings.confirm_leaders]
    baseline = [trial for trial in found if trial.user_attrs["assignment"]["sample"]["method"] == BASELINE]
    if chosen and baseline and baseline[0] not in chosen:
        chosen.append(baseline[0])
    # Seed by seed, not leader by leader: a search that is cut short has still repeated each of them.
    return [
        (trial.number, trial.user_attrs["assignment"]["seed"] + SEED_STEP * repetition)
        for repetition in range(1, settings.confirm_seeds + 1)
        for trial in chosen
    ]


def _complete(trials: Trials) -> list[FrozenTrial]:
    return [trial for trial in trials.search(duplicates=False) if trial.state == TrialState.COMPLETE]


def _leader(
    found: FrozenTrial, repeats: list[FrozenTrial], half_width: Callable[[int], float | None], experiment: Experiment
) -> Leader:
    measured = repeats or [found]
    values = tuple(metric(trial) for trial in measured)
    worst = -math.inf if experiment.maximise else math.inf
    mean = math.fsum(values) / len(values) if all(map(math.isfinite, values)) else worst
    half = half_width(len(values)) if math.isfinite(mean) else None
    # A share lies between 0 and 1, and two or three values far apart would reach beyond.
    least, most = (-math.inf, math.inf) if experiment.metric == "val/loss" else (0.0, 1.0)
    attrs = found.user_attrs["assignment"]
    return Leader(
        number=found.number,
        method=attrs["sample"]["method"],
        sample=attrs["sample"],
        origin=attrs["origin"],
        search_value=metric(found),
        values=values,
        seeds=tuple(trial.user_attrs["assignment"]["seed"] for trial in measured),
        numbers=tuple(trial.number for trial in measured),
        mean=mean,
        low=None if half is None else max(least, mean - half),
        high=None if half is None else min(most, mean + half),
        confirmed=bool(repeats),
    )


def _rank(leader: Leader, experiment: Experiment) -> tuple[bool, float, float, bool, int]:
    end = leader.low if experiment.maximise else leader.high
    value = (leader.mean if end is None else end) if leader.confirmed else leader.search_value
    sign = -1 if experiment.maximise else 1
    return not leader.confirmed, sign * value, sign * leader.mean, leader.method == BASELINE, leader.number


def _half_widths(groups: list[list[float]]) -> Callable[[int], float | None]:
    """Half the width of a mean's 95 % interval, as a function of how many values it is the mean of.

    The variance is pooled: sum of squared distances from each group's own mean over `sum(size - 1)` degrees of
    freedom. Without two values in any group there is none.
    """
    groups = [group for group in groups if len(group) > 1 and all(map(math.isfinite, group))]
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return lambda size: None
    from scipy.special import stdtrit

    means = [math.fsum(group) / len(group) for group in groups]
    squares = math.fsum((value - mean) ** 2 for group, mean in zip(groups, means, strict=True) for value in group)
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(squares / freedom)
    return lambda size: half / math.sqrt(size)
