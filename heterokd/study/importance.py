"""Which values mattered: the share of a study's scatter that each of them explains, read from its Optuna database.

fANOVA (Hutter, Hoos, Leyton-Brown, "An Efficient Approach for Assessing Hyperparameter Importance", ICML 2014): a
forest is fitted to the trials that were trained to the end, and its variance is taken apart by parameter. A forest is
random, so several are fitted and their range is told. Where too few trials reached the end, the values of all trials at
their first rung stand in.

What methods have in common (which method, the training's own values) is judged over all trials, a method's own values
over its trials alone: they do not exist in others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import optuna
from optuna.trial import FrozenTrial, TrialState

from heterokd.storage.study_dir import StudyFolder

FORESTS, TREES = 3, 24
"""How many are fitted, and trees of each: their mean is that of all the trees."""

FEWEST = 8
"""Trials below which a forest says more of itself than of them."""

MOST = 300
"""Of more trials the newest are taken: a forest's time grows with them, and its answer no longer changes."""

ALL = "all methods"


@dataclass(frozen=True)
class Share:
    """Of one value.

    Attributes:
        name: key of a sample, or `method`.
        mean: share of the variance, over the forests; those of a group sum to 1.
        low: the smallest of the forests.
        high: the largest.
    """

    name: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Importance:
    """Of one group of values that are judged together.

    Attributes:
        group: a method, or `ALL`.
        trials: that say so.
        epoch: whose values are explained; None: those of the end.
        shares: the largest first; empty where nothing can be said.
        reason: why nothing can be said.
    """

    group: str
    trials: int
    epoch: int | None = None
    shares: tuple[Share, ...] = ()
    reason: str = ""


def importances(folder: StudyFolder) -> list[Importance]:
    """Of what all methods share, then of each method's own values; empty where the study has no database here.

    Args:
        folder: of the study; its database is read, never written.
    """
    if not folder.database.exists():
        return []
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///file:{folder.database.absolute()}?mode=ro&uri=true")
    try:
        (name,) = optuna.get_all_study_names(storage)
        study = optuna.load_study(study_name=name, storage=storage)
        trials, direction = [one for one in study.get_trials(deepcopy=False) if _counts(one)], study.direction
    finally:
        storage.engine.dispose()
    groups: dict[str, list[FrozenTrial]] = {ALL: trials}
    for trial in trials:
        groups.setdefault(str(trial.params["method"]), []).append(trial)
    if len(groups) == 2:  # of one method, all trials are its own
        del groups[ALL]
    return [_importance(group, own, direction) for group, own in groups.items()]


def _counts(trial: FrozenTrial) -> bool:
    """A repetition has the values of its leader: counted again it would look like a second, independent one."""
    given = trial.user_attrs.get("assignment", {})
    return "method" in trial.params and given.get("confirms") is None and given.get("duplicate_of") is None


def _importance(group: str, trials: Sequence[FrozenTrial], direction: optuna.study.StudyDirection) -> Importance:
    epoch = None
    measured: list[tuple[FrozenTrial, float | None]]
    measured = [(one, one.value) for one in trials if one.state == TrialState.COMPLETE]
    if len(measured) < FEWEST:
        epoch = min((min(one.intermediate_values) for one in trials if one.intermediate_values), default=0)
        measured = [(one, one.intermediate_values.get(epoch)) for one in trials]
    known = [(one, value) for one, value in measured if value is not None and math.isfinite(value)][-MOST:]
    common = set.intersection(*(set(one.params) for one, _ in known)) if known else set()
    names = [name for name in known[0][0].params if name in common and _varies(known, name)] if known else []
    if len(known) < FEWEST:
        return Importance(group, len(known), reason=f"{len(known)} trials, of which {FEWEST} are needed")
    if not names:
        return Importance(group, len(known), reason="nothing was varied")
    if len({value for _, value in known}) == 1:
        return Importance(group, len(known), reason="all trials reached the same value")
    memory = optuna.create_study(direction=direction)
    for one, value in known:
        params = {name: one.params[name] for name in names}
        distributions = {name: one.distributions[name] for name in names}
        memory.add_trial(optuna.trial.create_trial(value=value, params=params, distributions=distributions))
    found = [_forest(memory, seed) for seed in range(FORESTS)]
    shares = [Share(name, *_range([one[name] for one in found])) for name in names]
    return Importance(group, len(known), epoch, tuple(sorted(shares, key=lambda share: -share.mean)))


def _forest(study: optuna.Study, seed: int) -> Mapping[str, float]:
    return optuna.importance.get_param_importances(
        study, evaluator=optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=seed)
    )


def _range(values: Sequence[float]) -> tuple[float, float, float]:
    return float(fmean(values)), float(min(values)), float(max(values))


def _varies(trials: Sequence[tuple[FrozenTrial, float]], name: str) -> bool:
    return len({str(one.params[name]) for one, _ in trials}) > 1
