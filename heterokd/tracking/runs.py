"""StudyRuns: the runs of one study, brought up to its folders."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from heterokd.config.experiment import Experiment
from heterokd.config.recipe import Recipe
from heterokd.errors import TrackingError, UserError
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus
from heterokd.tracking.labels import (
    TEXT_LIMIT,
    common_tags,
    is_alive,
    process_tags,
    study_description,
    study_id,
    study_params,
    study_result,
    trial_description,
    trial_params,
)
from heterokd.tracking.store import answering, first_line, pages, probe, shown
from heterokd.tracking.tracker import Status
from heterokd.tracking.ui_views import write_view

logger = logging.getLogger(__name__)

SCALARS = ("student/", "teacher/", "test/")
"""Prefixes of metrics that do not change over epochs: logged once, at step 0, where MLflow draws a bar."""

PATIENCE = 180.0
"""Seconds that the end of a study waits for a server: one that is started again takes a minute or two."""

BATCH = 900
"""Metrics of a call; MLflow takes a thousand, and a few scalars come on top."""

_MLFLOW = {
    TrialStatus.RUNNING: "RUNNING",
    TrialStatus.COMPLETE: "FINISHED",
    TrialStatus.PRUNED: "FINISHED",
    TrialStatus.DIVERGED: "FAILED",
    TrialStatus.FAILED: "FAILED",
}
"""MLflow's status of a run; that of a paused trial is left alone until the search ends."""


@dataclass
class _TrialRun:
    """What is known of one trial's run."""

    id: str
    status: TrialStatus | None = None
    epoch: int = 0
    keys: set[str] = field(default_factory=set)


