"""Checkpoints of a training: the last two, so that a damaged file costs only the epochs between the two."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch

from heterokd.errors import CheckpointError
from heterokd.storage.disk import PASSING
from heterokd.storage.files import write_file
from heterokd.storage.study_dir import previous_checkpoint

State = dict[str, object]
"""What `state_dict` of a module or an optimizer returns."""


@dataclass(frozen=True)
class Checkpoint:
    """State of a training after an epoch.

    Attributes:
        recipe: hash of the recipe.
        epoch: number of finished epochs.
        states: states of the training's parts by name.
    """

    recipe: str
    epoch: int
    states: dict[str, State]


def write_checkpoint(file: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically and keep the previous checkpoint; wait while the disk cannot be written."""
    content = {"recipe": checkpoint.recipe, "epoch": checkpoint.epoch, **checkpoint.states}

    def write(partial: Path) -> None:
        with partial.open("wb") as target:
            torch.save(content, target)
            target.flush()
            os.fsync(target.fileno())
        if file.exists():
            os.replace(file, previous_checkpoint(file))

    write_file(file, write)


def read_checkpoint(file: Path, recipe: str, parts: Collection[str]) -> Checkpoint:
    """Read and verify a checkpoint.

    Args:
        file: file of the checkpoint.
        recipe: hash of the recipe that it must belong to.
        parts: names of the parts whose states it must hold.

    Raises:
        CheckpointError: it is damaged, or belongs to another recipe.
        OSError: the disk cannot be read at present.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()  # torch.load does not verify checksums
        if broken is not None:
            raise ValueError(f"wrong checksum of {broken}")
        content = torch.load(file, map_location="cpu", weights_only=True)
        found = Checkpoint(content["recipe"], int(content["epoch"]), {name: content[name] for name in parts})
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in PASSING:
            raise  # of the disk, not of the file
        raise CheckpointError(f"{file}: is damaged ({type(error).__name__})") from None
    if found.recipe != recipe:
        raise CheckpointError(f"{file}: belongs to recipe {found.recipe}, not {recipe}")
    return found


def set_aside(file: Path) -> Path:
    """Rename a checkpoint that cannot be used, so that no later training reads it; return its new path."""
    unusable = file.with_name(f".{file.name}.{uuid4().hex[:8]}.unusable")
    os.replace(file, unusable)
    return unusable
