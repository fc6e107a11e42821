"""Text files that list images, classes and labels."""

from __future__ import annotations

from pathlib import Path

from heterokd.errors import DataError


def read_pairs(path: Path, advice: str) -> dict[str, str]:
    """Read the lines `<key> <value>` of a text file, in order; values may contain spaces.

    Args:
        path: the file.
        advice: how to get the file, for error messages.

    Raises:
        DataError: the file is missing, a line has no value, or a key is repeated.
    """
    pairs: dict[str, str] = {}
    for number, line in enumerate(read_lines(path, advice), 1):
        key, _, value = line.partition(" ")
        if not key or not value.strip():
            raise DataError(f"{path}: line {number} is {line[:40]!r}, expected `<key> <value>`; {advice}")
        if key in pairs:
            raise DataError(f"{path}: line {number} gives {key!r} a second value; {advice}")
        pairs[key] = value.strip()
    return pairs


def read_lines(path: Path, advice: str) -> list[str]:
    """Read the lines of a text file.

    Raises:
        DataError: the file is missing, empty or not text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise DataError(f"{path}: is missing; {advice}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is no text file; {advice}") from None
    if not lines:
        raise DataError(f"{path}: is empty; {advice}")
    return lines
