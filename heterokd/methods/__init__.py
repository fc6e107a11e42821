"""Every distillation method, one paper a file: the folder is the list.

`METHODS` maps a file's name to the one `Method` defined in it: `methods/dkd.py` -> `METHODS["dkd"]`.
"""

from __future__ import annotations

from collections.abc import Mapping

from heterokd.extensions import Implementations
from heterokd.method import Method

METHODS: Mapping[str, type[Method]] = Implementations("heterokd.methods", "heterokd.method:Method", "heterokd.methods")
