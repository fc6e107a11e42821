"""SpaceChange: what a resumed experiment adds to the search space of its study, and what it removes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from heterokd.config.experiment import Experiment
from heterokd.formatting import join_words
from heterokd.methods import BASELINE, PLUS

MOST_NAMED = 8
"""Maximum number of names or domains in a sentence."""


class _Training(Protocol):
    """What `is_searched` reads of a trial."""

    @property
    def method(self) -> str: ...
    @property
    def student(self) -> str: ...


def is_searched(trial: _Training, methods: Collection[str], experiment: Experiment) -> bool:
    """Return whether a trial may win: its method and its student are in the search space.

    Scratch is what all others are compared with, so its trials count as long as their student is searched.

    Args:
        trial: a trial of the study.
        methods: methods that are searched.
        experiment: experiment of the study, without the students that are left out.
    """
    return trial.student in experiment.student.networks and (trial.method in methods or trial.method == BASELINE)


@dataclass(frozen=True)
class SpaceChange:
    """Difference between the search space of an experiment and that of its study.

    Attributes:
        added_methods: methods that the study did not search.
        removed_methods: methods that are not searched any more.
        added_students: students that the study did not search.
        removed_students: students that are not searched any more.
        domains: domains of other parameters that differ, before and now; `absent` if there is none.
    """

    added_methods: tuple[str, ...] = ()
    removed_methods: tuple[str, ...] = ()
    added_students: tuple[str, ...] = ()
    removed_students: tuple[str, ...] = ()
    domains: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def adds(self) -> str:
        """The added methods and students as text; empty if there are none."""
        return join_words(_named("method", self.added_methods) + _named("student", self.added_students))

    @property
    def removes(self) -> str:
        """The removed methods and students as text; empty if there are none."""
        return join_words(_named("method", self.removed_methods) + _named("student", self.removed_students))

    def sentence(self, finished: int) -> str:
        """Say what has changed, and what becomes of the trials so far.

        `finished` is the number of trials that have ended.
        """
        parts = [f"{self.adds} added"] if self.adds else []
        parts += [f"{self.removes} removed"] if self.removes else []
        changed = [f"{key} {before} -> {now}" for key, (before, now) in self.domains.items()]
        if changed:
            more = len(changed) - MOST_NAMED
            parts.append("; ".join(changed[:MOST_NAMED]) + (f"; {more} more domains" if more > 0 else ""))
        text = f"The search space has changed: {'; '.join(parts)}. The {finished} trials that have ended count on"
        if self.removes:
            text += "; those of what was removed stay in the tables, but are neither repeated nor chosen as winner"
        return f"{text}."

    def to_json(self) -> dict[str, object]:
        """Return the change as plain values, without what is empty."""
        content: dict[str, dict[str, object]] = {
            "added": {"methods": list(self.added_methods), "students": list(self.added_students)},
            "removed": {"methods": list(self.removed_methods), "students": list(self.removed_students)},
            "domains": {key: {"before": before, "now": now} for key, (before, now) in self.domains.items()},
        }
        found = {key: {name: value for name, value in part.items() if value} for key, part in content.items()}
        return {key: part for key, part in found.items() if part}


def _named(kind: str, names: Collection[str]) -> list[str]:
    """Return names with their kind as an item of a sentence; pairs of methods are counted."""
    if not names:
        return []
    single = [name for name in names if PLUS not in name]
    pairs = len(names) - len(single)
    if len(single) > MOST_NAMED:
        single = [*single[:MOST_NAMED], f"{len(single) - MOST_NAMED} more"]
    found = [f"{kind}{'s' if len(single) > 1 else ''} {join_words(single)}"] if single else []
    return found + ([f"{pairs} combination{'s' if pairs > 1 else ''}"] if pairs else [])
