"""heterokd in a program of your own: the four functions and the one type that `from heterokd import ...` gives.

Everything of Ray, Optuna and MLflow is imported when a search or a distillation starts, so that an experiment can be
read, and changed, without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from heterokd.config.experiment import Experiment
from heterokd.config.methods import method_params
from heterokd.config.reading import load_experiment
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.workspace import open_workspace
from heterokd.training.train import Report

if TYPE_CHECKING:
    from heterokd.execution.callbacks import Listener
    from heterokd.execution.driver import Found
    from heterokd.teachers.prepare import TeacherReport

__all__ = ["Distilled", "Experiment", "distill", "load_experiment", "load_student", "search"]


@dataclass(frozen=True)
class Distilled:
    """What one training leaves.

    Attributes:
        trial: its folder: recipe.yaml, metrics.jsonl, student.safetensors.
        metrics: of its end, on val.
        trained: whether it was trained now; the same recipe is not trained twice.
    """

    trial: TrialFolder
    metrics: Mapping[str, float]
    trained: bool


def search(
    experiment: Experiment,
    root: str | Path = "runs",
    *,
    resume: bool = False,
    address: str | None = None,
    listener: Listener | None = None,
    teacher_progress: TeacherReport | None = None,
) -> Found:
    """Answer an experiment, as `heterokd search` does: train students in parallel, confirm, register the best.

    Args:
        experiment: what `load_experiment` returned.
        root: folder that holds all state.
        resume: go on with (or just show) a study of the same name.
        address: of a Ray cluster; None starts a local one and ends it again.
        listener: told of every trial that starts, reports or finishes.
        teacher_progress: told the metrics of each epoch of a teacher's fit, and its network.

    Returns:
        The study's folder, its summary (`found.summary["winner"]`), the winner's teacher, and the registered model.

    Raises:
        UserError: the input is wrong; nothing has been started then.
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
) -> Distilled:
    """Train once with a method's published settings, as `heterokd distill` does.

    Args:
        experiment: what `load_experiment` returned.
        method: a name of `heterokd methods`.
        root: folder that holds all state.
        on_epoch: told each epoch's metrics; it ends the training early by returning False.

    Raises:
        UserError: the input is wrong; nothing has been trained then.
    """
    from heterokd.execution.distill import distill_once

    method_params(method, {}, "distill")
    space = experiment.space.model_copy(update={"methods": (method,)})
    alone = experiment.model_copy(update={"search": experiment.search.model_copy(update={"space": space})})
    trial, trained = distill_once(alone, method, open_workspace(str(root)), on_epoch or (lambda metrics: True))
    return Distilled(trial, trial.snapshot.metrics, trained)


def load_student(source: str | Path, root: str | Path = "runs") -> nn.Module:
    """A trained student, ready for use: images [B, 3, H, W] in [0, 1] to logits; normalisation is inside.

    Args:
        source: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `studies/NAME` (its winner), or the folder of a trial or
            of an export as safetensors.
        root: folder that holds all state.

    Returns:
        A plain module in evaluation mode, on the CPU.

    Raises:
        UserError: there is no such student, or its weights are missing or damaged.
    """
    from heterokd.networks.network import deployable
    from heterokd.students.export.find import find_student
    from heterokd.students.export.formats.safetensors import CONFIG, open_exported

    if (Path(source) / CONFIG).is_file():
        return deployable(open_exported(source))
    with find_student(open_workspace(str(root)), str(source)) as student:
        return deployable(student.network)
