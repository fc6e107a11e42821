"""Find a student: a registered model, the winner of a study, or the folder of a trial."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from heterokd.config.reading import load_recipe
from heterokd.config.recipe import Recipe
from heterokd.datasets.io.split import Splits
from heterokd.errors import CheckpointError, StudyError
from heterokd.networks.network import AnyNetwork
from heterokd.networks.weights import weights_hash
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.students.download import download_student
from heterokd.study.read_summary import read_summary
from heterokd.tracking.store import existing_store
from heterokd.training.data import open_splits
from heterokd.training.student import open_student


@dataclass(frozen=True, eq=False)
class Student:
    """A trained student.

    Attributes:
        source: text that names it, see `find_student`.
        network: network in evaluation mode, on the CPU.
        recipe: recipe of its training.
        splits: data set that it was trained on.
        weights: SHA-256 of its weights.
        version: NAME/VERSION in the registry, if it is from there.
    """

    source: str
    network: AnyNetwork
    recipe: Recipe
    splits: Splits
    weights: str
    version: str | None = None


@contextmanager
def find_student(root: Workspace, source: str) -> Iterator[Student]:
    """Open the student that `source` names.

    Args:
        root: workspace.
        source: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `studies/NAME` (its winner), or the folder of a trial.

    Raises:
        TrackingError: the registry has no such model, or does not answer.
        StudyError: there is no such study, or it has no winner.
        CheckpointError: the weights are missing, damaged, or differ from the registered weights.
        DataError: the data set is not where the recipe expects it.
    """
    if not source.startswith("models:"):
        trial = _trial(root, source)
        yield _open(source, trial.path / "recipe.yaml", trial.weights)
        return
    with tempfile.TemporaryDirectory(prefix="heterokd-export-") as folder:
        logged = download_student(existing_store(root, None), source, Path(folder))
        version = None if logged.name is None else f"{logged.name}/{logged.version}"
        student = _open(source, logged.folder / "recipe.yaml", logged.folder / "student.safetensors", version)
        if student.weights != logged.weights:
            raise CheckpointError(
                f"{source}: the stored weights differ from the registered weights; restore the store's artifacts, or "
                "export the trial's folder"
            )
        yield student


def _open(source: str, recipe_file: Path, weights: Path, version: str | None = None) -> Student:
    if not weights.exists():
        raise CheckpointError(f"{weights}: does not exist, since this trial was not trained to the end; choose another")
    recipe = load_recipe(recipe_file)
    splits = open_splits(recipe.data)
    network = open_student(recipe, weights, splits.num_classes)
    return Student(source, network, recipe, splits, weights_hash(network), version)


def _trial(root: Workspace, source: str) -> TrialFolder:
    """Return the trial of a path, which may be relative to the workspace, or of a study's name."""
    for folder in (Path(source), root.path / source):
        if (folder / "recipe.yaml").is_file():
            return TrialFolder(folder)
        if (folder / "experiment.yaml").is_file():
            return _winner(StudyFolder(folder))
    if source.startswith("studies/") or "/" not in source:
        return _winner(root.existing_study(source.removeprefix("studies/").rstrip("/")))
    raise StudyError(
        f"{source}: is neither the folder of a study nor of a trial; give models:/NAME@ALIAS, models:/NAME/VERSION, "
        "studies/NAME or the folder of a trial"
    )


def _winner(folder: StudyFolder) -> TrialFolder:
    summary = read_summary(folder)
    if summary is None or summary.winner is None:
        raise StudyError(f"{folder.path}: the study has no winner; finish `heterokd search`, or name a trial")
    return folder.trial(summary.winner.number)
