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
    """

    network: str
    options: dict[str, object]
    num_classes: int
    image_size: int
    weights: str
    metric: str
    val_score: float
    source: str

    def to_json(self) -> str:
        """Format as the text of teacher.json."""
        return json.dumps(self.__dict__, indent=1)
