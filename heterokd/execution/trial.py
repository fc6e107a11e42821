"""Run a trial in its Ray process, which imports no MLflow."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from heterokd.config.recipe import Recipe
from heterokd.errors import TrainingDiverged
from heterokd.execution.crash_file import crash_recorded
from heterokd.execution.failure_cause import Cause, cause_of
from heterokd.execution.node_faults import NodeFault
from heterokd.execution.out_of_memory import is_out_of_memory
from heterokd.execution.parallel import TrialConfig
from heterokd.execution.prices import hourly_price
from heterokd.execution.ray_connection import is_preempted
from heterokd.execution.ray_settings import ray, tune
from heterokd.execution.run import RunContext, RunRecipe, run_recipe
from heterokd.execution.this_node import NodeCheck, gpu_fault, nodes_with_room, suspicion, this_node
from heterokd.outputs import Signal
from heterokd.storage.disk import when_writable
from heterokd.storage.files import write_text
from heterokd.storage.study_dir import TrialEnd, TrialFolder, exception_line
from heterokd.storage.sync import FolderSync
from heterokd.storage.trial_status import NOT_FINITE, OUT_OF_MEMORY, TrialSnapshot, TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.study.assignment import BUDGET, Assignment
from heterokd.teachers.cache_policy import CacheUse
from heterokd.training.precision import default_device
from heterokd.training.train import Metrics


@dataclass(frozen=True)
class SharedViews:
    """Views whose cache the builders of a search build.

    Attributes:
        seed: of the views.
        views: number of views of each image.
        signals: what the methods of the search read from the caches of the teacher.
    """

    seed: int
    views: int | None
    signals: Signal


@dataclass(frozen=True)
class TrialJob:
    """Arguments that all trials of a search share.

    Attributes:
        workspace: the driver's workspace.
        study: name of the study.
        weights: files of the prepared teachers' weights on the driver's node, by network.
        check: what a node is compared with; None on a local Ray.
        shared_views: by teacher, the views whose cache the search's builders build. A trial itself builds other caches
            of these teachers, and none of other teachers.
    """

    workspace: Workspace
    study: str
    weights: Mapping[str, Path | None]
    shared_views: Mapping[str, SharedViews]
    check: NodeCheck | None = None

    def context(
        self, assignment: Assignment, here: Workspace, mirror: FolderSync, avoid: Sequence[str] = ()
    ) -> RunContext:
        """Return the context of a trial's training.

        Args:
            assignment: the trial.
            here: the workspace on this node.
            mirror: sync of the trial's folder.
            avoid: ids of nodes on which workers do not run.

        Raises:
            OSError: the store does not answer.
        """
        recipe = assignment.recipe
        teacher, views = recipe.teacher.network, (recipe.training.seed, recipe.views)
        cache_use: CacheUse = "found"
        shared = self.shared_views.get(teacher)
        if shared is not None:
            cache_use = "shared" if (shared.seed, shared.views) == views else "built"
        weights = self.weights.get(teacher)
        return RunContext(
            workspace=here,
            teacher_weights=None if weights is None else here.fetched(weights, self.workspace),
            device=default_device(),
            cache_use=cache_use,
            cache_signals=Signal.NONE if shared is None else shared.signals,
            checkpoint_epochs=assignment.rungs,
            evaluated_epochs=assignment.evaluated,
            save_now=is_preempted,
            check=self.check,
            avoid=tuple(avoid),
            mirror=None if mirror.store is None else mirror,
        )


def fetch_trial(mirror: FolderSync, folder: TrialFolder, recipe: Recipe) -> FolderSync:
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


def _write_end(end: TrialEnd, here: Workspace, study: str, number: int) -> None:
    """Write the end of a trial that the driver ended to its folder in the store."""
    folder = here.study(study).trial(number)
    mirror = here.mirror(folder.path)
    mirror.replace()
    end.write(folder)
    mirror.push()


def _move(actor: ray.actor.ActorHandle, config: TrialConfig, fault: NodeFault) -> bool:
    """Let a trial that met a fault of a node run again on another node; return False if the trial is at fault."""
    number, candidates = config["number"], nodes_with_room(config["cluster"].needs)
    moves: bool = ray.get(actor.move.remote(number, fault, candidates))
    if moves:
        tune.report({"number": number, "epoch": 0, "moved": True})
    return moves


def _fault_at_start(actor: ray.actor.ActorHandle, job: TrialJob) -> NodeFault | None:
    """Check the GPUs of this process, and its node unless it has passed; return a fault, or None."""
    fault = gpu_fault()
    if fault is not None or job.check is None or ray.get(actor.is_checked.remote(this_node())):
        return fault
    fault = job.check.fault()
    if fault is None:
        actor.node_passed.remote(this_node())
    return fault


def run_trial(config: TrialConfig, actor: ray.actor.ActorHandle, job: TrialJob, run: RunRecipe = run_recipe) -> None:
    """Run a trial in its Tune process: train, and report to the study at each rung.

    Args:
        config: Tune's config of the trial.
        actor: handle of the `StudyActor`.
        job: arguments that all trials share.
        run: function that trains the recipe.
    """
    torch.set_num_threads(max(1, int(config["cluster"].cpus)))
    number = config["number"]
    assignment: Assignment | None = ray.get(actor.assignment.remote(number, this_node()))
    if assignment is None:
        # An earlier process died between its last reports to the study and to Tune, or was ended by the driver.
        end: TrialEnd | None = ray.get(actor.end.remote(number))
        if end is not None and job.workspace.url:
            _write_end(end, job.workspace.on_node(), job.study, number)
        tune.report({"number": number, "epoch": 0, "finished": True})
        return
    fault = _fault_at_start(actor, job)
    if fault is not None:
        _move(actor, config, fault)
        return
    here = job.workspace.on_node()
    folder = here.study(job.study).trial(number)
    mirror = fetch_trial(here.mirror(folder.path), folder, assignment.recipe)
    started = TrialSnapshot(
        origin=assignment.origin,
        confirms=assignment.confirms,
        sample=assignment.sample,
        pid=os.getpid(),
        began=time.time(),
        price=hourly_price(assignment.experiment, config["cluster"]),
        paid=folder.cost or 0.0,
    )
    folder.start(assignment.recipe, started)
    mirror.push()
    tune.report({"number": number, "epoch": 0})
    mirror.follow()

    def on_epoch(metrics: Metrics) -> bool:
        epoch = int(metrics["epoch"])
        is_rung = epoch in assignment.rungs
        if not is_rung and not assignment.is_timed:
            return True
        # A training that resumes from the checkpoint before the last has reported later epochs already.
        curve = [report for report in folder.metrics() if report["epoch"] <= epoch] if is_rung else []
        go_on: bool = ray.get(actor.report.remote(number, epoch, metrics, curve))
        if is_rung:
            mirror.push()
            tune.report({"number": number, "epoch": epoch})
        return go_on

    message: str | None = None
    try:
        context = job.context(assignment, here, mirror, config.get("avoid", ()))
        # After a failed write to a full disk the training resumes from its checkpoint.
        with crash_recorded(folder.path) if mirror.store is None else nullcontext():
            trained = when_writable(folder.path, lambda: run(assignment.recipe, folder, context, on_epoch))
        ended = replace(started, status=TrialStatus.COMPLETE, metrics=trained.metrics)
        if trained.stopped:
            reason: str | None = ray.get(actor.why.remote(number))
            ended = replace(ended, status=TrialStatus.PAUSED if reason == BUDGET else TrialStatus.PRUNED, reason=reason)
        else:
            parameters = sum(parameter.numel() for parameter in trained.student.parameters())
            ended = replace(ended, student={**assignment.costs, "params_m": parameters / 1e6})
    except Exception as error:  # a trial's exception is recorded, and the search continues
        fault = suspicion(error, job.check)
        # Another node continues from what is in the store.
        if fault is not None and mirror.pause() and _move(actor, config, fault):
            return
        is_memory = is_out_of_memory(error)
        if not is_memory and cause_of(error) != Cause.TRIAL:
            raise  # Tune restarts the trial from its checkpoint, and `TrialDeaths` decides if it does so in vain
        ended = replace(started, status=TrialStatus.FAILED)
        if isinstance(error, TrainingDiverged):
            ended = replace(started, status=TrialStatus.DIVERGED, reason=NOT_FINITE)
        text = traceback.format_exc()
        message = exception_line(text)
        if is_memory:
            ended = replace(ended, reason=OUT_OF_MEMORY)
            message = f"{OUT_OF_MEMORY}: {message}"
        write_text(folder.path / "error.txt", text)
    # First the folder: if this process dies before it reports to the study, the study reads the result from there.
    folder.save(replace(ended, ended=time.time()))
    mirror.close()
    ray.get(actor.finish.remote(number, ended.status, ended.metrics, message))
    epoch = int(ended.metrics.get("epoch", 0))
    tune.report({"number": number, "epoch": epoch, "finished": True, "failed": ended.status == TrialStatus.FAILED})
