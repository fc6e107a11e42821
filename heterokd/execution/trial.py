"""Run a trial in its Ray process, which imports no MLflow."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from heterokd.config.recipe import Recipe
from heterokd.errors import TrainingDiverged
from heterokd.execution.ray_connection import is_preempted
from heterokd.execution.ray_settings import ray, tune
from heterokd.execution.run import RunContext, RunRecipe, run_recipe
from heterokd.storage.disk import when_writable
from heterokd.storage.files import write_text
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.sync import FolderSync
from heterokd.storage.trial_status import NOT_FINITE, TrialSnapshot, TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.study.assignment import Assignment
from heterokd.teachers.cache_policy import CacheUse
from heterokd.training.precision import default_device


@dataclass(frozen=True)
class TrialJob:
    """Arguments that all trials of a search share.

    Attributes:
        workspace: the driver's workspace.
        study: name of the study.
        weights: files of the prepared teachers' weights on the driver's node, by network.
        threads: number of torch's threads.
        shared_views: by teacher, seed and number of the views whose cache the search's builders build. A trial itself
            builds other caches of these teachers, and none of other teachers.
    """

    workspace: Workspace
    study: str
    weights: Mapping[str, Path | None]
    threads: int
    shared_views: Mapping[str, tuple[int, int | None]]

    def cache_use(self, recipe: Recipe) -> CacheUse:
        """Return how a trial uses its teacher's cache."""
        teacher = recipe.teacher.network
        if teacher not in self.shared_views:
            return "found"
        return "shared" if self.shared_views[teacher] == (recipe.training.seed, recipe.views) else "built"


def begin(mirror: FolderSync, folder: TrialFolder, recipe: Recipe) -> FolderSync:
    """Download a trial's files from an earlier run on another node.

    Raises:
        OSError: the store does not respond.
    """
    mirror.replace()
    if mirror.store is not None and (folder.path / "recipe.yaml").exists() and folder.recipe.hash != recipe.hash:
        # The study lost that trial with its driver's node, and its number was assigned again.
        mirror.store.delete_everything()
        mirror.replace()
    return mirror


def run_trial(
    config: Mapping[str, int], actor: ray.actor.ActorHandle, job: TrialJob, run: RunRecipe = run_recipe
) -> None:
    """Run a trial in its Tune process: train, and report to the study at each rung.

    Args:
        config: Tune's config, with the trial's number.
        actor: handle of the `StudyActor`.
        job: arguments that all trials share.
        run: function that trains the recipe.
    """
    torch.set_num_threads(job.threads)
    number = config["number"]
    assignment: Assignment | None = ray.get(actor.assignment.remote(number))
    if assignment is None:
        # An earlier process died between its last reports to the study and to Tune.
        tune.report({"number": number, "epoch": 0, "finished": True})
        return
    recipe = assignment.recipe
    here = job.workspace.on_node()
    folder = here.study(job.study).trial(number)
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

    def on_epoch(metrics: dict[str, float]) -> bool:
        epoch = int(metrics["epoch"])
        if epoch not in assignment.rungs and not assignment.is_timed:
            return True
        curve = folder.metrics() if epoch in assignment.rungs else []
        go_on: bool = ray.get(actor.report.remote(number, epoch, metrics, curve))
        if epoch in assignment.rungs:
            mirror.push()
            tune.report({"number": number, "epoch": epoch})
        return go_on

    status = TrialStatus.COMPLETE
    reason: str | None = None
    error: str | None = None
    metrics: dict[str, float] = {}
    student: dict[str, float] = {}
    try:
        given = job.weights.get(recipe.teacher.network)
        context = RunContext(
            workspace=here,
            teacher_weights=None if given is None else here.fetched(given, job.workspace),
            device=default_device(),
            cache_use=job.cache_use(recipe),
            checkpoint_epochs=tuple(assignment.rungs),
            save_now=is_preempted,
        )
        trained = when_writable(
            folder.path,
            # After a failed write to a full disk it resumes from the checkpoint.
            lambda: run(recipe, folder, context, on_epoch),
        )
        metrics = trained.metrics
        if trained.stopped:
            reason = ray.get(actor.why.remote(number))
            status = TrialStatus.PAUSED if reason == "budget" else TrialStatus.PRUNED
        else:
            parameters = sum(parameter.numel() for parameter in trained.student.parameters())
            student = {**assignment.costs, "params_m": parameters / 1e6}
    except Exception as raised:  # noqa: BLE001  a trial's exception is recorded, and the search continues
        status, error = TrialStatus.FAILED, traceback.format_exc()
        if isinstance(raised, TrainingDiverged):
            status, reason = TrialStatus.DIVERGED, NOT_FINITE
        write_text(folder.path / "error.txt", error)
    # First the folder: if this process dies before it reports to the study, the study reads the result from there.
    folder.save(replace(snapshot, status=status, reason=reason, metrics=metrics, student=student, ended=time.time()))
    mirror.close()
    ray.get(actor.finish.remote(number, status, metrics, error.strip().splitlines()[-1] if error else None))
    tune.report({"number": number, "epoch": int(metrics.get("epoch", 0)), "finished": True})
