"""A table played back: trainings that take no time, on k workers and a clock that only the table moves."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.search_efficiency.digits import VAL
from benchmarks.search_efficiency.pairs import EPOCHS, PAIRS, Config
from benchmarks.search_efficiency.table import SHOWN, Table, load

WORKERS = 4


@dataclass(frozen=True)
class Ask:
    """One training that a strategy wants.

    Attributes:
        number: by which the strategy knows it.
        row: of the configuration in the table.
        stops: epochs after which the strategy is asked whether to go on.
    """

    number: int
    row: int
    stops: tuple[int, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What a strategy gives at its end.

    Attributes:
        row: of the configuration.
        reported: the accuracy that it claims for it.
    """

    row: int
    reported: float


class Strategy(Protocol):
    """Decides what is trained; the same calls as of `heterokd.study.Study`."""

    def next(self) -> Ask | Literal["wait"] | None:
        """What to train now; "wait": ask again when something has ended; None: nothing more."""

    def report(self, ask: Ask, epoch: int, values: Sequence[float]) -> bool:
        """Whether to go on, by the values of all epochs so far."""

    def finish(self, ask: Ask, epoch: int, value: float) -> None:
        """A training has ended: after the last epoch, or where `report` said so."""

    def choice(self) -> Choice:
        """The best configuration, as far as the strategy knows."""


class Replay:
    """One repetition: which of the shown seeds each training of a configuration gets, in a random order of its own.

    Attributes:
        table: what is played back.
        now: seconds since the beginning.
        spent: epochs of all trainings so far, in full trainings.
        repeated: trainings for which no fresh seed was left, so that a former one came again.
    """

    def __init__(self, table: Table, repetition: int) -> None:
        self.table = table
        self.now = self.spent = 0.0
        self.repeated = 0
        rng = np.random.default_rng([repetition, 7])
        self._order = rng.permuted(np.tile(np.arange(len(SHOWN)), (len(table.val), 1)), axis=1)
        self._used = np.zeros(len(table.val), int)

    def curve(self, row: int) -> NDArray[np.float64]:
        """Top-1 on val after each epoch of a fresh training."""
        used = int(self._used[row])
        self._used[row] += 1
        self.repeated += used >= len(SHOWN)
        found: NDArray[np.float64] = self.table.val[row, self._order[row, used % len(SHOWN)]] / VAL
        return found

    def run(self, strategy: Strategy, workers: int = WORKERS) -> Choice:
        """Train what a strategy wants, on so many workers at a time, until it wants nothing more."""
        events: list[tuple[float, int, Ask, int, NDArray[np.float64]]] = []
        order, wanted = 0, True
        while True:
            while wanted and len(events) < workers:
                ask = strategy.next()
                if ask is None or ask == "wait":
                    wanted = False
                    break
                order += 1
                heapq.heappush(events, self._until_next_stop(order, ask, 0, self.curve(ask.row)))
            if not events:
                return strategy.choice()
            self.now, _, ask, epoch, curve = heapq.heappop(events)
            before = max((stop for stop in ask.stops if stop < epoch), default=0)
            self.spent += (epoch - before) / EPOCHS
            value = float(curve[epoch - 1])
            if epoch < EPOCHS and strategy.report(ask, epoch, curve[:epoch].tolist()):
                order += 1
                heapq.heappush(events, self._until_next_stop(order, ask, epoch, curve))
            else:
                strategy.finish(ask, epoch, value)
            wanted = True

    def _until_next_stop(
        self, order: int, ask: Ask, epoch: int, curve: NDArray[np.float64]
    ) -> tuple[float, int, Ask, int, NDArray[np.float64]]:
        stop = min((stop for stop in ask.stops if stop > epoch), default=EPOCHS)
        seconds = float(self.table.seconds[ask.row]) * (stop - epoch) / EPOCHS
        return self.now + seconds, order, ask, stop, curve


@dataclass(frozen=True)
class Question:
    """A table with what it is about.

    Attributes:
        name: of the pair.
        table: all trainings.
        configs: its rows.
    """

    name: str
    table: Table
    configs: Sequence[Config]

    def row(self, sample: Config) -> int:
        """Of a sample."""
        return _rows(self.name)[_key(sample)]


@lru_cache(maxsize=3)
def question(name: str) -> Question:
    """A pair's table, read once."""
    return Question(name, load(name), PAIRS[name].configs())


@lru_cache(maxsize=3)
def _rows(name: str) -> dict[tuple[tuple[str, object], ...], int]:
    return {_key(config): row for row, config in enumerate(PAIRS[name].configs())}


def _key(sample: Config) -> tuple[tuple[str, object], ...]:
    return tuple(sorted(sample.items()))
