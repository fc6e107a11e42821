"""What a student reaches without a teacher, where a study of the workspace has trained it: known before a search."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_study_experiment
from heterokd.errors import UserError
from heterokd.formatting import format_score, metric_name
from heterokd.storage.teacher_card import TeacherCard
from heterokd.storage.workspace import Workspace
from heterokd.study.summary import stored_summary


def known_scratch(experiment: Experiment, root: Workspace) -> tuple[str, float] | None:
    """Return the study with the best student without a teacher, of the same data and students, and its mean; or None.

    Studies whose files are damaged, or whose trainings are longer, are left out.
    """
    found: list[tuple[float, str]] = []
    for folder in root.studies():
        with suppress(UserError):
            summary, other = stored_summary(folder), load_study_experiment(folder.experiment_file)
            if summary is None or summary.scratch is None or summary.scratch.mean is None or not summary.maximise:
                continue
            is_same = (other.data, other.student, other.metric) == (
                experiment.data,
                experiment.student,
                experiment.metric,
            )
            if is_same and other.training.epochs <= experiment.training.epochs:
                found.append((summary.scratch.mean, summary.name))
    if not found:
        return None
    mean, name = max(found)
    return name, mean


def weak_teachers(cards: Sequence[TeacherCard], experiment: Experiment, root: Workspace) -> str | None:
    """Return the sentence that every teacher is worse than a student that is known without a teacher, or None."""
    scores = [card.val_score for card in cards if card.metric == experiment.metric]
    known = known_scratch(experiment, root) if scores and len(scores) == len(cards) else None
    if known is None or max(scores) >= known[1]:
        return None
    name, mean = known
    return (
        f"the teacher reaches {metric_name(experiment.metric)} {format_score(max(scores))} on val, less than the "
        f"student without a teacher in study {name!r} ({format_score(mean)}): improve or replace the teacher first"
    )
