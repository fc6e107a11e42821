"""The plan that a study was started with, as its folder keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from heterokd.storage.files import read_json
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.plan.estimate import Plan


def plan_file(folder: StudyFolder) -> Path:
    """Where a study's plan lies."""
    return folder.path / "plan.json"


def planned(folder: StudyFolder) -> tuple[Plan, dict[str, Any]] | None:
    """A study's plan and what its search took (empty before its end); None where it has no plan."""
    content = read_json(plan_file(folder))
    if "plan" not in content:
        return None
    return Plan.from_json(content["plan"]), content.get("actual", {})
