"""Atomic writes and JSON files."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from heterokd.errors import StudyError
from heterokd.storage.disk import when_writable

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
"""Suffix of a file that is being written: `.NAME.HOST.PID.RANDOM.partial`."""


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, waiting for a disk that cannot be written at present."""
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically, waiting for a disk that cannot be written at present.

    Args:
        path: the file.
        write: writes the content to the path that it gets; it may be called again after it failed.
    """

    def write_and_rename() -> None:
        with replacing(path) as partial:
            write(partial)

    when_writable(path, write_and_rename)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file in the same folder, which replaces `path` on success and is removed on failure.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = f"{socket.gethostname()}.{os.getpid()}.{uuid4().hex[:8]}"
    partial = path.with_name(f".{path.name}.{owner}{PARTIAL}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object; empty if the file does not exist.

    Raises:
        StudyError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise damaged(path, error) from None
    if not isinstance(content, dict):
        raise damaged(path, "expected a JSON object")
    return content


def read_derived(path: Path) -> dict[str, object]:
    """Read a JSON object that can be computed again; empty if the file is missing or, with a warning, damaged."""
    try:
        return read_json(path)
    except StudyError as error:
        logger.warning("%s: is computed again", str(error).partition("; ")[0])
        return {}


def damaged(path: Path, reason: object) -> StudyError:
    """Return the error for a file whose content cannot be used."""
    return StudyError(f"{path}: is damaged ({reason}); restore it from a backup, or move it away")
