"""What an older version of heterokd left: its archives, and the answers that it gave (tests/golden/README.md)."""

from __future__ import annotations

import json
import math
import sqlite3
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden"
PREFIX = "/tmp/heterokd-golden"
"""Where the archives' roots lay when they were made (golden/generate.py)."""

TEXT = (".csv", ".html", ".json", ".jsonl", ".md", ".yaml", "MLmodel")


def unpack(name: str, folder: Path) -> Path:
    """Unpack an archive into a folder, and put the folder's path in place of the one where it was made.

    Returns:
        The root.
    """
    with tarfile.open(GOLDEN / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    for file in (file for file in folder.rglob("*") if file.is_file()):
        if file.suffix == ".db":
            _move_database(file, str(folder))
        elif file.name.endswith(TEXT):
            content = file.read_text(encoding="utf-8")
            if PREFIX in content:
                file.write_text(content.replace(PREFIX, str(folder)), encoding="utf-8")
    return folder / "runs"


def _move_database(file: Path, folder: str) -> None:
    with closing(sqlite3.connect(file)) as database, database:
        for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for _, column, kind, *_ in database.execute(f'PRAGMA table_info("{table}")').fetchall():
                if kind.upper().startswith(("VARCHAR", "TEXT", "JSON")):
                    database.execute(
                        f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) WHERE instr("{column}", ?)',
                        (PREFIX, folder, PREFIX),
                    )


def read(name: str) -> Any:
    """The content of a JSON file of golden/."""
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def write(name: str, content: Any) -> None:
    """Write a JSON file of golden/, with a line for each item of the lists inside."""
    (GOLDEN / name).write_text(_lines(content) + "\n", encoding="utf-8")


def _lines(value: Any, depth: int = 0) -> str:
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, Mapping) and value and depth < 3:
        parts = (f"{json.dumps(key)}: {_lines(part, depth + 1)}" for key, part in value.items())
        return "{" + inner + f",{inner}".join(parts) + outer + "}"
    if isinstance(value, list) and value and depth < 3:
        return "[" + inner + f",{inner}".join(map(json.dumps, value)) + outer + "]"
    return json.dumps(value)


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """What differs between two JSON values, a line each.

    Numbers may differ by 1e-12 of themselves: exp and log of another C library may round the last bit differently.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = [f"{where}.{key}: absent now" for key in old if key not in new]
        found += [f"{where}.{key}: absent before" for key in new if key not in old]
        return found + [line for key in old if key in new for line in differences(old[key], new[key], f"{where}.{key}")]
    if isinstance(old, list) and isinstance(new, Sequence) and not isinstance(new, str):
        if len(old) != len(new):
            return [f"{where}: {len(old)} values before, {len(new)} now"]
        return [line for i in range(len(old)) for line in differences(old[i], new[i], f"{where}[{i}]")]
    if isinstance(old, float) and isinstance(new, (int, float)) and not isinstance(new, bool):
        return [] if math.isclose(old, new, rel_tol=1e-12) else [f"{where}: {old!r} before, {new!r} now"]
    return [] if old == new and type(old) is type(new) else [f"{where}: {old!r} before, {new!r} now"]
