"""Who searches: what people do without a search, what Optuna offers, and heterokd.

All get the same budget, in full trainings, and pay for every epoch; a configuration that was trained is not trained
again unless the strategy repeats it on purpose. All but heterokd give the best value they have seen as the accuracy of
their choice.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.trial import TrialState

from benchmarks.search_efficiency.digits import VAL
from benchmarks.search_efficiency.pairs import EPOCHS, LEARNING_RATES, METHODS, OPTIONS, PAIRS
from benchmarks.search_efficiency.replay import Ask, Choice, Question, Replay
from benchmarks.search_efficiency.replay import question as replay_question
from benchmarks.search_efficiency.table import stored
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.options import StudyOptions
from heterokd.study.similar_studies import SimilarStudy, Traits
from heterokd.study.storage import StudyFacts
from heterokd.study.study import Study
from heterokd.study.summary import StudySummary
from heterokd.study.warm_start import MOST_SAMPLES, warm_starts

EARLIER, EARLIER_TRAININGS = 1000, 20
"""Seeds and budget of the searches that `heterokd_warm` starts from."""

LARGEST_STREAK = 50
"""Known configurations in a row after which a sampler is asked no more for this training, and a random one taken."""


def grid(question: Question, replay: Replay) -> Choice:
    """Every configuration once: what a patient person does."""
    finals = np.array([replay.curve(row)[-1] for row in range(len(question.configs))])
    return _best(np.arange(len(finals)), finals, replay)


def random(question: Question, replay: Replay, budget: float, seed: int) -> Choice:
    """A method at random, its parameters at random, trained to the end."""
    rows = _random_rows(question, int(budget), seed)
    return _best(rows, np.array([replay.curve(row)[-1] for row in rows]), replay)


def screen(question: Question, replay: Replay, budget: float, seed: int, epochs: int) -> Choice:
    """Many at random for a few epochs; the best share of them, of equal cost, goes on to the end."""
    count = 1
    while (cost := _screen_cost(count + 1, epochs)) <= budget and cost > 0 and count < len(question.configs):
        count += 1
    rows = _random_rows(question, count, seed)
    curves = np.array([replay.curve(row) for row in rows])
    ahead = np.argsort(-curves[:, epochs - 1], kind="stable")[: _screened(count, epochs)]
    return _best(rows[ahead], curves[ahead, -1], replay)


def _screened(count: int, epochs: int) -> int:
    return max(1, round(count * epochs / EPOCHS))


def _screen_cost(count: int, epochs: int) -> float:
    return count * epochs / EPOCHS + _screened(count, epochs) * (1 - epochs / EPOCHS)


def _random_rows(question: Question, count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 11])
    methods = np.array([config["method"] for config in question.configs])
    left = {method: list(rng.permutation(np.flatnonzero(methods == method))) for method in METHODS}
    rows: list[int] = []
    while len(rows) < count and any(left.values()):
        method = METHODS[rng.integers(len(METHODS))]
        if left[method]:
            rows.append(int(left[method].pop()))
    return np.array(rows)


def _best(rows: np.ndarray, values: np.ndarray, replay: Replay) -> Choice:
    place = int(values.argmax())
    return Choice(int(rows[place]), float(values[place]))


class OptunaStrategy:
    """An Optuna study with one of its own samplers and one of its own pruners, by ask and tell.

    Attributes:
        seconds: that each suggestion took.
    """

    def __init__(
        self,
        question: Question,
        budget: float,
        seed: int,
        sampler: optuna.samplers.BaseSampler,
        pruner: optuna.pruners.BasePruner,
    ) -> None:
        self._question, self._budget = question, budget
        # Named, because Hyperband draws each trial's bracket from the name.
        self._study = optuna.create_study(
            study_name=f"search {seed}", direction="maximize", sampler=sampler, pruner=pruner
        )
        self._stops = () if isinstance(pruner, optuna.pruners.NopPruner) else _EPOCHS_ASKED
        self._trials: dict[int, optuna.Trial] = {}
        self._done: dict[int, tuple[TrialState, float, dict[int, float]]] = {}
        self._running: dict[int, int] = {}
        self._spent = 0.0
        self._values: dict[int, float] = {}
        self.seconds: list[float] = []

    def next(self) -> Ask | Literal["wait"] | None:
        if self._spent + len(self._running) + 1 > self._budget + 1e-9:
            return "wait" if self._running else None
        began = time.perf_counter()
        for _ in range(LARGEST_STREAK):
            trial = self._study.ask()
            row = self._question.row(_suggest(trial))
            if row in self._done:
                self._tell(trial, *self._done[row])  # the same training again would give the same
            elif row in self._running.values():
                self._study.tell(trial, state=TrialState.FAIL)
            else:
                self._trials[trial.number], self._running[trial.number] = trial, row
                self.seconds.append(time.perf_counter() - began)
                return Ask(trial.number, row, self._stops)
        return "wait" if self._running else None

    def report(self, ask: Ask, epoch: int, values: Sequence[float]) -> bool:
        trial = self._trials[ask.number]
        trial.report(values[-1], epoch)
        return not trial.should_prune()

    def finish(self, ask: Ask, epoch: int, value: float) -> None:
        trial = self._trials[ask.number]
        row = self._running.pop(ask.number)
        self._spent += epoch / EPOCHS
        state = TrialState.COMPLETE if epoch == EPOCHS else TrialState.PRUNED
        if state == TrialState.COMPLETE:
            self._values[row] = value
        self._done[row] = state, value, {}
        self._study.tell(trial, value if state == TrialState.COMPLETE else None, state)
        if state == TrialState.PRUNED:
            self._done[row] = state, value, dict(self._study.trials[ask.number].intermediate_values)

    def choice(self) -> Choice:
        row = max(self._values, key=lambda row: self._values[row])
        return Choice(row, self._values[row])

    def _tell(self, trial: optuna.Trial, state: TrialState, value: float, reports: Mapping[int, float]) -> None:
        for epoch, one in reports.items():
            trial.report(one, epoch)
        self._study.tell(trial, value if state == TrialState.COMPLETE else None, state)


_EPOCHS_ASKED = (1, 3, 9)


def _suggest(trial: optuna.Trial) -> dict[str, Any]:
    method = trial.suggest_categorical("method", METHODS)
    sample: dict[str, Any] = {"method": method}
    for name, options in OPTIONS[method].items():
        sample[f"{method}.{name}"] = trial.suggest_categorical(f"{method}.{name}", options)
    sample["training.learning_rate"] = trial.suggest_categorical("training.learning_rate", LEARNING_RATES)
    return sample


def optuna_strategy(name: str, question: Question, budget: float, seed: int) -> OptunaStrategy:
    """Optuna as its documentation recommends it for such a space."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        tpe = optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)
        pruners: dict[str, tuple[optuna.samplers.BaseSampler, optuna.pruners.BasePruner]] = {
            "tpe": (tpe, optuna.pruners.NopPruner()),
            "tpe_halving": (tpe, optuna.pruners.SuccessiveHalvingPruner(min_resource=3, reduction_factor=3)),
            "hyperband": (
                optuna.samplers.RandomSampler(seed),
                optuna.pruners.HyperbandPruner(min_resource=1, max_resource=EPOCHS, reduction_factor=3),
            ),
        }
        return OptunaStrategy(question, budget, seed, *pruners[name])


