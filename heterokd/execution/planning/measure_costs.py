"""Measure the costs of a search on the Ray that will run it: a few steps of each method, timed concurrently.

Trials share cores, caches and memory bandwidth, so a step alone is faster than a step in a search. The steps are
therefore timed as trials run: in Ray processes, as many at a time, with as many threads.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from heterokd.config.experiment import Experiment
from heterokd.config.recipe import Recipe
from heterokd.datasets.io.loaders import open_split
from heterokd.datasets.io.split import Splits
from heterokd.execution.placement import future_nodes, gpu_bytes, largest_training, plan_cluster
from heterokd.execution.planning.time_steps import teacher_like, time_evaluation, time_method, time_training, time_view
from heterokd.execution.ray_connection import connected
from heterokd.execution.ray_settings import ray
from heterokd.methods import BASELINE
from heterokd.outputs import Signal
from heterokd.storage.workspace import Workspace
from heterokd.study.assignment import teachers_of
from heterokd.study.plan.costs import Costs, MethodCost
from heterokd.study.pruner import evaluated_epochs
from heterokd.teachers.cache_policy import stored_signals
from heterokd.teachers.fit import fine_tuning, planned_fit
from heterokd.teachers.folders import missing_folds, teacher_recipe
from heterokd.teachers.given import with_local_weights
from heterokd.teachers.prepare import ready_teacher
from heterokd.tracking.store import open_store
from heterokd.training.data import measured_splits, open_splits
from heterokd.training.precision import default_device, device_name
from heterokd.training.task_modules import build_task

END_SHARE = 0.75
"""Time after the last trial (figures, report, registration, Ray's shutdown) as a share of the start-up, which loads
about as much: 13 of 18 seconds in a quickstart on two busy cores."""

Work = tuple[str, str, str]
"""Method, student, teacher."""

Timings = dict[Work, MethodCost]


def measure(
    experiment: Experiment,
    root: Workspace,
    excluded: Mapping[str, str],
    *,
    address: str | None = None,
    began: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Costs:
    """Measure what a plan of an experiment needs; nothing is trained, and no weights are loaded.

    Args:
        experiment: the experiment.
        root: holds measured precisions and decoded images.
        excluded: methods that do not exist for the pair.
        address: address of a Ray cluster; None starts a local Ray.
        began: start time of this process (`time.time`), if it started as a search does; None: now.
        say: called with what is being measured.
    """
    began = time.time() if began is None else began
    loaded = time.time() - began
    device = default_device()
    store = 0.0 if experiment.tracking.uri or root.mlflow_database.exists() else _store_seconds()
    say("timing the teacher")
    each = [teacher_seconds(experiment.for_teacher(network), root, device) for network in experiment.teacher.networks]
    say("starting Ray, and the processes of trials")
    before = time.perf_counter()
    with connected(address):
        start = time.perf_counter() - before
        cluster = plan_cluster(experiment)
        workers = cluster.workers[1]
        places = cluster.parallel * workers
        before = time.perf_counter()
        task = ray.remote(_measure).options(num_cpus=cluster.cpus, num_gpus=cluster.gpus)
        described, threads = experiment.model_dump_json(), max(1, int(cluster.cpus))
        state = root if root.url else root.on_node()
        ray.get([task.remote(described, state, [], threads) for _ in range(places)])
        process = time.perf_counter() - before
        work = _work(experiment, excluded)
        say(f"timing {len(work)} kinds of training, {places} at a time")
        # Processes with less work repeat some, so that the last measurement of the others is not timed alone.
        shares = [work[place::places] for place in range(places)]
        longest = max(map(len, shares))
        shares = [[*share, *work[: longest - len(share)]] for share in shares]
        answers = ray.get([task.remote(described, state, share, threads) for share in shares])
        memory = None if address else sum(map(_held, (psutil.Process(), *psutil.Process().children(recursive=True))))
        gpu = gpu_bytes() if cluster.gpus else None
        nodes = sum(bool(node["Alive"]) for node in ray.nodes()) + len(future_nodes(experiment.cluster.resources))
    timed: Timings = {}
    views: dict[str, list[float]] = {}
    for found, of_teachers in answers:
        timed |= {key: _shared(cost, workers) for key, cost in found.items()}
        for teacher, view in of_teachers.items():
            views.setdefault(teacher, []).append(view)
    first = experiment.student.networks[0]
    groups: dict[str, list[MethodCost]] = {}
    for (method, network, _), cost in timed.items():
        if network == first:
            groups.setdefault(method, []).append(cost)
    methods = {method: _mean(costs) for method, costs in groups.items()}
    students = _reference(experiment, work)
    return Costs(
        device=device_name(device),
        parallel=cluster.parallel,
        cpus=cluster.cpus * workers,
        gpus=cluster.gpus * workers,
        start=loaded + store + start,
        process=process,
        end=END_SHARE * (loaded + start),
        teacher=sum(each),
        view=statistics.fmean(statistics.fmean(times) for times in views.values()),
        methods=methods,
        students={network: timed[key].epoch / timed[students[first]].epoch for network, key in students.items()},
        nodes=nodes,
        memory=memory,
        gpu_memory=None if gpu is None else largest_training(experiment, gpu, methods=list(methods))[0],
    )


def _work(experiment: Experiment, excluded: Mapping[str, str]) -> list[Work]:
    """List what is timed: every method with the first student, a single method with the other students.

    Methods that run their teacher live are timed with each teacher; with a cache the teacher makes no difference.
    """
    methods = [method for method in experiment.methods if method not in excluded]
    first, *others = experiment.student.networks
    stored = stored_signals(experiment.data.task) | Signal.TAIL if experiment.cache.enabled else Signal.NONE
    work: list[Work] = []
    for method in methods:
        teachers = teachers_of(experiment, method, excluded) or experiment.teacher.networks[:1]
        is_live = bool(experiment.method_class(method).teacher_needs & ~stored)
        work += [(method, first, teacher) for teacher in (teachers if is_live else teachers[:1])]
    for teacher in experiment.teacher.networks:
        known = [method for method in methods if teacher in teachers_of(experiment, method, excluded)]
        if known and teacher not in [timed for _, _, timed in work]:
            work.append((known[0], first, teacher))
    reference = next(entry for entry in work if entry[0] == (BASELINE if BASELINE in methods else methods[0]))
    return [*work, *((reference[0], network, reference[2]) for network in others)]


def _reference(experiment: Experiment, work: list[Work]) -> dict[str, Work]:
    """Return, by student, the entry of `work` whose method all students have."""
    known = {network: [entry for entry in work if entry[1] == network] for network in experiment.student.networks}
    last = known[experiment.student.networks[-1]][-1]
    if len(known) == 1:
        return {last[1]: last}
    return {network: (last[0], network, last[2]) for network in known}


def _mean(costs: list[MethodCost]) -> MethodCost:
    """Average the costs of a method over teachers, which are sampled equally often."""
    return replace(
        costs[0],
        begin=statistics.fmean(cost.begin for cost in costs),
        epoch=statistics.fmean(cost.epoch for cost in costs),
        live=statistics.fmean(cost.live for cost in costs),
    )


def _measure(described: str, root: Workspace, work: list[Work], threads: int) -> tuple[Timings, dict[str, float]]:
    """Time trainings, and a view of each teacher, in a Ray process on its node's copy of the workspace."""
    import heterokd.execution.trial  # noqa: F401  loaded by a trial's process

    here = root.on_node()
    torch.set_num_threads(threads)
    device = default_device()
    experiment = Experiment.model_validate_json(described)
    splits = measured_splits(open_splits(experiment.data), here, experiment.data.pixels_max_gb)
    found: Timings = {}
    views: dict[str, float] = {}
    for method, network, teacher in work:
        recipe = _recipe(experiment, method, network, teacher)
        live = teacher_like(recipe, splits.num_classes)
        live.network.to(device)
        if teacher not in views:
            views[teacher] = time_view(recipe, splits, live, device)
        evaluated = evaluated_epochs(experiment, recipe.training.epochs)
        found[method, network, teacher] = time_method(recipe, splits, live, here, device, views[teacher], evaluated)
    return found, views


def _shared(cost: MethodCost, workers: int) -> MethodCost:
    """Divide the cost of a training among its workers; their communication is not measured."""
    return replace(cost, epoch=cost.epoch / workers, live=cost.live / workers)


def _recipe(experiment: Experiment, method: str, network: str, teacher: str) -> Recipe:
    asked = experiment.for_teacher(teacher)
    chosen = {"student.network": network} if len(experiment.student.networks) > 1 else {}
    return asked.recipe({**asked.published(method), **chosen})


def teacher_seconds(experiment: Experiment, root: Workspace, device: str) -> float:
    """Return the seconds to fit the teacher of an experiment with a single one, or to verify an existing teacher."""
    teacher = experiment.teacher.settings_of()
    if teacher.is_combined and ready_teacher(experiment, root)[0]:
        return 0.0
    if teacher.ensemble:
        return sum(teacher_seconds(member, root, device) for member in experiment.member_experiments)
    if teacher.cross_fit is not None:
        recipe = teacher_recipe(experiment.member_experiments[0])
        splits = measured_splits(open_splits(recipe.data), root).without_fold(0, teacher.cross_fit)
        return missing_folds(experiment, root) * _fit_seconds(recipe, splits, root, device)
    recipe = teacher_recipe(experiment)
    splits = open_splits(recipe.data)
    if not ready_teacher(experiment, root)[0]:
        recipe, _ = with_local_weights(recipe, splits, root)  # weights of other classes start a short fit
        return _fit_seconds(recipe, measured_splits(splits, root, recipe.data.pixels_max_gb), root, device)
    if experiment.teacher.settings_of().checkpoint is None and not experiment.teacher.pretrained:
        return 0.0  # a fitted teacher: only its weights are hashed
    live = teacher_like(recipe, splits.num_classes)
    task = build_task(recipe.task, splits.num_classes, inference=recipe.data.inference)
    loader = open_split(splits.val, splits.num_classes, device=device)
    return time_evaluation(live.network.to(device), loader, task, device)


def _fit_seconds(recipe: Recipe, splits: Splits, root: Workspace, device: str) -> float:
    """Return the seconds to fit a teacher, if no plateau ends the fit."""
    how = planned_fit(recipe)
    if how == "all":
        timed = time_training(recipe, splits, None, root, device)
        return timed.begin + recipe.training.epochs * timed.epoch
    tuned = recipe.model_copy(update={"training": fine_tuning(recipe.training)})
    timed = time_training(tuned, splits, None, root, device)
    network = teacher_like(recipe, splits.num_classes).network.to(device)
    train = open_split(splits.train, splits.num_classes, device=device)
    features = time_evaluation(network, train, build_task(recipe.task, splits.num_classes), device)
    passes = 2 if recipe.data.policy.flip else 1
    return timed.begin + passes * features + (tuned.training.epochs * timed.epoch if how == "head_then_all" else 0.0)


def _store_seconds() -> float:
    """Return the seconds to create an MLflow store."""
    with tempfile.TemporaryDirectory() as folder:
        before = time.perf_counter()
        open_store(Workspace(Path(folder)), None)
        return time.perf_counter() - before


def _held(process: psutil.Process) -> int:
    """Return the memory of a process in bytes; shared pages are divided among processes."""
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
