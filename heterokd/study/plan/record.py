"""PlanRecord: the plan that a study was started with and what its search took, as its folder keeps them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from heterokd.storage.files import read_json
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.plan.estimate import Plan


@dataclass(frozen=True)
class Taken:
    """What a search took, all its runs together.

    Attributes:
        seconds: of wall-clock time.
        teacher_seconds: of them to fit the teachers.
        device_hours: in the plan's unit.
        money: in the plan's currency; None without a price.
        trainings: of the search.
        pruned: of them, stopped at a rung.
        repeated: trainings on fresh seeds.
        disk: bytes of the study's folder.
        ratio: `seconds` over what was planned.
    """

    seconds: float = 0.0
    teacher_seconds: float = 0.0
    device_hours: float = 0.0
    money: float | None = None
    trainings: int = 0
    pruned: int = 0
    repeated: int = 0
    disk: int = 0
    ratio: float = 0.0


@dataclass(frozen=True)
class PlanRecord:
    """A study's plan, and what its search took: None before its end."""

    plan: Plan
    taken: Taken | None


def plan_file(folder: StudyFolder) -> Path:
    """Where a study's plan lies."""
    return folder.path / "plan.json"


def planned(folder: StudyFolder) -> PlanRecord | None:
    """Read a study's plan; None where it has none."""
    content = read_json(plan_file(folder))
    if "plan" not in content:
        return None
    taken = content.get("actual")
    known = {one.name for one in fields(Taken)}
    return PlanRecord(
        Plan.from_json(content["plan"]),
        Taken(**{key: value for key, value in taken.items() if key in known}) if taken else None,
    )
