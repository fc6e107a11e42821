"""What promotions and rollbacks have in common: the lock, the aliases, and the lines of promotions.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heterokd.storage.files import read_json
from heterokd.storage.workspace import Workspace

CHAMPION = "champion"
LOCK = "promotion.lock"
"""In the root: whoever moves aliases holds it."""
LINES = "promotions.jsonl"


def previous_alias(alias: str) -> str:
    """Who had an alias before: `previous` for the champion, `previous-ALIAS` for any other."""
    return "previous" if alias == CHAMPION else f"previous-{alias}"


def rolled_back_tag(alias: str) -> str:
    """The tag of a version that a rollback took the alias from; likewise."""
    return "rolled_back" if alias == CHAMPION else f"rolled_back.{alias}"


def lines_file(root: Workspace, tags: Mapping[str, str]) -> Path:
    """promotions.jsonl of the study that a version's tags name, or of the root if the study lies elsewhere."""
    folder = root.study(tags.get("study", "-"))
    if read_json(folder.path / "tracking.json").get("study_id") == tags.get("study_id", "-"):
        return folder.path / LINES
    return root.path / LINES


def append_line(root: Workspace, tags: Mapping[str, str], content: Mapping[str, Any]) -> None:
    """Add one line to it."""
    with lines_file(root, tags).open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(content)) + "\n")


def last_line(file: Path) -> dict[str, Any]:
    """The last whole line; empty without one."""
    last: dict[str, Any] = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                last = json.loads(line)
            except ValueError:
                continue  # cut off by a crash
    return last
