"""Importance of parameters: the share of the variance of a study's values that each parameter explains.

fANOVA (Hutter, Hoos, Leyton-Brown, "An Efficient Approach for Assessing Hyperparameter Importance", ICML 2014): a
forest is fitted to the complete trials, and its variance is decomposed by parameter. A forest is random, so several are
fitted, and their range is reported. If too few trials are complete, the values of all trials at their last common rung
replace the final ones.

What methods have in common (which method, parameters of the training) is judged over all trials, a method's parameters
over its trials: others do not have them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from heterokd.storage.sqlite_url import sqlite_url
from heterokd.storage.study_dir import StudyFolder

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

FORESTS, TREES, FEW_TREES = 3, 24, 8
"""Number of forests, and of trees in each: the mean is that of all trees. From `MANY` trials fewer trees suffice."""

MANY = 60
"""Number of trials from which a forest has `FEW_TREES`."""

FEWEST = 8
"""Minimum number of trials: with fewer, the result depends on the forest more than on the trials."""

MOST = 120
"""Maximum number of trials, spread evenly over the study: a forest's time grows with them."""

ALL = "all methods"


@dataclass(frozen=True)
class Share:
    """Importance of a parameter.

    Attributes:
        name: key of a sample, or `method`.
        mean: share of the variance, over the forests; those of a group sum to 1.
        low: smallest share of a forest.
        high: largest.
    """

    name: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Importance:
    """Importances of a group of parameters that are judged together.

    Attributes:
        group: a method, or `ALL`.
        trials: number of trials.
        epoch: epoch of the values, a rung; None: final values.
        shares: largest first; empty if they are unknown.
        reason: why they are unknown.
    """

    group: str
    trials: int
    epoch: int | None = None
    shares: tuple[Share, ...] = ()
    reason: str = ""


def importances(folder: StudyFolder) -> list[Importance]:
    """Compute importances of what all methods share, then of each method's parameters; empty without a database.

    The database is opened read-only.
    """
    if not folder.database.exists():
        return []
    import optuna  # not at the top: `Importance` is read without it

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(sqlite_url(folder.database, read_only=True))
    try:
        (name,) = optuna.get_all_study_names(storage)
        study = optuna.load_study(study_name=name, storage=storage)
        trials, direction = list(filter(_is_sample, study.get_trials(deepcopy=False))), study.direction
    finally:
        storage.engine.dispose()
    groups: dict[str, list[FrozenTrial]] = {ALL: trials}
    for trial in trials:
        groups.setdefault(str(trial.params["method"]), []).append(trial)
    if len(groups) == 2:  # a single method: its group has all trials
        del groups[ALL]
    return [_importance(group, members, direction) for group, members in groups.items()]


def _is_sample(trial: FrozenTrial) -> bool:
    """Return whether a trial counts: a repetition of a leader would look like a second, independent sample."""
    attrs = trial.user_attrs.get("assignment", {})
    return "method" in trial.params and attrs.get("confirms") is None and attrs.get("duplicate_of") is None


def _importance(group: str, trials: Sequence[FrozenTrial], direction: optuna.study.StudyDirection) -> Importance:
    import optuna
    from optuna.trial import TrialState

    epoch = None
    values = {trial.number: trial.value for trial in trials if trial.state == TrialState.COMPLETE}
    if len(values) < FEWEST:
        rungs = _rung_values(trials)
        counts = Counter(rung for found in rungs.values() for rung in found)
        epoch = max(counts, key=lambda rung: (counts[rung], rung), default=None)
        values = {number: found[epoch] for number, found in rungs.items() if epoch in found}
    finite = {number: value for number, value in values.items() if value is not None and math.isfinite(value)}
    known = [(trial, finite[trial.number]) for trial in trials if trial.number in finite]
    known = [known[len(known) * place // MOST] for place in range(MOST)] if len(known) > MOST else known
    if len(known) < FEWEST:
        return Importance(group, len(known), reason=f"{len(known)} trials, of which {FEWEST} are needed")
    common = set.intersection(*(set(trial.params) for trial, _ in known))
    names = [name for name in known[0][0].params if name in common and _varies(known, name)]
    if not names:
        return Importance(group, len(known), reason="no parameter was varied")
    if len({value for _, value in known}) == 1:
        return Importance(group, len(known), reason="all trials reached the same value")
    ranges = {name: _widest([trial.distributions[name] for trial, _ in known]) for name in names}
    memory = optuna.create_study(direction=direction)
    for trial, value in known:
        params = {name: trial.params[name] for name in names}
        distributions = {name: ranges[name] for name in names}
        memory.add_trial(optuna.trial.create_trial(value=value, params=params, distributions=distributions))
    forests = [_forest(memory, seed) for seed in range(FORESTS)]
    found = {name: [float(forest[name]) for forest in forests] for name in names}
    shares = [Share(name, fmean(each), min(each), max(each)) for name, each in found.items()]
    return Importance(group, len(known), epoch, tuple(sorted(shares, key=lambda share: -share.mean)))


def _widest(distributions: Sequence[BaseDistribution]) -> BaseDistribution:
    """Return a distribution that holds the values of all: ranges differ if the search space was changed."""
    from optuna.distributions import FloatDistribution, IntDistribution

    whole = [each for each in distributions if isinstance(each, IntDistribution)]
    if whole:
        return IntDistribution(min(each.low for each in whole), max(each.high for each in whole), log=whole[0].log)
    ranges = [each for each in distributions if isinstance(each, FloatDistribution)]
    if ranges:
        return FloatDistribution(min(each.low for each in ranges), max(each.high for each in ranges), log=ranges[0].log)
    return distributions[0]


def _rung_values(trials: Sequence[FrozenTrial]) -> dict[int, dict[int, float]]:
    """Return the values at rungs by trial and epoch; a pruner of Optuna has every epoch in the trials themselves."""
    if any("rungs" in trial.user_attrs for trial in trials):
        attrs = {trial.number: trial.user_attrs.get("rungs", {}) for trial in trials}
        return {number: {int(rung): value for rung, value in found.items()} for number, found in attrs.items()}
    return {trial.number: trial.intermediate_values for trial in trials}


def _forest(study: optuna.Study, seed: int) -> Mapping[str, float]:
    import optuna

    trees = TREES if len(study.get_trials(deepcopy=False)) < MANY else FEW_TREES
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=trees, seed=seed)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def _varies(trials: Sequence[tuple[FrozenTrial, float]], name: str) -> bool:
    return len({str(trial.params[name]) for trial, _ in trials}) > 1
