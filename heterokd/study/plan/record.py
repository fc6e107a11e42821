"""PlanRecord: the plan that a study was started with and what its search took; plan.json in its folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from heterokd.storage.files import read_derived
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.typed_json import parse
from heterokd.study.plan.costs import Costs
from heterokd.study.plan.estimate import Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Taken:
    """What a search took in all its runs.

    Attributes:
        seconds: wall-clock time.
        teacher_seconds: part of it for fitting the teachers.
        device_hours: device time in the plan's unit.
        money: cost in the plan's currency; None without a price.
        trainings: number of trainings of the search.
        pruned: number of those that were stopped at a rung.
        repeated: number of trainings on fresh seeds.
        disk: bytes of the study's folder.
        ratio: `seconds` divided by the planned time.
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
    """The content of a study's plan.json.

    Attributes:
        question: identity of what was planned; see `question_of`.
        plan: estimate of the search.
        costs: costs that the plan was made from.
        taken: what the search took; None before its end.
    """

    question: str
    plan: Plan
    costs: Costs
    taken: Taken | None = None


def plan_file(folder: StudyFolder) -> Path:
    """Return the file of a study's plan."""
    return folder.path / "plan.json"


def planned(folder: StudyFolder) -> PlanRecord | None:
    """Read a study's plan; None if it has none, or the file is damaged."""
    content = read_derived(plan_file(folder))
    if "plan" not in content:
        return None
    try:
        return parse(PlanRecord, {**content, "taken": content.get("actual") or None})
    except ValueError as error:
        logger.warning("%s: is damaged (%s); `heterokd plan` writes it again", plan_file(folder), error)
        return None
