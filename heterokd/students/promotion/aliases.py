"""Aliases, lock and promotions.jsonl, which promotions and rollbacks share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from heterokd.storage.files import read_json
from heterokd.storage.workspace import Workspace

CHAMPION = "champion"
LOCK = "promotion.lock"
"""File in the root, locked while aliases are moved."""
LINES = "promotions.jsonl"


def previous_alias(alias: str) -> str:
    """Alias of the version that had an alias before: `previous` for the champion, `previous-ALIAS` for any other."""
    return "previous" if alias == CHAMPION else f"previous-{alias}"


def rolled_back_tag(alias: str) -> str:
    """Tag of a version that a rollback took the alias from: `rolled_back`, or `rolled_back.ALIAS`."""
    return "rolled_back" if alias == CHAMPION else f"rolled_back.{alias}"


def lines_file(root: Workspace, tags: Mapping[str, str]) -> Path:
    """promotions.jsonl of the study that a version's tags name, or of the root if the study lies elsewhere."""
    folder = root.study(tags.get("study", "-"))
    if read_json(folder.path / "tracking.json").get("study_id") == tags.get("study_id", "-"):
        return folder.path / LINES
    return root.path / LINES


def append_line(root: Workspace, tags: Mapping[str, str], content: Mapping[str, object]) -> None:
    """Append a line to `lines_file`."""
    with lines_file(root, tags).open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(content)) + "\n")


def last_line(file: Path) -> dict[str, object]:
    """Read the last whole line; empty if there is none."""
    last: dict[str, object] = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                last = json.loads(line)
            except ValueError:
                continue  # cut off by a crash
    return last
