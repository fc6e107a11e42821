"""What runs in a search's own processes: the judge (the study, in one actor) and the trials.

Apart from `search`, so that a trial's process loads neither MLflow nor what else only the driver needs.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from heterokd.config.experiment import Experiment
from heterokd.config.recipe import Recipe
from heterokd.errors import TrainingDiverged
from heterokd.execution.ray_connection import is_preempted
from heterokd.execution.ray_settings import ray, tune
from heterokd.execution.run import run_recipe
from heterokd.storage.disk import when_writable
from heterokd.storage.files import write_text
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.sync import FolderSync
from heterokd.storage.trial_status import NOT_FINITE, TrialSnapshot, TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.study.assignment import Assignment, Stop
from heterokd.study.study import Study
from heterokd.teachers.cache_policy import CacheUse
from heterokd.training.train import Metrics, TrainResult


class RunRecipe(Protocol):
    """What trains a trial's recipe; `run_recipe` does."""

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
        """As `run_recipe`."""


class StudyActor:
    """The study, for those who reach it through Ray."""

    def __init__(
        self, experiment: str, folder: Path, excluded: dict[str, str], devices: float = 1.0, before: float = 0.0
    ) -> None:
        """Open the study.

        Args:
            experiment: as JSON.
            folder: of the study.
            excluded: methods that cannot exist for the pair, with the reason.
            devices: that one trial keeps busy.
            before: seconds that this search has already taken, on one device (its teacher's fit).
        """
        self.study = Study(
            Experiment.model_validate_json(experiment), StudyFolder(folder), excluded=excluded, devices=devices
        )
        self.study.spending.pass_time(before, running=1)
        self.running: dict[int, Assignment] = {}

    def next(self) -> Assignment | Literal["wait"] | None:
        """The next training to run."""
        following = self.study.next()
        if isinstance(following, Assignment):
            self.running[following.number] = following
        return following

    def assignment(self, number: int) -> Assignment | None:
        """What a trial that was handed out is to do; None when it has told its end already."""
        return self.running.get(number)

    def report(self, number: int, epoch: int, metrics: dict[str, float], curve: list[dict[str, float]]) -> bool:
        """Whether a trial at a rung goes on."""
        return self.study.report(number, epoch, metrics, curve)

    def why(self, number: int) -> Stop | None:
        """Why a trial was told to stop."""
        return self.study.why(number)

    def finish(self, number: int, status: TrialStatus, metrics: dict[str, float], error: str | None) -> None:
        """Record the end of a trial."""
        self.study.finish(number, status, metrics, error)
        self.running.pop(number, None)

    def summary(self) -> dict[str, Any]:
        """Standing and leaders."""
        return self.study.summary()


def begin(mirror: FolderSync, folder: TrialFolder, recipe: Recipe) -> FolderSync:
    """Bring a trial's files here, wherever it ran before.

    Raises:
        OSError: the store does not answer.
    """
    mirror.replace()
    if mirror.store is not None and (folder.path / "recipe.yaml").exists() and folder.recipe.hash != recipe.hash:
        # Of a trial that the study forgot when its driver's machine went: the number was given anew.
        mirror.store.delete_everything()
        mirror.replace()
    return mirror


def run_trial(
    config: dict[str, Any],
    judge: Any,
    root: Workspace,
    study: str,
    weights: Mapping[str, Path | None],
    threads: int,
    filled: Mapping[str, tuple[int, int | None]],
    run: RunRecipe = run_recipe,
) -> None:
    """One trial, in its own Tune process: train, ask the judge at each rung, return.

    Args:
        config: holds the trial's number.
        judge: the study's actor.
        root: where state lives, as the driver sees it.
        study: name of the study.
        weights: by network, the prepared teachers' weights, likewise.
        threads: of torch.
        filled: by teacher, seed and number of the views whose cache others are filling; its other caches are completed
            here first. No cache is built of a teacher that is not named.
        run: trains the recipe.
    """
    torch.set_num_threads(threads)
    number: int = config["number"]
    assignment: Assignment | None = ray.get(judge.assignment.remote(number))
    if assignment is None:
        # Its process died between telling the judge and telling Tune.
        tune.report({"number": number, "epoch": 0, "finished": True})
        return
    recipe = assignment.recipe
    here = root.on_node()
    folder = here.study(study).trial(number)
    mirror = begin(here.mirror(folder.path), folder, recipe)
    snapshot = TrialSnapshot(
        origin=assignment.origin,
        confirms=assignment.confirms,
        sample=assignment.sample,
        pid=os.getpid(),
        began=time.time(),
    )
    folder.start(recipe, snapshot)
    mirror.push()
    tune.report({"number": number, "epoch": 0})
    mirror.follow()

    def keep_going(metrics: dict[str, float]) -> bool:
        epoch = int(metrics["epoch"])
        if epoch not in assignment.rungs and not assignment.is_timed:
            return True
        curve = folder.metrics() if epoch in assignment.rungs else []
        go_on: bool = ray.get(judge.report.remote(number, epoch, metrics, curve))
        if epoch in assignment.rungs:
            mirror.push()
            tune.report({"number": number, "epoch": epoch})
        return go_on

    status = TrialStatus.COMPLETE
    reason: Stop | None = None
    error: str | None = None
    metrics: dict[str, float] = {}
    student: dict[str, float] = {}
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        teacher = recipe.teacher.network
        cache: CacheUse = "built" if teacher in filled else "found"
        if filled.get(teacher) == (recipe.training.seed, recipe.views):
            cache = "shared"
        given = weights.get(teacher)
        near = None if given is None else here.fetched(given, root)
        trained = when_writable(
            folder.path,
            # From its checkpoint where something else than a report met a disk that cannot be written.
            lambda: run(
                recipe,
                folder,
                here,
                near,
                keep_going,
                rungs=assignment.rungs,
                save_now=is_preempted,
                device=device,
                cache=cache,
            ),
        )
        metrics = trained.metrics
        if trained.stopped:
            reason = ray.get(judge.why.remote(number))
            status = TrialStatus.PAUSED if reason == "budget" else TrialStatus.PRUNED
        else:
            parameters = sum(parameter.numel() for parameter in trained.student.parameters())
            student = {**assignment.facts, "params_m": parameters / 1e6}
    except Exception as raised:  # noqa: BLE001  whatever a trial raises is recorded, and the search goes on
        status, error = TrialStatus.FAILED, traceback.format_exc()
        if isinstance(raised, TrainingDiverged):
            status, reason = TrialStatus.DIVERGED, NOT_FINITE
        write_text(folder.path / "error.txt", error)
    # The folder first: if this process dies before the judge hears of it, the study adopts what the folder says.
    folder.save(replace(snapshot, status=status, reason=reason, metrics=metrics, student=student, ended=time.time()))
    mirror.close()
    ray.get(judge.finish.remote(number, status, metrics, error.strip().splitlines()[-1] if error else None))
    tune.report({"number": number, "epoch": int(metrics.get("epoch", 0)), "finished": True})
