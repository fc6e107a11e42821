"""TeacherCard: content of teacher.json, next to a teacher's weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from heterokd.formatting import classes_of, format_classes, metric_name

CHANCE_DEVIATIONS = 3
"""Standard deviations above chance up to which a score counts as near chance."""
SURE = 0.95
"""Mean confidence on train from which a teacher may have memorised its images."""
MEMORISED_GAP = 0.1
"""Difference of the scores on train and val from which a sure teacher counts as having memorised its images."""
SHOWN_CLASSES = 5
LONGEST_ORDER = 40
"""Maximum number of classes of an order that is printed."""


@dataclass(frozen=True)
class TeacherCard:
    """Description of a teacher. What was not measured is None or empty.

    Attributes:
        network: name of the network.
        options: options of the network.
        num_classes: number of classes.
        image_size: image size it was trained at, in pixels.
        weights: SHA-256 of the weights.
        metric: name of the score.
        val_score: score on val.
        source: origin of the weights, as a phrase.
        reason: which weights of a fit were kept, and why, as a phrase; None: not recorded.
        temperature: divides the logits for the lowest cross-entropy on val; above 1, the teacher is overconfident.
        val_confidence: mean of its largest probability on val.
        train_confidence: mean of its largest probability on training images, without augmentation.
        train_score: accuracy on these images.
        notes: how a given file of weights was read, as phrases.
        images: number of images of val.
        chance: share of val's most frequent class.
        never_predicted: classes that val has and the teacher never predicts.
        class_order: an order of the classes with which it scores clearly more: `natural`, `sorted` or the names.
        class_order_score: score on val with that order.
        members: network and score on val of each of several that answer together. Confidence and accuracy on training
            images are then those of the answers that students get: with `teacher.cross_fit`, of the teacher that has
            not seen the image.
        iou_classes: number of classes in the mean that an mIoU is; None in cards of earlier versions.

    What follows `reason` is of classifiers, except `notes`, `members` and `iou_classes`.
    """

    network: str
    options: dict[str, object]
    num_classes: int
    image_size: int
    weights: str
    metric: str
    val_score: float
    source: str
    reason: str | None = None
    temperature: float | None = None
    val_confidence: float | None = None
    train_confidence: float | None = None
    train_score: float | None = None
    notes: tuple[str, ...] = ()
    images: int | None = None
    chance: float | None = None
    never_predicted: tuple[str, ...] = ()
    class_order: str | tuple[str, ...] | None = None
    class_order_score: float | None = None
    members: tuple[str, ...] = ()
    iou_classes: int | None = None

    @property
    def score(self) -> str:
        """Score on val with its name, and of an mIoU the number of classes in the mean: `mIoU 0.4312 (11 classes)`."""
        return f"{score_text(self.metric, self.val_score)}{self.classes}"

    @property
    def classes(self) -> str:
        """` (11 classes)` if the score is an mIoU of so many classes."""
        return format_classes(() if self.iou_classes is None else (self.iou_classes,))

    def calibration(self) -> str:
        """Describe the calibration in a phrase; empty if it was not measured."""
        if self.temperature is None or self.val_confidence is None or self.train_confidence is None:
            return ""
        return (
            f"mean confidence {self.train_confidence:.3f} on training images and {self.val_confidence:.3f} on val, "
            f"where temperature {self.temperature:.2f} calibrates it"
        )

    @property
    def is_near_chance(self) -> bool:
        """Whether the score is that of a constant prediction, within its error."""
        if self.chance is None or not self.images:
            return False
        error = math.sqrt(self.chance * (1 - self.chance) / self.images)
        return self.val_score <= self.chance + CHANCE_DEVIATIONS * error

    @property
    def has_memorised(self) -> bool:
        """Whether it is sure of its training images and much worse on others."""
        if self.train_confidence is None or self.train_score is None:
            return False
        return self.train_confidence >= SURE and self.train_score - self.val_score >= MEMORISED_GAP

    def remarks(self) -> list[str]:
        """Return what its weights needed to be read, then `problems`: a sentence each."""
        read = [f"{self.source}: {'; '.join(self.notes)}"] if self.notes else []
        return [*read, *self.problems()]

    def problems(self) -> list[str]:
        """Return the reasons why students learn little from it, with what to do: a sentence each."""
        found, score = [], f"{self.score} on val"
        if self.class_order is not None and self.class_order_score is not None:
            found.append(
                f"its classes are in another order than the data's: {score}, but {self.class_order_score:.4f} in "
                f"{_order(self.class_order)}"
            )
        elif self.is_near_chance:
            found.append(
                f"it is near chance: {score}, and {self.chance:.4f} by predicting the most frequent class; check that "
                "its weights, image size and order of classes are those of its training, or fit it longer"
            )
        if self.has_memorised:
            found.append(
                f"it has memorised its training images: accuracy {self.train_score:.4f} and mean confidence "
                f"{self.train_confidence:.4f} on train, {score}; its answers there are close to the labels, so set "
                "teacher.cross_fit, or fit it for fewer epochs or with more augmentation"
            )
        if self.never_predicted and not self.is_near_chance:
            shown = ", ".join(self.never_predicted[:SHOWN_CLASSES])
            more = ", ..." if len(self.never_predicted) > SHOWN_CLASSES else ""
            found.append(
                f"it never predicts {len(self.never_predicted)} of {self.num_classes} classes on val: {shown}{more}"
            )
        return found

    def to_json(self) -> str:
        """Format as the text of teacher.json."""
        return json.dumps(self.content(), indent=1)

    def content(self) -> dict[str, object]:
        """Return the content of teacher.json, without what was not measured."""
        optional = TeacherCard.__dataclass_fields__
        return {key: value for key, value in vars(self).items() if value != optional[key].default}


def score_text(metric: str, value: float) -> str:
    """Format a teacher's score with its name: `top-1 0.9123`."""
    return f"{metric_name(metric)} {value:.4f}"


def classes_in(metric: str, metrics: Mapping[str, float]) -> int | None:
    """Return the number of classes in the mean of a teacher's mIoU; None for other scores."""
    return next(iter(classes_of(metric, metrics)), None)


def _order(order: str | Sequence[str]) -> str:
    """Say how an order of classes is set."""
    if isinstance(order, str):
        return f"{order} order; set data.class_order: {order}"
    if len(order) > LONGEST_ORDER:
        return "an order found by matching its predictions; set data.class_order to the list of its classes"
    listed = ", ".join(json.dumps(name, ensure_ascii=False) for name in order)
    return f"an order found by matching its predictions; set data.class_order: [{listed}]"
