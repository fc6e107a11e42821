"""Pictures of a study's best student, for its page: what it sees, where it is better, where it errs.

`colours` says what colour a class has, `drawing` draws arrays, `studied` opens the study's networks and runs val.
"""

from heterokd.pictures.colours import class_colours, paint
from heterokd.pictures.drawing import draw_confusion, draw_iou, draw_match, draw_reliability, draw_samples
from heterokd.pictures.studied import draw_pictures

__all__ = [
    "class_colours",
    "draw_confusion",
    "draw_iou",
    "draw_match",
    "draw_pictures",
    "draw_reliability",
    "draw_samples",
    "paint",
]
