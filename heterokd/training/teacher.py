"""Live teachers: frozen networks, fitted here, given as a checkpoint, or published by timm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from heterokd.config.networks import TeacherSettings
from heterokd.config.recipe import Recipe
from heterokd.config.schema import SCHEMA
from heterokd.datasets.io.images import image_shape
from heterokd.datasets.io.loaders import EvalLoader
from heterokd.datasets.io.split import Split
from heterokd.datasets.views.policy import BLACK
from heterokd.errors import CheckpointError
from heterokd.networks.combined import CombinedNetwork, in_order
from heterokd.networks.network import AnyNetwork
from heterokd.networks.weights import file_digest, load_weights
from heterokd.outputs import EVERY_NETWORK, Batch, Outputs, OutputSpec, Signal
from heterokd.training.evaluation import predict_classes
from heterokd.training.folds import Folds
from heterokd.training.student import build_configured
from heterokd.training.teacher_views import TeacherViews

FIRST_FIT = "all"
"""Fit of the first version, which is no part of a teacher's hash."""

LIVE = EVERY_NETWORK | Signal.CLASS_MAPS | Signal.PRE_ACTIVATIONS


class Teacher(Protocol):
    """Source of the teacher's outputs: a live network, or a cache."""

    spec: OutputSpec
    serves: Signal

    def outputs(self, batch: Batch, needs: Signal) -> Outputs:
        """Return the teacher's outputs for these views, without gradient (the tail is differentiable)."""
        ...

    def classes(self, loader: EvalLoader, device: torch.device | str) -> Tensor | None:
        """Return the teacher's predicted classes on a split of plain images, [N] or [N, H, W]; computed once per split.

        None if they would take too much memory.
        """
        ...


class LiveTeacher:
    """A frozen network that runs at every step.

    Args:
        network: network of the teacher; it is set to evaluation mode, without gradients of its parameters.
        views: what it sees if its image size differs from the student's.
        folds: of a cross-fitted teacher, the fold of each training image of the student, see `Folds`.
    """

    def __init__(self, network: AnyNetwork, views: TeacherViews | None = None, folds: Folds | None = None) -> None:
        self.network = network.eval().requires_grad_(requires_grad=False)
        self.spec = network.spec
        self.views, self.folds = views, folds
        self.serves = LIVE & network.spec.serves
        self._classes: dict[int, tuple[Split, Tensor | None]] = {}

    def outputs(self, batch: Batch, needs: Signal) -> Outputs:
        """See `Teacher`."""
        device = next(self.network.parameters()).device
        if device != batch.images.device:
            self.network.to(batch.images.device)
        images = batch.images if self.views is None else self.views.of(batch)
        with torch.no_grad():
            return self._answers(images, self.fold_rows(batch), needs).only(needs, "teacher")

    def fold_rows(self, batch: Batch) -> dict[int, Tensor]:
        """Return the positions in a batch of the images of each fold.

        Empty for plain images (val, test), which all members answer together, and for a teacher without folds.
        """
        if self.folds is None or batch.shown is None:
            return {}
        fold_of = self.folds.of_image[batch.shown[:, 0].numpy()]
        return {int(fold): torch.from_numpy(np.flatnonzero(fold_of == fold)) for fold in np.unique(fold_of)}

    def _answers(self, images: Tensor, fold_rows: Mapping[int, Tensor], needs: Signal) -> Outputs:
        if not isinstance(self.network, CombinedNetwork) or not fold_rows:
            outputs: Outputs = self.network(images, needs)
            return outputs
        rows = list(fold_rows.values())
        parts = [
            self.network.of_fold(images if len(rows) == 1 else images[at.to(images.device)], needs, fold)
            for fold, at in fold_rows.items()
        ]
        return in_order(parts, rows)

    def classes(self, loader: EvalLoader, device: torch.device | str) -> Tensor | None:
        """See `Teacher`."""
        split = loader.split
        if id(split) not in self._classes:
            # The split is stored so that its id is not reused.
            size = () if split.label_maps is None else image_shape(split.label_maps)  # that of the student's canvas
            classes = predict_classes(self.network.to(device), self.plain(loader, device), device, size)
            self._classes[id(split)] = (split, classes)
        return self._classes[id(split)][1]

    def plain(self, loader: EvalLoader, device: torch.device | str) -> EvalLoader:
        """Return a loader of the same plain images at the teacher's size."""
        return loader if self.views is None else self.views.plain(loader, device)


def teacher_hash(teacher: TeacherSettings, recipe: Recipe, fingerprint: str) -> str:
    """Return the name of a teacher's folder: 16 hexadecimal digits over its network, training and data.

    Raises:
        OSError: the file of `teacher.start_from` cannot be read.
    """
    training = recipe.training
    if training.is_shared:  # the number of workers does not change the result
        training = training.model_copy(update={"workers": 1, "gpus_per_worker": "auto"})
    content = {
        "network": teacher.network,
        "options": teacher.options,
        "pretrained": teacher.pretrained,
        "training": SCHEMA.identity(training, "training", training.model_dump(mode="json")),
        "augment": recipe.data.policy.hash,
        "image_size": recipe.data.image_size,
        "data": fingerprint,
    }
    if recipe.data.view_crop is not None:
        content["crop"] = recipe.data.view_crop
    if teacher.fit != FIRST_FIT:
        content["fit"] = teacher.fit
    if recipe.data.fill != BLACK:
        content["fill"] = recipe.data.fill
    if teacher.start_from is not None:
        content["start_from"] = file_digest(teacher.start_from)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def open_teacher(settings: TeacherSettings, num_classes: int, image_size: int, weights: Path | None) -> LiveTeacher:
    """Open a live teacher with the weights of a file, or with timm's published weights if `weights` is None.

    Raises:
        CheckpointError: the file is missing, damaged, or of another network or number of classes.
        NetworkError: the network cannot be built.
    """
    try:
        pretrained = settings.pretrained and weights is None
        network = build_configured(settings, num_classes, image_size, pretrained=pretrained)
    except (OSError, RuntimeError) as error:
        if not settings.pretrained:
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"teacher.pretrained: timm's weights of {settings.network!r} could not be loaded ({first}); "
            "check the network connection, or give teacher.checkpoint"
        ) from None
    if weights is not None:
        load_weights(network, weights)
    return LiveTeacher(network)
