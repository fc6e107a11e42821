"""Settings: the base class of an experiment's sections, and the types that sections share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Strict

from heterokd.domains import Scalar

Sample = Mapping[str, Scalar]
"""Values of a trial by key: `method`, its parameters (`kd.temperature`), `training.*`, and networks."""

# YAML has no paths and tuples: they are written as strings and lists.
PathName = Annotated[Path, Strict(False)]
Names = Annotated[tuple[str, ...], Strict(False)]

LARGEST_SEED = 2**63 - 1
"""Largest seed of torch's generators."""
MOST = 1_000_000
"""Maximum number of trials, and of images in a batch; a larger number is a typing mistake."""


class Settings(BaseModel):
    """A section of an experiment: frozen, without unknown keys, and strict (`true` and "3" are not numbers)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
