"""The networks of a finished study and the images that they are measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heterokd.config.experiment import Experiment
from heterokd.datasets.io.loaders import EvalLoader
from heterokd.datasets.io.split import Splits
from heterokd.errors import CheckpointError
from heterokd.networks.network import AnyNetwork
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.teachers.prepare import open_prepared
from heterokd.training.student import open_student
from heterokd.training.teacher import LiveTeacher

Weights = Mapping[str, Path | None]
"""File of a prepared teacher's weights by network; None: timm's published weights."""


@dataclass(frozen=True)
class StudyNetworks:
    """What is measured on val.

    Attributes:
        folder: folder of the study.
        experiment: experiment of the study.
        splits: its data.
        weights: weights of its teachers.
        winner: trial of the best student.
        scratch: trial of the best student without a teacher, if it has weights and is not the winner.
        device: device of the networks.
    """

    folder: StudyFolder
    experiment: Experiment
    splits: Splits
    weights: Weights
    winner: TrialFolder
    scratch: TrialFolder | None
    device: torch.device

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.splits.num_classes

    def student(self, trial: TrialFolder) -> AnyNetwork:
        """Open the student of a trial.

        Raises:
            CheckpointError: its weights are missing or damaged.
        """
        return open_student(trial.recipe, trial.weights, self.num_classes).to(self.device)

    def teacher(self, trial: TrialFolder) -> LiveTeacher:
        """Open the teacher of a trial, on the device.

        Raises:
            CheckpointError: its weights are missing or damaged.
        """
        settings = trial.recipe.teacher
        file = self.weights.get(settings.network)
        if file is None and not settings.pretrained and settings.checkpoint is None:
            raise CheckpointError("the teacher's weights are missing; `heterokd teacher EXPERIMENT` fits it")
        teacher = open_prepared(trial.recipe, file, self.num_classes)
        teacher.network.to(self.device)
        return teacher

    def images(self, index: NDArray[np.int64]) -> tuple[NDArray[np.uint8], Tensor, Tensor]:
        """Read images of val: [B, H, W, 3] to draw, [B, 3, H, W] in [0, 1] for networks, labels [B] or [B, H, W]."""
        val = self.splits.val
        pixels = val.images.read(index)
        labels = val.labels[index] if val.label_maps is None else val.label_maps.read(index)
        (batch,) = EvalLoader(val.chosen(index), len(index))
        return pixels, batch.images, torch.from_numpy(labels).long()


def describe_trial(trial: TrialFolder) -> str:
    """Name a trial by its network, method and number."""
    return f"{trial.recipe.student.network} by {trial.recipe.method}, trial {trial.number}"
