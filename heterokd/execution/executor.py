"""Run a study's trials with Ray Tune."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from heterokd.config.experiment import Experiment
from heterokd.errors import SearchError
from heterokd.execution.cache_builders import CacheBuild, start_cache_builds
from heterokd.execution.callbacks import Listener, MlflowSync, TuneCallback
from heterokd.execution.failure_limit import FailureLimit
from heterokd.execution.placement import plan_cluster
from heterokd.execution.ray_connection import connected
from heterokd.execution.ray_settings import ray, tune
from heterokd.execution.run import run_recipe
from heterokd.execution.searcher import StudySearcher, _InOrder, _name_trial
from heterokd.execution.study_sync import FromStore
from heterokd.execution.trial import RunRecipe, StudyActor, run_trial
from heterokd.storage.workspace import Workspace
from heterokd.teachers.cache.locks import hold
from heterokd.tracking.tracker import Tracker


def run_study(
    experiment: Experiment,
    root: Workspace,
    weights: Mapping[str, Path | None],
    *,
    excluded: Mapping[str, str],
    tracker: Tracker,
    address: str | None = None,
    listener: Listener | None = None,
    fillings: Sequence[CacheBuild] = (),
    run: RunRecipe = run_recipe,
    before: float = 0.0,
    question: Experiment | None = None,
) -> dict[str, Any]:
    """Run every trial that the study still wants; the summary at the end.

    Args:
        experiment: the question, resolved.
        root: where state lives.
        weights: by network, the prepared teachers' weights.
        excluded: methods that cannot exist for the pair, with reasons; see `check_experiment`.
        tracker: shows the study, in MLflow and elsewhere.
        address: of a Ray cluster; None starts a local one.
        listener: told of every event.
        fillings: the teachers' caches, built beside the first trials; without one, trials read what is complete.
        run: trains a trial's recipe.
        before: seconds that the search has taken already; they count towards its budget.
        question: what the study was created with, where students were left out of `experiment`.

    Raises:
        SearchError: no trial can run here.
    """
    folder = root.study(experiment.name)
    # From now to the end nobody may delete them, whichever trial reads them when.
    held = [held for filling in fillings if (held := hold(filling.folder)) is not None]
    sync = MlflowSync(tracker, folder)
    try:
        shared = experiment.training.is_shared
        # Tune's own files: snapshots that nothing reads back, on a disk that is not the study's.
        with connected(address, shared=shared), TemporaryDirectory(prefix="heterokd-tune-") as scratch:
            cluster = plan_cluster(experiment)
            if experiment.training.is_shared and run is run_recipe:
                from heterokd.execution.workers import OnWorkers  # with Ray Train, which other searches need not load

                run = OnWorkers(cluster, experiment.search.max_failures)
            here = ray.get_runtime_context().get_node_id()
            # The study's database lies on this machine, so its actor stays here.
            affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
            judge = (
                ray.remote(StudyActor)
                .options(num_cpus=0, scheduling_strategy=affinity)
                .remote(
                    (question or experiment).model_dump_json(),
                    folder.path.resolve(),
                    dict(excluded),
                    cluster.gpus or 1.0,
                    before,
                )
            )
            for trial in folder.trials():
                sync.put(trial)
            trainable = tune.with_parameters(
                run_trial,
                judge=judge,
                root=root if root.url else root.on_node(),
                study=folder.name,
                weights={network: file.resolve() if file else None for network, file in weights.items()},
                threads=max(1, int(cluster.cpus)),
                filled={one.recipe.teacher.network: (one.recipe.training.seed, one.recipe.views) for one in fillings},
                run=run,
            )
            builders = []
            partial = [filling for filling in fillings if not filling.is_complete]
            # Workers that share a training build it together before they begin.
            if partial and not experiment.training.is_shared:
                # Half of the places: the first trials train on what there is, and run the teacher for the rest.
                builders = start_cache_builds(partial, root, cluster, max(1, cluster.parallel // 2))
            deaths = FailureLimit(folder, cluster.parallel)
            tuner = tune.Tuner(
                tune.with_resources(trainable, cluster.trial),
                tune_config=tune.TuneConfig(
                    search_alg=StudySearcher(judge, deaths),
                    scheduler=_InOrder(),
                    num_samples=-1,
                    max_concurrent_trials=cluster.parallel,
                    reuse_actors=True,
                    trial_name_creator=_name_trial,
                    trial_dirname_creator=_name_trial,
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=scratch,
                    verbose=0,
                    stop=deaths,
                    failure_config=tune.FailureConfig(max_failures=experiment.search.max_failures),
                    callbacks=[
                        *([FromStore(root, folder)] if root.url else []),
                        TuneCallback(folder, judge, sync, listener, builders, deaths),
                    ],
                ),
            )
            # It says which of its own result files are missing: all, since the trial folders take their place.
            logging.getLogger("ray.tune").setLevel(logging.ERROR)
            tuner.fit()
            root.fetch_study(folder.name)
            summary: dict[str, Any] = ray.get(judge.summary.remote())
            # In a Ray that outlives this search it would wait for its handles to be collected, with all that it holds.
            ray.kill(judge)
    finally:
        sync.close()
        for one in held:
            one.release()
    folder.write_summary(summary)
    if deaths.are_hopeless:
        tracker.finish(summary, "FAILED")
        raise SearchError(deaths.sentence)
    return summary
