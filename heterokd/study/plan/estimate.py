"""Plan: what a search will take, as one plain object with a range to each number; pure, from counts and costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import optuna

from heterokd.study.plan.costs import Costs
from heterokd.study.plan.counts import Counts
from heterokd.study.plan.simulation import MOST_ASKED, simulate
from heterokd.study.pruner import Pruner

RUNS, TRAININGS = 200, 20_000
"""A search is simulated so often, or fewer times where it is long, so that a plan takes no more than a few seconds."""

ASKED, LEAST_RUNS = 20_000, 3
"""Epochs about which a pruner that reads every epoch is asked in all simulations, and the fewest simulations."""

LOW, HIGH = 0.05, 0.95
"""A range leaves out so many of the runs at either end."""


@dataclass(frozen=True)
class Range:
    """A number, and between which two it will lie nine times of ten."""

    expected: float
    low: float
    high: float

    def times(self, factor: float) -> Range:
        """All three multiplied."""
        return Range(factor * self.expected, factor * self.low, factor * self.high)


@dataclass(frozen=True)
class Stock:
    """What a search needs beside trainings, and what of it is there.

    Attributes:
        teacher_ready: the share of teachers that need not be fitted.
        teacher_bytes: of the weights of those that are fitted.
        cache_bytes: of one cache of each teacher's outputs; 0 where no method reads one.
        cache_ready: the share of the search's own caches that is there.
        views: teacher outputs that these hold.
    """

    teacher_ready: float
    teacher_bytes: int
    cache_bytes: int
    cache_ready: float
    views: int


@dataclass(frozen=True)
class Prices:
    """What devices cost.

    Attributes:
        per_hour: of all nodes together; None: not known.
        per_device: of an hour of one core or GPU at work, where the nodes' price is not known.
        currency: of both.
    """

    per_hour: float | None = None
    per_device: float | None = None
    currency: str = "USD"


@dataclass(frozen=True)
class Plan:
    """What is left of a search.

    Attributes:
        name: of the experiment.
        device: in words.
        parallel: trials at a time.
        trainings: `published`, `sampled` (of which `pruned` are expected to end early), `repeated`, and `done` before.
        phases: expected seconds of `start`, `teacher`, `search`, `confirmation`, `end`.
        seconds: of the whole.
        device_hours: of cores or GPUs at work.
        device_unit: `core-hours` or `GPU-hours`.
        money: what the nodes cost for that time; None without prices.
        currency: of it.
        memory: bytes of the machine, all processes together; None on a cluster, or where it was not measured.
        gpu_memory: bytes of a GPU for one trial; None without a GPU.
        disk: bytes that the search writes.
        ready: the share of the `teacher`s that is there, and of their `cache`s.
        source: where the costs are from.
        teachers: how many are followed.
        left_out: students that are over a limit, with the reason: neither counted nor timed.
    """

    name: str
    device: str
    parallel: int
    trainings: Mapping[str, float]
    phases: Mapping[str, float]
    seconds: Range
    device_hours: Range
    device_unit: str
    money: Range | None
    currency: str
    memory: int | None
    gpu_memory: int | None
    disk: Range
    ready: Mapping[str, float]
    source: str
    teachers: int = 1
    left_out: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def estimate(
    name: str,
    counts: Counts,
    costs: Costs,
    stock: Stock,
    prices: Prices,
    new_pruner: Callable[[], Pruner],
) -> Plan:
    """Multiply counts by costs.

    Args:
        name: of the experiment.
        counts: what is left to train.
        costs: of the parts.
        stock: what is there.
        prices: of what it runs on.
        new_pruner: makes the pruner of the search, one for each simulation.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    missing = round(stock.views * (1 - stock.cache_ready)) if counts.trainings else 0
    runs = range(_run_count(counts, every_epoch=new_pruner().every_epoch))
    simulated = [simulate(counts, costs, stock.views, missing, seed, new_pruner()) for seed in runs]
    around = costs.start + costs.teacher + costs.end
    whole = [around + one.search + one.confirmation for one in simulated]
    seconds = _range(whole)
    per_place = costs.gpus or costs.cpus
    teacher = costs.teacher * (1.0 if costs.gpus else costs.cpus * costs.parallel)
    hours = _range([(one.busy * per_place + teacher) / 3600 for one in simulated])
    money = None if prices.per_device is None else hours.times(prices.per_device)
    if prices.per_hour is not None:
        money = seconds.times(prices.per_hour / 3600)
    mean_disk = statistics.fmean(cost.disk for cost in costs.methods.values()) if costs.methods else 0.0
    caches = stock.cache_bytes * (1 - stock.cache_ready + counts.seeds) if counts.trainings else 0.0
    disk = counts.trainings * mean_disk + caches + (0 if stock.teacher_ready == 1 else stock.teacher_bytes)
    return Plan(
        name=name,
        device=costs.device,
        parallel=costs.parallel,
        trainings={
            "published": len(counts.starts),
            "sampled": counts.samples,
            "pruned": statistics.fmean(one.pruned for one in simulated),
            "repeated": statistics.fmean(one.repeated for one in simulated),
            "done": counts.done,
        },
        phases={
            "start": costs.start,
            "teacher": costs.teacher,
            "search": statistics.fmean(one.search for one in simulated),
            "confirmation": statistics.fmean(one.confirmation for one in simulated),
            "end": costs.end,
        },
        seconds=seconds,
        device_hours=hours,
        device_unit="GPU-hours" if costs.gpus else "core-hours",
        money=money,
        currency=prices.currency,
        memory=costs.memory,
        gpu_memory=costs.gpu_memory,
        # Names and pictures, the store and the page are small; weights that a method adds differ.
        disk=Range(disk, 0.7 * disk, 1.4 * disk),
        ready={"teacher": float(stock.teacher_ready), "cache": stock.cache_ready if stock.views else 1.0},
        source=costs.source,
        teachers=max(1, len(counts.teachers)),
    )


def _run_count(counts: Counts, *, every_epoch: bool) -> int:
    """How often a search is simulated."""
    if every_epoch:
        return max(LEAST_RUNS, min(RUNS, ASKED // (min(counts.trainings, MOST_ASKED) * counts.epochs + 1)))
    return max(10, min(RUNS, TRAININGS // max(1, counts.trainings)))


def _range(values: Sequence[float]) -> Range:
    ordered = sorted(values)
    places = (math.floor(LOW * (len(ordered) - 1)), math.ceil(HIGH * (len(ordered) - 1)))
    return Range(statistics.fmean(ordered), ordered[places[0]], ordered[places[1]])
