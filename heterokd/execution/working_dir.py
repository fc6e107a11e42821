"""Resolve relative paths on every node from the driver's working directory, where the node has it.

A relative `data.root` or checkpoint is resolved from the directory in which the command was typed; nodes that mount
the same folder at the same path find it there as well.
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "HETEROKD_DRIVER_FOLDER"
"""Environment variable that passes the driver's working directory to the nodes' processes."""


def enter() -> None:
    """Change to the driver's directory if it exists here. Ray calls this when a worker process starts."""
    folder = os.environ.get(VARIABLE)
    if folder and Path(folder).is_dir():
        os.chdir(folder)
