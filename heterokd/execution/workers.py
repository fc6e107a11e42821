"""Sharded trainings: a Ray Train run around `run_recipe`, inside the process that started it.

    trial (or `heterokd distill`)      OnWorkers(...) takes the place of run_recipe; on_epoch(metrics) is called here
      └─ TorchTrainer.fit()            Ray Train's controller, and N workers that call run_recipe, each on its shard
           └─ rank 0 ── WorkerChannel (actor) ──> trial: metrics of the epoch; <── continue?

Rank 0 asks after every epoch, and the answer is broadcast to all ranks (`training.train`), so that all return by
themselves: nothing is stopped from outside. Rank 0 writes metrics, checkpoints and the student into the trial's
folder, which therefore looks like that of a training in one process. When a worker dies, Ray Train restarts all of
them, and they resume from the checkpoint.

Where the workspace is a store, nodes share no folder. Each worker then begins with a copy of the trial's folder in the
store; rank 0 uploads checkpoints and the student, and the trial's process, which gets the metrics, uploads these.

`fit_on_workers` fits a teacher in the same way.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypedDict

import torch
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from heterokd import errors
from heterokd.config.recipe import Recipe
from heterokd.errors import HeterokdError
from heterokd.execution.answers import answer_questions, open_channel
from heterokd.execution.crash_file import crash_recorded
from heterokd.execution.parallel import other_nodes
from heterokd.execution.placement import Cluster
from heterokd.execution.ray_connection import is_preempted
from heterokd.execution.ray_settings import ray
from heterokd.execution.run import RunContext, run_recipe
from heterokd.execution.this_node import NodeCheck, NodeError, gpu_fault, suspicion
from heterokd.execution.threads import in_thread
from heterokd.execution.worker_channel import Raised
from heterokd.networks.weights import load_weights
from heterokd.outputs import Signal
from heterokd.storage.filesystem import RemoteDir, open_folder
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.sync import FolderSync
from heterokd.storage.workspace import Workspace
from heterokd.teachers.cache_policy import CacheUse
from heterokd.training.data import open_splits
from heterokd.training.student import build_configured
from heterokd.training.train import Metrics, Report, TrainResult

PATIENCE_SECONDS = 6 * 3600
"""Timeout of collectives: rank 0 may be evaluating. Ray Train notices a dead worker at once."""


@dataclass(frozen=True)
class OnWorkers:
    """Runs `run_recipe` on several workers.

    Attributes:
        place: number of workers and the resources of each.
        restarts: how often all workers are restarted after one has died.
    """

    place: Cluster
    restarts: int

    def __call__(self, recipe: Recipe, folder: TrialFolder, context: RunContext, on_epoch: Report) -> TrainResult:
        """See `run_recipe`; each worker has its device and checks for preemption, so those of `context` are ignored.

        Raises:
            HeterokdError: raised by a worker.
            NodeError: a worker met a fault of its node.
            OSError: the store does not answer.
            ray.train.TrainingFailedError: workers died more often than `restarts`.
        """
        workspace, weights, mirror = context.workspace, context.teacher_weights, context.mirror
        work = Work(
            recipe=recipe.model_dump_json(),
            folder=folder.path if mirror is not None else folder.path.resolve(),
            workspace=workspace if workspace.url else workspace.on_node(),
            is_apart=mirror is not None,
            weights=weights.resolve() if weights else None,
            checkpoint_epochs=context.checkpoint_epochs,
            evaluated_epochs=context.evaluated_epochs,
            cache_use="built" if context.cache_use == "shared" else context.cache_use,
            cache_signals=context.cache_signals,
            threads=max(1, int(self.place.cpus)),
            check=context.check,
        )

        def report(metrics: Metrics) -> bool:
            if mirror is not None:
                # Before the checkpoint of this epoch, which is not used without its report.
                folder.append(metrics)
                mirror.push()
            return on_epoch(metrics)

        outcome = train_on_workers(work, self, context.avoid, report)
        if mirror is not None and not outcome.stopped:
            mirror.fetch_file(folder.weights.name)
        return _trained(recipe, folder, outcome)


def train_on_workers(work: Work, workers: OnWorkers, avoid: Sequence[str], on_epoch: Report) -> Outcome:
    """Run `work` on several workers; return the result of rank 0.

    Args:
        work: arguments of each worker.
        workers: their number and resources, and how often they are restarted.
        avoid: ids of nodes on which they do not run.
        on_epoch: called with each epoch's metrics; False stops the training.

    Raises:
        HeterokdError, NodeError, OSError, ray.train.TrainingFailedError: see `OnWorkers`.
    """
    channel = open_channel()
    fitting = in_thread(_trainer(work, channel, workers, avoid).fit)
    try:
        answer_questions(channel, on_epoch, fitting.done)
        outcome = _outcome(channel, fitting)
    finally:
        ray.kill(channel)
    _run_folder(work).delete_everything()
    return outcome


def _trainer(work: Work, channel: ray.actor.ActorHandle, workers: OnWorkers, avoid: Sequence[str]) -> TorchTrainer:
    place = workers.place
    least, most = place.workers
    resources = {"CPU": place.cpus} | ({"GPU": place.gpus} if place.gpus else {})
    return TorchTrainer(
        work_on,
        train_loop_config={"work": work, "channel": channel},
        # NCCL refuses two workers on one GPU; workers that share a GPU communicate through gloo.
        torch_config=TorchConfig(backend="nccl" if place.gpus >= 1 else "gloo", timeout_s=PATIENCE_SECONDS),
        scaling_config=train.ScalingConfig(
            num_workers=most if least == most else (least, most),
            use_gpu=place.gpus > 0,
            resources_per_worker=resources,
            label_selector=other_nodes(avoid) or None,
        ),
        run_config=train.RunConfig(
            name=RUN_NAME,
            storage_path=_storage(work),
            failure_config=train.FailureConfig(max_failures=workers.restarts),
        ),
    )


RUN_NAME = "train"
"""Ray Train's folder; while a training runs, it is in the trial's folder, or in a store below `TRAIN`."""

TRAIN = "train"
"""Folder of a store for Ray Train's folders."""

