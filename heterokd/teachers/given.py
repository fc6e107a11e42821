"""Teachers with given weights: where a checkpoint's file is, the order of its classes, and whether it starts a fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from heterokd.config.networks import NetworkSettings
from heterokd.config.recipe import Recipe
from heterokd.datasets.io.split import Splits
from heterokd.errors import CheckpointError
from heterokd.networks.weights import FoundWeights, find_weights, weights_hash
from heterokd.storage.files import read_json, write_text
from heterokd.storage.workspace import Workspace
from heterokd.training.student import build_configured, save_student

STORES = ("models:/", "runs:/")
"""Beginnings of the URIs of weights in MLflow."""
SOURCE = "source.json"
"""File next to downloaded or converted weights: where they are from."""


def is_stored(checkpoint: Path) -> bool:
    """Whether a checkpoint is the URI of weights in MLflow."""
    return str(checkpoint).startswith(STORES)


def download_folder(checkpoint: Path, root: Workspace) -> Path:
    """Return the folder of a workspace for the files of weights in MLflow."""
    return root.teachers / "stored" / hashlib.sha256(str(checkpoint).encode()).hexdigest()[:16]


def local_file(checkpoint: Path, root: Workspace) -> Path:
    """Return the file of a checkpoint: of weights in MLflow, the downloaded file.

    Raises:
        CheckpointError: it has not been downloaded.
        OSError: the store of the workspace does not answer.
    """
    if not is_stored(checkpoint):
        return checkpoint
    folder = download_folder(checkpoint, root)
    root.mirror(folder).fetch()
    name = read_json(folder / SOURCE).get("file")
    if not isinstance(name, str):
        raise CheckpointError(f"teacher: {checkpoint} is not downloaded yet; `heterokd teacher EXPERIMENT` does it")
    return folder / name


@dataclass(frozen=True)
class GivenWeights:
    """Weights of a teacher that is not fitted.

    Attributes:
        file: safetensors with the network's names, in the data's order of classes.
        source: the checkpoint as the experiment names it.
        notes: how they were read, as phrases.
    """

    file: Path
    source: str
    notes: tuple[str, ...]


def with_local_weights(recipe: Recipe, splits: Splits, root: Workspace) -> tuple[Recipe, str | None]:
    """Return a teacher's recipe with local files; a checkpoint of another number of classes becomes its `start_from`.

    Returns:
        The recipe, and a sentence if a checkpoint only starts a fit, or if the weights that start it were converted.

    Raises:
        CheckpointError: the weights are missing, damaged or of another network.
    """
    settings, sentence = recipe.teacher, None
    if settings.checkpoint is not None:
        given = settings.checkpoint
        file = local_file(given, root)
        settings = settings.model_copy(update={"checkpoint": file})
        found = read_given(settings, file, splits.num_classes, recipe.data.image_size)
        if found.classes != splits.num_classes:
            has = f"has {found.classes} classes" if found.classes else "has no classifier"
            settings = settings.model_copy(update={"checkpoint": None, "start_from": file})
            sentence = (
                f"teacher.checkpoint: {given} {has}, the data set has {splits.num_classes}: the teacher is fitted from "
                "these weights, with a new classifier (teacher.start_from says the same)"
            )
            sentence = "; ".join([sentence, *found.notes])
    elif settings.start_from is not None:
        file = local_file(settings.start_from, root)
        found = read_given(settings, file, splits.num_classes, recipe.data.image_size, "teacher.start_from")
        if found.notes:
            sentence = f"teacher.start_from: {settings.start_from}: {'; '.join(found.notes)}"
        settings = settings.model_copy(update={"start_from": file})
    else:
        return recipe, None
    student = recipe.student.model_copy(update={"start_from": settings.start_from})
    return recipe.model_copy(update={"teacher": settings, "student": student}), sentence


def read_given(
    settings: NetworkSettings, file: Path, num_classes: int, image_size: int, key: str = "teacher.checkpoint"
) -> FoundWeights:
    """Read given weights of a network; cached while the file is unchanged.

    Args:
        settings: network and its options.
        file: local file of its weights.
        num_classes: K of its logits.
        image_size: pixels.
        key: key of the experiment that names the file, for messages.

    Raises:
        CheckpointError: see `find_weights`.
        NetworkError: the network cannot be built.
    """
    written = file.stat().st_mtime_ns if file.exists() else 0
    try:
        network = NetworkSettings(network=settings.network, options=settings.options).model_dump_json()
        return _read(network, file, num_classes, image_size, written)
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from None


@lru_cache(maxsize=2)
def _read(network: str, file: Path, num_classes: int, image_size: int, _written: int) -> FoundWeights:
    return find_weights(build_configured(NetworkSettings.model_validate_json(network), num_classes, image_size), file)


def given_weights(recipe: Recipe, splits: Splits, root: Workspace, source: Path) -> GivenWeights:
    """Return the weights of a given teacher as every worker reads them.

    Safetensors with the network's names are used as they are. Others are converted once into a file of the workspace,
    so that nodes need neither the original file nor its conversion.

    Args:
        recipe: recipe with the local file of the checkpoint.
        splits: data, with the names of its classes.
        root: workspace.
        source: the checkpoint as the experiment names it.

    Raises:
        CheckpointError: the weights are missing, damaged or of another network.
    """
    settings = recipe.teacher
    if settings.checkpoint is None:
        raise CheckpointError("teacher.checkpoint: no file is given")
    found = read_given(settings, settings.checkpoint, splits.num_classes, recipe.data.image_size)
    order, note = _class_order(found, tuple(map(str, splits.class_names)))
    notes = (*found.notes, *([] if note is None else [note]))
    if found.is_plain and order is None:
        return GivenWeights(settings.checkpoint, str(source), notes)
    network = build_configured(settings, splits.num_classes, recipe.data.image_size)
    state = dict(found.state)
    for name in found.heads if order is not None else ():
        state[name] = state[name][torch.tensor(order)]
    network.body.load_state_dict(state, strict=False)
    folder = root.teachers / f"given-{weights_hash(network)[:16]}"
    file = folder / "teacher.safetensors"
    if not file.exists():
        mirror = root.mirror(folder)
        save_student(network, file)
        content: Mapping[str, object] = {"source": str(source), "file": file.name, "notes": notes}
        write_text(folder / SOURCE, json.dumps(content, indent=1))
        mirror.close()
    return GivenWeights(file, str(source), notes)


def _class_order(found: FoundWeights, names: tuple[str, ...]) -> tuple[tuple[int, ...] | None, str | None]:
    """Compare the file's names of classes with the data's.

    Returns:
        The file's number of each class of the data, None if both have the same order; and a phrase, or None.
    """
    if found.class_names is None:
        return None, None
    known, place = found.class_names
    if set(known) == set(names):
        if known == names:
            return None, None
        note = f"its classes are in another order than the data's, by {place}; the classifier is reordered"
        return tuple(known.index(name) for name in names), note
    if place.endswith("of the file") and len(known) == len(names):
        other = next(name for name in known if name not in names)
        return None, f"its class {other!r}, by {place}, is no class of the data; whether the classes match is unknown"
    return None, None
