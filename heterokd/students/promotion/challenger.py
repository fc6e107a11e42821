"""Find the challenger of a promotion in the registry or the study, and load its model as it would be served."""

from __future__ import annotations

from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from torch import nn

from heterokd.config.experiment import Experiment
from heterokd.config.recipe import Recipe
from heterokd.datasets.io.split import Splits
from heterokd.errors import PromotionError
from heterokd.networks.network import deployable
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.trial_status import TrialStatus
from heterokd.students.promotion.evaluation import EvaluatedStudent, task_of
from heterokd.students.promotion.served import ServingModel
from heterokd.students.registry import CHALLENGER, log_student, register, taken_size
from heterokd.study.read_summary import read_summary
from heterokd.tracking.pytorch_flavor import mlflow_pytorch
from heterokd.tracking.runs import StudyRuns
from heterokd.tracking.store import first_line, pages
from heterokd.training.student import open_student


@dataclass(frozen=True)
class Candidate:
    """A student to promote.

    Attributes:
        trial: trial that trained it.
        version: version in the registry; None if it is not registered.
        model: model as it would be served.
    """

    trial: TrialFolder
    version: str | None
    model: nn.Module

    @property
    def recipe(self) -> Recipe:
        """Recipe of its training."""
        return self.trial.recipe

    def tested(self, experiment: Experiment) -> EvaluatedStudent:
        """Return what is evaluated on the test split."""
        uri = None if self.version is None else model_uri(experiment, self.version)
        return EvaluatedStudent(self.model, experiment.data, uri, self.trial)


def version_with(runs: StudyRuns, alias: str) -> ModelVersion | None:
    """Return the version of the study's registered model that has an alias; None if no version has it."""
    try:
        return runs.client.get_model_version_by_alias(runs.experiment.registered_model, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def find_challenger(runs: StudyRuns, number: int | None) -> tuple[TrialFolder, str | None]:
    """Find the challenger and its version: trial `number`, otherwise the study's winner.

    If the study's summary is lost, it is the version `challenger` of the study.

    Raises:
        PromotionError: the study has no trained student, or the named trial is not complete.
    """
    folder = runs.folder
    if number is not None:
        return _named_trial(runs, number)
    summary = read_summary(folder)
    winner = None if summary is None or summary.winner is None else summary.winner.number
    version = version_with(runs, CHALLENGER)
    if version is not None and version.tags.get("study_id") == runs.study_id:
        number = int(version.tags["trial"])
        if winner in (None, number):
            return folder.trial(number), str(version.version)
    if winner is None:
        raise PromotionError(
            f"{folder.path}: study {folder.name!r} has no trained student, and the registry has no challenger of it; "
            "run `heterokd search` first (with --resume if it was interrupted)"
        )
    trial = folder.trial(winner)
    newest = _newest_version(runs, trial)
    if newest is None and not trial.weights.exists():
        raise PromotionError(f"{trial.weights}: the winner's weights are missing; run `heterokd search` again")
    return trial, newest


def _named_trial(runs: StudyRuns, number: int) -> tuple[TrialFolder, str | None]:
    folder, trial = runs.folder, runs.folder.trial(number)
    if trial.status != TrialStatus.COMPLETE or not trial.weights.exists():
        summary = read_summary(folder)
        leaders = ", ".join(str(leader.number) for leader in (summary.leaders if summary else ())) or "none"
        state = f"is {trial.status}" if trial.path.exists() else "does not exist"
        raise PromotionError(
            f"--trial {number}: trial {number} of study {folder.name!r} {state}, so it has no student to promote; "
            f"the leaders are {leaders}"
        )
    return trial, _newest_version(runs, trial)


def _newest_version(runs: StudyRuns, trial: TrialFolder) -> str | None:
    """Return the newest registered version of a trial; None if it was not registered."""
    query = f"name = '{runs.experiment.registered_model}'"
    versions = [
        int(version.version)
        for version in pages(lambda token: runs.client.search_model_versions(query, max_results=1000, page_token=token))
        if version.tags.get("study_id") == runs.study_id
        and version.tags.get("trial") == str(trial.number)
        and version.tags.get("recipe") == trial.recipe.hash
    ]
    return str(max(versions)) if versions else None


def open_challenger(
    runs: StudyRuns,
    trial: TrialFolder,
    version: str | None,
    splits: Splits,
    *,
    dry_run: bool,
    alias: str | None = CHALLENGER,
) -> Candidate:
    """Load the challenger; register it first, with `alias`, if it is not registered, unless this is a dry run."""
    if version is None and dry_run:
        student = open_student(trial.recipe, trial.weights, splits.num_classes)
        return Candidate(trial, None, deployable(student))
    if version is None:
        version = register(runs, trial, log_student(runs, trial, splits), splits, alias)
        if runs.is_new:
            # No search uses this store, so nothing else would end the study's run.
            runs.finish(read_summary(runs.folder))
    return Candidate(trial, version, load_version(runs.experiment, version, splits))


def load_version(experiment: Experiment, version: str, splits: Splits) -> nn.Module:
    """Load a registered version as it would be served.

    Raises:
        PromotionError: its files are missing or damaged.
    """
    name, uri = experiment.registered_model, model_uri(experiment, version)
    try:
        graph = mlflow_pytorch.load_model(uri)  # type: ignore[no-untyped-call]
        size = taken_size(uri)
    except (MlflowException, OSError, RuntimeError) as error:
        raise PromotionError(
            f"version {version} of {name!r} cannot be loaded ({first_line(error)}); restore its files in {_place(uri)}"
        ) from error
    return ServingModel(graph, task_of(experiment, splits), size)


def model_uri(experiment: Experiment, version: str) -> str:
    """Return the URI of a version of the experiment's registered model."""
    return f"models:/{experiment.registered_model}/{version}"


def _place(uri: str) -> str:
    """Return the recorded location of a registered version's files, in MLflow's current store."""
    name, version = uri.removeprefix("models:/").rsplit("/", 1)
    try:
        return str(MlflowClient().get_model_version_download_uri(name, version))
    except MlflowException:
        return "the store's artifacts"