OF_TRIAL = ("recipe.yaml", "trial.json", "metrics.jsonl", "error.txt")
"""Files that the trial's process uploads, so that rank 0 does not."""


@dataclass(frozen=True)
class Outcome:
    """Result of a training as rank 0 returns it."""

    metrics: Metrics
    epochs: int
    stopped: bool


RunRank: TypeAlias = Callable[[Recipe, TrialFolder, RunContext, Report], Outcome]
"""Trains a recipe on a rank of a sharded training."""


def run_rank(recipe: Recipe, folder: TrialFolder, context: RunContext, on_epoch: Report) -> Outcome:
    """Train a trial's recipe on this rank."""
    trained = run_recipe(recipe, folder, context, on_epoch)
    return Outcome(trained.metrics, trained.epochs, trained.stopped)


@dataclass(frozen=True)
class Work:
    """Arguments of a worker.

    Attributes:
        recipe: the training, as JSON.
        folder: folder of the trial, or of the teacher that is fitted.
        workspace: the workspace of the process that started the training.
        is_apart: whether workers have separate copies of the folder, which they exchange through a store.
        weights: file of the teacher's weights, or of those that its fit starts from, where the training was started;
            None: timm's published ones, or none.
        threads: number of torch's threads.
        check: what a worker's node is compared with; None on a local Ray.
        checkpoint_epochs: epochs after which a checkpoint is written.
        evaluated_epochs: see `RunContext`.
        cache_use: see `RunContext`.
        cache_signals: see `RunContext`.
        run: function that trains the recipe on each rank.
        skip: names of files that rank 0 does not upload, because the process that started the training does.
    """

    recipe: str
    folder: Path
    workspace: Workspace
    is_apart: bool
    weights: Path | None
    threads: int
    check: NodeCheck | None
    checkpoint_epochs: tuple[int, ...] = ()
    evaluated_epochs: frozenset[int] | None = None
    cache_use: CacheUse = "found"
    cache_signals: Signal = Signal.NONE
    run: RunRank = run_rank
    skip: tuple[str, ...] = OF_TRIAL

    @property
    def name(self) -> str:
        """Path of the folder in the workspace."""
        return self.folder.relative_to(self.workspace.path).as_posix()


