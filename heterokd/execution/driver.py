"""Search an experiment: check, prepare teachers, run the study, register the winner, write the report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from heterokd.config.experiment import TEACHER, Experiment
from heterokd.config.reading import dump_experiment
from heterokd.errors import StudyError, TrackingError, UserError
from heterokd.execution.cache_builders import CacheBuild
from heterokd.execution.callbacks import Listener
from heterokd.execution.check import check_experiment, check_files, within_limits
from heterokd.execution.executor import SearchJob, run_study
from heterokd.execution.node_task import Tasks, tasks_on
from heterokd.execution.pictures import draw_study
from heterokd.execution.placement import plan_cluster
from heterokd.execution.planning.plan_record import PlanRecorder
from heterokd.execution.prepare import prepare_teachers, verified_cache
from heterokd.execution.ray_connection import check_address, connected
from heterokd.execution.search_log import faults_explained, logged_to, search_log
from heterokd.execution.study_sync import download_study, upload_study
from heterokd.report.page import write_report
from heterokd.report.study_data import read_study
from heterokd.storage.files import write_text
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.workspace import Workspace
from heterokd.students.given_weights import with_given_weights
from heterokd.students.registry import create_model, log_student, register, remove_pending
from heterokd.students.registry_lock import locked_model
from heterokd.study.known_scratch import weak_teachers
from heterokd.study.plugins import check_plugins
from heterokd.study.search_result import SearchResult
from heterokd.study.search_space import open_space
from heterokd.study.seed_noise import noise_prior
from heterokd.study.storage import StudyFacts
from heterokd.study.stored_question import as_stored, changed_space
from heterokd.study.summary import StudySummary
from heterokd.study.warm_start import AUTO, NOTHING_SIMILAR, other_summaries, warm_start
from heterokd.teachers.prepare import TeacherReport
from heterokd.tracking.runs import StudyRuns, open_runs
from heterokd.tracking.store import answering, first_line, quiet
from heterokd.tracking.tracker import with_others
from heterokd.training.data import fetch_files, open_splits

logger = logging.getLogger(__name__)


def search(
    experiment: Experiment,
    root: Workspace,
    *,
    resume: bool = False,
    address: str | None = None,
    listener: Listener | None = None,
    teacher_progress: TeacherReport | None = None,
) -> SearchResult:
    """Search an experiment: check it, prepare the teachers, run the study, register the winner, write the report.

    Args:
        experiment: what `load_experiment` returned.
        root: where state lives.
        resume: resume a study of the same name, or return the result of a finished one. Its methods, students, domains
            and budget may have changed.
        address: address of a Ray cluster; None starts a local Ray.
        listener: called with every event of a trial.
        teacher_progress: called with the metrics of each epoch of a teacher's fit, and the teacher's network.

    Raises:
        UserError: the input is wrong; nothing has been started then.
        SearchError: no trial can run here, or the machine or Ray failed; what was computed is kept.
    """
    folder = root.study(experiment.name)
    download_study(root, folder)
    if not resume:
        root.check_new(experiment.name)
    asked = as_stored(with_given_weights(experiment, root), folder)
    experiment, candidates = within_limits(asked, root)
    excluded = check_experiment(experiment)
    change = changed_space(experiment, folder, excluded)
    check_plugins(experiment, excluded)
    check_files(experiment, root)
    check_address(address)
    check_cluster(experiment, address)
    if address in (None, "local"):
        fetch_files(open_splits(experiment.data))
    splits = open_splits(experiment.data)
    warm = warm_start(experiment, root, len(splits.val), splits.num_classes)
    prior = noise_prior(len(splits.val), other_summaries(experiment, root))
    plan_recorder = PlanRecorder(experiment, folder)
    runs = open_runs(experiment, folder, root)
    tracker = with_others(runs, experiment, folder)
    with logged_to(folder), faults_explained(folder):
        if change is not None:
            logger.warning(change)
        began = time.monotonic()
        with tasks_on(experiment, root, address) as tasks:
            prepared = prepare_teachers(experiment, root, teacher_progress, tasks)
            plan_recorder.prepared(time.monotonic() - began)
            weak = weak_teachers([teacher.card for teacher in prepared.values()], experiment, root)
            if weak is not None:
                logger.warning(weak)
            weights = {network: teacher.weights for network, teacher in prepared.items()}
            caches = _cache_builds(experiment, root, weights, tasks)
        folder.path.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            # First the database: a study that another process has created meanwhile is refused before a file changes.
            facts = StudyFacts(excluded, candidates.left_out, candidates.costs, warm, prior=prior)
            space = open_space(asked, folder, facts)
            write_text(folder.experiment_file, dump_experiment(asked))
            search_log.info("resumed" if resume else "started")
            if experiment.search.warm_start_from == AUTO and not warm.studies:
                search_log.info(NOTHING_SIMILAR)
            runs.close_zombies()
            _remove_pending(runs)
            summary = run_study(
                SearchJob(
                    experiment=experiment,
                    workspace=root,
                    space=space,
                    asked=asked,
                    weights=weights,
                    caches=caches,
                    seconds_before=time.monotonic() - began,
                    trial_seconds=plan_recorder.trial_seconds,
                ),
                tracker,
                address=address,
                listener=listener,
            )
            card = prepared[_teacher_of_winner(experiment, summary)].card
            summary = replace(summary, teacher=card, teachers=tuple(teacher.card for teacher in prepared.values()))
            summary.write(folder)
            plan_recorder.ended()
            upload_study(root, folder)
            root.fetch_leaders(folder)
            result = SearchResult(folder, summary, card, runs.uri)
            if not result.finished:
                # Tune ends its loop in order on an interrupt: running trials keep their last checkpoint.
                search_log.info("interrupted")
                tracker.finish(summary, "KILLED")
                return result
            _report(folder, experiment, root, weights, address)
            runs.wait()
            model = _registered(experiment, folder, summary, runs)
            tracker.finish(summary, "FAILED" if summary.has_failed else "FINISHED")
            plan_recorder.ended()
            upload_study(root, folder)
        search_log.info("finished")
        return replace(result, model=model)


def check_cluster(experiment: Experiment, address: str | None) -> None:
    """Check that a cluster takes this process, and has or may get room for trials, before teachers are fitted.

    Raises:
        ConfigError: it refuses this process (token, versions, not on its nodes), or no trial fits.
    """
    if address not in (None, "local"):
        with connected(address):
            plan_cluster(experiment)


def _cache_builds(
    experiment: Experiment, root: Workspace, weights: Mapping[str, Path | None], tasks: Tasks | None
) -> list[CacheBuild]:
    """Return the cache to build of each teacher; a teacher whose cache cannot be built runs live."""
    caches = []
    for network in experiment.teacher.networks:
        build = verified_cache(experiment.for_teacher(network), root, weights[network], tasks)
        obstacle = None if build is None else build.obstacle
        if obstacle is not None:
            logger.warning("the teacher runs live (%s)", obstacle)
        elif build is not None:
            caches.append(build)
    return caches


def _teacher_of_winner(experiment: Experiment, summary: StudySummary) -> str:
    """Return the winner's teacher; the first teacher if there is no winner, or it has none."""
    first = experiment.teacher.networks[0]
    return first if summary.winner is None else str(summary.winner.sample.get(TEACHER, first))


