"""search(): an experiment becomes a study. Ray Tune executes; the Optuna study in its actor decides everything.

    driver   Tuner.fit() ── suggest ──> judge (actor: heterokd.study.Study) ── Assignment ──> trial process
             MLflow thread <─ folders ─ trial process: run_recipe(), asks the judge at each rung, returns by itself

Nothing is ever stopped from outside, nothing hangs on a pickled driver state: the study's database and the trial
folders are the truth, and resuming is running again.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from filelock import FileLock, Timeout

from heterokd.cache import hold
from heterokd.cluster import check_address, connected, plan_cluster
from heterokd.config import TEACHER, Experiment
from heterokd.deaths import Deaths
from heterokd.distillation import (
    TeacherReport,
    check_experiment,
    check_files,
    dump_experiment,
    open_splits,
    prepare_teachers,
    run_recipe,
    within_limits,
)
from heterokd.errors import ConfigError, SearchError, StudyError, TrackingError, UserError
from heterokd.filling import Filling, plan_filling, start_filling
from heterokd.pictures import draw_pictures
from heterokd.plan import Following
from heterokd.priors import finished_summaries, warm_starts
from heterokd.ray_settings import ray, tune
from heterokd.remote import FromStore, fetch, keep
from heterokd.report.page import write_report
from heterokd.root import Root, StudyFolder, open_root, write_text
from heterokd.study import Study
from heterokd.teachers import TeacherCard
from heterokd.tracking.labels import dataset_inputs
from heterokd.tracking.runs import StudyRuns
from heterokd.tracking.store import first_line, open_store
from heterokd.tracking.students import log_student, register
from heterokd.trial import Judge, RunRecipe, run_trial
from heterokd.watching import Listener, Progress, Projector

logger = logging.getLogger(__name__)


def _name_trial(trial: Any) -> str:
    """Tune's own names hold the whole configuration, which makes unusable folders."""
    return str(trial.trial_id)


class AskJudge(tune.search.Searcher):  # type: ignore[misc]  # Ray is not fully typed
    """Tune's view of the study: whatever runs next is its suggestion."""

    def __init__(self, judge: Any, deaths: Deaths) -> None:
        super().__init__()
        self.judge = judge
        self.deaths = deaths
        self.numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        """The next assignment, nothing for the moment, or the end."""
        assignment = ray.get(self.judge.next.remote())
        if assignment is None:
            return str(tune.search.Searcher.FINISHED)
        if assignment == "wait":
            return None
        self.numbers[trial_id] = assignment.number
        self.deaths.begin(assignment.number)
        # Its number alone: Tune copies and keeps what it is given; the trial asks the judge for the rest.
        return {"number": assignment.number}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial whose process died more often than `search.max_failures` never told the judge itself."""
        number = self.numbers.pop(trial_id, None)
        if error and number is not None:
            self.deaths.add()
        # Where none can live it is not the trial that failed: it is kept for another start of the search.
        if error and number is not None and not self.deaths.are_hopeless:
            message = "the trial's process died (killed, or out of memory); see Ray's logs of its node"
            ray.get(self.judge.finish.remote(number, "failed", {}, message))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study's database is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study's database is the state."""


class _InOrder(tune.schedulers.FIFOScheduler):  # type: ignore[misc]
    """Tune's own order, without looking through the trials that have ended."""

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """A trial that waits for its place, if there is one."""
        waiting = (trial for trial in tune_controller.get_live_trials() if trial.status == "PENDING")
        return next(waiting, None)


