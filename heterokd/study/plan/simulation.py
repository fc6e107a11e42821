"""Simulation of a search without training: which trainings run in parallel, which are pruned, and when it ends.

The methods that the sampler will prefer and the trials that will be pruned are unknown. So the search is simulated many
times with both drawn at random (methods and students uniformly, scores independent of the method), with the pruner of
the real search, and the plan's range is that of these simulations.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from heterokd.methods import BASELINE
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.assignment import Origin
from heterokd.study.plan.costs import Costs
from heterokd.study.plan.counts import Counts
from heterokd.study.pruner import Pruner
from heterokd.study.trials import TrialRecord, Trials

BETWEEN_TRIALS = 0.15
"""Seconds from the end of a trial to the start of the next in the same process (benchmarks/quickstart.py)."""

LEAST_REPEATED = 0.5
"""Minimum share of the maximum number of repetitions that an adaptive confirmation makes."""

EPOCH_NOISE = 0.1
"""Standard deviation of a score between epochs, for scores of trainings that are uniform between 0 and 1."""

MOST_ASKED = 200
"""Number of trainings on which a pruner that reads every epoch decides, since its time grows with their square. Later
trainings end at the epoch of a random one of these."""


@dataclass(frozen=True)
class SimulatedSearch:
    """Result of a simulation, times in seconds.

    Attributes:
        search: time from the first trial to the last, without confirmation.
        confirmation: time from the first repetition to the last.
        busy: total time of all slots in trainings and in cache building.
        pruned: number of pruned trainings.
        repeated: number of trainings on fresh seeds.
    """

    search: float
    confirmation: float
    busy: float
    pruned: int
    repeated: int


def simulate(
    counts: Counts, costs: Costs, views: int, missing_views: int, seed: int, pruner: Pruner
) -> SimulatedSearch:
    """Simulate a search.

    Args:
        counts: number of trainings.
        costs: their costs.
        views: teacher outputs in the caches of a seed, over all teachers (each seed of a confirmation has those of its
            leaders' teachers); 0: no caches.
        missing_views: outputs that are missing in the search's caches.
        seed: seed of the simulation.
        pruner: pruner of the search, a new object for each simulation if it has state.
    """
    draw = random.Random(seed)
    speed = draw.lognormvariate(0, costs.speed_spread)
    places, trainings = costs.parallel, _Trainings(counts, pruner, seed)
    builders = max(1, places // 2) if missing_views else 0
    building = missing_views * costs.view / builders if builders else 0.0
    queue: list[tuple[str, Origin]] = [(method, "published") for method in counts.starts]
    queue += [(draw.choice(counts.sampled), "sampled") for _ in range(counts.samples)]
    queue.reverse()
    # Time at which each slot is free, later for those that build caches. At an event a slot continues or starts a
    # training.
    events = [(costs.process + (building if place < builders else 0.0), place) for place in range(places)]
    running: dict[int, _Training] = {}
    busy, pruned, ends = building * builders, 0, []
    while events:
        at, place = heapq.heappop(events)
        training = running.get(place)
        if training is not None:
            stopped = trainings.stops(training)
            pruned += stopped
            if stopped or training.reached == counts.epochs:
                at += BETWEEN_TRIALS
                training = None
        seconds = 0.0
        if training is None:
            if not queue:
                ends.append(at)
                continue
            method, origin = queue.pop()
            rank, student = draw.random(), draw.choice(counts.students)
            training = running[place] = trainings.begin(method, origin, student, rank)
            training.factor = costs.students.get(student, 1.0)
            seconds = costs.methods[method].begin * training.factor
        goal = trainings.next_report(training)
        cost = costs.methods[training.record.method]
        # Until the cache is complete, the teacher computes missing outputs.
        epoch = cost.live if at < building else cost.epoch
        seconds += (goal - training.reached) * epoch * training.factor
        training.reached = goal
        busy += seconds
        heapq.heappush(events, (at + seconds, place))
    search = max(ends)
    confirmation, more, repeated = _confirm(counts, costs, views, draw)
    return SimulatedSearch(speed * search, speed * confirmation, speed * (busy + more), pruned, repeated)


def _confirm(counts: Counts, costs: Costs, views: int, draw: random.Random) -> tuple[float, float, int]:
    """Return the time of the repetitions, the total time of all slots, and the number of repetitions."""
    repeats = counts.repeats
    if counts.is_adaptive:
        repeats = round(draw.uniform(LEAST_REPEATED, 1.0) * repeats)
    if not repeats:
        return 0.0, 0.0, 0
    seeds = max(1, min(counts.seeds, repeats))
    free, busy = [0.0] * costs.parallel, 0.0
    needed = float(views)
    for number in range(repeats):
        # Leaders may be of any method; in each seed's round one is scratch, with which they are compared.
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
        if place < builders and any(method.stored for method in costs.methods.values()):
            # The first trainings of a seed build its cache together.
            seconds += needed * costs.view / builders
        busy += seconds
        heapq.heapreplace(free, free[0] + seconds + BETWEEN_TRIALS)
    return max(free), busy, repeats


@dataclass
class _Training:
    """A simulated training: its record, its rank among all (0 is best), and its last epoch if that is drawn."""

    record: TrialRecord
    rank: float
    factor: float = 1.0
    reached: int = 0
    end: int | None = None


class _Trainings:
    """The trainings of a simulated search, in a study in memory that the pruner reads."""

    def __init__(self, counts: Counts, pruner: Pruner, seed: int) -> None:
        direction = StudyDirection.MAXIMIZE if counts.maximise else StudyDirection.MINIMIZE
        study = optuna.create_study(study_name=f"simulated {seed}", direction=direction)
        self._trials = Trials(study, is_kept=False, every_epoch=pruner.every_epoch)
        self._counts, self._pruner, self._noise = counts, pruner, random.Random(f"noise {seed}")
        self._reports = tuple(range(1, counts.epochs)) if pruner.every_epoch else counts.rungs
        self._ends: list[int] = []

    def begin(self, method: str, origin: Origin, student: str, rank: float) -> _Training:
        """Add a training."""
        attrs = {
            "sample": {"method": method},
            "origin": origin,
            "seed": 0,
            "epochs": self._counts.epochs,
            "student": student,
            "confirms": None,
            "duplicate_of": None,
        }
        record = self._trials.add(create_trial(state=TrialState.RUNNING, user_attrs={"assignment": attrs}))
        training = _Training(record, rank)
        if self._pruner.every_epoch and record.number >= MOST_ASKED and self._ends:
            training.end = self._noise.choice(self._ends)
        return training

    def next_report(self, training: _Training) -> int:
        """Return the epoch of a training's next report."""
        if training.end is not None:
            return training.end
        return min((epoch for epoch in self._reports if epoch > training.reached), default=self._counts.epochs)

    def stops(self, training: _Training) -> bool:
        """Return whether a training is pruned at its current epoch."""
        record, epoch = training.record, training.reached
        is_last = epoch == self._counts.epochs
        if training.end is not None:
            return not is_last
        value = epoch / self._counts.epochs - training.rank
        if not self._pruner.every_epoch:
            if is_last:
                return False
            self._trials.report(record.number, epoch, value if self._counts.maximise else -value)
            return self._pruner.decide(self._trials, record, epoch) is not None
        value += self._noise.gauss(0, EPOCH_NOISE)
        value = value if self._counts.maximise else -value
        self._trials.report_epochs(record.number, {epoch: value})
        stopped = not is_last and self._pruner.decide(self._trials, record, epoch) is not None
        if stopped or is_last:
            self._ends.append(epoch)
            self._trials.end(record.number, *((TrialStatus.PRUNED,) if stopped else (TrialStatus.COMPLETE, value)))
        return stopped
