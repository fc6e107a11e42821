"""Settings that do not fit the task of an experiment's data set."""

from __future__ import annotations

from heterokd.config.data import DataSettings
from heterokd.config.networks import TeachersSettings
from heterokd.config.services import PromotionSettings
from heterokd.config.training import OF_IMAGES, OF_PIXELS, TrainingSettings
from heterokd.tasks import TASKS


def task_fault(
    data: DataSettings, teacher: TeachersSettings, training: TrainingSettings, promotion: PromotionSettings
) -> str | None:
    """Return a sentence on a setting of an experiment that does not fit the task, or None."""
    has_maps = TASKS[data.task].labels_are_maps
    if has_maps and teacher.image_size not in (None, data.image_size):
        if "drawn_at" not in data.dataset_class.reads:
            return f"teacher.image_size: data set {data.dataset!r} has no larger images; remove the key"
        if data.scene_views < 3:
            return "teacher.image_size: in segmentation it needs data.scene_views: 3; set it, or remove the key"
    for section, settings in (("training", training), ("teacher.training", teacher.training)):
        for key in OF_IMAGES if has_maps else OF_PIXELS:
            value = getattr(settings, key)
            if value != type(settings).model_fields[key].default and (fault := setting_fault(key, value, has_maps)):
                return f"{section}.{key}: {fault}"
    for key in () if has_maps else ("min_iou", "test_time"):
        if getattr(promotion, key):
            return f"promotion.{key}: is for segmentation; data set {data.dataset!r} has no label maps"
    if data.view_crop is not None and (teacher.ensemble or teacher.cross_fit):
        key = "ensemble" if teacher.ensemble else "cross_fit"
        return f"teacher.{key}: is for whole images; in {data.task}, name a single teacher"
    if teacher.cross_fit is not None and data.policy.mixes:
        reason = "mixup and cutmix show an image to the teachers that have not seen another"
        return f"teacher.cross_fit: {reason}; set data.augment to a policy without them"
    return None


def setting_fault(key: str, value: object, has_maps: bool) -> str | None:
    """Return why a setting of a training does not fit images with label maps, or with a class each; None if it does."""
    refused = (OF_IMAGES if has_maps else OF_PIXELS).get(key)
    if refused is None or (refused and value not in refused):
        return None
    what = f"{value!r} " if key == "class_weights" else ""
    if has_maps:
        return f"{what}counts images of a class, and label maps have none; remove it"
    return f"{what}is for label maps, and the images have one class each; remove it"
