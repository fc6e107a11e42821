"""Schedule: the next step of a search (start, sample or repetition) within its budget, and how many are left."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from typing import Literal

from heterokd.config.experiment import Experiment
from heterokd.config.search import MOST_TRIALS
from heterokd.methods import BASELINE
from heterokd.study.confirmation import (
    REFERENCES_FROM,
    Repetition,
    beyond_decision,
    fixed_repetitions,
    most_references,
    next_repetition,
    reference_repetitions,
    share,
    share_after,
)
from heterokd.study.failures import distillation_failure, failing_methods
from heterokd.study.initial_trials import Start
from heterokd.study.leaderboard import Leaderboard
from heterokd.study.ledger import Ledger
from heterokd.study.ranked_config import pareto_front
from heterokd.study.sampler import STOP_AFTER
from heterokd.study.search_space import SearchSpace
from heterokd.study.space_change import is_searched
from heterokd.study.storage import StudyFacts
from heterokd.study.trials import TrialRecord, Trials

Step = Start | Repetition | Literal["sample", "wait"] | None
"""A start, a repetition, a sample, a wait until a running trial has ended, or the end of the search."""


class Schedule:
    """Decides the next step from the trials alone, without side effects.

    Attributes:
        unfinished: trials of an interrupted run, which are resumed before anything else.
        stalled: trials of an interrupted run whose last process finished no epoch; resumed after starts and samples.
    """

    def __init__(
        self,
        experiment: Experiment,
        facts: StudyFacts,
        trials: Trials,
        ledger: Ledger,
        space: SearchSpace,
        *,
        has_samples: Callable[[], bool],
    ) -> None:
        """Make the schedule of a study.

        `has_samples` returns whether any method has parameters to sample.
        """
        self.unfinished: deque[int] = deque()
        self.stalled: deque[int] = deque()
        self._experiment, self._settings = experiment, experiment.search
        self._facts, self._trials, self._ledger = facts, trials, ledger
        self._space, self._starts, self._has_samples = space, space.starts, has_samples
        self._leaderboard: Leaderboard | None = None

    @property
    def leaderboard(self) -> Leaderboard:
        """Ranking of the configurations that were trained to the end, cached until `refresh`."""
        if self._leaderboard is None:
            self._leaderboard = Leaderboard(self._trials, self._experiment, self._facts.prior, self._facts.methods)
        return self._leaderboard

    def searches(self, record: TrialRecord) -> bool:
        """Return whether a trial's method and student are in the search space."""
        return is_searched(record, self._facts.methods, self._experiment)

    def refresh(self) -> None:
        """Drop the cached ranking after the end of a trial that changes it."""
        self._leaderboard = None

    def unqueue(self, number: int) -> None:
        """Remove a trial from the queues of trials to resume, if it is there."""
        for queue in (self.unfinished, self.stalled):
            if number in queue:
                queue.remove(number)

    def next(self) -> Step:
        """Return the next step."""
        is_busy = bool(self._ledger.running or self.unfinished or self.stalled)
        if not self._ledger.fits():
            # A running trial may end early, so that another one fits.
            return "wait" if is_busy and not self._ledger.spending.is_exhausted() else None
        start = self._next_start()
        is_over = self._search_is_over()
        if is_over and distillation_failure(self._trials) is not None:
            return None  # there is nothing to compare, so no repetition would be of use
        if not is_over and self._search_has_room():
            return "sample" if start is None else start
        if self._settings.confirm_leaders is not None:
            return self._next_fixed(is_over)
        repetition = next_repetition(self._trials, self.leaderboard, self._for_decision(), self._front())
        repetition = repetition or next(iter(self._missing_references()), None)
        if repetition is not None:
            return repetition
        if not is_over:
            # No repetition can change the decision, but another sample may be better.
            return "sample" if start is None else start
        return "wait" if is_busy and self._capacity() else None

    def planned(self, step: Step) -> tuple[int, int]:
        """Estimate the final numbers of trainings of the search and of repetitions, given the next step."""
        begun = len(self._trials.search)
        repeats = sum(1 for _ in self._trials.repetitions())
        is_over = self._search_is_over() or step is None
        planned = begun if is_over else self._settings.trials
        total = self._ledger.total()
        if not is_over and total is not None:
            searched = self._ledger.spending.search
            left = total - self._reserve(total) - searched
            each = searched / max(1, sum(record.status.is_final for record in self._trials.search)) or 1.0
            planned = min(planned, begun + max(0, math.floor(left / each) - len(self._ledger.running)))
        if self._settings.confirm_leaders is None:
            if step is None:
                return planned, repeats
            if total is None and not is_over:
                guess = self._settings.trials if self._settings.trials < MOST_TRIALS else begun
                part = share_after(self._experiment, float(guess), is_warm=self._is_warm)
                return planned, max(repeats, math.ceil(part / (1 - part) * guess))
            if total is None:
                return planned, max(repeats, self._for_decision()) + len(self._missing_references())
            return planned, max(repeats, self._capacity())
        if is_over and not any(record.is_running for record in self._trials.search):
            missing = fixed_repetitions(self._trials, self.leaderboard) if step is not None else []
            return planned, repeats + len(missing or self._missing_references())
        return planned, max(repeats, self._fixed_count())

    def _next_start(self) -> Start | None:
        """Return the next start that has not been tried, or None."""
        if not self._starts:
            return None
        left_out = failing_methods(self._trials)
        tried = Counter((record.origin, record.method) for record in self._trials.search)
        left: list[Start] = []
        for start in self._starts:
            if self._space.identity(start.sample) in self._trials.numbers:
                tried[start.origin, start.method] -= 1
            elif start.method not in left_out:
                left.append(start)
        for start in left:
            if tried[start.origin, start.method] <= 0:
                return start
            # It was tried with other values, those of an earlier version.
            tried[start.origin, start.method] -= 1
        self._starts = ()  # trials are never removed, so no start will be left later
        return None

    def _next_fixed(self, is_over: bool) -> Step:
        """Return the next repetition of a fixed number of leaders, which are known after the search."""
        if not self._settings.confirm_leaders or not self._settings.confirm_seeds:
            return None if is_over else "sample"
        if any(record.is_running for record in self._trials.search):
            return "wait"
        fixed = fixed_repetitions(self._trials, self.leaderboard)
        return next(iter(fixed or self._missing_references()), None)

    def _search_is_over(self) -> bool:
        """Return whether no start or sample is left; some may still run."""
        if len(self._trials.search) >= self._settings.trials:
            return True
        return self._next_start() is None and (not self._has_samples() or self._trials.known_in_a_row >= STOP_AFTER)

    def _search_has_room(self) -> bool:
        """Return whether another training of the search leaves enough of the budget for repetitions."""
        total = self._ledger.total()
        return total is None or self._ledger.searched() + 1 <= total - self._reserve(total) + 1e-9

    def _reserve(self, total: float) -> float:
        """Return the full trainings of a budget that are reserved for repetitions."""
        if self._settings.confirm_leaders is None:
            return total * share(self._experiment, total, is_warm=self._is_warm)
        return min(float(self._fixed_count()), total / 2)

    def _fixed_count(self) -> int:
        """Return the maximum number of repetitions of `confirm_leaders`, including scratch and references."""
        leaders = self._settings.confirm_leaders or 0
        if not leaders:
            return 0
        references = most_references(self._experiment, self._facts.methods)
        return (leaders + (BASELINE in self._facts.methods) + references) * self._settings.confirm_seeds

    def _capacity(self) -> int:
        """Return the maximum number of repetitions."""
        total = self._ledger.total()
        if total is not None:
            part = share(self._experiment, total, is_warm=self._is_warm)
        else:
            searched = self._ledger.searched()
            part = share_after(self._experiment, searched, is_warm=self._is_warm)
            total = searched / (1 - part)
        # Rounded up, since the rest of the search's share is too small for a training.
        return math.ceil(part * total)

    def _for_decision(self) -> int:
        """Return the number of repetitions, those of references included, up to which `next_repetition` is asked.

        References come on top of a number of trials. They take a part of a budget from `REFERENCES_FROM` on.
        """
        capacity, total = self._capacity(), self._ledger.total()
        if not self._settings.confirm_references:
            return capacity
        if total is None:
            return capacity + beyond_decision(self._trials, self.leaderboard)
        return capacity - (len(self._missing_references()) if total >= REFERENCES_FROM else 0)

    def _missing_references(self) -> list[Repetition]:
        """List the repetitions that the winner's references lack; none unless they are asked for."""
        if not self._settings.confirm_references:
            return []
        return reference_repetitions(self._trials, self.leaderboard)

    @property
    def _is_warm(self) -> bool:
        """Whether the search started from settings known to be good."""
        return bool(self._facts.warm.samples)

    def _front(self) -> list[str]:
        """Return the students on the Pareto front so far; empty if the metric is the only objective."""
        if not self._experiment.by_student:
            return []
        leaders = self.leaderboard.leaders(1)
        return [config.student for config in pareto_front(leaders, self._facts.costs, self._settings.cost_objectives)]
