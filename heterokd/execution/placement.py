"""Resources of each trial and how many trials run at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeAlias

from heterokd.config.domain_values import ends
from heterokd.config.experiment import Experiment
from heterokd.config.recipe import Recipe
from heterokd.config.training import TrainingSettings
from heterokd.datasets.io.split import Splits
from heterokd.errors import ConfigError, PairError
from heterokd.execution import autoscaler as autoscaling
from heterokd.execution.ray_settings import only_on, ray
from heterokd.storage.machine_load import under_load
from heterokd.training.data import open_splits
from heterokd.training.memory import estimate_memory
from heterokd.training.student_costs import parameters_m

logger = logging.getLogger(__name__)

GPU_SECONDS = 60.0
"""Timeout for asking a node for its GPU memory; a process that loads PyTorch has to start there."""


Node: TypeAlias = tuple[int, int]
"""Number of cores and GPUs of a node."""

MemoryEstimate: TypeAlias = Callable[[Recipe, Splits, int], int]
"""Estimates the bytes that a training takes of a GPU with the given memory."""


@dataclass(frozen=True)
class Cluster:
    """Where trials run.

    Attributes:
        parallel: number of concurrent trials.
        cpus: processor cores of each trial, or of each of its workers.
        gpus: GPUs of each trial, or of each of its workers.
        workers: minimum and maximum number of workers of a trial; (1, 1) trains in the trial's process.
    """

    parallel: int
    cpus: float
    gpus: float
    workers: tuple[int, int] = (1, 1)

    @property
    def trial(self) -> dict[str, float]:
        """Resources that Ray Tune reserves for a trial's process.

        Where workers train, the trial's process only waits and must hold nothing that they need, or trials that have
        started could deadlock; Ray needs a resource, so the process gets a byte of memory.
        """
        return {"CPU": self.cpus, "GPU": self.gpus} if self.workers[1] == 1 else {"memory": 1.0}

    @property
    def needs(self) -> dict[str, float]:
        """Resources that a node needs for a trial, or for one of its workers."""
        return {"CPU": self.cpus, "GPU": self.gpus}


def plan_cluster(experiment: Experiment) -> Cluster:
    """Place an experiment's trials on the connected Ray, see `place_trials`."""

    def per_gpu() -> int | None:
        memory = gpu_bytes()
        return None if memory is None else trials_per_gpu(experiment, memory)

    return place_trials(experiment, node_resources(experiment), per_gpu)


def place_trials(experiment: Experiment, nodes: Sequence[Node], per_gpu: Callable[[], int | None]) -> Cluster:
    """Decide how many trials run concurrently on given nodes, and the resources of each.

    With `search.gpus_per_trial: auto`, as many trials share a GPU as its memory and the cores allow.

    Args:
        experiment: the experiment.
        nodes: cores and GPUs of each node.
        per_gpu: number of trials that fit into a GPU's memory, or None if unknown; called only where it matters.

    Raises:
        ConfigError: no trial fits into a GPU's memory, the share of GPUs does not exist, or there is no room for a
            training's workers.
    """
    if experiment.training.is_shared:
        search = experiment.search
        return plan_workers(experiment.training, search.parallel, search.trials, search.gpus_per_trial, nodes)
    cores, gpus = sum(cores for cores, _ in nodes), sum(gpus for _, gpus in nodes)
    wanted, asked = experiment.search.parallel, experiment.search.gpus_per_trial
    if not gpus:
        if not cores and asked == "auto":
            # Trials that ask for no GPU would share the one of a node that comes.
            raise ConfigError(
                "search.gpus_per_trial: no node has a core for trials, and Ray does not know which nodes may come; "
                "give their resources (cluster.nodes.NAME: {count: 4, cpus: 8, gpus: 1}), or set this key"
            )
        parallel = wanted or max(cores, 1)
        # Without any cores the trials wait for future nodes, which are unknown: they ask for what the user set.
        share = asked if asked != "auto" and not cores else 0
        return Cluster(parallel, cpus=_cores_each(parallel, nodes), gpus=share)
    if asked == "auto":
        fitting = per_gpu()
        room = gpus if fitting is None else gpus * fitting
        if wanted is not None and wanted > room:
            why = "GPUs of unknown size are not shared" if fitting is None else "more do not fit into the GPUs' memory"
            logger.warning("search.parallel: %d trials at a time instead of %d, since %s", room, wanted, why)
        parallel = max(1, min(wanted or experiment.search.trials, room, max(cores, 1)))
        share = _fraction(parallel / gpus)
    else:
        if asked > gpus or (asked > 1 and asked != int(asked)):
            raise ConfigError(
                f"search.gpus_per_trial: {asked:g} GPUs for each trial are not available from {gpus}; "
                "give a share of one GPU, or a whole number of GPUs"
            )
        room = gpus * int(1 / asked + 1e-9) if asked <= 1 else gpus // int(asked)
        parallel, share = max(1, min(wanted or room, room)), asked
    return Cluster(parallel, cpus=_cores_each(parallel, nodes), gpus=share)


