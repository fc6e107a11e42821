"""Finished studies of a workspace that resemble an experiment, for `search.warm_start_from: auto`."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass

from heterokd.config.experiment import Experiment
from heterokd.config.reading import read_study_experiment
from heterokd.errors import UserError
from heterokd.storage.workspace import Workspace
from heterokd.study.priors import kinds
from heterokd.study.summary import StudySummary, stored_summary

MOST_STUDIES = 4
"""Number of studies that a search starts from, the most similar ones."""

LEAST_WEIGHT = 0.1
"""Minimum similarity: e^-2.3, such as another kind of teacher and of student, and half as many labels."""


@dataclass(frozen=True)
class SimilarStudy:
    """A finished study and its similarity to an experiment, above 0 and at most 1."""

    summary: StudySummary
    weight: float


@dataclass(frozen=True)
class Traits:
    """What of a search decides whether another one resembles it."""

    teacher_kind: str
    student_kind: str
    dataset: str
    image_size: int
    images: int
    labels_per_class: int | None
    classes: int | None

    @classmethod
    def of(cls, experiment: Experiment, images: int, classes: int | None) -> Traits:
        """Return those of an experiment with this number of validation images, and of classes if it is known."""
        teacher, student = kinds(experiment)
        return cls(
            teacher_kind=teacher,
            student_kind=student,
            dataset=experiment.data.dataset,
            image_size=experiment.data.image_size,
            images=images,
            labels_per_class=experiment.data.labels_per_class,
            classes=classes,
        )

    def distance(self, other: Traits) -> float:
        """Return the distance of two searches.

        1 for each other kind of network, 0.5 for another data set, and 1 for each factor of 4 in image size, of 10 in
        validation images, labels per class and classes, as far as they are known.
        """
        found = 1.0 * (self.teacher_kind != other.teacher_kind) + 1.0 * (self.student_kind != other.student_kind)
        found += 0.5 * (self.dataset != other.dataset)
        found += _apart(self.image_size, other.image_size, 4) + _apart(self.images, other.images, 10)
        if (self.labels_per_class is None) != (other.labels_per_class is None):
            found += 0.5
        found += _apart(self.labels_per_class, other.labels_per_class, 10)
        return found + _apart(self.classes, other.classes, 10)


def similar_studies(
    experiment: Experiment, root: Workspace, val_images: int, num_classes: int | None
) -> list[SimilarStudy]:
    """List the finished studies of a workspace with this metric that resemble an experiment, the most similar first.

    Studies whose files are damaged, or need a file that is gone, are left out.

    Args:
        experiment: experiment of the search; a study of its name is left out.
        root: workspace.
        val_images: number of validation images of the experiment.
        num_classes: its number of classes; None: not compared.

    Returns:
        At most `MOST_STUDIES`, each with a weight of e to the power of minus its distance, see `Traits.distance`.
    """
    traits = Traits.of(experiment, val_images, num_classes)
    found = []
    for folder in root.studies():
        if folder.name == experiment.name:
            continue
        with suppress(UserError):
            summary = stored_summary(folder)
            if summary is None or not summary.progress.finished or summary.metric != experiment.metric:
                continue
            other = read_study_experiment(folder.experiment_file)
            classes = summary.teacher.num_classes if summary.teacher else None
            distance = traits.distance(Traits.of(other, summary.val_images, classes))
            if other.data.task == experiment.data.task and summary.leaders and math.exp(-distance) >= LEAST_WEIGHT:
                found.append(SimilarStudy(summary, math.exp(-distance)))
    return sorted(found, key=lambda study: -study.weight)[:MOST_STUDIES]


def _apart(first: int | None, second: int | None, factor: float) -> float:
    """Return the logarithm of the ratio of two numbers to a base; 0 if one is unknown."""
    return abs(math.log(first / second, factor)) if first and second else 0.0
