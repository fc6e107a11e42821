"""Sync the MLflow runs of trials with the trials' folders."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Metric, Param, Run, RunTag

from heterokd.config.experiment import Experiment
from heterokd.config.recipe import Recipe
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus
from heterokd.study.summary import StudySummary
from heterokd.tracking.labels import (
    TEXT_LIMIT,
    common_tags,
    estimate_metrics,
    mlflow_key,
    process_tags,
    run_link,
    trial_description,
    trial_params,
)
from heterokd.tracking.store import pages, sent_once

logger = logging.getLogger(__name__)

FINAL, SETTING, RANK, CONFIRMED = "final/", "setting/", "rank", "confirmed"
"""Metrics by which MLflow's tables are sorted, see `_scalars` and `TrialRuns.rank`; the last begins three, see
`estimate_metrics`."""

SCALARS = ("student/", "teacher/", "test/", "cost/", FINAL, SETTING)
"""Prefixes of metrics that do not change over epochs: logged once, at step 0, where MLflow draws a bar."""

ORDER = "heterokd.order"
"""Tag of a study's run: `final` if its trials have a final value, `rank` once they are ranked."""

MOST_RANKED = 100
"""Maximum number of trials with a rank, each of which is a request at the end of a search."""

BATCH = 900
"""Maximum number of metrics per call; MLflow allows a thousand, and a few scalars are added."""

_MLFLOW = {
    TrialStatus.RUNNING: "RUNNING",
    TrialStatus.COMPLETE: "FINISHED",
    TrialStatus.PRUNED: "FINISHED",
    TrialStatus.DIVERGED: "FAILED",
    TrialStatus.FAILED: "FAILED",
}
"""MLflow's status of a run; that of a paused trial is left alone until the search ends."""


def runs_of(client: MlflowClient, experiment_id: str, study_id: str) -> Iterator[Run]:
    """Iterate over the runs of a study and of its trials in the store."""
    chosen = f"tags.`heterokd.study_id` = '{study_id}'"
    return pages(lambda token: client.search_runs([experiment_id], chosen, max_results=1000, page_token=token))