def _cores_each(parallel: int, nodes: Sequence[Node]) -> int:
    """Return the cores of each trial; a trial never spans nodes, so fewer where that many trials would not fit."""
    cpus = max(1, sum(cores for cores, _ in nodes) // parallel)
    while cpus > 1 and sum(held // cpus for held, _ in nodes) < parallel:
        cpus -= 1
    return cpus


def places(cluster: Cluster, nodes: Sequence[Node]) -> int:
    """Return how many trials of a cluster have room on given nodes; a trial never spans nodes, its workers may."""
    cpus, most = int(cluster.cpus), cluster.workers[1]
    room = sum(
        min(cores // cpus, _gpu_places(gpus, cluster.gpus)) if cluster.gpus else cores // cpus for cores, gpus in nodes
    )
    return room // most


def future_nodes(declared: Sequence[Node] = ()) -> list[Node]:
    """Return cores and GPUs of the nodes that the cluster's autoscaler may add, as far as this machine knows.

    `declared`: nodes that the experiment lists, which count where the autoscaler's are not known.
    """
    from ray._private.state import state  # as Ray Train does; there is no public API

    if not ray.is_initialized():
        return []
    config = state.get_cluster_config()
    groups = [] if config is None else config.node_group_configs
    addable: list[Mapping[str, float]] = [group.resources for group in groups for _ in range(max(0, group.max_count))]
    if not addable:
        # Managed clusters expose their configuration; Ray's autoscaler does not.
        addable = autoscaling.addable(ray.get_runtime_context().gcs_address)
    may_come = list(map(_held, addable)) or list(declared)
    there = [_held(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    coming = []
    for held in may_come:
        if held in there:
            there.remove(held)
        else:
            coming.append(held)
    return coming


def _held(resources: Mapping[str, float]) -> Node:
    return int(resources.get("CPU", 0)), int(resources.get("GPU", 0))


def node_resources(experiment: Experiment | None = None, avoid: Collection[str] = ()) -> list[Node]:
    """Return cores and GPUs of the nodes of the connected Ray, and of the nodes that may be added.

    Args:
        experiment: lists nodes that may be added, see `ClusterSettings`.
        avoid: ids of nodes that do not count.
    """
    there = [_held(node["Resources"]) for node in ray.nodes() if node["Alive"] and node["NodeID"] not in avoid]
    return [*there, *future_nodes(experiment.cluster.resources if experiment else ())]


def plan_workers(
    training: TrainingSettings,
    wanted: int | None = 1,
    trials: int = 1,
    gpus_per_trial: float | Literal["auto"] = "auto",
    nodes: Sequence[Node] | None = None,
) -> Cluster:
    """Decide how many sharded trainings run concurrently, each with all its workers.

    Args:
        training: number of workers; each worker needs a place on a single node.
        wanted: number of concurrent trainings; None: as many as fit.
        trials: maximum number of concurrent trainings.
        gpus_per_trial: GPUs of all workers of a training, where `training.gpus_per_worker` is auto.
        nodes: cores and GPUs of each node; None: those of the connected Ray.

    Raises:
        ConfigError: the workers of a single training do not fit.
    """
    nodes = node_resources() if nodes is None else nodes
    least, most = training.worker_range
    gpus = _gpus_per_worker(training, gpus_per_trial, are_there=any(gpus for _, gpus in nodes))
    if gpus:
        places = [_gpu_places(held, gpus) for _, held in nodes]
        per_node = [cores // count for (cores, _), count in zip(nodes, places, strict=True) if count]
        cpus = max(1, min(per_node, default=1))
        room = sum(min(count, cores // cpus) for (cores, _), count in zip(nodes, places, strict=True))
    else:
        cores = sum(cores for cores, _ in nodes)
        cpus = max(1, cores // (most * (wanted or max(1, cores // most))))
        # Fewer cores each where that many workers do not fit on the nodes.
        while cpus > 1 and sum(cores // cpus for cores, _ in nodes) < most * (wanted or 1):
            cpus -= 1
        room = sum(cores // cpus for cores, _ in nodes)
    if room < least:
        each = f"{cpus} core(s)" + (f" and {gpus:g} GPU(s)" if gpus else "")
        raise ConfigError(
            f"training.workers: {least} workers with {each} each do not fit into this Ray, which has room for {room}; "
            "lower it (or training.gpus_per_worker), or add nodes"
        )
    parallel = max(1, min(wanted or trials, room // most))
    return Cluster(parallel, cpus, gpus, (least, most))


def _gpus_per_worker(training: TrainingSettings, gpus_per_trial: float | Literal["auto"], *, are_there: bool) -> float:
    if training.gpus_per_worker != "auto":
        return training.gpus_per_worker
    if gpus_per_trial != "auto":
        return gpus_per_trial / training.most_workers
    return 1.0 if are_there else 0.0


def _gpu_places(held: int, each: float) -> int:
    """Number of workers, with `each` GPUs, that fit on a node that has `held` GPUs."""
    return held * int(1 / each + 1e-9) if each <= 1 else held // int(each)


def _fraction(trials_per_gpu: float) -> float:
    """Share of a GPU for each trial, rounded down to Ray's resolution of 1/10,000."""
    return 1.0 if trials_per_gpu <= 1 else int(10_000 / math.ceil(trials_per_gpu)) / 10_000


def trials_per_gpu(experiment: Experiment, memory: int, estimate: MemoryEstimate = estimate_memory) -> int:
    """Return how many trials fit into a GPU's memory, whatever their methods and students.

    Args:
        experiment: the experiment.
        memory: memory of the GPU, in bytes.
        estimate: estimates a training's bytes.

    Raises:
        ConfigError: not a single trial fits.
    """
    most, largest_name = largest_training(experiment, memory, estimate=estimate)
    if most > memory:
        raise ConfigError(
            f"training.batch_size: a training by {largest_name} needs about {most / 2**30:.1f} GiB of a GPU that has "
            f"{memory / 2**30:.1f}; raise training.accumulate, or lower training.batch_size"
        )
    return max(1, memory // max(most, 1))


def largest_training(
    experiment: Experiment,
    memory: int,
    *,
    methods: Sequence[str] | None = None,
    estimate: MemoryEstimate = estimate_memory,
) -> tuple[int, str]:
    """Return the GPU memory of an experiment's largest training, in bytes, and a description of that training.

    A trial's process keeps the teachers of earlier trials, so all teachers count.

    Args:
        experiment: the experiment.
        memory: memory of the GPU, in bytes.
        methods: methods to consider, with the first student; None: all methods with all students.
        estimate: estimates a training's bytes.
    """
    splits = open_splits(experiment.data)
    shared = experiment.shared_domains() if methods is None else {}
    largest = {key: max(ends(shared[key])) for key in ("training.batch_size",) if key in shared}  # type: ignore[type-var]
    first, *others = experiment.teacher.networks
    held = {
        teacher: round(
            4e6 * parameters_m(experiment.teacher.settings_of(teacher), splits.num_classes, experiment.teacher_size)
        )
        for teacher in (experiment.teacher.networks if others else ())
    }
    students = experiment.student.networks if methods is None else experiment.student.networks[:1]
    most, largest_name = 0, ""
    for teacher, network, method in product(experiment.teacher.networks, students, methods or experiment.methods):
        if teacher != first and not experiment.reads_teacher(method):
            continue
        asked = experiment.for_teacher(teacher)
        chosen = {"student.network": network} if len(experiment.student.networks) > 1 else {}
        try:
            needed = estimate(asked.recipe({**asked.published(method), **largest, **chosen}), splits, memory)
        except PairError:
            continue
        needed += sum(held.values()) - held.get(teacher, 0)
        if needed > most:
            most, largest_name = needed, f"method {method!r} for student {network!r}"
    return most, largest_name


def gpu_bytes(patience: float = GPU_SECONDS) -> int | None:
    """Return the memory of the smallest GPU of the connected Ray, in bytes; None if no node answers.

    A GPU that others hold completely does not answer until they are done; only answers within `patience` count.

    Args:
        patience: seconds to wait for answers, more on a busy machine.
    """

    def ask() -> int | None:
        import torch  # in the worker, not in the driver

        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None

    asking = [
        ray.remote(ask).options(num_cpus=0, num_gpus=0.01, scheduling_strategy=only_on(node["NodeID"])).remote()
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU", 0) >= 1
    ]
    answered, busy = ray.wait(asking, num_returns=len(asking), timeout=under_load(patience)) if asking else ([], [])
    for task in busy:
        ray.cancel(task, force=True)
    if busy:
        logger.warning(
            "%d of %d nodes with GPUs did not report their memory: others use the GPUs", len(busy), len(asking)
        )
    known = [memory for memory in ray.get(answered) if memory is not None]
    return min(known, default=None)
