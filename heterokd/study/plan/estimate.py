"""Plan: estimate of a search with intervals, computed from counts and costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from heterokd.study.plan.costs import Costs

if TYPE_CHECKING:
    from heterokd.study.plan.counts import Counts
    from heterokd.study.pruner import Pruner

RUNS, TRAININGS = 200, 20_000
"""Maximum number of simulations, and of trainings in all of them, so that a plan takes at most a few seconds."""

ASKED, LEAST_RUNS = 20_000, 3
"""Maximum number of decisions of a pruner that reads every epoch, and minimum number of simulations."""

LOW, HIGH = 0.05, 0.95
"""Quantiles of the simulations at the ends of a range."""


@dataclass(frozen=True)
class Range:
    """An expected value with its 90 % interval."""

    expected: float
    low: float
    high: float

    def times(self, factor: float) -> Range:
        """Multiply all three values."""
        return Range(factor * self.expected, factor * self.low, factor * self.high)


@dataclass(frozen=True)
class Stock:
    """Teachers and caches that a search needs, and which of them exist.

    Attributes:
        teacher_ready: share of teachers that need not be fitted.
        teacher_bytes: size of the weights of those that are fitted.
        cache_bytes: size of the caches of a seed, over all teachers; 0 if no method reads them.
        cache_ready: share of the search's caches that exists.
        views: number of teacher outputs in these caches.
    """

    teacher_ready: float
    teacher_bytes: int
    cache_bytes: int
    cache_ready: float
    views: int


@dataclass(frozen=True)
class Prices:
    """Prices of devices.

    Attributes:
        per_hour: hourly price of all nodes; None if unknown.
        per_device: price of a used core-hour or GPU-hour, if the price of the nodes is unknown.
        currency: currency of both.
    """

    per_hour: float | None = None
    per_device: float | None = None
    currency: str = "USD"


@dataclass(frozen=True)
class DataFetch:
    """Fetch of a data set from its store to the nodes, before their first trials.

    Attributes:
        bytes: that each node fetches.
        nodes: number of nodes, which fetch at the same time.
        gbit: gigabits per second that a node reads.
    """

    bytes: int
    nodes: int
    gbit: float

    @property
    def seconds(self) -> float:
        """Seconds until all nodes have the data."""
        return self.bytes * 8 / (self.gbit * 1e9)


@dataclass(frozen=True)
class Plan:
    """Estimate of what is left of a search.

    Attributes:
        name: name of the experiment.
        device: description of the device.
        parallel: number of parallel trials.
        trainings: `published`, `sampled` (of which `pruned` are expected to be pruned), `repeated`, and `done` before.
        phases: expected seconds of `start`, `teacher`, `search`, `confirmation`, `end`.
        seconds: total time.
        device_hours: hours of busy cores or GPUs.
        device_unit: `core-hours` or `GPU-hours`.
        money: price of the nodes for the time; None without prices.
        currency: currency of the price.
        memory: bytes of memory of all processes; None on a cluster, or if it was not measured.
        gpu_memory: bytes of GPU memory per trial; None without a GPU.
        disk: bytes that the search writes.
        ready: share of existing `teacher`s, and of existing `cache`s.
        source: where the costs are from.
        teachers: number of teachers.
        fetch: of a data set in a store, part of the time; None for others.
        left_out: methods that do not exist for the pair and students that exceed a limit, with the reason; they are
            neither counted nor timed.
        images: number of `labelled` and of `unlabelled` training images; empty without unlabelled images.
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
    fetch: DataFetch | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Convert to plain values."""
        content = asdict(self)
        fetch = content.pop("fetch")
        if not self.images:
            del content["images"]
        return content if self.fetch is None else {**content, "fetch": {**fetch, "seconds": self.fetch.seconds}}


def estimate(
    name: str,
    counts: Counts,
    costs: Costs,
    stock: Stock,
    prices: Prices,
    new_pruner: Callable[[], Pruner],
) -> Plan:
    """Estimate a search from its counts and costs.

    `new_pruner` makes the pruner of a simulation.
    """
    import optuna  # not at the top, for reports, which only read plans

    from heterokd.study.plan.simulation import simulate

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    missing = round(stock.views * (1 - stock.cache_ready)) if counts.trainings else 0
    runs = range(_run_count(counts, every_epoch=new_pruner().every_epoch))
    simulated = [simulate(counts, costs, stock.views, missing, seed, new_pruner()) for seed in runs]
    around = costs.start + costs.teacher + costs.end
    seconds = _range([around + run.search + run.confirmation for run in simulated])
    per_place = costs.gpus or costs.cpus
    teacher = costs.teacher * (1.0 if costs.gpus else costs.cpus * costs.parallel)
    hours = _range([(run.busy * per_place + teacher) / 3600 for run in simulated])
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
            "pruned": statistics.fmean(run.pruned for run in simulated),
            "repeated": statistics.fmean(run.repeated for run in simulated),
            "done": counts.done,
        },
        phases={
            "start": costs.start,
            "teacher": costs.teacher,
            "search": statistics.fmean(run.search for run in simulated),
            "confirmation": statistics.fmean(run.confirmation for run in simulated),
            "end": costs.end,
        },
        seconds=seconds,
        device_hours=hours,
        device_unit="GPU-hours" if costs.gpus else "core-hours",
        money=money,
        currency=prices.currency,
        memory=costs.memory,
        gpu_memory=costs.gpu_memory,
        # Pictures, store and report are small; the size of a method's projectors varies.
        disk=Range(disk, 0.7 * disk, 1.4 * disk),
        ready={"teacher": float(stock.teacher_ready), "cache": stock.cache_ready if stock.views else 1.0},
        source=costs.source,
        teachers=max(1, len(counts.teachers)),
    )


def _run_count(counts: Counts, *, every_epoch: bool) -> int:
    """Return the number of simulations."""
    if every_epoch:
        from heterokd.study.plan.simulation import MOST_ASKED

        return max(LEAST_RUNS, min(RUNS, ASKED // (min(counts.trainings, MOST_ASKED) * counts.epochs + 1)))
    return max(10, min(RUNS, TRAININGS // max(1, counts.trainings)))


def _range(values: Sequence[float]) -> Range:
    ordered = sorted(values)
    places = (math.floor(LOW * (len(ordered) - 1)), math.ceil(HIGH * (len(ordered) - 1)))
    return Range(statistics.fmean(ordered), ordered[places[0]], ordered[places[1]])
