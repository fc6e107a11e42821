"""The public functions of heterokd, imported by `from heterokd import ...`.

Ray, Optuna and MLflow are imported inside the functions that need them, so experiments can be read and changed without
them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from heterokd.config.experiment import Experiment
from heterokd.config.methods import method_params
from heterokd.config.reading import load_experiment
from heterokd.config.recipe import Recipe
from heterokd.datasets import DATASETS
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
    "DistillResult",
    "Experiment",
    "Method",
    "Recipe",
    "SearchResult",
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
    """Search for the best student: train students in parallel, confirm the leaders, register the winner.

    Args:
        experiment: as returned by `load_experiment`.
        root: workspace folder, or address of an object store (s3://BUCKET/...).
        resume: resume the study of this name, or return its result if it is finished. Its methods, students, domains
            and budget may have changed.
        address: address of a Ray cluster; None starts a local Ray for the search.
        listener: called when a trial starts, reports or finishes.
        teacher_progress: called in each epoch of fitting a teacher, with its metrics and the teacher's network.

    Returns:
        The winner, the trials as a data frame, the Optuna study, the report and the registered model.
        `result.finished` is False if the search was interrupted.

    Raises:
        UserError: the input is wrong; nothing was started.
        SearchError: no trial can run; finished work is kept.
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
    """Train a student once with the published settings of a method.

    Args:
        experiment: what `load_experiment` returned.
        method: name in `METHODS`, or `FILE.py:Class`.
        root: workspace folder, or address of a store.
        on_epoch: called with the metrics of each epoch; if it returns False, the training ends.

    Raises:
        UserError: the input is wrong; nothing was trained.
    """
    from heterokd.execution.distill import distill_once

    experiment = experiment.with_methods([method])
    (name,) = experiment.methods
    method_params(name, {}, "distill", experiment.space.extensions.get(name))
    return distill_once(experiment, name, open_workspace(str(root)), on_epoch or (lambda metrics: True))


def plan(experiment: Experiment, root: str | Path = "runs", *, address: str | None = None) -> Plan:
    """Estimate trainings, time, money, memory and disk space of a search.

    Args:
        experiment: what `load_experiment` returned.
        root: workspace folder, or address of a store.
        address: address of a Ray cluster to measure on; None starts a local Ray.

    Raises:
        UserError: the input is wrong.
    """
    from heterokd.execution.planning.plan import plan_experiment

    return plan_experiment(experiment, open_workspace(str(root)), address=address)


# One parameter for each option of the command.
def promote(
    study: str,
    root: str | Path = "runs",
    *,
    dry_run: bool = False,
    alias: str = "champion",
    trial: int | None = None,
    unfinished: bool = False,
    address: str | None = None,
) -> Decision:
    """Compare a study's winner with the champion on the test split; move the alias if the winner passes every gate.

    Args:
        study: name of a study with a winner.
        root: workspace folder, or address of a store.
        dry_run: return the decision without changing anything.
        alias: alias to move; the version that had it gets the alias `previous`.
        trial: number of a trial to promote instead of the winner, in this call alone.
        unfinished: also judge a study that is not finished.
        address: address of a Ray cluster whose nodes evaluate; None: this process.

    Raises:
        StudyError: unknown study.
        PromotionError: there is no student to promote, or no comparison with the champion is possible.
        TrackingError: the tracking server does not answer.
    """
    if address is not None:
        from heterokd.execution.promote import promote_on

        workspace = open_workspace(str(root))
        return promote_on(address, workspace, study, dry_run=dry_run, alias=alias, trial=trial, unfinished=unfinished)
    from heterokd.students.promotion.promote import promote as decide

    return decide(open_workspace(str(root)), study, dry_run=dry_run, alias=alias, trial=trial, unfinished=unfinished)


def export(
    source: str | Path, out: str | Path, format: str = "onnx", root: str | Path = "runs", *, overwrite: bool = False
) -> Exported:
    """Export a trained student to a file that runs without heterokd, verified on real images.

    Args:
        source: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `studies/NAME` (its winner), or the folder of a trial.
        out: output folder, created if it does not exist.
        format: onnx, pt2, safetensors, or the name of an installed package's format.
        root: workspace folder, or address of a store.
        overwrite: also replace files that no export wrote.

    Raises:
        UserError: unknown student or format, or a folder that cannot be used.
        ExportError: outputs of the exported file differ from those of the trained student.
    """
    from heterokd.students.export.export import export_student
    from heterokd.students.export.find import find_student

    with find_student(open_workspace(str(root)), str(source)) as student:
        return export_student(student, format, Path(out), overwrite=overwrite)


def load_student(source: str | Path, root: str | Path = "runs") -> nn.Module:
    """Load a trained student, which maps images [B, 3, H, W] in [0, 1] to logits; it includes the normalisation.

    Args:
        source: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `studies/NAME` (its winner), or the folder of a trial or
            of an export as safetensors.
        root: workspace folder, or address of a store.

    Returns:
        A module in evaluation mode, on the CPU.

    Raises:
        UserError: unknown student, or its weights are missing or damaged.
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
    """Import a result type on first use, because its module loads Ray or MLflow."""
    if name == "SearchResult":
        from heterokd.study.search_result import SearchResult

        return SearchResult
    if name == "DistillResult":
        from heterokd.execution.distill import DistillResult

        return DistillResult
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
