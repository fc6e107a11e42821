"""Run a study's trials with Ray Tune."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from heterokd.config.experiment import Experiment
from heterokd.errors import SearchError
from heterokd.execution.abandoned import scratch_folder
from heterokd.execution.cache_builders import CacheBuild, start_cache_builds
from heterokd.execution.callbacks import Forwarding, Listener, MlflowSync, RaySummary, TuneCallback
from heterokd.execution.failure_limit import FailureLimit
from heterokd.execution.node_watch import NodeWatch, node_check
from heterokd.execution.parallel import Parallelism, request
from heterokd.execution.placement import plan_cluster
from heterokd.execution.ray_connection import LocalRayError, connected
from heterokd.execution.ray_settings import only_on, ray, tune
from heterokd.execution.ray_watch import RayLost, RayWatch, watching
from heterokd.execution.run import RunRecipe, run_recipe
from heterokd.execution.search_log import search_log
from heterokd.execution.search_metrics import SearchMetrics
from heterokd.execution.searcher import InOrder, StudySearcher, trial_name
from heterokd.execution.study_actor import StudyActor
from heterokd.execution.study_sync import trial_events
from heterokd.execution.this_node import NodeCheck
from heterokd.execution.trial import SharedViews, TrialJob, run_trial
from heterokd.execution.trial_deaths import TrialDeaths
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.use_locks import shared_lock
from heterokd.storage.workspace import Workspace
from heterokd.study.search_space import SearchSpace
from heterokd.study.summary import StudySummary
from heterokd.tracking.tracker import Tracker

logger = logging.getLogger(__name__)

LOCAL_STARTS = 4
"""Maximum number of local Rays of a search, of which all but the first replace a Ray whose processes died."""

RESTARTS = 100
"""Maximum restarts of the study's actor: more than faults cause, and fewer than a study that always crashes would."""


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

    def for_trials(self, check: NodeCheck | None) -> TrialJob:
        """Return the arguments of trials; paths are valid on every node."""
        return TrialJob(
            workspace=self.workspace if self.workspace.url else self.workspace.on_node(),
            study=self.folder.name,
            weights={network: file.resolve() if file else None for network, file in self.weights.items()},
            check=check,
            shared_views={
                cache.recipe.teacher.network: SharedViews(cache.recipe.training.seed, cache.recipe.views, cache.signals)
                for cache in self.caches
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
    folder = job.folder
    # The caches must not be deleted before the search ends, whenever trials read them.
    held = [lock for cache in job.caches if (lock := shared_lock(cache.folder)) is not None]
    sync = MlflowSync(tracker, folder)
    # A local Ray whose processes die is started again, unless it was started by the caller.
    starts = 1 if address is not None or ray.is_initialized() else LOCAL_STARTS
    ended: _Ended | RayLost | LocalRayError
    try:
        for left in reversed(range(starts)):
            try:
                ended = _run_on_ray(job, sync, address, listener, run)
                break
            except (RayLost, LocalRayError) as lost:
                ended = lost
                search_log.info("Ray was lost", exc_info=lost)
                if left:
                    logger.warning("%s; the search continues on a new local Ray", lost)
                job = replace(job, seconds_before=0.0)
    finally:
        sync.close()
        for lock in held:
            lock.release()
    if not isinstance(ended, _Ended):
        tracker.finish(None, "KILLED")
        raise SearchError(_lost_sentence(ended, folder, address)) from ended
    summary = ended.summary
    summary.write(folder)
    if ended.failure is not None:
        tracker.finish(summary, "FAILED")
        raise SearchError(ended.failure)
    return summary


@dataclass(frozen=True)
class _Ended:
    """End of Ray Tune's loop: the study's summary, and the reason why the search cannot go on, or None."""

    summary: StudySummary
    failure: str | None


def _run_on_ray(
    job: SearchJob, sync: MlflowSync, address: str | None, listener: Listener | None, run: RunRecipe
) -> _Ended:
    """Run the study's trials on a Ray, see `run_study`.

    Raises:
        RayLost: a process of Ray died, without which nothing goes on.
        LocalRayError: a local Ray did not start.
    """
    experiment, workspace, folder = job.experiment, job.workspace, job.folder
    is_shared = experiment.training.is_shared
    # Tune's snapshots, which nothing reads, are kept off the study's disk.
    with (
        RayWatch(lambda lost: _lost_sentence(lost, folder, address)) as watch,
        connected(address, shared=is_shared),
        watching(watch, address),
        scratch_folder("heterokd-tune-") as scratch,
        closing(trial_events(workspace, folder)) as events,
    ):
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
        plan = Parallelism(experiment, cluster)
        check = None if address is None else node_check(experiment, workspace)
        nodes = NodeWatch(actor, check, plan, failures)
        nodes.wait()
        searcher = StudySearcher(actor, failures, TrialDeaths(folder, experiment.search.max_failures), plan)
        metrics = SearchMetrics(plan)
        forwarding = Forwarding(
            folder, events, sync, lambda: RaySummary(actor.summary.remote(searcher.running)), listener, metrics.update
        )
        config = tune.RunConfig(
            name="tune",
            storage_path=str(scratch),
            verbose=0,
            stop=failures,
            failure_config=tune.FailureConfig(max_failures=experiment.search.max_failures),
            callbacks=[TuneCallback(folder, searcher, forwarding, watch, builders, nodes, metrics.add_failure)],
        )
        trainable = tune.with_parameters(run_trial, actor=actor, job=job.for_trials(check), run=run)
        tuner = tune.Tuner(
            tune.with_resources(trainable, request),
            tune_config=_tune_config(searcher),
            run_config=config,
        )
        # Tune warns that its result files are missing; trial folders replace them.
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        tuner.fit()
        forwarding.close()
        workspace.fetch_study(folder.name)
        summary: StudySummary = ray.get(actor.summary.remote())
        interrupted: dict[int, str] = ray.get(actor.interrupted.remote())
        # In a Ray that outlives this search, the actor would live until its handles are collected.
        ray.kill(actor)
    failure = failures.sentence if failures.is_reached else _interruptions(interrupted, folder)
    return _Ended(summary, failure)


def _lost_sentence(lost: RayLost | LocalRayError, folder: StudyFolder, address: str | None) -> str:
    where = "" if address is None else f" (--address {address}), so start the cluster again"
    return (
        f"{folder.path}: {lost}{where}; all results are kept, details are in {folder.log_file}, and --resume continues "
        "the search"
    )


def _interruptions(interrupted: Mapping[int, str], folder: StudyFolder) -> str | None:
    """Format the message of a search whose trials were interrupted by faults that are not their own; None if none."""
    if not interrupted:
        return None
    (reason, _), numbers = Counter(interrupted.values()).most_common(1)[0], sorted(interrupted)
    named = f"trial {numbers[0]} was" if len(numbers) == 1 else f"trials {', '.join(map(str, numbers))} were"
    return (
        f"{folder.path}: {named} interrupted by a fault of the machine or of Ray ({reason}); all results are kept, "
        f"details are in {folder.log_file}, and --resume continues the search"
    )


def _tune_config(searcher: StudySearcher) -> tune.TuneConfig:
    return tune.TuneConfig(
        search_alg=searcher,
        scheduler=InOrder(),
        num_samples=-1,
        reuse_actors=True,
        trial_name_creator=trial_name,
        trial_dirname_creator=trial_name,
    )


def start_actor(job: SearchJob, devices: float) -> ray.actor.ActorHandle:
    """Start the study's actor on this machine, where the study's database lies."""
    here = only_on(ray.get_runtime_context().get_node_id())
    actor = (
        ray.remote(StudyActor)
        # A call that was not answered is repeated by the restarted actor.
        .options(num_cpus=0, scheduling_strategy=here, max_restarts=RESTARTS, max_task_retries=-1)
        .remote(
            (job.asked or job.experiment).model_dump_json(),
            job.folder.path.resolve(),
            job.space,
            devices,
            job.trial_seconds,
        )
    )
    ray.get(actor.spent.remote(job.seconds_before))
    return actor
