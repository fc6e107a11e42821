"""Use the driver's working directory on every node that has it, so that relative paths mean the same files."""

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
