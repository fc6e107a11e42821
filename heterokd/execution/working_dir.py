"""Where relative paths begin: processes of a cluster stand in the driver's folder, where their node has it.

A `data.root` or a checkpoint that is given by a relative path is looked for from where the command was typed; on nodes
that mount the same folder at the same place it is found there as well.
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "HETEROKD_DRIVER_FOLDER"
"""Of the environment, that says it to the nodes' processes."""


def enter() -> None:
    """Go there; stay where the folder does not exist. Ray calls it when a process starts."""
    folder = os.environ.get(VARIABLE)
    if folder and Path(folder).is_dir():
        os.chdir(folder)
