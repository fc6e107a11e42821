"""Start a search from finished studies of similar pairs: their leaders and the ranks of their methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from statistics import fmean

from heterokd.config.experiment import TEACHER, Experiment
from heterokd.domains import Scalar
from heterokd.errors import StudyError
from heterokd.methods import BASELINE
from heterokd.storage.workspace import Workspace
from heterokd.study.similar_studies import SimilarStudy, similar_studies
from heterokd.study.summary import StudySummary, stored_summary

LEADERS = 3
"""Number of leaders taken from each study."""

AUTO = "auto"
"""Value of `search.warm_start_from` that takes similar studies of the workspace."""

NOTHING_SIMILAR = "search.warm_start_from: auto finds no finished study like this one in the workspace; none is used."

MOST_SAMPLES = 6
"""Number of samples that a search with `AUTO` tries first, all studies together."""


@dataclass(frozen=True)
class WarmStart:
    """Samples and ranks from finished studies of similar pairs.

    Attributes:
        samples: their leaders, translated to this experiment's space, best first.
        ranks: mean rank of each method: 0 is the best, 1 the worst.
        studies: the studies with their weight.
    """

    samples: tuple[dict[str, Scalar], ...] = ()
    ranks: Mapping[str, float] = field(default_factory=dict)
    studies: Mapping[str, float] = field(default_factory=dict)


def warm_start(experiment: Experiment, root: Workspace, val_images: int, num_classes: int | None) -> WarmStart:
    """Return what `search.warm_start_from` takes from other studies; empty if the key is not set.

    Args:
        experiment: experiment of the search.
        root: workspace.
        val_images: number of validation images.
        num_classes: number of classes; None: not compared.

    Raises:
        StudyError: a study that is named is unknown, unfinished, or this study itself.
    """
    if experiment.search.warm_start_from != AUTO:
        return warm_starts(experiment, [SimilarStudy(each, 1.0) for each in finished_summaries(experiment, root)])
    found = warm_starts(experiment, similar_studies(experiment, root, val_images, num_classes))
    return replace(found, samples=found.samples[:MOST_SAMPLES])


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


def warm_starts(experiment: Experiment, studies: Sequence[SimilarStudy]) -> WarmStart:
    """Derive samples and ranks from other studies; ranks are means by weight.

    Values are clipped to the experiment's domains; unknown keys are left out.
    """
    columns = []
    ranks: dict[str, list[tuple[float, float]]] = {}
    for study in studies:
        leaders = [leader for leader in study.summary.leaders if leader.method in experiment.methods]
        teacher = study.summary.teacher.network if study.summary.teacher else ""
        followed: dict[str, Scalar] = {TEACHER: teacher} if teacher in experiment.teacher.networks else {}
        first = list(dict.fromkeys(leader.method for leader in leaders))
        for place, method in enumerate(first):
            ranks.setdefault(method, []).append((place / max(1, len(first) - 1), study.weight))
        best = [leader.sample for leader in leaders if leader.method != BASELINE][:LEADERS]
        columns.append([{**followed, **sample} for sample in best])
    # The best of each study, then the second of each.
    found = [sample for row in zip_longest(*columns) for sample in row if sample is not None]
    samples: list[dict[str, Scalar]] = []
    for sample in (_translate(experiment, each) for each in found):
        if sample not in samples:
            samples.append(sample)
    means = {method: fmean(*zip(*found, strict=True)) for method, found in ranks.items()}
    return WarmStart(tuple(samples), means, {study.summary.name: study.weight for study in studies})


def _translate(experiment: Experiment, sample: Mapping[str, Scalar]) -> dict[str, Scalar]:
    method = str(sample["method"])
    known = experiment.domains(method)
    return experiment.published(method, {key: value for key, value in sample.items() if key in known})
