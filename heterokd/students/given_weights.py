"""Find the weights that an experiment names: versions and runs of MLflow, folders of trials, studies and exports."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from heterokd.config.experiment import Experiment
from heterokd.config.given_files import GivenFile, with_files
from heterokd.errors import ConfigError
from heterokd.storage.workspace import Workspace
from heterokd.students.weights_folder import file_in_folder
from heterokd.teachers.given import is_stored


def with_given_weights(experiment: Experiment, root: Workspace) -> Experiment:
    """Return the experiment with each name of weights fixed: folders by the file in them, aliases by their version.

    A study therefore keeps its teacher when an alias moves. Weights in MLflow are downloaded into the workspace.

    Raises:
        TrackingError: there is no such model, version or alias, or the store does not answer.
        CheckpointError: the weights cannot be downloaded, or a folder has several files of weights.
        StudyError: the study has no winner.
        ConfigError: a student is to start from weights in MLflow.
    """
    return with_files(experiment, partial(_fixed, experiment=experiment, root=root))


def _fixed(given: GivenFile, experiment: Experiment, root: Workspace) -> Path:
    if is_stored(given.file):
        if given.key.startswith("student."):
            raise ConfigError(f"{given.key}: {given.file} is for teachers; give the file of the student's weights")
        from heterokd.students.download_weights import download_weights  # MLflow takes seconds to import

        return download_weights(given, root, experiment.tracking.uri)
    for place in (given.file, root.path / given.file):
        if place.exists():
            found = file_in_folder(given.key, place) if place.is_dir() else place
            return found or given.file
    return given.file
