"""StudyOptions: options of opening a study."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from heterokd.storage.machine_load import Load, machine_load
from heterokd.study.pruner import Pruner
from heterokd.study.sampler import Sampler
from heterokd.study.search_space import SearchSpace
from heterokd.study.storage import StudyFacts


@dataclass(frozen=True)
class StudyOptions:
    """Options of opening a study.

    Attributes:
        facts: facts of a new study; an existing study keeps those that it was created with.
        storage: `memory` creates a study that is not kept and touches no file (a simulated search).
        clock: returns the time in seconds, for budgets of time and limits of trials; monotonic.
        load: load of the machine, with which the minimum limits of trials grow.
        trial_seconds: seconds of the longest training by the plan; None without a plan.
        devices: GPUs of a training, which may be a fraction; without GPUs, 1.
        space: space of an experiment that agrees with the study; None: it is made and compared here, which imports
            the methods.
        pruner: replaces the experiment's pruner.
        sampler: replaces the experiment's sampler.
    """

    facts: StudyFacts = field(default_factory=StudyFacts)
    storage: Literal["disk", "memory"] = "disk"
    clock: Callable[[], float] = time.monotonic
    load: Load = machine_load
    trial_seconds: float | None = None
    devices: float = 1.0
    space: SearchSpace | None = None
    pruner: Pruner | None = None
    sampler: Sampler | None = None
