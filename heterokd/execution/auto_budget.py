"""Fit the experiment of `heterokd auto` into its time: a shorter fit of the teacher, a smaller cache, fewer epochs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from heterokd.config.experiment import Experiment
from heterokd.errors import ConfigError
from heterokd.execution.auto import EPOCHS, TEACHER_EPOCHS, Proposal
from heterokd.execution.auto_file import Section
from heterokd.execution.planning.measure_costs import teacher_seconds
from heterokd.execution.planning.plan import affordable, existing_stock
from heterokd.formatting import format_duration
from heterokd.storage.workspace import Workspace
from heterokd.study.plan.costs import Costs
from heterokd.teachers.fit import planned_fit
from heterokd.teachers.folders import teacher_recipe
from heterokd.teachers.given import with_local_weights
from heterokd.training.data import open_splits
from heterokd.training.precision import default_device

TEACHER_SHARE = 1 / 3
"""Maximum share of the time that the teacher's fit gets, if it can be shorter."""

CACHE_SHARE = 1 / 4
"""Maximum share of the trials' time that the teacher's cache gets, if it can have fewer views."""

FEWEST_VIEWS = 4
"""Views of each image below which the cache is not reduced: students would see the same few views all the time."""

ENOUGH_TRAININGS = 12
"""Full trainings below which trainings are shortened: a smaller search repeats no leader on fresh seeds."""

FEWEST_TRAININGS = 2.0
"""Full trainings of the shortest length that a search needs: scratch and a student with a teacher."""


def _timed(experiment: Experiment, root: Workspace) -> float:
    return teacher_seconds(experiment, root, default_device())


def within_budget(
    made: Proposal,
    root: Workspace,
    costs: Costs,
    seconds: float,
    fit_seconds: Callable[[Experiment, Workspace], float] = _timed,
) -> tuple[Proposal, Costs]:
    """Shorten what a proposal trains until a search of its time can compare students; its file is written again.

    If the teacher's fit takes more than `TEACHER_SHARE` of the time, only the classifier of a pretrained network is
    fitted, and any other network has fewer epochs. If the cache takes more than `CACHE_SHARE` of the rest, it has fewer
    views. Then the epochs of students are reduced until `ENOUGH_TRAININGS` are possible.

    Args:
        made: the proposal, whose budget is in hours.
        root: workspace, which keeps fitted teachers.
        costs: measured costs of its search.
        seconds: time that is left, without what the planning took; it becomes the budget.
        fit_seconds: times the shorter fit of the teacher.

    Returns:
        The proposal with a sentence for each change, and its costs.

    Raises:
        ConfigError: the time does not suffice for `FEWEST_TRAININGS`, however short.
    """
    search = made.experiment.search.model_dump(include={"budget"}, exclude_none=True)["budget"]
    # A minimum, so that the file is valid if planning has taken all the time; nothing fits then.
    made = made.changed({"search": {"budget": {**search, "hours": max(0.0001, round(seconds / 3600, 4))}}}, [])
    shorter = _with_shorter_fit(made, root, costs, seconds)
    if shorter is not made:
        made, costs = shorter, replace(costs, teacher=fit_seconds(shorter.experiment, root))
    made = _with_fewer_views(made, root, costs, seconds)
    made = _with_shorter_trainings(made, root, costs)
    found = _affordable(made, root, costs)
    if seconds <= 0 or found < FEWEST_TRAININGS:
        each = _training_seconds(made.experiment, costs)
        stock = existing_stock(made.experiment, root, {})
        cache = stock.views * (1 - stock.cache_ready) * costs.view
        needed = costs.teacher + costs.process + (cache + ENOUGH_TRAININGS * each) / costs.parallel
        made.file.unlink(missing_ok=True)
        raise ConfigError(
            f"--budget: {format_duration(max(0.0, seconds))} are left after planning; the teacher's fit takes about "
            f"{format_duration(costs.teacher)} and a training of {made.experiment.training.epochs} epochs about "
            f"{format_duration(each)}, so no students can be compared; give at least {format_duration(needed)} more "
            "than the planning takes, a checkpoint of a fitted teacher (--checkpoint), or a smaller --student"
        )
    return made, costs


def _with_shorter_fit(made: Proposal, root: Workspace, costs: Costs, seconds: float) -> Proposal:
    most = TEACHER_SHARE * seconds
    if costs.teacher <= most:
        return made
    experiment = made.experiment
    recipe, _ = with_local_weights(teacher_recipe(experiment), open_splits(experiment.data), root)
    how, epochs = planned_fit(recipe), recipe.teacher.training.epochs
    changes: Section
    if how == "head_then_all":
        changes, what = {"fit": "head"}, "only its classifier is fitted, on frozen features (teacher.fit: head)"
    elif how == "all" and epochs > TEACHER_EPOCHS[0]:
        fewer = max(TEACHER_EPOCHS[0], int(epochs * most / costs.teacher))
        training = {**experiment.teacher.training.model_dump(include={"batch_size"}), "epochs": fewer}
        changes = {"training": {**training, "warmup_epochs": min(5.0, fewer // 5)}}
        what = f"{fewer} instead of {epochs} epochs"
    else:
        return made
    reason = f"the teacher's fit would take {format_duration(costs.teacher)} of {format_duration(seconds)}: {what}"
    return made.changed({"teacher": changes}, [reason])


def _with_fewer_views(made: Proposal, root: Workspace, costs: Costs, seconds: float) -> Proposal:
    stock, experiment = existing_stock(made.experiment, root, {}), made.experiment
    cache = stock.views * (1 - stock.cache_ready) * costs.view / costs.parallel
    trials = max(0.0, seconds - costs.teacher - costs.process)
    views = min(experiment.training.epochs, experiment.cache.views)
    if cache <= CACHE_SHARE * trials or views <= FEWEST_VIEWS:
        return made
    fewer = max(FEWEST_VIEWS, int(views * CACHE_SHARE * trials / cache))
    reason = (
        f"the teacher's cache has {fewer} instead of {views} views of each image: {views} would take "
        f"{format_duration(cache)} of {format_duration(trials)}"
    )
    return made.changed({"cache": {"views": fewer}}, [reason])


def _with_shorter_trainings(made: Proposal, root: Workspace, costs: Costs) -> Proposal:
    found, epochs = _affordable(made, root, costs), made.experiment.training.epochs
    if found >= ENOUGH_TRAININGS or epochs <= EPOCHS[0]:
        return made
    begin = sum(cost.begin for cost in costs.methods.values()) / len(costs.methods)
    each = _training_seconds(made.experiment, costs)
    wanted = each * found / ENOUGH_TRAININGS - begin
    fewer = min(epochs, max(EPOCHS[0], int(epochs * wanted / (each - begin))))
    if fewer == epochs:
        return made
    reason = (
        f"trainings have {fewer} instead of {epochs} epochs: the time allows {found:.1f} full trainings of {epochs}"
    )
    return made.changed({"training": {"epochs": fewer}}, [reason])


def _affordable(made: Proposal, root: Workspace, costs: Costs) -> float:
    return affordable(made.experiment, costs, existing_stock(made.experiment, root, {})) or 0.0


def _training_seconds(experiment: Experiment, costs: Costs) -> float:
    epochs = experiment.training.epochs
    return sum(cost.begin + epochs * cost.epoch for cost in costs.methods.values()) / len(costs.methods)
