"""TeacherCard: content of teacher.json, next to a teacher's weights."""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class TeacherCard:
    """Description of a teacher.

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
        train_confidence: mean of its largest probability on training images.

    The last three are of classifiers; None: not measured.
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

    def calibration(self) -> str:
        """Describe the calibration in a phrase; empty if it was not measured."""
        if self.temperature is None or self.val_confidence is None or self.train_confidence is None:
            return ""
        return (
            f"mean confidence {self.train_confidence:.3f} on training images and {self.val_confidence:.3f} on val, "
            f"where temperature {self.temperature:.2f} calibrates it"
        )

    def to_json(self) -> str:
        """Format as the text of teacher.json."""
        return json.dumps(self.__dict__, indent=1)