def _registered(
    experiment: Experiment, folder: StudyFolder, summary: StudySummary, runs: StudyRuns
) -> tuple[str, str] | None:
    """Register the winner as challenger; return name and version, or None."""
    if summary.winner is None or summary.has_failed:
        return None
    splits = open_splits(experiment.data)
    winner = folder.trial(summary.winner.number)
    try:
        student = log_student(runs, winner, splits)
        with answering(runs.uri), quiet():
            create_model(runs)
            # A promotion or a rollback of the same model, in any workspace, ends first.
            with locked_model(runs.client, experiment.registered_model):
                version = register(runs, winner, student, splits)
    except TrackingError as error:
        logger.warning("the best student is not registered yet (%s); `heterokd promote` does it later", error)
        return None
    except (UserError, OSError, RuntimeError) as error:
        network = experiment.student.network
        logger.warning("the best student, a %s, is not registered (%s); the study is kept", network, first_line(error))
        return None
    return experiment.registered_model, version


def _remove_pending(runs: StudyRuns) -> None:
    """Delete the models that a killed driver did not finish to log; a store that does not answer is asked next time."""
    with suppress(TrackingError):
        remove_pending(runs)


def _report(
    folder: StudyFolder,
    experiment: Experiment,
    root: Workspace,
    weights: Mapping[str, Path | None],
    address: str | None = None,
) -> None:
    """Draw the study's figures and write report.html; log a warning on failure, since the trainings must be kept."""
    try:
        with tasks_on(experiment, root, address) as tasks:
            draw_study(folder, experiment, root, weights, tasks)
    except Exception as error:  # noqa: BLE001  see above
        logger.warning("the study's figures are not drawn (%s)", first_line(error))
    try:
        write_report(read_study(folder, experiment), root=str(root))
    except Exception as error:  # noqa: BLE001  see above
        again = f"`heterokd report {experiment.name}` regenerates it"
        logger.warning("the report is not written (%s); everything else is kept, and %s", first_line(error), again)


@contextmanager
def _locked(folder: StudyFolder) -> Iterator[None]:
    """Hold the lock of a study's folder.

    Raises:
        StudyError: another process runs this study.
    """
    try:
        with FileLock(folder.path / ".lock", timeout=0):
            yield
    except Timeout:
        raise StudyError(f"{folder.path}: another process is running this study; wait for it, or end it") from None
