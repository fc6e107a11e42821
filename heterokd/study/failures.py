"""Failures of a search: methods that fail repeatedly, and a search in which all distillation failed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from heterokd.methods import BASELINE
from heterokd.storage.trial_status import TrialStatus

if TYPE_CHECKING:
    from heterokd.study.trials import TrialRecord, Trials

IN_A_ROW = 3
"""Failures in a row, for the same reason, after which a method is left out of the search."""

REASON_LENGTH = 200
"""Maximum length of a reason in a sentence."""

_CHANGING = re.compile(r"0x[0-9a-f]+|/\S+|[-+]?\d[\d.,e+-]*", re.IGNORECASE)
"""Parts of a message that differ between failures for the same reason: addresses, paths and numbers."""


@dataclass(frozen=True)
class DistillationFailure:
    """All trials with a teacher have failed.

    Attributes:
        trials: number of these trials.
        reason: most frequent reason.
    """

    trials: int
    reason: str


@lru_cache(maxsize=1024)
def failure_kind(error: str) -> str:
    """Return an error's type and message without the parts that differ between failures for the same reason.

    >>> failure_kind("RuntimeError: shapes (32x512 and 384x100) differ")
    'RuntimeError: shapes (#x# and #x#) differ'
    """
    return " ".join(_CHANGING.sub("#", error).split())


def failing_methods(trials: Trials) -> dict[str, str]:
    """Return the methods that are left out of the rest of the search, with the reason.

    A method is left out once `IN_A_ROW` of its trials, in their order and without those that run, have failed for the
    same reason. A diverged trial may be due to its sample: it counts only if all trials of its method have failed.
    """
    failures = sum(count for (status, _), count in trials.counts.items() if status.is_failure)
    if failures < IN_A_ROW:
        return {}
    ended: dict[str, list[TrialRecord]] = {}
    for record in trials.search:
        if record.status.is_final:
            ended.setdefault(record.method, []).append(record)
    found: dict[str, str] = {}
    for method, records in ended.items():
        always = all(record.status.is_failure for record in records)
        for end in range(IN_A_ROW, len(records) + 1):
            row = records[end - IN_A_ROW : end]
            if all(_is_to_blame(record, always=always) for record in row) and len({_kind(each) for each in row}) == 1:
                found[method] = reason_of(row[-1])
                break
    return found


def distillation_failure(trials: Trials) -> DistillationFailure | None:
    """Return the failure of all trials of the search with a teacher; None if one has not failed, or there is none."""
    distilled = [record for record in trials.search if record.method != BASELINE]
    if not distilled or not all(record.status.is_failure for record in distilled):
        return None
    return DistillationFailure(len(distilled), most_frequent(distilled))


def most_frequent(failed: Sequence[TrialRecord]) -> str:
    """Return the most frequent reason of failures, as the first of them has it."""
    counts = Counter(map(_kind, failed))
    return reason_of(max(failed, key=lambda record: (counts[_kind(record)], -record.number)))


def reason_of(record: TrialRecord) -> str:
    """Return the reason of a failure, short enough for a sentence."""
    reason = record.error or str(record.status)
    return reason if len(reason) <= REASON_LENGTH else f"{reason[:REASON_LENGTH]}..."


def _kind(record: TrialRecord) -> str:
    return failure_kind(record.error or str(record.status))


def _is_to_blame(record: TrialRecord, *, always: bool) -> bool:
    if not record.error:
        return False  # the reason is unknown
    return record.status == TrialStatus.FAILED or (record.status == TrialStatus.DIVERGED and always)
