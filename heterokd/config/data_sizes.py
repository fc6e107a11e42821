"""The section `data` as a teacher of another image size sees it."""

from __future__ import annotations

from heterokd.config.data import DataSettings
from heterokd.tasks import TASKS


def data_at(settings: DataSettings, image_size: int) -> DataSettings:
    """Return the settings of the same images and views, rendered at another size.

    In segmentation the crop grows with the image, and each image keeps its place on the canvas.

    Args:
        settings: of the student.
        image_size: of the teacher, in pixels.
    """
    if image_size == settings.image_size:
        return settings
    changes: dict[str, object] = {"image_size": image_size}
    if TASKS[settings.task].labels_are_maps:
        changes["drawn_at"] = settings.drawn_at or settings.image_size
        if settings.crop is not None:
            changes["crop"] = scaled(settings.crop, image_size / settings.image_size)
    return settings.model_copy(update=changes)


def scaled(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Return a height and width times a factor, in whole pixels."""
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
