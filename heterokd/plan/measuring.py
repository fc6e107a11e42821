"""The costs of a search where it will run: a few steps of each method, timed as many at a time as trials will run.

Trials share processors, their caches and memory, so a step alone is faster than a step in a search. So what is timed
runs where trials would: in processes of the Ray that the search would use, as many at a time, with as many threads.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from heterokd.cluster import connected, gpu_bytes, plan_cluster, ray
from heterokd.config import Experiment, Recipe
from heterokd.distillation import open_splits, ready_teacher, teacher_recipe, training_splits
from heterokd.errors import PairError
from heterokd.loaders import open_split
from heterokd.memory import estimate_memory
from heterokd.plan.costs import Costs, MethodCost
from heterokd.plan.timing import teacher_like, time_evaluation, time_method, time_training, time_view
from heterokd.precision import device_name
from heterokd.root import Root
from heterokd.study import BASELINE
from heterokd.tasks import build_task
from heterokd.tracking import open_store

END_SHARE = 0.75
"""What comes after the last trial (pictures, page, the winner's registration, Ray's end) as a share of the start-up,
which loads about as much: 13 of 18 seconds in a quickstart on two busy cores."""

Timings = dict[tuple[str, str], MethodCost]
"""By method and student."""


def measure(
    experiment: Experiment,
    root: Root,
    excluded: Mapping[str, str],
    *,
    address: str | None = None,
    began: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Costs:
    """Measure what a plan of an experiment needs; nothing is trained, and no weights are loaded.

    Args:
        experiment: the question.
        root: remembers measured precisions; decoded images are shared there.
        excluded: methods that do not exist for the pair.
        address: of a Ray cluster; None starts a local one.
        began: when this process began (`time.time`), as far as a search would do the same; now, when left out.
        say: told what is being measured.
    """
    began = time.time() if began is None else began
    loaded = time.time() - began
    device = "cuda" if torch.cuda.is_available() else "cpu"
    store = 0.0 if experiment.tracking.uri or root.mlflow_database.exists() else _store_seconds()
    say("timing the teacher")
    teacher = _teacher_seconds(experiment, root, device)
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
        # Who has few takes some of the first ones again, so that the last of the others is not timed alone.
        shares = [work[place::places] for place in range(places)]
        longest = max(map(len, shares))
        shares = [[*share, *work[: longest - len(share)]] for share in shares]
        answers = ray.get([task.remote(described, state, share, threads) for share in shares])
        memory = None if address else sum(map(_held, (psutil.Process(), *psutil.Process().children(recursive=True))))
        gpu = gpu_bytes() if cluster.gpus else None
    timed: Timings = {}
    for found, _ in answers:
        timed |= {key: _shared(cost, workers) for key, cost in found.items()}
    first = experiment.student.networks[0]
    methods = {method: cost for (method, network), cost in timed.items() if network == first}
    reference = BASELINE if BASELINE in methods else next(iter(methods))
    return Costs(
        device=device_name(device),
        parallel=cluster.parallel,
        cpus=cluster.cpus * workers,
        gpus=cluster.gpus * workers,
        start=loaded + store + start,
        process=process,
        end=END_SHARE * (loaded + start),
        teacher=teacher,
        view=statistics.fmean(view for _, view in answers),
        methods=methods,
        students={
            network: timed[reference, network].epoch / methods[reference].epoch
            for network in experiment.student.networks
        },
        memory=memory,
        gpu_memory=None if gpu is None else _gpu_memory(experiment, list(methods), gpu),
    )


def _work(experiment: Experiment, excluded: Mapping[str, str]) -> list[tuple[str, str]]:
    """Method and student: every method with the first student, one method with the others."""
    methods = [method for method in experiment.methods if method not in excluded]
    reference = BASELINE if BASELINE in methods else methods[0]
    first, *others = experiment.student.networks
    return [*((method, first) for method in methods), *((reference, network) for network in others)]


def _measure(described: str, root: Root, work: list[tuple[str, str]], threads: int) -> tuple[Timings, float]:
    """In a process of its own, on its node's copy of the root: the cost of these trainings, and of one view."""
    import heterokd.trial  # noqa: F401  what a trial's process loads

    here = root.on_node()
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    experiment = Experiment.model_validate_json(described)
    splits = training_splits(open_splits(experiment.data), here)
    found: Timings = {}
    view = 0.0
    for method, network in work:
        recipe = _recipe(experiment, method, network)
        live = teacher_like(recipe, splits.num_classes)
        live.network.to(device)
        view = view or time_view(recipe, splits, live, device)
        found[method, network] = time_method(recipe, splits, live, here, device, view)
    return found, view


def _shared(cost: MethodCost, workers: int) -> MethodCost:
    """A training that workers share: each takes its part of every batch; what they exchange is not measured."""
    return replace(cost, epoch=cost.epoch / workers, live=cost.live / workers)


def _recipe(experiment: Experiment, method: str, network: str) -> Recipe:
    chosen = {"student.network": network} if len(experiment.student.networks) > 1 else {}
    return experiment.recipe({**experiment.published(method), **chosen})


def _teacher_seconds(experiment: Experiment, root: Root, device: str) -> float:
    """Seconds to fit the teacher, or to look at the one that is there."""
    recipe = teacher_recipe(experiment)
    splits = open_splits(recipe.data)
    if not ready_teacher(experiment, root)[0]:
        timed = time_training(recipe, training_splits(splits, root), None, root, device)
        return timed.begin + recipe.training.epochs * timed.epoch
    if experiment.teacher.checkpoint is None and not experiment.teacher.pretrained:
        return 0.0  # a fitted one: its weights are hashed
    live = teacher_like(recipe, splits.num_classes)
    task = build_task(recipe.task, splits.num_classes, window=recipe.data.window)
    loader = open_split(splits.val, splits.num_classes, device=device)
    return time_evaluation(live.network.to(device), loader, task, device)


def _store_seconds() -> float:
    """What it takes to make a new MLflow store."""
    with tempfile.TemporaryDirectory() as folder:
        before = time.perf_counter()
        open_store(Root(Path(folder)), None)
        return time.perf_counter() - before


def _gpu_memory(experiment: Experiment, methods: list[str], gpu: int) -> int:
    splits = open_splits(experiment.data)
    needed = [0]
    for method in methods:
        try:
            needed.append(estimate_memory(_recipe(experiment, method, experiment.student.networks[0]), splits, gpu))
        except PairError:
            continue
    return max(needed)


def _held(process: Any) -> int:
    """Bytes of a process; pages that several share count once."""
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
