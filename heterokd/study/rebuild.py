"""Rebuild the trials of a study's database from their folders, which are the source of truth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import get_args

from optuna.trial import FrozenTrial, TrialState, create_trial

from heterokd.config.experiment import Experiment
from heterokd.config.recipe import Recipe
from heterokd.domains import Scalar
from heterokd.errors import ConfigError, StudyError
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus
from heterokd.study.assignment import Origin, assignment_attrs, completed, method_defaults, method_space, with_student
from heterokd.study.distributions import Spaces, fitted, has_freedom
from heterokd.study.pruner import checkpoint_epochs, compared
from heterokd.study.question import leaves
from heterokd.study.stored_question import summary_of_files

HOUR = 3600.0

Reports = dict[int, float]
"""Values of the searched metric by finished epoch."""


def rebuilt_trials(
    experiment: Experiment,
    folder: StudyFolder,
    methods: tuple[str, ...],
    excluded: Mapping[str, str],
    before: Sequence[FrozenTrial] = (),
) -> list[FrozenTrial]:
    """Return a study's trials as their folders record them, by number.

    All are running: `Study.open` then ends those that have ended by their folders. A number without a usable folder,
    such as that of a sample that was known and not trained, becomes a failed trial that a study ignores.

    Args:
        experiment: experiment of the study, without the students that are left out.
        folder: the study's folder.
        methods: methods that are searched.
        excluded: methods, and pairs of method and teacher, that are left out.
        before: trials that the database has; only later ones are returned.

    Raises:
        StudyError: a trial was trained for another experiment.
    """
    spaces = {method: space for method in methods if has_freedom(space := method_space(experiment, method, excluded))}
    first = len(before)
    usable = dict(_usable(folder, first))
    known = usable.keys() | {trial.number for trial in before if "assignment" in trial.user_attrs}
    spent = _spent(folder, usable)
    trials: list[FrozenTrial] = []
    for number, snapshot in usable.items():
        if snapshot.confirms is not None and snapshot.confirms not in known:
            continue
        trained = folder.trial(number).recipe
        sample = with_student(snapshot.sample, trained.student.network, experiment)
        if folder.changes_file.exists():
            sample = completed(sample, trained, experiment)
        snapshot = replace(snapshot, sample=sample)
        recipe = _checked_recipe(folder.trial(number), snapshot, experiment)
        trials += [create_trial(state=TrialState.FAIL) for _ in range(number - first - len(trials))]
        trials.append(_rebuilt(folder.trial(number), snapshot, experiment, recipe, spaces, spent))
    return trials


def recorded_reports(trial: TrialFolder, experiment: Experiment, epochs: int) -> tuple[Reports, Reports]:
    """Return what a trial has reported by its folder: the metric by epoch, and the mean at each rung.

    Args:
        trial: folder of the trial.
        experiment: experiment of the study.
        epochs: epochs of a complete training.
    """
    values = {int(report["epoch"]): _value(report, experiment) for report in trial.metrics()}
    rungs: dict[int, float] = {}
    for rung in checkpoint_epochs(experiment, epochs):
        newest = [value for epoch, value in values.items() if rung - compared(epochs) < epoch <= rung]
        if rung in values:
            rungs[rung] = math.fsum(newest) / len(newest)
    return values, rungs


def reads_every_epoch(experiment: Experiment) -> bool:
    """Whether the study's pruner is one of Optuna, which reads the metric of every epoch."""
    return experiment.search.prune and experiment.search.pruner is not None


def _usable(folder: StudyFolder, first: int) -> Iterator[tuple[int, TrialSnapshot]]:
    """Yield number and snapshot of the trials, from the first, whose sample and recipe can be read."""
    for trial in folder.trials():
        if trial.number < first:
            continue
        try:
            snapshot, _ = trial.snapshot, trial.recipe
        except (StudyError, ConfigError):
            continue
        if "method" in snapshot.sample:
            yield trial.number, snapshot


def _spent(folder: StudyFolder, snapshots: Mapping[int, TrialSnapshot]) -> dict[str, float]:
    """Return the times that a study has used, by its summary, or else by its trials as if they ran in turn."""
    summary = summary_of_files(folder)
    if summary is not None:
        hours, gpu_hours = (float(summary.spent.get(key) or 0.0) for key in ("hours", "gpu_hours"))
        return {"seconds": HOUR * hours, "device_seconds": HOUR * gpu_hours}
    seconds = math.fsum(snapshot.seconds or 0.0 for snapshot in snapshots.values())
    return {"seconds": seconds, "device_seconds": seconds}


def _checked_recipe(trial: TrialFolder, snapshot: TrialSnapshot, experiment: Experiment) -> Recipe:
    """Return a trial's recipe if the experiment gives the same for its sample.

    Raises:
        StudyError: it gives another recipe, or none.
    """
    stored, file = trial.recipe, trial.path / "recipe.yaml"
    if not experiment.knows(stored.method) or stored.student.network not in experiment.student.networks:
        return stored  # removed from the search space
    advice = "set the experiment back, or rename it to start a new study"
    try:
        recipe = experiment.recipe(dict(snapshot.sample), seed=stored.training.seed)
    except ConfigError as error:
        raise StudyError(f"{file}: the experiment cannot have trained this trial ({error}); {advice}") from None
    if recipe.hash != stored.hash:
        now = dict(leaves(recipe.model_dump(mode="json")))
        before = dict(leaves(stored.model_dump(mode="json")))
        key = next((key for key in {**before, **now} if before.get(key) != now.get(key)), "the recipe")
        raise StudyError(
            f"{file}: {key} was {before.get(key, 'absent')} in this trial and is {now.get(key, 'absent')} now; {advice}"
        )
    return stored


def _rebuilt(  # everything that a trial consists of
    trial: TrialFolder,
    snapshot: TrialSnapshot,
    experiment: Experiment,
    recipe: Recipe,
    spaces: Spaces,
    spent: Mapping[str, float],
) -> FrozenTrial:
    sample: Mapping[str, Scalar] = snapshot.sample
    defaults = method_defaults(experiment, recipe.method) if recipe.method in spaces else {}
    params, learned = fitted(spaces, sample, defaults)
    origin: Origin = next((known for known in get_args(Origin) if known == snapshot.origin), "sampled")
    seed = None if snapshot.confirms is None else recipe.training.seed
    attrs: dict[str, object] = {
        "assignment": assignment_attrs(experiment, sample, origin, seed=seed, confirms=snapshot.confirms)
        | {"student": recipe.student.network},
        "ended": dict(spent),
    }
    values, reports = recorded_reports(trial, experiment, recipe.training.epochs)
    if reads_every_epoch(experiment):
        attrs["rungs"] = {str(rung): value for rung, value in reports.items()}
        reports = values
    if snapshot.status == TrialStatus.PRUNED:
        attrs["stopped"] = {"at": max(values, default=0), "reason": snapshot.reason}
    return create_trial(
        state=TrialState.RUNNING,
        params=params,
        distributions=learned,
        intermediate_values=reports,
        user_attrs=attrs,
    )


def _value(report: Mapping[str, float], experiment: Experiment) -> float:
    value = report.get(experiment.metric, math.nan)
    return value if math.isfinite(value) else (-math.inf if experiment.maximise else math.inf)
