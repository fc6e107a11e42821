"""Let every strategy search every table many times, with every budget, and sum up.

Searches that were already made are read from runs/search_efficiency/searches.jsonl (`--fresh` forgets them), so that a
run that was ended goes on where it stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.search_efficiency.build import PARTS
from benchmarks.search_efficiency.replay import Choice, Question, Replay, question
from benchmarks.search_efficiency.strategies import STRATEGIES, grid

BUDGETS = (5, 10, 20, 40)
"""Full trainings."""

SHARE = 40
"""The budget that is about 6 % of the grid."""

JOURNAL = PARTS / "searches.jsonl"


@dataclass(frozen=True)
class Task:
    """One search."""

    pair: str
    strategy: str
    budget: int
    repetition: int


@dataclass(frozen=True)
class Found:
    """What came of one search.

    Attributes:
        regret: of the chosen configuration, on val: (best - its) / (best - median), of the hidden seeds' means.
        regret_of_largest: the same against the largest of those means, which is too large.
        test_regret: on test.
        truth: its hidden seeds' mean on val.
        excess: accuracy that was reported for it minus `truth`, in seed deviations.
        milliseconds: of the search itself for each training that it began; None where nothing was timed.
        spent: full trainings.
        repeated: trainings that saw a seed for the second time, since the table had no fresh one.
    """

    regret: float
    regret_of_largest: float
    test_regret: float
    truth: float
    excess: float
    milliseconds: float | None
    spent: float
    repeated: int


def search(task: Task, asked: Question) -> Found:
    """Search the table of a question once."""
    replay = Replay(asked.table, task.repetition)
    began = time.process_time()
    if task.strategy == "grid":
        choice, spent = grid(asked, replay), float(len(asked.configs))
    else:
        choice = STRATEGIES[task.strategy](asked, replay, task.budget, task.repetition)
        spent = replay.spent or float(task.budget)
    seconds = time.process_time() - began
    begun = int(replay._used.sum())
    return found(asked, choice, 1000 * seconds / begun if replay.spent else None, spent, replay.repeated)


def found(asked: Question, choice: Choice, milliseconds: float | None, spent: float, repeated: int) -> Found:
    """A choice beside the truth."""
    table = asked.table
    truth = float(table.truth[choice.row])
    return Found(
        regret=table.regret(choice.row),
        regret_of_largest=table.regret_of_largest(choice.row),
        test_regret=table.regret(choice.row, on_test=True),
        truth=truth,
        excess=(choice.reported - truth) / table.noise,
        milliseconds=milliseconds,
        spent=spent,
        repeated=repeated,
    )


def tasks(pairs: Sequence[str], strategies: Sequence[str], budgets: Sequence[int], repetitions: int) -> Iterator[Task]:
    """Every search, the first repetitions of all strategies first."""
    for repetition in range(repetitions):
        for pair in pairs:
            yield Task(pair, "grid", 0, repetition)
            for strategy in strategies:
                for budget in budgets:
                    yield Task(pair, strategy, budget, repetition)


def run(wanted: Iterable[Task], *, processes: int = 1, limit: float | None = None) -> dict[Task, Found]:
    """Make those searches that the journal does not hold; all that is known of them afterwards.

    Args:
        wanted: the searches.
        processes: at a time.
        limit: seconds after which no further one is waited for.
    """
    wanted = list(wanted)
    known = read_journal()
    missing = [task for task in wanted if task not in known]
    began = time.monotonic()
    JOURNAL.parent.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("fork").Pool(processes) as pool, JOURNAL.open("a") as file:
        for task, result in pool.imap_unordered(_labelled, missing, chunksize=1):
            known[task] = result
            file.write(json.dumps([asdict(task), asdict(result)]) + "\n")
            file.flush()
            if limit is not None and time.monotonic() - began > limit:
                pool.terminate()
                break
    return {task: known[task] for task in wanted if task in known}


def read_journal() -> dict[Task, Found]:
    """Searches that were made before."""
    if not JOURNAL.exists():
        return {}
    rows = [json.loads(line) for line in JOURNAL.read_text().splitlines()]
    return {Task(**task): Found(**result) for task, result in rows}


def forget(strategy: str | None = None) -> None:
    """Make searches again: of one strategy, or of all."""
    kept = {} if strategy is None else {t: f for t, f in read_journal().items() if t.strategy != strategy}
    JOURNAL.parent.mkdir(parents=True, exist_ok=True)
    JOURNAL.write_text("".join(json.dumps([asdict(task), asdict(result)]) + "\n" for task, result in kept.items()))


@dataclass(frozen=True)
class Row:
    """What is said of one strategy with one budget on one table; means over its repetitions.

    Attributes:
        regret: on val.
        error: its standard error.
        regret_of_largest: against the largest of the hidden seeds' means.
        test_regret: on test.
        beats_grid: share of repetitions whose choice is truly better than that of the grid of the same repetition.
        excess: reported minus true accuracy, in seed deviations.
        excess_error: its standard error.
        milliseconds: of the search itself for each training.
        repetitions: how many.
        repeated: trainings in all that saw a seed for the second time.
    """

    pair: str
    strategy: str
    budget: int
    regret: float
    error: float
    regret_of_largest: float
    test_regret: float
    beats_grid: float
    excess: float
    excess_error: float
    milliseconds: float | None
    repetitions: int
    repeated: int


def summarise(results: dict[Task, Found]) -> list[Row]:
    """A row for each table, strategy and budget."""
    groups: dict[tuple[str, str, int], dict[int, Found]] = {}
    for task, result in results.items():
        groups.setdefault((task.pair, task.strategy, task.budget), {})[task.repetition] = result
    rows = []
    for (pair, strategy, budget), group in groups.items():
        of_grid = groups.get((pair, "grid", 0), {})
        regrets = np.array([one.regret for one in group.values()])
        excess = np.array([one.excess for one in group.values()])
        times = [one.milliseconds for one in group.values() if one.milliseconds is not None]
        beats = [one.truth > of_grid[number].truth for number, one in group.items() if number in of_grid]
        rows.append(
            Row(
                pair=pair,
                strategy=strategy,
                budget=budget,
                regret=float(regrets.mean()),
                error=_error(regrets),
                regret_of_largest=float(np.mean([one.regret_of_largest for one in group.values()])),
                test_regret=float(np.mean([one.test_regret for one in group.values()])),
                beats_grid=float(np.mean(beats)) if beats else 0.0,
                excess=float(excess.mean()),
                excess_error=_error(excess),
                milliseconds=float(np.mean(times)) if times else None,
                repetitions=len(group),
                repeated=sum(one.repeated for one in group.values()),
            )
        )
    return rows


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def _labelled(task: Task) -> tuple[Task, Found]:
    return task, search(task, question(task.pair))