def run_study(
    experiment: Experiment,
    root: Root,
    weights: Mapping[str, Path | None],
    *,
    excluded: Mapping[str, str],
    runs: StudyRuns,
    address: str | None = None,
    listener: Listener | None = None,
    fillings: Sequence[Filling] = (),
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
        runs: the study's projection in MLflow.
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
    projector = Projector(runs, folder)
    try:
        shared = experiment.training.is_shared
        # Tune's own files: snapshots that nothing reads back, on a disk that is not the study's.
        with connected(address, shared=shared), TemporaryDirectory(prefix="heterokd-tune-") as scratch:
            cluster = plan_cluster(experiment)
            if experiment.training.is_shared and run is run_recipe:
                from heterokd.workers import OnWorkers  # with Ray Train, which other searches need not load

                run = OnWorkers(cluster, experiment.search.max_failures)
            here = ray.get_runtime_context().get_node_id()
            # The study's database lies on this machine, so its actor stays here.
            affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
            judge = (
                ray.remote(Judge)
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
                projector.put(trial)
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
                builders = start_filling(partial, root, cluster, max(1, cluster.parallel // 2))
            deaths = Deaths(folder, cluster.parallel)
            tuner = tune.Tuner(
                tune.with_resources(trainable, cluster.trial),
                tune_config=tune.TuneConfig(
                    search_alg=AskJudge(judge, deaths),
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
                        Progress(folder, judge, projector, listener, builders, deaths),
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
        projector.close()
        for one in held:
            one.release()
    folder.write_summary(summary)
    if deaths.are_hopeless:
        runs.finish(summary, "FAILED")
        raise SearchError(deaths.sentence)
    return summary


@dataclass(frozen=True)
class Found:
    """What a search leaves.

    Attributes:
        folder: the study's files, report.html among them.
        summary: standing, winner, scratch and leaders; see `Study.summary`.
        teacher: network, score on val and weights hash of the winner's teacher; of the first one where scratch won.
        uri: the MLflow store.
        model: name and version of the registered winner; None when there is none, or the store did not answer.
    """

    folder: StudyFolder
    summary: dict[str, Any]
    teacher: TeacherCard
    uri: str
    model: tuple[str, str] | None


def search(
    experiment: Experiment,
    root: Root,
    *,
    resume: bool = False,
    address: str | None = None,
    listener: Listener | None = None,
    teacher_progress: TeacherReport | None = None,
) -> Found:
    """Answer an experiment: check it, prepare the teachers, run the study, register the best student, write the page.

    Args:
        experiment: what `load_experiment` returned.
        root: where state lives.
        resume: go on with (or just show) a study of the same name.
        address: of a Ray cluster; None starts a local one.
        listener: told of every event of a trial.
        teacher_progress: told the metrics of each epoch of a teacher's fit, and its network.

    Raises:
        UserError: the input is wrong; nothing has been launched then.
        SearchError: no trial can run here; what was computed is kept.
    """
    folder = root.study(experiment.name)
    fetch(root, folder)
    if folder.experiment_file.exists() and not resume:
        raise StudyError(
            f"{folder.path}: the study {experiment.name!r} exists already; "
            "go on with it (--resume) or give another name (--set name=NEW)"
        )
    asked = experiment
    experiment, candidates = within_limits(asked, root)
    excluded = check_experiment(experiment)
    check_files(experiment)
    check_workers_root(experiment, root, address)
    check_address(address)
    warm = warm_starts(experiment, finished_summaries(experiment, root))
    following = Following(experiment, root, folder, excluded)
    runs = open_runs(experiment, folder, root)
    runs.data = dataset_inputs(experiment.data, open_splits(experiment.data))
    began = time.monotonic()
    prepared = prepare_teachers(experiment, root, progress=teacher_progress)
    following.prepared(time.monotonic() - began)
    weights = {network: teacher.weights for network, teacher in prepared.items()}
    fillings = _fillings(experiment, root, weights)
    folder.path.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        # The question first, as an object, so that a study of another experiment is refused before its file changes.
        Study(asked, folder, excluded=excluded, left_out=candidates.left_out, facts=candidates.facts, warm=warm)
        write_text(folder.experiment_file, dump_experiment(asked))
        runs.close_zombies()
        summary = run_study(
            experiment,
            root,
            weights,
            excluded=excluded,
            runs=runs,
            address=address,
            listener=following.listening(listener),
            fillings=fillings,
            before=time.monotonic() - began,
            question=asked,
        )
        card = prepared[_teacher_of_winner(experiment, summary)].card
        summary |= {"teacher": asdict(card), "teachers": [asdict(one.card) for one in prepared.values()]}
        folder.write_summary(summary)
        following.ended()
        keep(root, folder, patiently=True)
        root.fetch_leaders(folder, summary)
        if not summary["standing"]["finished"]:
            # Tune answers an interrupt by ending its loop in good order: what runs is kept at its last rung.
            runs.finish(summary, "KILLED")
            raise KeyboardInterrupt
        _draw(folder, experiment, root, weights)
        _write_page(folder, experiment, summary, root)
        runs.wait()
        model = _registered(experiment, folder, summary, runs)
        runs.finish(summary)
        following.ended()
        keep(root, folder, patiently=True)
    return Found(folder, summary, card, runs.uri, model)


def _fillings(experiment: Experiment, root: Root, weights: Mapping[str, Path | None]) -> list[Filling]:
    """The caches that trials share, one a teacher; a teacher whose cache cannot be completed runs live."""
    fillings = []
    for network in experiment.teacher.networks:
        filling = plan_filling(experiment.following(network), root, weights[network])
        obstacle = None if filling is None else filling.obstacle
        if obstacle is not None:
            logger.warning("the teacher runs live (%s)", obstacle)
        elif filling is not None:
            fillings.append(filling)
    return fillings


def _teacher_of_winner(experiment: Experiment, summary: Mapping[str, Any]) -> str:
    """The network that the winner followed; the first one where there is no winner, or it followed nobody."""
    first = experiment.teacher.networks[0]
    return str(summary["winner"]["sample"].get(TEACHER, first)) if summary["winner"] else first


def _registered(
    experiment: Experiment, folder: StudyFolder, summary: Mapping[str, Any], runs: StudyRuns
) -> tuple[str, str] | None:
    """Publish the winner as challenger; name and version, or None when there is none or it cannot be published."""
    if summary["winner"] is None:
        return None
    splits = open_splits(experiment.data)
    winner = folder.trial(int(summary["winner"]["number"]))
    try:
        version = register(runs, winner, log_student(runs, winner, splits), splits)
    except TrackingError as error:
        logger.warning("the best student is not registered yet (%s); `heterokd promote` does it later", error)
        return None
    except (UserError, OSError, RuntimeError) as error:
        network = experiment.student.network
        logger.warning("the best student, a %s, is not registered (%s); the study is kept", network, first_line(error))
        return None
    return experiment.registered_model, version


def _draw(folder: StudyFolder, experiment: Experiment, root: Root, weights: Mapping[str, Path | None]) -> None:
    """The study's pictures; what cannot be drawn costs a warning, not the study."""
    try:
        draw_pictures(folder, experiment, root, weights)
    except Exception as error:  # noqa: BLE001  hours of training are behind it
        logger.warning("the study's pictures are not drawn (%s)", first_line(error))


def _write_page(folder: StudyFolder, experiment: Experiment, summary: Mapping[str, Any], root: Root) -> None:
    """The study's page; likewise."""
    try:
        write_report(folder, experiment, summary, root=str(root))
    except Exception as error:  # noqa: BLE001
        again = f"`heterokd report {experiment.name}` writes it anew"
        logger.warning(
            "the study's page is not written (%s); everything else is kept, and %s", first_line(error), again
        )


@contextmanager
def _alone(folder: StudyFolder) -> Iterator[None]:
    """One search at a time in a study's folder.

    Raises:
        StudyError: another process is searching here.
    """
    try:
        with FileLock(folder.path / ".lock", timeout=0):
            yield
    except Timeout:
        raise StudyError(f"{folder.path}: another process is running this study; wait for it, or end it") from None


def check_workers_root(experiment: Experiment, root: Root, address: str | None) -> None:
    """Refuse trainings whose workers would each write into a copy of their own.

    Workers of one training share its trial's folder: the first one writes checkpoints that all go on from. On one
    machine they do so in its working copy of a store; the nodes of a cluster have one each.

    Raises:
        ConfigError: the trainings of a cluster are shared, and the root is a store.
    """
    if root.url is not None and experiment.training.is_shared and address is not None:
        raise ConfigError(
            f"training.workers: the workers of a training share its folder, and of {root} each node has a copy of its "
            "own; give --root a folder that all nodes mount (its plain path, no address), or set training.workers: 1"
        )


def open_runs(experiment: Experiment, folder: StudyFolder, root: Root) -> StudyRuns:
    """A study's projection in MLflow.

    Raises:
        TrackingError: the tracking server does not answer.
    """
    uri = open_store(root, experiment.tracking.uri)
    return StudyRuns(experiment, folder, uri, root.artifacts)


class _Callable(ModuleType):
    """Once this module is imported, `from heterokd import search` gives it, not the function: so it is called."""

    def __call__(self, experiment: Experiment, root: str | Path = "runs", **options: Any) -> Found:
        """See `heterokd.library.search`."""
        return search(experiment, open_root(str(root)), **options)


sys.modules[__name__].__class__ = _Callable
