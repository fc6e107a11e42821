"""StudySummary: what a study has found, read from and written to summary.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from heterokd.storage.files import damaged, read_json, write_text
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.teacher_card import TeacherCard
from heterokd.storage.typed_json import parse
from heterokd.study.failures import DistillationFailure
from heterokd.study.progress import StudyProgress
from heterokd.study.ranked_config import RankedConfig

SUMMARY_LEADERS = 20
"""Number of leaders in a summary, which is rewritten after each trial."""


@dataclass(frozen=True)
class HarmfulTrial:
    """A trial that was clearly worse than the same student without a teacher, and was stopped at `epoch`."""

    number: int
    method: str
    epoch: int


@dataclass(frozen=True)
class StudySummary:
    """Results of a study so far; summary.json, which is rewritten after each trial.

    Attributes:
        name: name of the study.
        metric: metric that is searched.
        maximise: whether a larger value is better.
        methods: methods that are searched.
        excluded: methods that cannot be built for the pair, with the reason.
        left_out: students that exceed a limit, with the reason.
        students: costs of each student.
        cost_conditions: how costs with a limit or among the objectives were measured, or that they are from a table.
        val_images: number of validation images; 0 in studies of older versions.
        objectives: metric and costs; empty if the metric is the only objective.
        progress: number of trials in each state.
        budget: limits, by the keys of `search.budget`; None: no limit.
        spent: what was spent, by the same keys.
        negative_transfer: trials with negative transfer.
        changes: what was changed of the search space while it was resumed, a sentence for each time.
        warm_studies: finished studies that it started from, with their similarity from 0 to 1.
        failing: methods that failed repeatedly and were left out of the rest of the search, with the reason.
        failing_nodes: nodes of the cluster that the newest run of the search avoided, with the reason.
        distillation_failure: set if every trial with a teacher failed.
        winner: the best configuration; None before the first complete trial.
        scratch: the best configuration without a teacher.
        front: Pareto front, the best configuration of each of its students; empty without costs as objectives.
        leaders: the leading configurations, best first.
        teacher: the winner's teacher, or the first; known after the search.
        teachers: all teachers.
    """

    name: str
    metric: str
    maximise: bool
    methods: tuple[str, ...] = ()
    excluded: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    students: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    cost_conditions: Mapping[str, str] = field(default_factory=dict)
    val_images: int = 0
    objectives: tuple[str, ...] = ()
    progress: StudyProgress = field(default_factory=StudyProgress)
    budget: Mapping[str, int | float | None] = field(default_factory=dict)
    spent: Mapping[str, int | float | None] = field(default_factory=dict)
    negative_transfer: tuple[HarmfulTrial, ...] = ()
    changes: tuple[str, ...] = ()
    warm_studies: Mapping[str, float] = field(default_factory=dict)
    failing: Mapping[str, str] = field(default_factory=dict)
    failing_nodes: Mapping[str, str] = field(default_factory=dict)
    distillation_failure: DistillationFailure | None = None
    winner: RankedConfig | None = None
    scratch: RankedConfig | None = None
    front: tuple[RankedConfig, ...] = ()
    leaders: tuple[RankedConfig, ...] = ()
    teacher: TeacherCard | None = None
    teachers: tuple[TeacherCard, ...] = ()

    @property
    def has_failed(self) -> bool:
        """Whether no student is worth registering, since every trial with a teacher, or every trial, failed."""
        return self.distillation_failure is not None or (self.winner is None and self.progress.failed > 0)

    @property
    def limits(self) -> dict[str, float]:
        """Limits of the budget that are set."""
        return {key: limit for key, limit in self.budget.items() if limit is not None and key != "price"}

    def leader(self, number: int) -> RankedConfig | None:
        """Return the leader that a trial found, or None."""
        known = (*self.leaders, *(each for each in (self.winner, self.scratch) if each is not None))
        return next((leader for leader in known if leader.number == number), None)

    def confirmed(self, number: int) -> RankedConfig | None:
        """Return the leader that a trial found if it was repeated on fresh seeds, otherwise None."""
        found = self.leader(number)
        return found if found is not None and found.confirmed else None

    def rows(self, most: int | None = None) -> list[RankedConfig]:
        """Return the first leaders and scratch in the order of a table: by what it shows.

        The winner comes first, then the confirmed ones, then the others, each by the worse end of their interval.

        Args:
            most: maximum number of leaders; None: all, without adding scratch.
        """
        chosen = list(self.leaders[:most])
        scratch = self.scratch
        if most is not None and scratch is not None and all(each.number != scratch.number for each in chosen):
            chosen.append(scratch)

        def place(leader: RankedConfig) -> tuple[bool, bool, bool, float]:
            is_winner = self.winner is not None and leader.number == self.winner.number
            worse = leader.low if self.maximise else leader.high
            ordered = 0.0 if worse is None else -worse if self.maximise else worse
            return not is_winner, not leader.confirmed, worse is None, ordered

        return sorted(chosen, key=place)

    def teacher_of(self, network: str) -> TeacherCard | None:
        """Return the card of a teacher, or that of the winner's teacher if the name is unknown."""
        return next((card for card in self.teachers if card.network == network), self.teacher)

    def to_json(self) -> dict[str, object]:
        """Return the content of summary.json: plain values, no NaN."""
        content = {("standing" if key == "progress" else key): value for key, value in asdict(self).items()}
        content["front"] = [{**asdict(member), **self.students.get(member.student, {})} for member in self.front]
        del content["teacher"], content["teachers"]
        if self.teacher is not None:
            content["teacher"] = self.teacher.content()
            content["teachers"] = [card.content() for card in self.teachers]
        return {key: _plain(value) for key, value in content.items() if value or key not in _UNLESS_EMPTY}

    @classmethod
    def from_json(cls, content: Mapping[str, object]) -> StudySummary:
        """Read the content of summary.json, also of an older version; unknown keys are left out.

        Raises:
            ValueError: a value is missing or of another type.
        """
        known = {key: value for key, value in content.items() if value is not None}
        return parse(cls, {**known, "progress": content.get("standing", {})})

    def write(self, folder: StudyFolder) -> None:
        """Replace a study's summary.json."""
        write_text(folder.summary_file, json.dumps(self.to_json(), indent=1))


_UNLESS_EMPTY = (
    *("changes", "warm_studies", "cost_conditions", "failing", "failing_nodes", "distillation_failure"),
    *("val_images", "iou_classes"),
)
"""Keys of summary.json that are left out if they are empty."""


def stored_summary(folder: StudyFolder) -> StudySummary | None:
    """Read a study's summary.json; None if it is missing.

    Raises:
        StudyError: the file is damaged.
    """
    content = read_json(folder.summary_file)
    if not content:
        return None
    try:
        return StudySummary.from_json(content)
    except ValueError as error:
        raise damaged(folder.summary_file, error) from None


def _plain(value: object) -> object:
    """Convert to JSON's values: lists for tuples, null for floats that are not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items() if inner or key not in _UNLESS_EMPTY}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
