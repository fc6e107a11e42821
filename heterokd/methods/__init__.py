"""Every distillation method, one paper a file: the folder is the list.

`METHODS` maps a file's name to the one `Method` defined in it: `methods/dkd.py` -> `METHODS["dkd"]`.
"""

from __future__ import annotations

from collections.abc import Mapping

from heterokd.extensions import Implementations
from heterokd.method import Method
from heterokd.tasks import TaskName

METHODS: Mapping[str, type[Method]] = Implementations("heterokd.methods", "heterokd.method:Method", "heterokd.methods")

BASELINE = "scratch"
"""The method without a teacher, which every other one is compared with."""

VANILLA_KD: dict[TaskName, str] = {"classification": "kd", "segmentation": "pixel_kd"}
"""Hinton's distillation by task: it reads logits alone and exists for every pair of networks."""

ONE_OF_EACH_KIND = (BASELINE, "kd", "dkd", "dist", "ofa", "rsd", "hcd", "fbt")
"""A short selection for classification: logits, relations, stages, fused networks. All methods take several times as
long."""