class WorkerConfig(TypedDict):
    """Ray Train's config of a worker; `channel` is a `WorkerChannel` to the process that started the training."""

    work: Work
    channel: ray.actor.ActorHandle


def work_on(config: WorkerConfig) -> Outcome | None:
    """Train on one worker; Ray Train has set up the process group.

    Returns:
        The result; None if an earlier attempt ended with an error.
    """
    work, channel = config["work"], config["channel"]
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    torch.set_num_threads(work.threads)
    if ray.get(channel.raised.remote()) is not None:
        return None  # Ray Train restarts workers after any error; this error would be raised again

    def on_epoch(metrics: Metrics) -> bool:
        go_on: bool = ray.get(channel.ask.remote(metrics))
        return go_on

    try:
        fault = gpu_fault() or (None if work.check is None else work.check.fault())
        if fault is not None:
            raise NodeError(fault)
        with _worker_folder(work) as folder, nullcontext() if work.is_apart else crash_recorded(folder.path):
            return work.run(Recipe.model_validate_json(work.recipe), folder, _worker_context(work), on_epoch)
    except errors.TrainingDiverged as error:
        ray.get(channel.leave.remote(Raised(type(error).__name__, str(error))))
        return None  # the loss is the same on all ranks: all return
    except Exception as error:
        fault = suspicion(error, work.check)
        if isinstance(error, HeterokdError) or fault is not None:
            ray.get(channel.leave.remote(Raised(type(error).__name__, str(error), fault)))
        raise


def _worker_context(work: Work) -> RunContext:
    """Return the context of a training on this worker."""
    here, weights = work.workspace.on_node(), work.weights
    return RunContext(
        workspace=here,
        teacher_weights=None if weights is None else here.fetched(weights, work.workspace),
        device=get_device(),
        cache_use=work.cache_use,
        cache_signals=work.cache_signals,
        checkpoint_epochs=work.checkpoint_epochs,
        evaluated_epochs=work.evaluated_epochs,
        save_now=lambda: is_preempted(anywhere=True),
    )


@contextmanager
def _worker_folder(work: Work) -> Iterator[TrialFolder]:
    """Yield the trial's folder: a shared one, or this worker's copy, of which rank 0 uploads what it writes."""
    if not work.is_apart:
        yield TrialFolder(work.folder)
        return
    rank = train.get_context().get_world_rank()
    copies = work.workspace.on_node().path / "workers" / f"rank{rank}"
    sync = FolderSync(copies / work.name, work.workspace.mirror(work.folder).store)
    sync.replace()
    if rank == 0:
        sync.follow(skip=work.skip)
    try:
        yield TrialFolder(sync.local)
    except BaseException:
        if rank == 0:
            sync.pause(skip=work.skip)
        raise
    if rank == 0:
        sync.close(skip=work.skip)
    shutil.rmtree(sync.local, ignore_errors=True)


def _storage(work: Work) -> str:
    """Return the path or URL below which Ray Train makes its folder, which its controller and all workers reach."""
    if not work.is_apart:
        return str(work.folder)
    return f"{work.workspace.url}/{TRAIN}/{work.name}"


def _run_folder(work: Work) -> RemoteDir:
    """Return Ray Train's folder of a training."""
    return open_folder(_storage(work)).at(RUN_NAME)


def _outcome(channel: ray.actor.ActorHandle, fitting: Future[train.Result]) -> Outcome:
    """Return rank 0's result; raise a worker's error."""
    raised: Raised | None = ray.get(channel.raised.remote())
    if raised is not None:
        raise NodeError(raised.fault) if raised.fault is not None else getattr(errors, raised.kind)(raised.sentence)
    outcome: Outcome = fitting.result().return_value
    return outcome


def _trained(recipe: Recipe, folder: TrialFolder, outcome: Outcome) -> TrainResult:
    """Return the result as `train` does; the weights of a stopped training are only in its checkpoint."""
    student = build_configured(recipe.student, open_splits(recipe.data).num_classes, recipe.data.image_size)
    if not outcome.stopped:
        load_weights(student, folder.weights)
    return TrainResult(student.eval(), outcome.metrics, outcome.epochs, outcome.stopped)
