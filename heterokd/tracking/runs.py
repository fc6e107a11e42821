"""StudyRuns: sync the MLflow runs of a study with its folders."""

from __future__ import annotations

import hashlib
import logging
import socket
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Metric, Param, Run
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from heterokd.config.experiment import Experiment
from heterokd.errors import TrackingError, UserError, without_password
from heterokd.storage.machine_load import under_load
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.summary import StudySummary
from heterokd.tracking.labels import (
    TEXT_LIMIT,
    common_tags,
    dataset_inputs,
    estimate_metrics,
    is_alive,
    run_link,
    study_description,
    study_id,
    study_params,
    study_result,
)
from heterokd.tracking.relocate import check_location
from heterokd.tracking.store import answering, first_line, open_store, pages, probe, sent_once
from heterokd.tracking.tracker import Status
from heterokd.tracking.trial_runs import ORDER, StudyRun, TrialRuns, runs_of
from heterokd.tracking.ui_views import write_view
from heterokd.training.data import open_splits

logger = logging.getLogger(__name__)

PATIENCE = 180.0
"""Longest wait for a server at the end of a study, in seconds; a restart takes a minute or two on an idle machine."""


FINISH_PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds between the attempts to close a study's runs."""


WRITTEN = "mlflow.heterokd.description"
"""Tag of an MLflow experiment: SHA-256 of the last description that a study wrote. MLflow hides tags of `mlflow.`"""


