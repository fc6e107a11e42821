"""What to know before relying on a study's winner: a sentence each, the most important first."""

from __future__ import annotations

import math

from heterokd.formatting import format_score, join_words
from heterokd.methods import BASELINE
from heterokd.report.study_data import StudyReport
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.gain import gain

SMALL_CHANCE = 0.01
"""Half width of a score's binomial 95 % interval from which a validation set is called small."""

LOW_RECALL, LEAST_IMAGES = 0.5, 5
"""A class with at least so many images fails if a smaller share of them is found."""

MOST_NAMED = 6
"""Maximum number of configurations or classes that a sentence names."""


def caveats(report: StudyReport) -> list[str]:
    """List ties for the first place, a small validation set, methods that were only stopped early, failing classes."""
    found = (_ties(report), _small_validation(report), _only_stopped(report), _failing_classes(report))
    return [sentence for sentence in found if sentence]


def _named(names: list[str]) -> str:
    more = len(names) - MOST_NAMED
    return join_words(names[:MOST_NAMED]) if more <= 0 else f"{', '.join(names[:MOST_NAMED])} and {more} more"


def _ties(report: StudyReport) -> str:
    winner, summary = report.winner, report.summary
    if winner is None:
        return ""
    tied = []
    for leader in summary.rows():
        compared = gain(winner, leader, maximise=summary.maximise)
        if leader.number == winner.number or leader.method == BASELINE or not leader.confirmed or compared is None:
            continue
        if compared.grade not in ("significant", "likely"):
            tied.append(f"{leader.method} (trial {leader.number}, {format_score(leader.mean)})")
    if not tied:
        return ""
    verb = "is" if len(tied) == 1 else "are"
    return (
        f"Tie for the first place: {_named(tied)} {verb} not known to be worse than the winner; fresh seeds decide it."
    )


def _small_validation(report: StudyReport) -> str:
    """Compare one image, and the chance of the choice of images, with the differences that a search looks for."""
    winner = report.winner
    images = report.summary.val_images or (0 if report.measured is None else report.measured.images)
    is_share = report.summary.metric.rpartition("/")[2] in ("top1", "top5")
    if winner is None or winner.mean is None or not images or not is_share:
        return ""
    half = 1.96 * math.sqrt(max(winner.mean * (1 - winner.mean), 0.0) / images)
    if half < SMALL_CHANCE:
        return ""
    return (
        f"Small validation set: with {images} images, the choice of images alone moves this score by {half:.4f} either "
        f"way (95 %), and an image is {1 / images:.4f}. The intervals above cover seeds, not the choice of images."
    )


def _only_stopped(report: StudyReport) -> str:
    winner = report.winner
    methods = []
    for method in dict.fromkeys(trial.method for trial in report.search):
        trials = [trial for trial in report.search if trial.method == method]
        is_searched = not report.summary.methods or method in report.summary.methods
        if is_searched and all(trial.status == TrialStatus.PRUNED for trial in trials):
            methods.append(method)
    if not methods or winner is None:
        return ""
    return (
        f"Never trained to the end: {_named(methods)}. All their trials were stopped early for being behind, and a "
        "slow starter may still be good: raise search.min_epochs, or train it with heterokd distill EXPERIMENT "
        "--method NAME."
    )


def _failing_classes(report: StudyReport) -> str:
    measured = report.measured
    if measured is None or measured.confusion is None:
        return ""
    low = []
    for place, name in enumerate(measured.classes):
        images = int(measured.confusion[place].sum())
        recall = float(measured.confusion[place, place]) / images if images else 1.0
        if images >= LEAST_IMAGES and recall < LOW_RECALL:
            low.append((recall, f"{name} ({recall:.0%} of {images})"))
    if not low:
        return ""
    return f"Classes of which the winner finds less than half: {_named([text for _, text in sorted(low)])}."
