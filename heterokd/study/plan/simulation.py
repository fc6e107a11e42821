"""A search played through without training: who runs when on how many places, who is pruned, when it ends.

What a search will do is not known: which methods the sampler takes to, and who falls behind at a rung. So it is played
many times with both drawn at random (methods and students evenly, ranks at rungs without regard to the method), by the
rules of the real one, and the plan's range is what those runs scatter over.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_left, insort
from dataclasses import dataclass

from heterokd.methods import BASELINE
from heterokd.study.assignment import REFERENCES
from heterokd.study.plan.costs import Costs
from heterokd.study.plan.counts import Counts

BETWEEN_TRIALS = 0.15
"""Seconds from the end of a trial to the beginning of the next in the same process (benchmarks/quickstart.py)."""

LEAST_REPEATED = 0.5
"""Of the repetitions that an adaptive confirmation has room for, it makes at least this share."""

NOISE = 0.07
"""Deviation of a machine's speed between a plan and its search, as a share."""


@dataclass(frozen=True)
class Played:
    """One run of a search, in seconds.

    Attributes:
        search: from the first trial to the last, confirmation apart.
        confirmation: likewise.
        busy: of all places together, in trainings and in building caches.
        pruned: trainings that ended at a rung.
        repeated: trainings on fresh seeds.
    """

    search: float
    confirmation: float
    busy: float
    pruned: int
    repeated: int


def play(counts: Counts, costs: Costs, views: int, missing_views: int, seed: int) -> Played:
    """Play a search once.

    Args:
        counts: what it trains.
        costs: what that costs.
        views: outputs that caches of fresh views hold, one a teacher (each confirmation's seed has those of whom its
            leaders follow); 0: no caches.
        missing_views: those of the search's own caches that are still to be built.
        seed: of what is drawn.
    """
    draw = random.Random(seed)
    speed = draw.lognormvariate(0, NOISE)
    places, rungs = costs.parallel, _Rungs(counts.factor)
    builders = max(1, places // 2) if missing_views else 0
    building = missing_views * costs.view / builders if builders else 0.0
    queue = [_Training(method, may_stop=method not in REFERENCES) for method in counts.starts]
    queue += [_Training(draw.choice(counts.sampled), may_stop=True) for _ in range(counts.samples)]
    queue.reverse()
    # When each place is free: a builder's later. At each event a place goes on, or takes the next training.
    events = [(costs.process + (building if place < builders else 0.0), place) for place in range(places)]
    running: dict[int, _Training] = {}
    busy, pruned, ends = building * builders, 0, []
    while events:
        at, place = heapq.heappop(events)
        training = running.get(place)
        if training is not None:
            stopped = training.reached in counts.rungs and rungs.stops(training.reached, training.rank)
            stopped = stopped and training.may_stop
            pruned += stopped
            if stopped or training.reached == counts.epochs:
                at += BETWEEN_TRIALS
                training = None
        seconds = 0.0
        if training is None:
            if not queue:
                ends.append(at)
                continue
            training = running[place] = queue.pop()
            training.rank = draw.random()
            training.factor = costs.students.get(draw.choice(counts.students), 1.0)
            seconds = costs.methods[training.method].begin * training.factor
        goal = min((rung for rung in counts.rungs if rung > training.reached), default=counts.epochs)
        cost = costs.methods[training.method]
        # Until the cache is there the teacher runs for what is missing.
        epoch = cost.live if at < building else cost.epoch
        seconds += (goal - training.reached) * epoch * training.factor
        training.reached = goal
        busy += seconds
        heapq.heappush(events, (at + seconds, place))
    search = max(ends)
    confirmation, more, repeated = _confirm(counts, costs, views, draw)
    return Played(speed * search, speed * confirmation, speed * (busy + more), pruned, repeated)


def _confirm(counts: Counts, costs: Costs, views: int, draw: random.Random) -> tuple[float, float, int]:
    """Seconds of the repetitions, of all places together, and how many there are."""
    repeats = counts.repeats
    if counts.is_adaptive:
        repeats = round(draw.uniform(LEAST_REPEATED, 1.0) * repeats)
    if not repeats:
        return 0.0, 0.0, 0
    seeds = max(1, min(counts.seeds, repeats))
    free, busy = [0.0] * costs.parallel, 0.0
    needed = float(views)
    for number in range(repeats):
        # Leaders may be of any method; one in each seed's round is scratch, which they are compared with.
        together = math.ceil(repeats / seeds)
        place = number % together
        if place == 0 and len(counts.teachers) > 1:
            followed = {draw.choice(counts.teachers) for _ in range(together)}
            needed = views * len(followed) / len(counts.teachers)
        is_baseline = BASELINE in counts.methods and place == together - 1 and together > 1
        cost = costs.methods[BASELINE if is_baseline else draw.choice(counts.methods)]
        factor = costs.students.get(draw.choice(counts.students), 1.0)
        seconds = (cost.begin + counts.epochs * cost.epoch) * factor
        builders = min(costs.parallel, together)
        if place < builders and any(one.stored for one in costs.methods.values()):
            # Those that begin a seed together build its cache together.
            seconds += needed * costs.view / builders
        busy += seconds
        heapq.heapreplace(free, free[0] + seconds + BETWEEN_TRIALS)
    return max(free), busy, repeats


@dataclass
class _Training:
    method: str
    may_stop: bool
    rank: float = 0.0
    factor: float = 1.0
    reached: int = 0


class _Rungs:
    """Who has reached which rung with what rank: the rule of `heterokd.study.pruner`."""

    def __init__(self, factor: int) -> None:
        self.factor = factor
        self.arrived: dict[int, list[float]] = {}

    def stops(self, rung: int, rank: float) -> bool:
        arrived = self.arrived.setdefault(rung, [])
        insort(arrived, rank)
        return bisect_left(arrived, rank) >= max(1, len(arrived) // self.factor)
