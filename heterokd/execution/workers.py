"""Trainings that several workers share: a Ray Train run around `run_recipe`, inside the process that asked for it.

    trial (or `heterokd distill`)      OnWorkers(...) in the place of run_recipe; keep_going(metrics) is called here
      └─ TorchTrainer.fit()            Ray Train's controller, and N workers that call run_recipe, each with its part
           └─ first worker ── Questions (actor) ──> trial: epoch's metrics; <── go on?

The first worker asks after every epoch, and its answer reaches all (`training.train`), so that all return by
themselves: nothing is stopped from outside. Metrics, checkpoints and the student are written by the first worker into
the trial's folder, so that whoever reads it sees no difference to a training in one process. When a worker dies, Ray
Train starts all of them anew, and they go on from the checkpoint.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from heterokd import errors
from heterokd.config.recipe import Recipe
from heterokd.errors import HeterokdError
from heterokd.execution.placement import Cluster
from heterokd.execution.ray_connection import is_preempted
from heterokd.execution.ray_settings import ray
from heterokd.execution.run import run_recipe
from heterokd.execution.worker_channel import WorkerChannel
from heterokd.networks.network import build_network
from heterokd.networks.weights import load_weights
from heterokd.storage.files import read_json, write_text
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.teachers.cache_policy import CacheUse
from heterokd.training.data import open_splits
from heterokd.training.train import Metrics, TrainResult

POLL_SECONDS = 0.25
"""How long a question of the first worker waits at most while nobody looks."""

PATIENCE_SECONDS = 6 * 3600
"""Workers wait this long for another one, which may be evaluating; one that died is noticed at once, by Ray Train."""


@dataclass(frozen=True)
class OnWorkers:
    """`run_recipe` on several workers; takes its place in a search.

    Attributes:
        place: how many workers, and what each of them gets.
        restarts: of all workers, after one has died.
    """

    place: Cluster
    restarts: int

    def __call__(
        self,
        recipe: Recipe,
        folder: TrialFolder,
        root: Workspace,
        weights: Path | None,
        keep_going: Callable[[Metrics], bool],
        *,
        rungs: Collection[int] = (),
        save_now: Callable[[], bool] = lambda: False,
        device: torch.device | str = "cpu",
        cache: CacheUse = "found",
    ) -> TrainResult:
        """As `run_recipe`; `device` is each worker's own, and the workers look themselves whether a node leaves.

        Raises:
            HeterokdError: what a worker raised.
            ray.train.TrainingFailedError: workers died more often than `restarts`.
        """
        (folder.path / RAISED).unlink(missing_ok=True)
        questions = ray.remote(WorkerChannel).options(num_cpus=0).remote()
        work = {
            "recipe": recipe.model_dump_json(),
            "folder": folder.path.resolve(),
            "root": root if root.url else root.on_node(),
            "weights": weights.resolve() if weights else None,
            "rungs": tuple(rungs),
            "cache": "built" if cache == "shared" else cache,
            "threads": max(1, int(self.place.cpus)),
            "questions": questions,
        }
        fitting = _in_thread(self._trainer(work, folder).fit)
        try:
            _answer(questions, keep_going, fitting)
            outcome = _outcome(folder, fitting)
        finally:
            ray.kill(questions)
        shutil.rmtree(folder.path / RUN_NAME, ignore_errors=True)
        return _trained(recipe, folder, outcome)

    def _trainer(self, work: dict[str, Any], folder: TrialFolder) -> TorchTrainer:
        least, most = self.place.workers
        resources = {"CPU": self.place.cpus} | ({"GPU": self.place.gpus} if self.place.gpus else {})
        return TorchTrainer(
            work_on,
            train_loop_config=work,
            # NCCL refuses two workers on one GPU; where they share it, gloo carries what they exchange.
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
"""Ray Train's own folder, and what a worker raised on purpose; both inside the trial's folder, while it runs."""


def work_on(work: dict[str, Any]) -> dict[str, Any] | None:
    """What each worker does; Ray Train has joined it with the others.

    Returns:
        Metrics of the end, epochs, and whether it was stopped; None when an earlier attempt ended for good.
    """
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    torch.set_num_threads(work["threads"])
    folder, questions = TrialFolder(work["folder"]), work["questions"]
    if (folder.path / RAISED).exists():
        return None  # Ray Train starts workers anew whatever happened; this would happen again

    def keep_going(metrics: Metrics) -> bool:
        go_on: bool = ray.get(questions.ask.remote(metrics))
        return go_on

    try:
        trained = run_recipe(
            Recipe.model_validate_json(work["recipe"]),
            folder,
            work["root"],
            work["weights"],
            keep_going,
            rungs=work["rungs"],
            save_now=lambda: is_preempted(anywhere=True),
            device=get_device(),
            cache=work["cache"],
        )
    except errors.TrainingDiverged as error:
        _leave(folder, error)
        return None  # all workers have the same figures and return: nobody waits for anybody
    except HeterokdError as error:
        _leave(folder, error)
        raise
    return {"metrics": trained.metrics, "epochs": trained.epochs, "stopped": trained.stopped}


def _leave(folder: TrialFolder, error: HeterokdError) -> None:
    write_text(folder.path / RAISED, json.dumps({"kind": type(error).__name__, "sentence": str(error)}))


def _in_thread(fit: Callable[[], Any]) -> Future[Any]:
    """Call `fit` beside this thread; a daemon, so that an interrupt need not wait for it."""
    fitting: Future[Any] = Future()

    def run() -> None:
        try:
            fitting.set_result(fit())
        except BaseException as error:  # noqa: BLE001  handed to the one who waits for it
            fitting.set_exception(error)

    threading.Thread(target=run, name="fit", daemon=True).start()
    return fitting


def _answer(questions: Any, keep_going: Callable[[Metrics], bool], fitting: Future[Any]) -> None:
    """Answer the first worker's questions until the training is over."""
    question = questions.next.remote()
    while not fitting.done():
        done, _ = ray.wait([question], timeout=POLL_SECONDS)
        if done:
            ray.get(questions.answer.remote(keep_going(ray.get(question))))
            question = questions.next.remote()


def _outcome(folder: TrialFolder, fitting: Future[Any]) -> dict[str, Any]:
    """What the first worker returned; what a worker raised is raised here."""
    raised = read_json(folder.path / RAISED)
    if raised:
        (folder.path / RAISED).unlink()
        raise getattr(errors, raised["kind"])(raised["sentence"])
    outcome: dict[str, Any] = fitting.result().return_value
    return outcome


def _trained(recipe: Recipe, folder: TrialFolder, outcome: dict[str, Any]) -> TrainResult:
    """The training's end as `train` returns it; the weights of one that was stopped are in its checkpoint alone."""
    student = build_network(
        recipe.student.network,
        open_splits(recipe.data).num_classes,
        recipe.student.options,
        image_size=recipe.data.image_size,
    )
    if not outcome["stopped"]:
        load_weights(student, folder.weights)
    return TrainResult(student.eval(), outcome["metrics"], outcome["epochs"], outcome["stopped"])