class Heterokd:
    """The real `Study` of the pair's real `Experiment`, kept in memory.

    Attributes:
        seconds: that each suggestion took.
        study: for a closer look.
    """

    def __init__(
        self,
        question: Question,
        replay: Replay,
        budget: float,
        seed: int,
        settings: Mapping[str, Any] | None = None,
        others: Sequence[SimilarStudy] = (),
    ) -> None:
        search = {"budget": {"trainings": float(budget)}, "seed": seed, **(settings or {})}
        experiment = PAIRS[question.name].experiment(search)
        self._question = question
        warm = warm_starts(experiment, others)
        facts = StudyFacts(warm=replace(warm, samples=warm.samples[:MOST_SAMPLES]))
        options = StudyOptions(facts, storage="memory", clock=lambda: replay.now)
        self.study = Study.open(experiment, StudyFolder(Path(question.name)), options)
        self.seconds: list[float] = []

    def next(self) -> Ask | Literal["wait"] | None:
        began = time.perf_counter()
        assignment = self.study.next()
        if assignment is None or assignment == "wait":
            return assignment
        self.seconds.append(time.perf_counter() - began)
        return Ask(assignment.number, self._question.row(assignment.sample), assignment.rungs)

    def report(self, ask: Ask, epoch: int, values: Sequence[float]) -> bool:
        curve = [{"val/top1": value} for value in values]
        return self.study.report(ask.number, epoch, curve[-1], curve)

    def finish(self, ask: Ask, epoch: int, value: float) -> None:
        state = "complete" if epoch == EPOCHS else "pruned"
        self.study.finish(ask.number, state, {"val/top1": value, "epoch": epoch})

    def choice(self) -> Choice:
        winner = self.study.leaders()[0]
        return Choice(self._question.row(winner.sample), winner.expected)


