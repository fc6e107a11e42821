"""Run a study's trials with Ray Tune."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from heterokd.config.experiment import Experiment
from heterokd.errors import SearchError
from heterokd.execution.abandoned import scratch_folder
from heterokd.execution.cache_builders import CacheBuild, start_cache_builds
from heterokd.execution.callbacks import Listener, MlflowSync, TuneCallback
from heterokd.execution.failure_limit import FailureLimit
from heterokd.execution.placement import plan_cluster
from heterokd.execution.ray_connection import connected
from heterokd.execution.ray_settings import only_on, ray, tune
from heterokd.execution.run import RunRecipe, run_recipe
from heterokd.execution.searcher import InOrder, StudySearcher, trial_name
from heterokd.execution.study_actor import StudyActor
from heterokd.execution.study_sync import FromStore
from heterokd.execution.trial import TrialJob, run_trial
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.search_space import SearchSpace
from heterokd.study.summary import StudySummary
from heterokd.teachers.cache.locks import shared_lock
from heterokd.tracking.tracker import Tracker


@dataclass(frozen=True)
class SearchJob:
    """A search whose inputs are checked and prepared.

    Attributes:
        experiment: the experiment, without the students that exceed a limit.
        workspace: where state lives.
        space: the study's search space, see `open_space`.
        asked: the experiment as the study was created with it; None: `experiment`.
        weights: files of the prepared teachers' weights, by network.
        caches: the teachers' caches, built while the first trials run; without any, trials read the complete ones.
        seconds_before: time that the search has taken already; it counts towards its budget.
        trial_seconds: see `StudyOptions`.
    """

    experiment: Experiment
    workspace: Workspace
    space: SearchSpace
    asked: Experiment | None = None
    weights: Mapping[str, Path | None] = field(default_factory=dict)
    caches: Sequence[CacheBuild] = ()
    seconds_before: float = 0.0
    trial_seconds: float | None = None

    @property
    def folder(self) -> StudyFolder:
        """The study's folder."""
        return self.workspace.study(self.experiment.name)

    def for_trials(self, threads: int) -> TrialJob:
        """Return the arguments of trials; paths are valid on every node."""
        return TrialJob(
            workspace=self.workspace if self.workspace.url else self.workspace.on_node(),
            study=self.folder.name,
            weights={network: file.resolve() if file else None for network, file in self.weights.items()},
            threads=threads,
            shared_views={
                cache.recipe.teacher.network: (cache.recipe.training.seed, cache.recipe.views) for cache in self.caches
            },
        )


def run_study(
    job: SearchJob,
    tracker: Tracker,
    *,
    address: str | None = None,
    listener: Listener | None = None,
    run: RunRecipe = run_recipe,
) -> StudySummary:
    """Run the study to its end with Ray Tune; return its summary.

    Args:
        job: the search.
        tracker: MLflow and other trackers.
        address: address of a Ray cluster; None starts a local Ray.
        listener: called with every event of a trial.
        run: function that trains a recipe.

    Raises:
        SearchError: no trial can run here.
    """
    experiment, workspace, folder = job.experiment, job.workspace, job.folder
    is_shared = experiment.training.is_shared
    # The caches must not be deleted before the search ends, whenever trials read them.
    held = [lock for cache in job.caches if (lock := shared_lock(cache.folder)) is not None]
    sync = MlflowSync(tracker, folder)
    try:
        # Tune's snapshots, which nothing reads, are kept off the study's disk.
        with connected(address, shared=is_shared), scratch_folder("heterokd-tune-") as scratch:
            cluster = plan_cluster(experiment)
            if is_shared and run is run_recipe:
                from heterokd.execution.workers import OnWorkers  # imports Ray Train, which takes a second

                run = OnWorkers(cluster, experiment.search.max_failures)
            actor = start_actor(job, devices=cluster.gpus or 1.0)
            for trial in folder.trials():
                sync.put(trial)
            incomplete = [cache for cache in job.caches if not cache.is_complete]
            # Builders take half of the places: the first trials read what is cached and run the teacher for the rest.
            # Workers of a sharded training build the cache together before they begin.
            builders = (
                start_cache_builds(incomplete, workspace, cluster, max(1, cluster.parallel // 2))
                if incomplete and not is_shared
                else []
            )
            failures = FailureLimit(folder, cluster.parallel)
            callbacks: list[tune.Callback] = [TuneCallback(folder, actor, sync, listener, builders, failures)]
            if workspace.url:
                callbacks.insert(0, FromStore(workspace, folder))
            config = tune.RunConfig(
                name="tune",
                storage_path=str(scratch),
                verbose=0,
                stop=failures,
                failure_config=tune.FailureConfig(max_failures=experiment.search.max_failures),
                callbacks=callbacks,
            )
            trainable = tune.with_parameters(
                run_trial, actor=actor, job=job.for_trials(threads=max(1, int(cluster.cpus))), run=run
            )
            tuner = tune.Tuner(
                tune.with_resources(trainable, cluster.trial),
                tune_config=_tune_config(StudySearcher(actor, failures), cluster.parallel),
                run_config=config,
            )
            # Tune warns that its result files are missing; trial folders replace them.
            logging.getLogger("ray.tune").setLevel(logging.ERROR)
            tuner.fit()
            workspace.fetch_study(folder.name)
            summary: StudySummary = ray.get(actor.summary.remote())
            # In a Ray that outlives this search, the actor would live until its handles are collected.
            ray.kill(actor)
    finally:
        sync.close()
        for lock in held:
            lock.release()
    summary.write(folder)
    if failures.is_reached:
        tracker.finish(summary, "FAILED")
        raise SearchError(failures.sentence)
    return summary


def _tune_config(searcher: StudySearcher, parallel: int) -> tune.TuneConfig:
    return tune.TuneConfig(
        search_alg=searcher,
        scheduler=InOrder(),
        num_samples=-1,
        max_concurrent_trials=parallel,
        reuse_actors=True,
        trial_name_creator=trial_name,
        trial_dirname_creator=trial_name,
    )


def start_actor(job: SearchJob, devices: float) -> ray.actor.ActorHandle:
    """Start the study's actor on this machine, where the study's database lies."""
    here = only_on(ray.get_runtime_context().get_node_id())
    return (
        ray.remote(StudyActor)
        .options(num_cpus=0, scheduling_strategy=here)
        .remote(
            (job.asked or job.experiment).model_dump_json(),
            job.folder.path.resolve(),
            job.space,
            devices,
            job.seconds_before,
            job.trial_seconds,
        )
    )
