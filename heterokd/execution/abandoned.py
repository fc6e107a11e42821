"""Temporary folders that carry the process that made them, and their removal once that process is dead."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from heterokd.errors import StudyError
from heterokd.storage.files import read_json

MARK = "heterokd-driver.json"
"""File in a folder of ours: host, id and start time of its process."""

logger = logging.getLogger(__name__)


def mark(folder: Path) -> None:
    """Record this process as the owner of a folder."""
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "began": psutil.Process().create_time()}
    (folder / MARK).write_text(json.dumps(owner), encoding="utf-8")


def remove_abandoned(parent: Path, pattern: str) -> list[Path]:
    """Remove the marked folders below `parent` whose process on this machine is dead; return them."""
    removed = [folder for folder in sorted(parent.glob(pattern)) if not folder.is_symlink() and _is_abandoned(folder)]
    for folder in removed:
        shutil.rmtree(folder, ignore_errors=True)
    if removed:
        logger.info("%s: removed %d temporary folders of searches that were killed", parent, len(removed))
    return removed


@contextmanager
def scratch_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder, which is removed afterwards; first remove those of killed processes.

    `parent`: folder in which it is made; None: the system's folder for temporary files.
    """
    parent = parent or Path(tempfile.gettempdir())
    remove_abandoned(parent, f"{prefix}*")
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as folder:
        mark(Path(folder))
        yield Path(folder)


def _is_abandoned(folder: Path) -> bool:
    try:
        owner = read_json(folder / MARK)
    except StudyError:
        return False
    pid, began = owner.get("pid"), owner.get("began")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int) or not isinstance(began, float):
        return False
    with suppress(psutil.NoSuchProcess):
        # Start times are compared, since ids of processes are used again.
        return bool(abs(psutil.Process(pid).create_time() - began) > 1.0)
    return True
