"""Atomic writes and JSON files."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from heterokd.errors import StudyError
from heterokd.storage.disk import when_writable


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all (temporary file in the same folder, then rename).

    A disk that cannot be written for the moment is waited for.
    """
    when_writable(path, lambda: _replace(path, text))


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when the file does not exist.

    Raises:
        StudyError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StudyError(f"{path}: is damaged ({error}); remove it, or restore it from a backup") from None
    if not isinstance(content, dict):
        raise StudyError(f"{path}: is damaged (expected a JSON object); remove it, or restore it from a backup")
    return content
