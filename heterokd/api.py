"""The public functions of heterokd; `from heterokd import ...` gives them.

Ray, Optuna and MLflow are imported inside the functions that need them, so that an experiment can be read and changed
without them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from heterokd.config.experiment import Experiment
from heterokd.config.methods import method_params
from heterokd.config.reading import load_experiment
from heterokd.config.recipe import Recipe
from heterokd.datasets import DATASETS
from heterokd.errors import (
    CacheError,
    CheckpointError,
    ConfigError,
    DataError,
    ExportError,
    HeterokdError,
    MissingSignal,
    NetworkError,
    PairError,
    PromotionError,
    SearchError,
    StudyError,
    TrackingError,
    TrainingDiverged,
    UserError,
)
from heterokd.method import Method
from heterokd.methods import METHODS
from heterokd.storage.workspace import open_workspace

if TYPE_CHECKING:
    from torch import nn

    from heterokd.execution.callbacks import Listener
    from heterokd.execution.distill import DistillResult
    from heterokd.students.export.export import Exported
    from heterokd.students.promotion.decision import Decision
    from heterokd.study.plan.estimate import Plan
    from heterokd.study.search_result import SearchResult
    from heterokd.teachers.prepare import TeacherReport
    from heterokd.training.train import Report

__all__ = [
    "DATASETS",
    "METHODS",
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DistillResult",
    "Experiment",
    "ExportError",
    "HeterokdError",
    "Method",
    "MissingSignal",
    "NetworkError",
    "PairError",
    "PromotionError",
    "Recipe",
    "SearchError",
    "SearchResult",
    "StudyError",
    "TrackingError",
    "TrainingDiverged",
    "UserError",
    "distill",
    "export",
    "load_experiment",
    "load_student",
    "plan",
    "promote",
    "search",
]


def search(
    experiment: Experiment,
    root: str | Path = "runs",
    *,
    resume: bool = False,
    address: str | None = None,
    listener: Listener | None = None,
    teacher_progress: TeacherReport | None = None,
) -> SearchResult:
    """Run a search, as `heterokd search` does: train students in parallel, repeat the best, register the winner.

    Args:
        experiment: what `load_experiment` returned.
        root: workspace folder, or address of a store (s3://BUCKET/...).
        resume: resume a study of the same name, or return the result of a finished one.
        address: address of a Ray cluster; None starts a local Ray and ends it again.
        listener: called when a trial starts, reports or finishes.
        teacher_progress: called with the metrics of each epoch of a teacher's fit, and the teacher's network.

    Returns:
        The winner, the trials as a data frame, the Optuna study, the report and the registered model;
        `result.finished` is False where the search was interrupted.

    Raises:
        UserError: the input is wrong; nothing has been started then.
        SearchError: no trial can run; what was computed is kept.
    """
    from heterokd.execution.driver import search as run

    return run(
        experiment,
        open_workspace(str(root)),
        resume=resume,
        address=address,
        listener=listener,
        teacher_progress=teacher_progress,
    )


def distill(
    experiment: Experiment, method: str, root: str | Path = "runs", *, on_epoch: Report | None = None
) -> DistillResult:
    """Train once with a method's published settings, as `heterokd distill` does.

    Args:
        experiment: what `load_experiment` returned.
        method: name of the method, see `METHODS`, or `FILE.py:Class`.
        root: workspace folder, or address of a store.
        on_epoch: called with each epoch's metrics; returning False ends the training early.

    Raises:
        UserError: the input is wrong; nothing has been trained then.
    """
    from heterokd.execution.distill import distill_once

    alone = experiment.with_methods([method])
    (name,) = alone.methods
    method_params(name, {}, "distill", alone.space.extensions.get(name))
    return distill_once(alone, name, open_workspace(str(root)), on_epoch or (lambda metrics: True))


def plan(experiment: Experiment, root: str | Path = "runs", *, address: str | None = None) -> Plan:
    """Estimate what a search will take, as `heterokd plan` does: trainings, time, money, memory, disk.

    Args:
        experiment: what `load_experiment` returned.
        root: workspace folder, or address of a store.
        address: address of a Ray cluster to measure on; None starts a local Ray.

    Raises:
        UserError: the input is wrong, as in a search.
    """
    from heterokd.execution.planning.plan import plan_experiment

    return plan_experiment(experiment, open_workspace(str(root)), address=address)


def promote(
    study: str, root: str | Path = "runs", *, dry_run: bool = False, alias: str = "champion", trial: int | None = None
) -> Decision:
    """Compare a study's best student with the champion on the test split, and move the alias if it passes every gate.

    Args:
        study: name of a study that has a winner.
        root: workspace folder, or address of a store.
        dry_run: decide, but change nothing.
        alias: alias that the version gets; the version that had it becomes `previous`.
        trial: number of a trial to promote instead of the winner.

    Raises:
        StudyError: there is no such study.
        PromotionError: there is no student to promote, or the champion cannot be compared with it.
        TrackingError: the tracking server does not answer.
    """
    from heterokd.students.promotion.promote import promote as decide

    return decide(open_workspace(str(root)), study, dry_run=dry_run, alias=alias, trial=trial)


def export(source: str | Path, out: str | Path, format: str = "onnx", root: str | Path = "runs") -> Exported:
    """Export a trained student to a file that runs without heterokd, verified on real images.

    Args:
        source: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `studies/NAME` (its winner), or the folder of a trial.
        out: folder to write to, made if it does not exist.
        format: name of an export format: onnx, pt2, safetensors, or one of an installed package.
        root: workspace folder, or address of a store.

    Raises:
        UserError: there is no such student or format, or the folder cannot be used.
        ExportError: the exported file disagrees with the trained student.
    """
    from heterokd.students.export.export import export_student
    from heterokd.students.export.find import find_student

    with find_student(open_workspace(str(root)), str(source)) as student:
        return export_student(student, format, Path(out))


def load_student(source: str | Path, root: str | Path = "runs") -> nn.Module:
    """Load a trained student: images [B, 3, H, W] in [0, 1] to logits; normalisation is inside.

    Args:
        source: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `studies/NAME` (its winner), or the folder of a trial or
            of an export as safetensors.
        root: workspace folder, or address of a store.

    Returns:
        A plain module in evaluation mode, on the CPU.

    Raises:
        UserError: there is no such student, or its weights are missing or damaged.
    """
    from heterokd.networks.network import deployable
    from heterokd.networks.timm_folder import CONFIG
    from heterokd.students.export.find import find_student
    from heterokd.students.export.formats.safetensors import open_exported

    if (Path(source) / CONFIG).is_file():
        return deployable(open_exported(source))
    with find_student(open_workspace(str(root)), str(source)) as student:
        return deployable(student.network)


def __getattr__(name: str) -> object:
    """Import the result types, whose modules load Ray and MLflow, when they are asked for."""
    if name == "SearchResult":
        from heterokd.study.search_result import SearchResult

        return SearchResult
    if name == "DistillResult":
        from heterokd.execution.distill import DistillResult

        return DistillResult
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
