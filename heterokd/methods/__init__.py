"""Every distillation method, one paper a file: the folder is the list.

`METHODS` maps a file's name to the one `Method` defined in it: `methods/dkd.py` -> `METHODS["dkd"]`. A file is imported
when its method is looked up; the names alone cost nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from heterokd.extensions import Implementations
from heterokd.tasks import TaskName

if TYPE_CHECKING:
    from heterokd.method import Method

METHODS: Implementations[Method] = Implementations(__name__, "heterokd.method:Method", __name__)

BASELINE = "scratch"
"""The method without a teacher, which every other one is compared with."""

VANILLA_KD: dict[TaskName, str] = {"classification": "kd", "segmentation": "pixel_kd"}
"""Hinton's distillation by task: it reads logits alone and exists for every pair of networks."""

ONE_OF_EACH_KIND = (BASELINE, "kd", "dkd", "dist", "ofa", "rsd", "hcd", "fbt")
"""A short selection for classification: logits, relations, stages, fused networks. All methods take several times as
long."""