def similar(name: str, seed: int) -> list[SimilarStudy]:
    """A search of each other table, as `search.warm_start_from: auto` would find it in a workspace."""
    own, found = _traits(name), []
    for pair in stored():
        if pair != name:
            weight = math.exp(-own.distance(_traits(pair)))
            found.append(SimilarStudy(_finished(pair, seed), weight))
    return sorted(found, key=lambda study: -study.weight)


def _traits(name: str) -> Traits:
    return Traits.of(PAIRS[name].experiment({}), VAL, 10)


@lru_cache(maxsize=8)
def _finished(name: str, seed: int) -> StudySummary:
    """The summary of a search of 20 trainings, with seeds that no other search of the benchmark has."""
    asked = replay_question(name)
    replay = Replay(asked.table, EARLIER + seed)
    search = Heterokd(asked, replay, EARLIER_TRAININGS, EARLIER + seed)
    replay.run(search)
    return search.study.summary()


def _warm(question: Question, replay: Replay, budget: float, seed: int) -> Choice:
    return replay.run(Heterokd(question, replay, budget, seed, others=similar(question.name, seed)))


Search = Callable[[Question, Replay, float, int], Choice]


def _by_optuna(name: str) -> Search:
    return lambda question, replay, budget, seed: replay.run(optuna_strategy(name, question, budget, seed))


def _heterokd(settings: Mapping[str, Any]) -> Search:
    return lambda question, replay, budget, seed: replay.run(Heterokd(question, replay, budget, seed, settings))


STRATEGIES: dict[str, Search] = {
    "random": random,
    "screen_1": lambda question, replay, budget, seed: screen(question, replay, budget, seed, 1),
    "screen_3": lambda question, replay, budget, seed: screen(question, replay, budget, seed, 3),
    "tpe": _by_optuna("tpe"),
    "tpe_halving": _by_optuna("tpe_halving"),
    "hyperband": _by_optuna("hyperband"),
    "heterokd": _heterokd({}),
    "heterokd_prior": _heterokd({"prior_weight": 0.5}),
    "heterokd_warm": _warm,
}

LABELS = {
    "random": "random",
    "screen_1": "random, screened after 1 epoch",
    "screen_3": "random, screened after 3 epochs",
    "tpe": "TPE",
    "tpe_halving": "TPE with halving (Optuna)",
    "hyperband": "Hyperband (Optuna)",
    "heterokd": "heterokd",
    "heterokd_prior": "heterokd, papers' ranking",
    "heterokd_warm": "heterokd after searches of the other tables",
}
