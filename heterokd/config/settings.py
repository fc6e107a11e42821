"""Settings: the base of every section of an experiment, and the types that sections share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Strict

from heterokd.domains import Scalar

Sample = Mapping[str, Scalar]
"""What a study proposes for a trial: `method`, that method's `method.parameter` values, `training.*`, networks."""

# YAML has names for neither: a path is written as a text, a tuple as a list.
PathName = Annotated[Path, Strict(False)]
Names = Annotated[tuple[str, ...], Strict(False)]

LARGEST_SEED = 2**63 - 1
"""Of torch's generators."""
MOST = 1_000_000
"""Upper limit of trials and of images in a batch: larger values are typing mistakes."""


class Settings(BaseModel):
    """A section of an experiment: frozen; unknown keys are errors; `true` and "3" are no numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
