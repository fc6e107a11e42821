"""Sharded trainings: a Ray Train run around `run_recipe`, inside the process that started it.

    trial (or `heterokd distill`)      OnWorkers(...) takes the place of run_recipe; on_epoch(metrics) is called here
      └─ TorchTrainer.fit()            Ray Train's controller, and N workers that call run_recipe, each on its shard
           └─ rank 0 ── WorkerChannel (actor) ──> trial: metrics of the epoch; <── continue?

Rank 0 asks after every epoch, and the answer is broadcast to all ranks (`training.train`), so that all return by
themselves: nothing is stopped from outside. Rank 0 writes metrics, checkpoints and the student into the trial's
folder, which therefore looks like that of a training in one process. When a worker dies, Ray Train restarts all of
them, and they resume from the checkpoint.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from heterokd import errors
from heterokd.config.recipe import Recipe
from heterokd.errors import HeterokdError
from heterokd.execution.placement import Cluster
from heterokd.execution.ray_connection import is_preempted
from heterokd.execution.ray_settings import ray
from heterokd.execution.run import RunContext, run_recipe
from heterokd.execution.threads import in_thread
from heterokd.execution.worker_channel import WorkerChannel
from heterokd.networks.weights import load_weights
from heterokd.storage.files import read_json, write_text
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.teachers.cache_policy import CacheUse
from heterokd.training.data import open_splits
from heterokd.training.student import build_configured
from heterokd.training.train import Metrics, Report, TrainResult

POLL_SECONDS = 0.25
"""Interval at which the end of the training is checked."""

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
            ray.train.TrainingFailedError: workers died more often than `restarts`.
        """
        (folder.path / RAISED).unlink(missing_ok=True)
        channel = ray.remote(WorkerChannel).options(num_cpus=0).remote()
        workspace, weights = context.workspace, context.teacher_weights
        work = Work(
            recipe=recipe.model_dump_json(),
            folder=folder.path.resolve(),
            workspace=workspace if workspace.url else workspace.on_node(),
            teacher_weights=weights.resolve() if weights else None,
            checkpoint_epochs=context.checkpoint_epochs,
            cache_use="built" if context.cache_use == "shared" else context.cache_use,
            threads=max(1, int(self.place.cpus)),
            channel=channel,
        )
        fitting = in_thread(self._trainer(work, folder).fit)
        try:
            _answer(channel, on_epoch, fitting)
            outcome = _outcome(folder, fitting)
        finally:
            ray.kill(channel)
        shutil.rmtree(folder.path / RUN_NAME, ignore_errors=True)
        return _trained(recipe, folder, outcome)

    def _trainer(self, work: Work, folder: TrialFolder) -> TorchTrainer:
        least, most = self.place.workers
        resources = {"CPU": self.place.cpus} | ({"GPU": self.place.gpus} if self.place.gpus else {})
        return TorchTrainer(
            work_on,
            train_loop_config={"work": work},
            # NCCL refuses two workers on one GPU; workers that share a GPU communicate through gloo.
            torch_config=TorchConfig(backend="nccl" if self.place.gpus >= 1 else "gloo", timeout_s=PATIENCE_SECONDS),
            scaling_config=train.ScalingConfig(
                num_workers=most if least == most else (least, most),
                use_gpu=self.place.gpus > 0,
                resources_per_worker=resources,
            ),
            run_config=train.RunConfig(
                name=RUN_NAME,
                storage_path=str(folder.path.resolve()),
                failure_config=train.FailureConfig(max_failures=self.restarts),
            ),
        )


RUN_NAME, RAISED = "train", "raised.json"
"""Ray Train's folder and the file of an error that a worker raised; both in the trial's folder while it runs."""


@dataclass(frozen=True)
class Work:
    """Arguments of a worker.

    Attributes:
        recipe: the training, as JSON.
        folder: the trial's folder.
        workspace: the workspace on a node.
        teacher_weights: file of the teacher's weights; None: timm's published ones, or no teacher.
        checkpoint_epochs: epochs after which a checkpoint is written.
        cache_use: see `RunContext`.
        threads: number of torch's threads.
        channel: `WorkerChannel` to the process that started the training.
    """

    recipe: str
    folder: Path
    workspace: Workspace
    teacher_weights: Path | None
    checkpoint_epochs: tuple[int, ...]
    cache_use: CacheUse
    threads: int
    channel: ray.actor.ActorHandle


@dataclass(frozen=True)
class Outcome:
    """Result of a training as rank 0 returns it."""

    metrics: Metrics
    epochs: int
    stopped: bool


def work_on(config: Mapping[str, Work]) -> Outcome | None:
    """Train on one worker; Ray Train has set up the process group.

    Returns:
        The result; None if an earlier attempt ended with an error.
    """
    work = config["work"]
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    torch.set_num_threads(work.threads)
    folder, channel = TrialFolder(work.folder), work.channel
    if (folder.path / RAISED).exists():
        return None  # Ray Train restarts workers after any error; this error would be raised again

    def on_epoch(metrics: Metrics) -> bool:
        go_on: bool = ray.get(channel.ask.remote(metrics))
        return go_on

    context = RunContext(
        workspace=work.workspace,
        teacher_weights=work.teacher_weights,
        device=get_device(),
        cache_use=work.cache_use,
        checkpoint_epochs=work.checkpoint_epochs,
        save_now=lambda: is_preempted(anywhere=True),
    )
    try:
        trained = run_recipe(Recipe.model_validate_json(work.recipe), folder, context, on_epoch)
    except errors.TrainingDiverged as error:
        _leave(folder, error)
        return None  # the loss is the same on all ranks: all return
    except HeterokdError as error:
        _leave(folder, error)
        raise
    return Outcome(trained.metrics, trained.epochs, trained.stopped)


def _leave(folder: TrialFolder, error: HeterokdError) -> None:
    write_text(folder.path / RAISED, json.dumps({"kind": type(error).__name__, "sentence": str(error)}))


def _answer(channel: ray.actor.ActorHandle, on_epoch: Report, fitting: Future[train.Result]) -> None:
    """Answer rank 0's questions until the training has ended."""
    question = channel.next.remote()
    while not fitting.done():
        done, _ = ray.wait([question], timeout=POLL_SECONDS)
        if done:
            ray.get(channel.answer.remote(on_epoch(ray.get(question))))
            question = channel.next.remote()


def _outcome(folder: TrialFolder, fitting: Future[train.Result]) -> Outcome:
    """Return rank 0's result; raise a worker's error."""
    raised = read_json(folder.path / RAISED)
    if raised:
        (folder.path / RAISED).unlink()
        raise getattr(errors, str(raised["kind"]))(raised["sentence"])
    outcome: Outcome = fitting.result().return_value
    return outcome


def _trained(recipe: Recipe, folder: TrialFolder, outcome: Outcome) -> TrainResult:
    """Return the result as `train` does; the weights of a stopped training are only in its checkpoint."""
    student = build_configured(recipe.student, open_splits(recipe.data).num_classes, recipe.data.image_size)
    if not outcome.stopped:
        load_weights(student, folder.weights)
    return TrainResult(student.eval(), outcome.metrics, outcome.epochs, outcome.stopped)