class StudyRuns:
    """The runs of one study. Nothing is asked of the store before the first call.

    Calls that log return whether the store took it. When it does not answer, they say so once in the log and return
    False; the next call fills in what is missing.

    Args:
        experiment: the question.
        study_folder: its files, the truth.
        uri: what `open_store` returned.
        artifacts: folder of the artifacts; None leaves it to the tracking server.
        data: what the runs are trained and selected on, see `dataset_inputs`.

    Attributes:
        experiment_id: of the MLflow experiment, once the store was asked.
        is_new: whether the store had nothing of this study and this object made its run.
    """

    def __init__(
        self,
        experiment: Experiment,
        study_folder: StudyFolder,
        uri: str,
        artifacts: Path | None,
        data: Sequence[DatasetInput] = (),
    ) -> None:
        self.experiment = experiment
        self.folder = study_folder
        self.uri = uri
        self.artifacts = artifacts if uri.startswith("sqlite") else None
        self.data = data
        self.client = MlflowClient(uri)
        self.is_new = False
        self.experiment_id = ""
        self._parent = ""
        self._is_running = False
        self._runs: dict[int, _TrialRun] = {}
        self._found: dict[int, Run] = {}
        self._is_silent = False

    @cached_property
    def study_id(self) -> str:
        """Names this study in a store that others share."""
        return study_id(self.folder)

    def sync(self, trial: TrialFolder) -> bool:
        """Bring a trial's run up to its folder; False if the store does not answer (the next call catches up)."""
        return self._try(lambda: self._project(trial))

    def finish(self, summary: Mapping[str, Any], status: Status = "FINISHED") -> bool:
        """Catch up on every trial, then close the study's run (and, as KILLED, the trials that are not done).

        Args:
            summary: what summary.json says; of it `winner.number` and `winner.mean` are read.
            status: of the study's run.
        """
        return self._try(lambda: self._finish(summary, status))

    def answers(self) -> bool:
        """Whether there is somebody to log to; a file always is."""
        try:
            if self.uri.startswith("http"):
                probe(self.uri)
        except TrackingError:
            return False
        return True

    def wait(self, seconds: float = PATIENCE) -> bool:
        """Give a server that is away for a moment time to come back; whether it answers."""
        ends = time.monotonic() + seconds
        if not self.answers():
            logger.warning("MLflow at %s does not answer; waiting %.0f s for it", shown(self.uri), seconds)
        while not (there := self.answers()) and time.monotonic() < ends:
            time.sleep(1)
        return there

    def close_zombies(self) -> int:
        """Close, as KILLED, every RUNNING run of this store whose process on this machine is gone.

        Returns:
            How many were closed.
        """
        closed: list[str] = []
        self._try(lambda: closed.extend(_close_zombies(self.client)))
        for run in self._runs.values():
            if run.id in closed:
                run.status = None
        return len(closed)

    def run_id(self, trial: TrialFolder) -> str:
        """The MLflow run of a trial, brought up to its folder.

        Raises:
            TrackingError: the store does not answer.
        """
        with answering(self.uri):
            self._connect()
            self._project(trial)
            return self._open(trial).id

    # --- one trial

    def _try(self, action: Callable[[], object]) -> bool:
        try:
            if self.uri.startswith("http"):
                probe(self.uri)
            self._connect()
            action()
        except (MlflowException, SQLAlchemyError, OSError, UserError) as error:
            if isinstance(error, MlflowException | SQLAlchemyError):
                # It may have kept what it did not answer for: what is there is asked of the store again.
                self._parent, self._runs, self._is_running = "", {}, False
            if not self._is_silent:
                logger.warning(
                    "MLflow at %s is not up to date (%s); the results are safe in %s and logged as soon as it can be",
                    shown(self.uri),
                    first_line(error),
                    self.folder.path,
                )
            self._is_silent = True
            return False
        self._is_silent = False
        return True

    def _project_all(self) -> None:
        for trial in self.folder.trials():
            self._project(trial)

    def _project(self, trial: TrialFolder) -> None:
        if not (trial.path / "recipe.yaml").exists():
            return  # its process is just making the folder
        snapshot = trial.snapshot
        status = snapshot.status
        run = self._open(trial)
        reports = [report for report in trial.metrics() if report["epoch"] > run.epoch]
        if run.status == status and not reports:
            return
        if not status.is_final and not self._is_running:
            self.client.update_run(self._parent, status="RUNNING")
            self._tag(self._parent, process_tags())
            self._is_running = True
        if run.status != status and not status.is_final:
            # First seen, or going on after it was pruned or interrupted.
            self.client.update_run(run.id, status="RUNNING")
            self._tag(run.id, {**process_tags(), "heterokd.pruned": "false", "heterokd.state": status})
            run.status = status
        self._log(run, reports, _scalars(snapshot))
        if run.status != status:
            self._end(run, trial, snapshot)

    def _log(self, run: _TrialRun, reports: Sequence[Mapping[str, float]], scalars: Mapping[str, float]) -> None:
        """Reports, in as few calls as MLflow takes, and what is new of the scalars; an epoch is there whole or not."""
        now = int(time.time() * 1000)
        waiting: list[Metric] = []
        for report in reports:
            epoch, once = int(report["epoch"]), {key: value for key, value in report.items() if key.startswith(SCALARS)}
            metrics = [
                Metric(key, float(value), now, epoch)
                for key, value in report.items()
                if key != "epoch" and key not in once
            ]
            if len(waiting) + len(metrics) > BATCH:
                self.client.log_batch(run.id, metrics=waiting)
                waiting = []
            waiting += metrics
            run.epoch = epoch
            scalars = {**once, **scalars}
        for key, value in scalars.items():
            if key.startswith(SCALARS) and key not in run.keys:
                waiting.append(Metric(key, float(value), now, 0))
                run.keys.add(key)
        if waiting:
            self.client.log_batch(run.id, metrics=waiting)

    def _end(self, run: _TrialRun, trial: TrialFolder, snapshot: TrialSnapshot) -> None:
        """Artifacts first, the status last: it marks that everything is there."""
        status = snapshot.status
        tags = {"heterokd.pruned": str(status == TrialStatus.PRUNED).lower(), "heterokd.state": str(status)}
        if snapshot.reason:
            tags["heterokd.reason"] = snapshot.reason  # behind, negative transfer, not finite
        self.client.log_artifact(run.id, str(trial.path / "recipe.yaml"))
        error = trial.error
        if error and status.is_failure:
            self.client.log_artifact(run.id, str(trial.path / "error.txt"))
            tags["heterokd.error"] = next((line for line in reversed(error.splitlines()) if line.strip()), "")
        self._tag(run.id, tags)
        self.client.set_terminated(run.id, _MLFLOW[status])
        run.status = status

    def _open(self, trial: TrialFolder) -> _TrialRun:
        """The trial's run: known, found in the store, or new."""
        number = trial.number
        if number in self._runs:
            return self._runs[number]
        recipe = trial.recipe
        found = self._found.get(number)
        if found is not None and found.data.tags.get("heterokd.recipe") != recipe.hash:
            found = None  # the folder was removed and its number used again
        run = self._create(trial, recipe) if found is None else self._adopt(found, trial)
        if found is None or not found.data.params:
            params = trial_params(recipe, trial.snapshot.sample)
            self.client.log_batch(run.id, params=[Param(key, value) for key, value in params.items()])
        if self.data and (found is None or not found.inputs or not found.inputs.dataset_inputs):
            self.client.log_inputs(run.id, list(self.data))
        self._runs[number] = run
        return run

    def _adopt(self, found: Run, trial: TrialFolder) -> _TrialRun:
        """Learn from the store how far an existing run has come."""
        run_id, name = found.info.run_id, found.data.tags.get("heterokd.state")
        status = next((one for one, of_run in _MLFLOW.items() if (one, of_run) == (name, found.info.status)), None)
        reports = trial.metrics()
        if status is not None and status.is_final and status == trial.status:
            # The status was set last, so everything is there.
            return _TrialRun(run_id, status, int(reports[-1]["epoch"]) if reports else 0, set(found.data.metrics))
        keys = {key for report in reports for key in report if key != "epoch" and not key.startswith(SCALARS)}
        known = keys & set(found.data.metrics)
        steps = [metric.step for key in known for metric in self.client.get_metric_history(run_id, key)]
        return _TrialRun(run_id, status, max(steps, default=0), set(found.data.metrics))

    def _create(self, trial: TrialFolder, recipe: Recipe) -> _TrialRun:
        snapshot = trial.snapshot
        confirms = snapshot.confirms
        parent, name = self._parent, f"{trial.number:03d}-{recipe.method}"
        if len(self.experiment.student.networks) > 1:
            name += f"-{recipe.student.network}"
        if confirms is not None:
            name += f"-seed{recipe.training.seed}"
            confirmed = self.folder.trial(confirms)
            if (confirmed.path / "recipe.yaml").exists():
                parent = self._open(confirmed).id
        tags = {
            **common_tags("trial", self.experiment.name, self.study_id),
            "mlflow.parentRunId": parent,
            "heterokd.trial": str(trial.number),
            "heterokd.method": recipe.method,
            "heterokd.origin": snapshot.origin,
            "heterokd.task": recipe.task,
            "heterokd.dataset": recipe.data.dataset,
            "heterokd.recipe": recipe.hash,
            "heterokd.pruned": "false",
            "heterokd.state": str(TrialStatus.RUNNING),
            "mlflow.note.content": trial_description(recipe, snapshot)[:TEXT_LIMIT],
        }
        if confirms is not None:
            tags["heterokd.confirms"] = str(confirms)
        created = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        return _TrialRun(created.info.run_id, TrialStatus.RUNNING)

    def _tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        self.client.log_batch(run_id, tags=[RunTag(key, value[:TEXT_LIMIT]) for key, value in tags.items()])

    # --- the study

    def _connect(self) -> None:
        """Find or make the MLflow experiment, the study's run and what there is of the trials' runs."""
        if self._parent:
            return
        self.experiment_id = self._mlflow_experiment()
        chosen = f"tags.`heterokd.study_id` = '{self.study_id}'"
        parent = ""
        self._found = {}
        for run in pages(
            lambda token: self.client.search_runs([self.experiment_id], chosen, max_results=1000, page_token=token)
        ):
            tags = run.data.tags
            if tags.get("heterokd.kind") == "study":
                parent = run.info.run_id
            elif tags.get("heterokd.kind") == "trial" and int(tags["heterokd.trial"]) not in self._found:
                self._found[int(tags["heterokd.trial"])] = run
        if not parent:
            self.is_new = True
            tags = {
                **common_tags("study", self.experiment.name, self.study_id),
                "heterokd.task": self.experiment.data.task,
                "heterokd.metric": self.experiment.metric,
                "mlflow.note.content": study_description(self.experiment),
            }
            parent = self.client.create_run(self.experiment_id, run_name=self.experiment.name, tags=tags).info.run_id
            params = study_params(self.experiment)
            self.client.log_batch(parent, params=[Param(key, value) for key, value in params.items()])
            if self.data:
                self.client.log_inputs(parent, list(self.data))
        self._parent = parent

    def _mlflow_experiment(self) -> str:
        name = self.experiment.experiment_name
        location = self.artifacts.resolve().as_uri() if self.artifacts is not None else None
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                experiment_id: str = self.client.create_experiment(name, artifact_location=location)
                self.client.set_experiment_tag(experiment_id, "mlflow.note.content", study_description(self.experiment))
            except MlflowException:
                # Another driver was first.
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found is not None:
            if found.lifecycle_stage != "active":
                raise TrackingError(
                    f"tracking.experiment: the MLflow experiment {name!r} was deleted; restore it with "
                    f"`mlflow experiments restore --experiment-id {found.experiment_id}`, or choose another name"
                )
            experiment_id = found.experiment_id
        # Opens the page of a trained model, not the one for chat agents.
        self.client.set_experiment_tag(experiment_id, "mlflow.experimentKind", "custom_model_development")
        return experiment_id

    def _finish(self, summary: Mapping[str, Any], status: Status) -> None:
        self._project_all()
        for run in self._runs.values():
            if run.status is None or not run.status.is_final:
                self.client.set_terminated(run.id, "KILLED")
                run.status = None
        winner = summary.get("winner") or {}
        if winner.get("number") in self._runs:
            self._log_winner(self.folder.trial(winner["number"]), winner.get("mean"))
        result = study_result(summary)
        if result:
            self._tag(self._parent, {"mlflow.note.content": study_description(self.experiment, result)})
        for file in (self.folder.experiment_file, self.folder.report, self.folder.path / "summary.json"):
            if file.exists():
                self.client.log_artifact(self._parent, str(file))
        if self.folder.pictures.is_dir():
            self.client.log_artifacts(self._parent, str(self.folder.pictures), "pictures")
        self.client.set_terminated(self._parent, status)
        self._is_running = False
        write_view(self.client, self.client.get_run(self._parent))

    def _log_winner(self, trial: TrialFolder, mean: float | None) -> None:
        """The study's own figure: the mean over the winner's fresh seeds, where it was confirmed."""
        key = f"best/{self.experiment.metric}"
        known = self.client.get_run(self._parent).data.metrics
        if mean is not None and known.get(key) != mean:
            self.client.log_metric(self._parent, key, mean, step=trial.number)
        self._tag(
            self._parent,
            {"heterokd.best_run_id": self._runs[trial.number].id, "heterokd.best_trial": str(trial.number)},
        )


def _scalars(snapshot: TrialSnapshot) -> dict[str, float]:
    """What trial.json knows beside the reports: its last metrics, and facts about the student."""
    return {**snapshot.metrics, **{f"student/{key}": value for key, value in snapshot.student.items()}}


def _close_zombies(client: MlflowClient) -> list[str]:
    experiments = [
        one.experiment_id for one in pages(lambda token: client.search_experiments(max_results=1000, page_token=token))
    ]
    chosen = f"attributes.status = 'RUNNING' and tags.`heterokd.host` = '{socket.gethostname()}'"
    running = pages(lambda token: client.search_runs(experiments, chosen, max_results=1000, page_token=token))
    dead = [run.info.run_id for run in running if not is_alive(run.data.tags)]
    for run_id in dead:
        client.set_terminated(run_id, "KILLED")
    return dead
