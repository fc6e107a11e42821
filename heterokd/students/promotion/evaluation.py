"""Evaluate students on the test split: in this process, or, as plain values, in a process on another machine."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import mlflow.artifacts
import torch
from torch import nn
from torch.export.passes import move_to_device_pass

from heterokd.config.data import DataSettings
from heterokd.config.experiment import Experiment
from heterokd.config.recipe import Recipe
from heterokd.datasets.io.loaders import open_test
from heterokd.datasets.io.split import Splits
from heterokd.errors import PromotionError
from heterokd.networks.network import deployable
from heterokd.storage.study_dir import TrialFolder
from heterokd.students.promotion.served import ServingModel
from heterokd.training.data import open_splits
from heterokd.training.evaluation import image_results
from heterokd.training.macro_metrics import MACRO_METRICS
from heterokd.training.paired_tests import ImageResults
from heterokd.training.precision import forbid_tf32
from heterokd.training.student import open_student
from heterokd.training.task_modules import Task, build_task

GRAPH = "data/model.pt2"
"""File of the graph in a model that MLflow logged."""


def task_of(experiment: Experiment, splits: Splits) -> Task:
    """Build the task of a study's students; they are tested by the study's metric if it counts every class the same."""
    metric = experiment.metric.removeprefix("val/")
    chosen = metric if metric in MACRO_METRICS else None
    data, views = experiment.data, experiment.promotion.test_time
    inference = data.inference if views is None else replace(data.inference, flip=views.flip, scales=views.scales)
    return build_task(data.task, splits.num_classes, inference=inference, metric=chosen)


@dataclass(frozen=True)
class EvaluatedStudent:
    """A student to evaluate on the test split.

    Attributes:
        model: maps images in [0, 1] to logits.
        data: data set, at the image size that the student takes.
        uri: `models:/NAME/VERSION` of a registered student; None: it is the student of `trial`.
        trial: trial that trained it.
    """

    model: nn.Module
    data: DataSettings
    uri: str | None
    trial: TrialFolder | None = None

    def packed(self) -> PackedStudent:
        """Return the student as plain values.

        Raises:
            PromotionError: the registered graph cannot be downloaded.
        """
        if isinstance(self.model, ServingModel) and self.uri is not None:
            try:
                graph = Path(mlflow.artifacts.download_artifacts(f"{self.uri}/{GRAPH}")).read_bytes()
            except (mlflow.MlflowException, OSError) as error:
                raise PromotionError(f"{self.uri}: its graph cannot be downloaded ({error})") from error
            return PackedStudent(self.data.model_dump_json(), graph=graph, size=self.model.size)
        assert self.trial is not None  # a student is registered, or has a trial
        recipe, weights = self.trial.recipe.model_dump_json(), self.trial.weights.read_bytes()
        return PackedStudent(self.data.model_dump_json(), recipe=recipe, weights=weights)


@dataclass(frozen=True)
class PackedStudent:
    """A student as plain values.

    Attributes:
        data: data set, as JSON.
        graph: content of the registered graph; None: the student is given by recipe and weights.
        size: see `ServingModel`.
        recipe: recipe of its training, as JSON.
        weights: content of the file of its weights.
    """

    data: str
    graph: bytes | None = None
    size: tuple[int, int] | None = None
    recipe: str | None = None
    weights: bytes | None = None

    def opened(self, task: Task, num_classes: int, device: str) -> nn.Module:
        """Return the student on a device."""
        if self.graph is not None:
            program = torch.export.load(io.BytesIO(self.graph))
            # Constants of the graph, too, are on the device of its export.
            moved = program if device == "cpu" else move_to_device_pass(program, device)
            return ServingModel(moved.module(), task, self.size)
        assert self.recipe is not None  # see `EvaluatedStudent.packed`
        assert self.weights is not None
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "student.safetensors"
            file.write_bytes(self.weights)
            student = open_student(Recipe.model_validate_json(self.recipe), file, num_classes)
        return deployable(student).to(device)


Evaluate: TypeAlias = Callable[[EvaluatedStudent, Experiment], ImageResults]
"""Evaluates a student of an experiment's task on the test split."""


def evaluate_here(student: EvaluatedStudent, experiment: Experiment) -> ImageResults:
    """Evaluate a student in this process, on the CPU."""
    splits = open_splits(student.data)
    return image_results(student.model, open_test(splits), task_of(experiment, splits))


def evaluate_packed(student: PackedStudent, experiment: Experiment, device: str) -> ImageResults:
    """Evaluate a student that was packed, perhaps on another machine."""
    forbid_tf32(device)
    splits = open_splits(DataSettings.model_validate_json(student.data))
    task = task_of(experiment, splits)
    return image_results(student.opened(task, splits.num_classes, device), open_test(splits), task, device)
