"""Start a search from finished studies of similar pairs: their leaders and the ranks of their methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from statistics import fmean

from heterokd.config.experiment import TEACHER, Experiment
from heterokd.domains import Scalar
from heterokd.errors import StudyError
from heterokd.methods import BASELINE
from heterokd.storage.workspace import Workspace
from heterokd.study.summary import StudySummary, stored_summary

LEADERS = 3
"""Number of leaders taken from each study."""


@dataclass(frozen=True)
class WarmStart:
    """Samples and ranks from finished studies of similar pairs.

    Attributes:
        samples: their leaders, translated to this experiment's space, best first.
        ranks: mean rank of each method: 0 is the best, 1 the worst.
    """

    samples: tuple[dict[str, Scalar], ...] = ()
    ranks: Mapping[str, float] = field(default_factory=dict)


def finished_summaries(experiment: Experiment, root: Workspace) -> list[StudySummary]:
    """Read the summaries of the studies that `search.warm_start_from` names.

    Raises:
        StudyError: a study is unknown, unfinished, or this study itself.
    """
    summaries = []
    for name in experiment.search.warm_start_from:
        if name == experiment.name:
            raise StudyError(f"search.warm_start_from: {name!r} is this study itself; name others")
        try:
            summary = stored_summary(root.existing_study(name))
        except StudyError as error:
            raise StudyError(f"search.warm_start_from: {error}") from None
        if summary is None or not summary.progress.finished:
            raise StudyError(
                f"search.warm_start_from: the study {name!r} is not finished; resume it (heterokd search ... --resume) "
                "or remove it from the list"
            )
        summaries.append(summary)
    return summaries


def other_summaries(experiment: Experiment, root: Workspace) -> list[StudySummary]:
    """Read the summaries of all finished studies of a workspace with this metric; damaged files are left out."""
    found = []
    for folder in root.studies():
        with suppress(StudyError):
            summary = stored_summary(folder)
            if summary is not None and summary.progress.finished and summary.metric == experiment.metric:
                found.append(summary)
    return [summary for summary in found if summary.name != experiment.name]


def warm_starts(experiment: Experiment, summaries: Sequence[StudySummary]) -> WarmStart:
    """Derive samples and ranks from other studies, with equal weight.

    Values are clipped to the experiment's domains; unknown keys are left out.
    """
    columns = []
    ranks: dict[str, list[float]] = {}
    for summary in summaries:
        leaders = [leader for leader in summary.leaders if leader.method in experiment.methods]
        teacher = summary.teacher.network if summary.teacher else ""
        followed: dict[str, Scalar] = {TEACHER: teacher} if teacher in experiment.teacher.networks else {}
        first = list(dict.fromkeys(leader.method for leader in leaders))
        for place, method in enumerate(first):
            ranks.setdefault(method, []).append(place / max(1, len(first) - 1))
        best = [leader.sample for leader in leaders if leader.method != BASELINE][:LEADERS]
        columns.append([{**followed, **sample} for sample in best])
    # The best of each study, then the second of each.
    found = [sample for row in zip_longest(*columns) for sample in row if sample is not None]
    samples: list[dict[str, Scalar]] = []
    for sample in (_translate(experiment, each) for each in found):
        if sample not in samples:
            samples.append(sample)
    return WarmStart(tuple(samples), {method: fmean(found) for method, found in ranks.items()})


def _translate(experiment: Experiment, sample: Mapping[str, Scalar]) -> dict[str, Scalar]:
    method = str(sample["method"])
    known = experiment.domains(method)
    return experiment.published(method, {key: value for key, value in sample.items() if key in known})
