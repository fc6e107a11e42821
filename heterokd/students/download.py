"""Download students from MLflow: the weights, the recipe and student.json of a model URI."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from heterokd.errors import CheckpointError, TrackingError, did_you_mean
from heterokd.tracking.store import answering, current, first_line, pages, quiet

_URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[^/@:]+)|/(?P<version>\d+))?")


@dataclass(frozen=True)
class LoggedStudent:
    """A downloaded student.

    Attributes:
        folder: folder with student.safetensors, recipe.yaml and student.json.
        weights: expected SHA-256 of its weights.
        name: name of the registered model; None for a model that was only logged.
        version: version of the registered model; None for a model that was only logged.
    """

    folder: Path
    weights: str
    name: str | None
    version: str | None


def download_student(uri: str, model_uri: str, into: Path) -> LoggedStudent:
    """Download the weights, the recipe and student.json of a logged student.

    Args:
        uri: URI of the tracking store.
        model_uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `models:/m-ID`.
        into: an empty folder.

    Raises:
        TrackingError: there is no such model, version or alias, or the store does not answer.
        CheckpointError: heterokd did not log it, or its files are missing.
    """
    parts = _URI.fullmatch(model_uri)
    if parts is None:
        raise TrackingError(
            f"{model_uri}: is not a model URI; write models:/NAME@ALIAS (models:/digits-student@champion) "
            "or models:/NAME/VERSION"
        )
    client = MlflowClient(uri)
    with answering(uri), quiet(), current(uri):
        if parts["alias"] is None and parts["version"] is None:
            name, version, model_id = None, None, _existing_id(client, parts["name"])
        else:
            found = find_version(client, parts["name"], parts["alias"], parts["version"])
            name, version = found.name, str(found.version)
            model_id = found.model_id or str(found.source).removeprefix("models:/")
        try:
            logged = client.get_logged_model(model_id)
            mlflow.artifacts.download_artifacts(
                run_id=logged.source_run_id, artifact_path="weights", dst_path=str(into), tracking_uri=uri
            )
        except (MlflowException, OSError) as error:
            raise CheckpointError(
                f"{model_uri}: its weights cannot be downloaded ({first_line(error)}); restore the store's artifacts"
                f"{_place(client, model_id)}, or export the trial's folder"
            ) from error
    return LoggedStudent(into / "weights", logged.tags.get("heterokd.weights", ""), name, version)


def find_version(client: MlflowClient, name: str, alias: str | None, version: str | None) -> ModelVersion:
    """Find a version of a registered model by alias or number, in MLflow's current store.

    Raises:
        TrackingError: there is no such model, alias or version.
    """
    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = [model.name for model in pages(lambda token: client.search_registered_models(page_token=token))]
        hint = did_you_mean(name, known) if known else "a search registers its winner"
        raise TrackingError(f"models:/{name}: the registry has no model of this name; {hint}") from None
    if alias is not None and alias not in model.aliases:
        aliases = ", ".join(sorted(model.aliases)) or "none"
        raise TrackingError(f"models:/{name}@{alias}: no version has this alias; known: {aliases}")
    try:
        return client.get_model_version(name, str(model.aliases[alias]) if alias is not None else str(version))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise TrackingError(f"models:/{name}/{version}: the registry has no such version; see `heterokd ui`") from None


def _existing_id(client: MlflowClient, model_id: str) -> str:
    try:
        return str(client.get_logged_model(model_id).model_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise TrackingError(
            f"models:/{model_id}: is not a logged model; for a registered model, give models:/{model_id}@champion or "
            f"models:/{model_id}/VERSION"
        ) from None


def _place(client: MlflowClient, model_id: str) -> str:
    """Return ` in LOCATION`, the recorded location of a logged model's files; empty if it is unknown."""
    try:
        return f" in {client.get_logged_model(model_id).artifact_location}"
    except MlflowException:
        return ""
