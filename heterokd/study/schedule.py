"""What a search does next, and how much of it is left: starts, samples, repetitions of leaders, within its budget."""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import Literal

from heterokd.config.experiment import Experiment
from heterokd.config.search import MOST_TRIALS
from heterokd.methods import BASELINE
from heterokd.study.confirmation import Repetition, fixed_repetitions, next_repetition, share, share_after
from heterokd.study.initial_trials import Start
from heterokd.study.leaderboard import Leaderboard
from heterokd.study.ledger import Ledger
from heterokd.study.ranked_config import pareto_front
from heterokd.study.sampler import STOP_AFTER
from heterokd.study.search_space import SearchSpace
from heterokd.study.storage import StudyFacts
from heterokd.study.trials import Trials

Step = Start | Repetition | Literal["sample", "wait"] | None
"""A start, a repetition, whatever the sampler proposes, nothing until a running trial has ended, nothing more."""


class Schedule:
    """Decides the next step from the trials alone: asking changes nothing.

    Attributes:
        unfinished: trials of an interrupted run, which are handed out again before anything else.
    """

    def __init__(
        self,
        experiment: Experiment,
        facts: StudyFacts,
        trials: Trials,
        ledger: Ledger,
        space: SearchSpace,
        *,
        has_samples: bool,
    ) -> None:
        """Plan a study.

        Args:
            experiment: the question about the students that are not left out.
            facts: of the study.
            trials: of the study so far.
            ledger: what they have cost.
            space: of the study.
            has_samples: whether there is anything to sample.
        """
        self.unfinished: deque[int] = deque()
        self._experiment, self._settings = experiment, experiment.search
        self._facts, self._trials, self._ledger = facts, trials, ledger
        self._space, self._starts, self._has_samples = space, space.starts, has_samples
        self._leaderboard: Leaderboard | None = None

    @property
    def leaderboard(self) -> Leaderboard:
        """Every configuration that was trained to the end, compared; read once until `refresh`."""
        if self._leaderboard is None:
            self._leaderboard = Leaderboard(self._trials, self._experiment)
        return self._leaderboard

    def refresh(self) -> None:
        """Compare again: a trial has ended that counts."""
        self._leaderboard = None

    def next(self) -> Step:
        """The next step."""
        is_busy = bool(self._ledger.running or self.unfinished)
        if not self._ledger.fits():
            # What runs may end early, and leave room.
            return "wait" if is_busy and not self._ledger.spending.is_exhausted() else None
        start = self._next_start()
        is_over = self._search_is_over()
        if not is_over and self._search_has_room():
            return "sample" if start is None else start
        if self._settings.confirm_leaders is not None:
            return self._next_fixed(is_over)
        repetition = next_repetition(self._trials, self.leaderboard, self._capacity(), self._front())
        if repetition is not None:
            return repetition
        if not is_over:
            # No repetition can change the decision: another sample may find something better.
            return "sample" if start is None else start
        return "wait" if is_busy and self._capacity() else None

    def planned(self, step: Step) -> tuple[int, int]:
        """Trainings of the search, and repetitions, that there will have been at the end, with `step` the next one."""
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
            return planned, max(repeats, self._capacity())
        if is_over and not any(record.is_running for record in self._trials.search):
            missing = fixed_repetitions(self._trials, self.leaderboard) if step is not None else []
            return planned, repeats + len(missing)
        return planned, max(repeats, self._fixed_count())

    def _next_start(self) -> Start | None:
        """The next start that has not been tried."""
        if not self._starts:
            return None
        tried = Counter((record.origin, record.method) for record in self._trials.search)
        for start in self._starts:
            if not tried[start.origin, start.method]:
                if self._space.identity(start.sample) not in self._trials.numbers:
                    return start
                continue  # another start has the same values
            tried[start.origin, start.method] -= 1
        self._starts = ()  # trials are only added: all starts have been tried for good
        return None

    def _next_fixed(self, is_over: bool) -> Step:
        """The repetitions of a fixed number of leaders, who are known once the search is over."""
        if not self._settings.confirm_leaders or not self._settings.confirm_seeds:
            return None if is_over else "sample"
        if any(record.is_running for record in self._trials.search):
            return "wait"
        return next(iter(fixed_repetitions(self._trials, self.leaderboard)), None)

    def _search_is_over(self) -> bool:
        """Whether no more start or sample is wanted; some may still run."""
        if len(self._trials.search) >= self._settings.trials:
            return True
        return self._next_start() is None and (not self._has_samples or self._trials.known_in_a_row >= STOP_AFTER)

    def _search_has_room(self) -> bool:
        """Whether one more training of the search leaves enough of a budget for repetitions."""
        total = self._ledger.total()
        return total is None or self._ledger.searched() + 1 <= total - self._reserve(total) + 1e-9

    def _reserve(self, total: float) -> float:
        """Full trainings of a budget that are kept for repetitions."""
        if self._settings.confirm_leaders is None:
            return total * share(self._experiment, total, is_warm=self._is_warm)
        return min(float(self._fixed_count()), total / 2)

    def _fixed_count(self) -> int:
        """Repetitions of `confirm_leaders`, scratch's included."""
        leaders = self._settings.confirm_leaders or 0
        return (leaders + (BASELINE in self._facts.methods and leaders > 0)) * self._settings.confirm_seeds

    def _capacity(self) -> int:
        """Repetitions that there is room for in all."""
        total = self._ledger.total()
        if total is not None:
            part = share(self._experiment, total, is_warm=self._is_warm)
        else:
            searched = self._ledger.searched()
            part = share_after(self._experiment, searched, is_warm=self._is_warm)
            total = searched / (1 - part)
        # Rounded up: what the search has left of its part is too little for a training.
        return math.ceil(part * total)

    @property
    def _is_warm(self) -> bool:
        """Whether the search began at settings that are known to be good."""
        return bool(self._facts.warm.samples)

    def _front(self) -> list[str]:
        """Students on the Pareto front so far; empty where the metric alone counts."""
        if not self._experiment.by_student:
            return []
        leaders = self.leaderboard.leaders(1)
        return [one.student for one in pareto_front(leaders, self._facts.costs, self._settings.costs)]