@dataclass(frozen=True)
class StudyRun:
    """The run of a study.

    Attributes:
        client: client of the store.
        experiment: the study's experiment.
        folder: the study's folder.
        data: train and val.
        study_id: id of the study, unique in the store.
        experiment_id: id of the MLflow experiment.
        id: id of the run.
    """

    client: MlflowClient
    experiment: Experiment
    folder: StudyFolder
    data: Sequence[DatasetInput]
    study_id: str
    experiment_id: str
    id: str

    def runs(self) -> Iterator[Run]:
        """Iterate over the runs of the study and of its trials in the store."""
        return runs_of(self.client, self.experiment_id, self.study_id)

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run of this study."""
        self.client.log_batch(run_id, tags=[RunTag(key, value[:TEXT_LIMIT]) for key, value in tags.items()])


@dataclass
class TrialRun:
    """State of a trial's run in the store.

    Attributes:
        id: id of the run.
        status: last logged status; None if it is to be logged again.
        epoch: last logged epoch.
        keys: names of the logged metrics.
    """

    id: str
    status: TrialStatus | None = None
    epoch: int = 0
    keys: set[str] = field(default_factory=set)


class TrialRuns:
    """Runs of a study's trials, nested below the study's run.

    Args:
        study: the study's run.
        found: existing runs of the store, by the trial's number.
    """

    def __init__(self, study: StudyRun, found: Mapping[int, Run]) -> None:
        self.study, self.found = study, found
        self.known: dict[int, TrialRun] = {}
        self._is_running = False

    def sync(self, trial: TrialFolder) -> None:
        """Log what is new in a trial's folder."""
        if not (trial.path / "recipe.yaml").exists():
            return  # its process is creating the folder
        snapshot = trial.snapshot
        status = snapshot.status
        run = self.open(trial)
        reports = [report for report in trial.metrics() if report["epoch"] > run.epoch]
        if run.status == status and not reports:
            return
        if not status.is_final and not self._is_running:
            self._mark_running(self.study.id, {})
            self._is_running = True
        if run.status != status and not status.is_final:
            # First seen, or continued after it was pruned or interrupted.
            self._mark_running(run.id, {"heterokd.pruned": "false", "heterokd.state": status})
            run.status = status
        self._log(run, reports, _scalars(trial, snapshot, self.study.experiment.metric))
        if run.status != status:
            self._end(run, trial, snapshot)

    def kill_unfinished(self) -> None:
        """Close, as KILLED, the runs of trials that have not ended."""
        for run in self.known.values():
            if run.status is None or not run.status.is_final:
                self.study.client.set_terminated(run.id, "KILLED")
                run.status = None
        self._is_running = False

    def remove_doubles(self) -> None:
        """Delete runs that repeat a known run: the server created them after the client had given up waiting."""
        kept = {self.study.id, *(run.id for run in self.known.values())}
        recipes = {str(number): self.study.folder.trial(number).recipe.hash for number in self.known}
        for run in self.study.runs():
            tags, run_id = run.data.tags, run.info.run_id
            is_known = tags.get("heterokd.recipe") == recipes.get(tags.get("heterokd.trial", ""), "")
            if run_id not in kept and (is_known or tags.get("heterokd.kind") == "study"):
                logger.info("MLflow's run %s (%s) was created twice and is deleted", run_id, run.info.run_name)
                self.study.client.delete_run(run_id)

    def rank(self, summary: StudySummary) -> None:
        """Log the place of trials in the order of the leaders' tables, and leaders' means over fresh seeds.

        Leaders come first, then the other complete trials of the search by their value. A table that is sorted by an
        epoch's metric would mix repetitions and pruned trials with them; these have no rank. NaN replaces the rank of
        a trial that is no longer among the first `MOST_RANKED`.
        """
        metric, now = summary.metric, int(time.time() * 1000)
        logged = {run.info.run_id: run.data for run in self.study.runs()}
        leaders = {leader.number: leader for leader in summary.rows()}
        others: dict[int, float] = {}
        for number, run in self.known.items():
            data = logged.get(run.id)
            is_of_search = data is not None and "heterokd.confirms" not in data.tags
            if data is not None and is_of_search and run.status == TrialStatus.COMPLETE and number not in leaders:
                value = data.metrics.get(f"{FINAL}{metric}", data.metrics.get(metric, math.nan))
                if math.isfinite(value):
                    others[number] = -value if summary.maximise else value
        order = [*leaders, *sorted(others, key=lambda number: (others[number], number))][:MOST_RANKED]
        places = {number: place for place, number in enumerate(order, 1)}
        for number, run in self.known.items():
            before, found = logged[run.id].metrics if run.id in logged else {}, dict[str, float]()
            if number in places:
                found[RANK] = places[number]
            elif math.isfinite(before.get(RANK, math.nan)):
                found[RANK] = math.nan
            leader = leaders.get(number)
            if leader is not None and leader.confirmed:
                found |= estimate_metrics(CONFIRMED, metric, leader)
            changed = [Metric(key, value, now, 0) for key, value in found.items() if before.get(key) != value]
            if changed:
                self.study.client.log_batch(run.id, metrics=changed)
        self.study.tag(self.study.id, {ORDER: "rank"})

    def _mark_running(self, run_id: str, tags: Mapping[str, str]) -> None:
        self.study.client.update_run(run_id, status="RUNNING")
        self.study.tag(run_id, {**process_tags(), **tags})

    def open(self, trial: TrialFolder) -> TrialRun:
        """Return a trial's run: the known run, the store's, or a new run."""
        number = trial.number
        if number in self.known:
            return self.known[number]
        recipe = trial.recipe
        found = self.found.get(number)
        if found is not None and found.data.tags.get("heterokd.recipe") != recipe.hash:
            found = None  # the folder was removed and its number used again
        run = self._create(trial, recipe) if found is None else self._adopt(found, trial)
        if found is None or not found.data.params:
            params = trial_params(recipe, trial.snapshot.sample)
            self.study.client.log_batch(run.id, params=[Param(key, value) for key, value in params.items()])
        if self.study.data and (found is None or not found.inputs or not found.inputs.dataset_inputs):
            self.study.client.log_inputs(run.id, list(self.study.data))
        self.known[number] = run
        return run

    def _adopt(self, found: Run, trial: TrialFolder) -> TrialRun:
        """Read from the store which epochs of an existing run are logged."""
        run_id, name = found.info.run_id, found.data.tags.get("heterokd.state")
        status = next(
            (known for known, of_run in _MLFLOW.items() if (known, of_run) == (name, found.info.status)), None
        )
        reports = trial.metrics()
        if status is not None and status.is_final and status == trial.status:
            # The status was set last, so everything is there.
            return TrialRun(run_id, status, int(reports[-1]["epoch"]) if reports else 0, set(found.data.metrics))
        keys = {key for report in reports for key in report if key != "epoch" and not key.startswith(SCALARS)}
        known = keys & set(found.data.metrics)
        steps = [metric.step for key in known for metric in self.study.client.get_metric_history(run_id, key)]
        return TrialRun(run_id, status, max(steps, default=0), set(found.data.metrics))

    def _create(self, trial: TrialFolder, recipe: Recipe) -> TrialRun:
        snapshot = trial.snapshot
        confirms = snapshot.confirms
        parent, name = self.study.id, f"{trial.number:03d}-{recipe.method}"
        if len(self.study.experiment.student.networks) > 1:
            name += f"-{recipe.student.network}"
        if confirms is not None:
            name += f"-seed{recipe.training.seed}"
            confirmed = self.study.folder.trial(confirms)
            if (confirmed.path / "recipe.yaml").exists():
                parent = self.open(confirmed).id
        tags = {
            **common_tags("trial", self.study.experiment.name, self.study.study_id),
            "mlflow.parentRunId": parent,
            "heterokd.trial": str(trial.number),
            "heterokd.method": recipe.method,
            "heterokd.origin": snapshot.origin,
            "heterokd.task": recipe.task,
            "heterokd.dataset": recipe.data.dataset,
            "heterokd.recipe": recipe.hash,
            "heterokd.pruned": "false",
            "heterokd.state": str(TrialStatus.RUNNING),
            "mlflow.note.content": f"{trial_description(recipe, snapshot)[:TEXT_LIMIT]}\n\n{self._links()}",
        }
        if confirms is not None:
            tags["heterokd.confirms"] = str(confirms)
        with sent_once():
            created = self.study.client.create_run(self.study.experiment_id, run_name=name, tags=tags)
        return TrialRun(created.info.run_id, TrialStatus.RUNNING)

    def _links(self) -> str:
        study = self.study
        page = run_link(
            "the study's page (once the search has ended)", study.experiment_id, study.id, study.folder.report.name
        )
        return f"{run_link('Study', study.experiment_id, study.id)} | {page}"

    def _log(self, run: TrialRun, reports: Sequence[Mapping[str, float]], scalars: Mapping[str, float]) -> None:
        """Log reports and new scalars in as few calls as MLflow takes, no epoch split between two calls."""
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
                self.study.client.log_batch(run.id, metrics=waiting)
                waiting = []
            waiting += metrics
            run.epoch = epoch
            scalars = {**once, **scalars}
        for key, value in scalars.items():
            if key.startswith(SCALARS) and key not in run.keys:
                waiting.append(Metric(key, float(value), now, 0))
                run.keys.add(key)
        if waiting:
            self.study.client.log_batch(run.id, metrics=waiting)

    def _end(self, run: TrialRun, trial: TrialFolder, snapshot: TrialSnapshot) -> None:
        """Log artifacts first and the status last, which marks the run as complete."""
        status = snapshot.status
        tags = {"heterokd.pruned": str(status == TrialStatus.PRUNED).lower(), "heterokd.state": str(status)}
        if snapshot.reason:
            tags["heterokd.reason"] = snapshot.reason  # behind, negative transfer, not finite
        if snapshot.price is not None:
            tags["heterokd.currency"] = self.study.experiment.cluster.currency
        self.study.client.log_artifact(run.id, str(trial.path / "recipe.yaml"))
        error = trial.error
        if error and status.is_failure:
            self.study.client.log_artifact(run.id, str(trial.path / "error.txt"))
            tags["heterokd.error"] = next((line for line in reversed(error.splitlines()) if line.strip()), "")
        self.study.tag(run.id, tags)
        self.study.client.set_terminated(run.id, _MLFLOW[status])
        run.status = status


def _scalars(trial: TrialFolder, snapshot: TrialSnapshot, metric: str) -> dict[str, float]:
    """Return the values of trial.json: the last metrics, costs of the student, and of the trial once it has ended.

    Numbers among the searched settings are metrics, too: MLflow sorts parameters as text. The result of a complete
    trial of the search has a name of its own, which pruned trials and repetitions on other seeds do not have.
    """
    found = {**snapshot.metrics, **{f"student/{key}": value for key, value in snapshot.student.items()}}
    for key, value in snapshot.sample.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{SETTING}{mlflow_key(key)}"] = float(f"{value:.6g}")  # as `trial_params` shows it
    if snapshot.status == TrialStatus.COMPLETE and snapshot.confirms is None:
        last = snapshot.metrics or (trial.metrics() or [{}])[-1]
        if metric in last:
            found[f"{FINAL}{metric}"] = last[metric]
    cost = trial.cost if snapshot.status.is_final else None
    return found if cost is None else {**found, "cost/trial": cost}
