"""All distillation methods, one paper per file; the folder is the list.

`METHODS` maps a file's name to the `Method` defined in it: `methods/dkd.py` -> `METHODS["dkd"]`. A file is imported
when its method is looked up; listing the names imports nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from heterokd.extensions import Implementations
from heterokd.tasks import TaskName

if TYPE_CHECKING:
    from heterokd.method import Method

METHODS: Implementations[Method] = Implementations(__name__, "heterokd.method:Method", __name__)

BASELINE = "scratch"
"""Name of the method without a teacher, the baseline of all comparisons."""

VANILLA_KD: dict[TaskName, str] = {"classification": "kd", "segmentation": "pixel_kd"}
"""Hinton's distillation by task; it reads only logits and exists for every pair of networks."""

ONE_OF_EACH_KIND = (BASELINE, "kd", "dkd", "dist", "ofa", "rsd", "hcd", "fbt")
"""Short selection for classification, with logits, relations, stages and fused networks. A search of all methods takes
several times as long."""

SCENE_METHODS = (BASELINE, "pixel_kd", "cwd", "heteroakd")
"""Short selection for segmentation."""
