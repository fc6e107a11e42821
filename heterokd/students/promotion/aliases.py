"""Aliases, lock and promotions.jsonl of promotions and rollbacks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion

from heterokd.config.names import alias_fault
from heterokd.config.sentences import given
from heterokd.errors import PromotionError
from heterokd.storage.files import read_json
from heterokd.storage.workspace import Workspace

CHAMPION = "champion"
LOCK = "promotion.lock"
"""File in the workspace, locked while aliases are moved."""
LINES = "promotions.jsonl"


def check_alias(alias: str) -> None:
    """Refuse an alias that MLflow does not accept, or that heterokd sets itself, before anything is evaluated.

    Raises:
        PromotionError: it is such an alias.
    """
    fault = alias_fault(alias)
    if alias == "challenger" or alias == "previous" or alias.startswith("previous-"):
        fault = "expected an alias that heterokd does not set itself"
    if fault is not None:
        raise PromotionError(f"--alias: {fault}, got {given(alias)}")


def previous_alias(alias: str) -> str:
    """Return the alias of the version that had an alias before: `previous` for the champion, else `previous-ALIAS`."""
    return "previous" if alias == CHAMPION else f"previous-{alias}"


def rolled_back_tag(alias: str) -> str:
    """Return the tag of a version that lost the alias in a rollback: `rolled_back`, or `rolled_back.ALIAS`."""
    return "rolled_back" if alias == CHAMPION else f"rolled_back.{alias}"


def described_version(version: ModelVersion) -> str:
    """Name a version with the trial and method of its student: `version 2: trial 5, dist`."""
    tags = version.tags
    known = [f"trial {tags['trial']}"] if "trial" in tags else []
    known += [tags["method"]] if "method" in tags else []
    return f"version {version.version}{': ' if known else ''}{', '.join(known)}"


def lines_file(root: Workspace, tags: Mapping[str, str]) -> Path:
    """Return promotions.jsonl of the study that a version's tags name, or of the workspace if it lacks the study."""
    folder = root.study(tags.get("study", "-"))
    if read_json(folder.path / "tracking.json").get("study_id") == tags.get("study_id", "-"):
        return folder.path / LINES
    return root.path / LINES


def append_line(file: Path, time: str, content: Mapping[str, object]) -> None:
    """Append a line with its time."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"time": time, **content}) + "\n")


def last_line(file: Path) -> dict[str, object]:
    """Read the last complete line; empty if there is none."""
    last: dict[str, object] = {}
    if file.exists():
        for line in file.read_bytes().splitlines():
            with suppress(ValueError):  # truncated by a crash
                content = json.loads(line)
                last = content if isinstance(content, dict) else last
    return last
