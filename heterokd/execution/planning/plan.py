"""Plan an experiment: trainings, time, money, memory and disk of a search."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from statistics import fmean

from heterokd.config.experiment import Experiment
from heterokd.datasets.io.unlabelled import training_images
from heterokd.errors import PairError
from heterokd.execution.check import check_experiment, within_limits
from heterokd.execution.planning.time_steps import teacher_like
from heterokd.storage.files import read_derived, write_text
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.workspace import Workspace
from heterokd.students.given_weights import with_given_weights
from heterokd.study.plan.costs import Costs
from heterokd.study.plan.counts import count
from heterokd.study.plan.estimate import DataFetch, Plan, Prices, Stock, estimate
from heterokd.study.plan.record import plan_file
from heterokd.study.plugins import check_plugins, make_pruner
from heterokd.teachers.cache.build import missing
from heterokd.teachers.cache.shards import cache_bytes, layout_of
from heterokd.teachers.cache_policy import cache_key, is_served, is_small_enough, searched_signals
from heterokd.teachers.prepare import open_prepared, ready_teacher
from heterokd.training.data import open_splits, stored_data, unlabelled_store


def plan_experiment(
    experiment: Experiment,
    root: Workspace,
    *,
    address: str | None = None,
    began: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Plan the search of an experiment, or what is left of it; nothing is trained.

    Args:
        experiment: the experiment.
        root: where state lives.
        address: address of a Ray cluster to measure on; None starts a local Ray.
        began: start time of this process (`time.time`), if it started as a search does.
        say: called with what is being measured.

    Raises:
        UserError: the input is wrong, as in a search.
    """
    costs = measure_experiment(experiment, root, address=address, began=began, say=say)
    return plan_at(experiment, root, costs)


def measure_experiment(
    experiment: Experiment,
    root: Workspace,
    *,
    address: str | None = None,
    began: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Costs:
    """Measure the costs of the search of an experiment; see `plan_experiment` for the arguments."""
    from heterokd.execution.planning.measure_costs import measure

    experiment, _ = within_limits(with_given_weights(experiment, root), root)
    excluded = check_experiment(experiment)
    check_plugins(experiment, excluded)
    return measure(experiment, root, excluded, address=address, began=began, say=say)


def plan_at(experiment: Experiment, root: Workspace, costs: Costs) -> Plan:
    """Plan the search of an experiment at measured costs; see `plan_experiment`."""
    experiment, candidates = within_limits(with_given_weights(experiment, root), root)
    excluded = check_experiment(experiment)
    folder = root.study(experiment.name)
    found = replace(plan_with(experiment, root, excluded, costs, folder), left_out={**excluded, **candidates.left_out})
    if not folder.experiment_file.exists():
        # A search that has started keeps its plan.
        write_plan(folder, experiment, found, costs)
    return found


def plan_with(
    experiment: Experiment, root: Workspace, excluded: Mapping[str, str], costs: Costs, folder: StudyFolder | None
) -> Plan:
    """Plan what remains of a search, at given costs."""
    cluster = experiment.cluster
    stores = [stored for stored in (stored_data(experiment.data), unlabelled_store(experiment.data)) if stored]
    fetch = None
    if stores:
        size = sum(stored.total_bytes if costs.nodes > 1 else stored.missing_bytes for stored in stores)
        fetch = DataFetch(size, costs.nodes, cluster.store_gbit)
        costs = replace(costs, start=costs.start + fetch.seconds)
    stock = existing_stock(experiment, root, excluded)
    counts = count(experiment, excluded, folder, affordable(experiment, costs, stock))
    prices = Prices(cluster.price_per_hour, experiment.search.budget.price, cluster.currency)
    found = estimate(experiment.name, counts, costs, stock, prices, partial(make_pruner, experiment))
    images = {} if experiment.data.unlabelled is None else training_images(open_splits(experiment.data))
    return replace(found, fetch=fetch, images=images)


def affordable(experiment: Experiment, costs: Costs, stock: Stock) -> float | None:
    """Return the number of trainings that the budgets of time and money allow; None without such a budget.

    What the teacher's cache lacks is computed in the time of the trials, and leaves less for trainings.
    """
    budget = experiment.search.budget
    each = fmean(cost.begin + experiment.training.epochs * cost.epoch for cost in costs.methods.values())
    devices, found = costs.gpus or 1.0, []
    cache = stock.views * (1 - stock.cache_ready) * costs.view
    if budget.hours is not None:
        trials = (3600 * budget.hours - costs.teacher - costs.process) * costs.parallel
        found.append(max(0.0, trials - cache) / each)
    if budget.gpu_hours is not None:
        found.append(3600 * budget.gpu_hours / (each * devices))
    if budget.money is not None and budget.price is not None:
        found.append(3600 * budget.money / budget.price / (each * devices))
    return min(found, default=None)


def existing_stock(experiment: Experiment, root: Workspace, excluded: Mapping[str, str]) -> Stock:
    """Return what already exists of a search's teachers and caches."""
    each = [_stock_of(experiment.for_teacher(network), root, excluded) for network in experiment.teacher.networks]
    views = sum(stock.views for stock in each)
    return Stock(
        teacher_ready=fmean(stock.teacher_ready for stock in each),
        teacher_bytes=sum(stock.teacher_bytes for stock in each if not stock.teacher_ready),
        cache_bytes=sum(stock.cache_bytes for stock in each),
        cache_ready=sum(stock.cache_ready * stock.views for stock in each) / views if views else 0.0,
        views=views,
    )


def _stock_of(experiment: Experiment, root: Workspace, excluded: Mapping[str, str]) -> Stock:
    """Return the stock of an experiment with a single teacher."""
    splits = open_splits(experiment.data)
    is_ready, weights = ready_teacher(experiment, root)
    size = None
    for method in experiment.methods if experiment.cache.enabled else ():
        recipe = experiment.recipe(experiment.published(method))
        live = (
            open_prepared(recipe, weights, splits.num_classes) if is_ready else teacher_like(recipe, splits.num_classes)
        )
        size = sum(tensor.nbytes for tensor in live.network.state_dict().values())
        try:
            served = method not in excluded and is_served(recipe, splits, live)
        except PairError:
            continue
        if not served:
            continue
        key = cache_key(recipe, splits, live, root, searched_signals(experiment, splits, live))
        if not is_small_enough(recipe, key):
            break
        folder, share = root.cache_folder.at(key.id), 0.0
        if is_ready and folder.exists("manifest.json"):
            share = 1.0
        elif is_ready:
            share = 1 - len(missing(folder, key)) / layout_of(key).shards
        return Stock(is_ready, size, cache_bytes(key), share, key.records)
    if size is None:
        recipe = experiment.recipe(experiment.published(experiment.methods[0]))
        size = sum(tensor.nbytes for tensor in teacher_like(recipe, splits.num_classes).network.state_dict().values())
    return Stock(is_ready, size, 0, 0.0, 0)


def write_plan(folder: StudyFolder, experiment: Experiment, plan: Plan, costs: Costs) -> None:
    """Write a plan into its study's folder, keeping the record of what the search took."""
    known = read_derived(plan_file(folder))
    content = {**known, "question": question_of(experiment), "plan": plan.to_json(), "costs": asdict(costs)}
    write_text(plan_file(folder), json.dumps(content, indent=1))


def question_of(experiment: Experiment) -> str:
    """Hash what a plan depends on: experiments with equal hashes have the same plan."""
    content = experiment.model_dump_json(exclude={"name", "tracking", "promotion"})
    return hashlib.sha256(content.encode()).hexdigest()[:16]
