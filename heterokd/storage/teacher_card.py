"""TeacherCard: what is known of a teacher beside its weights; teacher.json in its folder, and part of a summary."""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class TeacherCard:
    """What is known of a teacher.

    Attributes:
        network: its name.
        options: of its network.
        num_classes: that it tells apart.
        image_size: that it was trained at.
        weights: their SHA-256.
        metric: that it was measured by.
        val_score: on val.
        source: where the weights come from, in words.
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
        """The text of teacher.json."""
        return json.dumps(self.__dict__, indent=1)
