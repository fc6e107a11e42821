"""Download the weights of teachers from MLflow: versions of registered models, logged models and artifacts of runs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from heterokd.config.given_files import GivenFile
from heterokd.errors import CheckpointError
from heterokd.storage.files import write_text
from heterokd.storage.workspace import Workspace
from heterokd.students.download import download_student, find_version
from heterokd.students.weights_folder import SUFFIXES, file_in_folder
from heterokd.teachers.given import SOURCE, download_folder
from heterokd.tracking.store import answering, current, existing_store, first_line, quiet


def download_weights(given: GivenFile, root: Workspace, store: str | None) -> Path:
    """Download weights of MLflow into the workspace; return their URI with the number of the version.

    Args:
        given: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `models:/m-ID` or `runs:/RUN/PATH`: a student of heterokd,
            or any artifact with a file of weights.
        root: workspace, which has a folder for each.
        store: the experiment's `tracking.uri`, or None.

    Raises:
        TrackingError: there is no such model, version or alias, or the store does not answer.
        CheckpointError: the files cannot be downloaded, or hold no weights or several.
    """
    uri = existing_store(root, store)
    fixed = _with_version(given.file, uri)
    folder = download_folder(fixed, root)
    mirror = root.mirror(folder)
    mirror.fetch()
    if (folder / SOURCE).is_file():
        return fixed
    with tempfile.TemporaryDirectory(prefix="heterokd-weights-") as temporary:
        place = Path(temporary)
        source = str(fixed)
        try:
            if source.startswith("models:/"):
                place = download_student(uri, source, place).folder
            else:
                place = _artifacts(source, uri, place)
        except CheckpointError:
            place = _artifacts(source, uri, place)  # not a student of heterokd: any model with a file of weights
        file = place if place.is_file() else file_in_folder(given.key, place)
        if file is None:
            raise CheckpointError(f"{given.key}: {given.file} holds no file of weights ({', '.join(SUFFIXES)})")
        folder.mkdir(parents=True, exist_ok=True)
        for part in [file] if place.is_file() else [each for each in sorted(file.parent.iterdir()) if each.is_file()]:
            (folder / part.name).write_bytes(part.read_bytes())
    write_text(folder / SOURCE, json.dumps({"source": source, "file": file.name}, indent=1))  # last: it is complete
    mirror.close()
    return fixed


def _artifacts(source: str, uri: str, place: Path) -> Path:
    with answering(uri), quiet(), current(uri):
        try:
            return Path(mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=str(place), tracking_uri=uri))
        except (MlflowException, OSError) as error:
            raise CheckpointError(f"{source}: its files cannot be downloaded ({first_line(error)})") from error


def _with_version(given: Path, uri: str) -> Path:
    """Replace an alias by the number of its version."""
    model, separator, alias = str(given).removeprefix("models:/").partition("@")
    if str(given).startswith("models:/") and separator:
        with answering(uri), quiet(), current(uri):
            found = find_version(MlflowClient(uri), model, alias, None)
        return Path(f"models:/{found.name}/{found.version}")
    return given