class StudyRuns:
    """MLflow runs of a study; a `Tracker`. The store is not accessed before the first call.

    Methods that log return whether everything was stored. If the store does not answer, they log a warning, once until
    it answers again, and return False; the next call fills in what is missing.

    Args:
        experiment: the study's experiment.
        study_folder: the study's folder.
        uri: URI that `open_store` returned.
        artifacts: folder of the artifacts; None leaves it to the tracking server.
        data: train and val, see `dataset_inputs`.
        client: client of the store; None makes one.

    Attributes:
        experiment_id: id of the MLflow experiment, once the store was accessed.
        is_new: whether this object created the study's run.
    """

    def __init__(
        self,
        experiment: Experiment,
        study_folder: StudyFolder,
        uri: str,
        artifacts: Path | None,
        data: Sequence[DatasetInput] = (),
        client: MlflowClient | None = None,
    ) -> None:
        self.experiment = experiment
        self.folder = study_folder
        self.uri = uri
        self.artifacts = artifacts if uri.startswith("sqlite") else None
        self.data = data
        self.client = client or MlflowClient(uri)
        self.is_new = False
        self.experiment_id = ""
        self._trials: TrialRuns | None = None
        self._is_silent = False

    @cached_property
    def study_id(self) -> str:
        """Id of the study, unique in the store."""
        return study_id(self.folder)

    def sync(self, trial: TrialFolder) -> bool:
        """Log what is new in a trial's folder; False if the store does not answer (the next call catches up)."""
        return self._try(lambda trials: trials.sync(trial))

    def finish(
        self, summary: StudySummary | None, status: Status = "FINISHED", pauses: Sequence[float] = FINISH_PAUSES
    ) -> bool:
        """Sync all trials, then close the study's run and, as KILLED, those of trials that have not ended.

        Args:
            summary: the study's summary; None if its trials are not a search.
            status: status of the study's run.
            pauses: seconds between the attempts if the server answers with errors.
        """
        for seconds in pauses:
            if self._try(lambda trials: self._finish(trials, summary, status)):
                return True
            if not self.uri.startswith("http") or not self.answers():
                return False
            time.sleep(seconds)  # the server is there but refused: the study's end is logged by no later call
        return self._try(lambda trials: self._finish(trials, summary, status))

    def link(self, trial: TrialFolder) -> bool:
        """Link the study's run to a trial that no search has chosen."""
        return self._try(lambda trials: _link(trials.study, trials.open(trial).id, trial.number))

    def answers(self) -> bool:
        """Whether the tracking server answers; a database always does."""
        try:
            if self.uri.startswith("http"):
                probe(self.uri)
        except TrackingError:
            return False
        return True

    def wait(self, seconds: float = PATIENCE) -> bool:
        """Wait for a server that restarts; return whether it answers."""
        began, most = time.monotonic(), under_load(seconds)
        if not self.answers():
            logger.warning("MLflow at %s does not answer; waiting %.0f s for it", without_password(self.uri), most)
        while not (there := self.answers()) and time.monotonic() - began < most:
            time.sleep(1)
        return there

    def close_zombies(self) -> int:
        """Close, as KILLED, the RUNNING runs whose process on this machine is gone; return their number."""
        closed: list[str] = []
        self._try(lambda trials: closed.extend(_close_zombies(self.client)))
        for run in self._trials.known.values() if self._trials else ():
            if run.id in closed:
                run.status = None
        return len(closed)

    def run_id(self, trial: TrialFolder) -> str:
        """Sync a trial; return the id of its run.

        Raises:
            TrackingError: the store does not answer.
        """
        with answering(self.uri):
            trials = self._connected()
            trials.sync(trial)
            return trials.open(trial).id

    @property
    def study_run_id(self) -> str:
        """Id of the study's run, which is created if it is missing.

        Raises:
            TrackingError: the store does not answer.
        """
        with answering(self.uri):
            return self._connected().study.id

    def _try(self, action: Callable[[TrialRuns], object]) -> bool:
        try:
            if self.uri.startswith("http"):
                probe(self.uri)
            action(self._connected())
        except (MlflowException, SQLAlchemyError, OSError, UserError) as error:
            if isinstance(error, MlflowException | SQLAlchemyError):
                # A request may have been stored without an answer: read the state again.
                self._trials = None
            if not self._is_silent:
                logger.warning(
                    "MLflow at %s is not up to date (%s); the results are kept in %s, and logged when it works again",
                    without_password(self.uri),
                    first_line(error),
                    self.folder.path,
                )
            self._is_silent = True
            return False
        self._is_silent = False
        return True

    def _connected(self) -> TrialRuns:
        """Find or create the MLflow experiment, the study's run and the trials' runs."""
        if self._trials is not None:
            return self._trials
        self.experiment_id = self._mlflow_experiment()
        parent, found = "", dict[int, Run]()
        for run in runs_of(self.client, self.experiment_id, self.study_id):
            tags = run.data.tags
            if tags.get("heterokd.kind") == "study":
                parent = run.info.run_id
            elif tags.get("heterokd.kind") == "trial" and int(tags["heterokd.trial"]) not in found:
                found[int(tags["heterokd.trial"])] = run
        study = StudyRun(
            self.client,
            self.experiment,
            self.folder,
            self.data,
            self.study_id,
            self.experiment_id,
            parent or self._create_run(),
        )
        self._trials = TrialRuns(study, found)
        return self._trials

    def _create_run(self) -> str:
        self.is_new = True
        tags = {
            **common_tags("study", self.experiment.name, self.study_id),
            "heterokd.task": self.experiment.data.task,
            "heterokd.metric": self.experiment.metric,
            ORDER: "final",
            "mlflow.note.content": study_description(self.experiment),
        }
        with sent_once():
            created = self.client.create_run(self.experiment_id, run_name=self.experiment.name, tags=tags)
        run_id = str(created.info.run_id)
        params = study_params(self.experiment)
        self.client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])
        if self.data:
            self.client.log_inputs(run_id, list(self.data))
        return run_id

    def _mlflow_experiment(self) -> str:
        name = self.experiment.experiment_name
        location = self.artifacts.resolve().as_uri() if self.artifacts is not None else None
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                experiment_id: str = self.client.create_experiment(name, artifact_location=location)
                self.client.set_experiment_tag(experiment_id, "mlflow.note.content", study_description(self.experiment))
            except MlflowException:
                # Another driver created it first.
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found is not None:
            if found.lifecycle_stage != "active":
                raise TrackingError(
                    f"tracking.experiment: the MLflow experiment {name!r} was deleted; restore it with "
                    f"`mlflow experiments restore --experiment-id {found.experiment_id}`, or choose another name"
                )
            if self.artifacts is not None:
                check_location(found.artifact_location, self.artifacts, self.folder.path, self.study_id)
            experiment_id = found.experiment_id
        self.client.set_experiment_tag(experiment_id, "mlflow.experiment.primaryMetric.name", self.experiment.metric)
        # Open the page for trained models, not the page for chat agents.
        self.client.set_experiment_tag(experiment_id, "mlflow.experimentKind", "custom_model_development")
        return experiment_id

    def _finish(self, trials: TrialRuns, summary: StudySummary | None, status: Status) -> None:
        for trial in self.folder.trials():
            trials.sync(trial)
        trials.kill_unfinished()
        trials.remove_doubles()
        study = trials.study
        winner = None if summary is None else summary.winner
        if summary is not None and winner is not None and winner.number in trials.known:
            self._log_best(study.id, winner, len(trials.known))
            trials.rank(summary)
            _link(study, trials.known[winner.number].id, winner.number)
        if summary is not None and summary.failing_nodes:
            named = "; ".join(f"{address}: {reason}" for address, reason in summary.failing_nodes.items())
            study.tag(study.id, {"heterokd.failing_nodes": named})
        if summary is not None and summary.changes:
            study.tag(study.id, {"heterokd.changes": " ".join(summary.changes)})
        files = (self.folder.experiment_file, self.folder.changes_file, self.folder.report, self.folder.summary_file)
        for file in files:
            if file.exists():
                self.client.log_artifact(study.id, str(file))
        if self.folder.pictures.is_dir():
            self.client.log_artifacts(study.id, str(self.folder.pictures), "pictures")
        self.client.set_terminated(study.id, status)
        view = write_view(self.client, self.client.get_run(study.id))
        if summary is not None and study_result(summary):
            self._describe(trials, summary, view)

    def _describe(self, trials: TrialRuns, summary: StudySummary, view: str | None) -> None:
        """Write result and links to the descriptions of the study's run and of the MLflow experiment.

        MLflow's plain page of an experiment has no columns for metrics, and shows the first line of its description.
        """
        study, winner = trials.study, summary.winner
        links = []
        if winner is not None and winner.number in trials.known:
            links.append(run_link("best student", self.experiment_id, trials.known[winner.number].id))
        if view is not None:
            links.append(f"[trials, best first](#/experiments/{self.experiment_id}/runs?viewStateShareKey={view})")
        if self.folder.report.exists():
            links.append(run_link("page", self.experiment_id, study.id, self.folder.report.name))
        text = study_description(self.experiment, study_result(summary), links)[:TEXT_LIMIT]
        study.tag(study.id, {"mlflow.note.content": text})
        # The user may have written another description of the experiment, which is kept.
        tags = self.client.get_experiment(self.experiment_id).tags
        note = tags.get("mlflow.note.content")
        if note in (None, study_description(self.experiment)) or _digest(note) == tags.get(WRITTEN):
            self.client.set_experiment_tag(self.experiment_id, "mlflow.note.content", text)
            self.client.set_experiment_tag(self.experiment_id, WRITTEN, _digest(text))

    def _log_best(self, run_id: str, winner: RankedConfig, trainings: int) -> None:
        """Log the winner's mean and interval after a number of trainings: of several values MLflow shows the last."""
        known, now = self.client.get_run(run_id).data.metrics, int(time.time() * 1000)
        found = estimate_metrics("best", self.experiment.metric, winner)
        changed = [Metric(key, value, now, trainings) for key, value in found.items() if known.get(key) != value]
        if changed:
            self.client.log_batch(run_id, metrics=changed)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _link(study: StudyRun, best_run_id: str, number: int) -> None:
    study.tag(study.id, {"heterokd.best_run_id": best_run_id, "heterokd.best_trial": str(number)})


def open_runs(experiment: Experiment, folder: StudyFolder, root: Workspace) -> StudyRuns:
    """Open the MLflow runs of a study.

    Raises:
        TrackingError: the store does not answer, or cannot be used.
    """
    inputs = dataset_inputs(experiment.data, open_splits(experiment.data))
    return StudyRuns(experiment, folder, open_store(root, experiment.tracking.uri), root.artifacts, inputs)


def _close_zombies(client: MlflowClient) -> list[str]:
    found = pages(lambda token: client.search_experiments(max_results=1000, page_token=token))
    experiments = [experiment.experiment_id for experiment in found]
    chosen = f"attributes.status = 'RUNNING' and tags.`heterokd.host` = '{socket.gethostname()}'"
    running = pages(lambda token: client.search_runs(experiments, chosen, max_results=1000, page_token=token))
    dead = [run.info.run_id for run in running if not is_alive(run.data.tags)]
    for run_id in dead:
        client.set_terminated(run_id, "KILLED")
    return dead
