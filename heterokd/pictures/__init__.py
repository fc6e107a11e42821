"""Pictures and charts of a study, for its page; matplotlib is imported nowhere else.

`colours` says what colour a class has, `vector` makes SVG for the inside of a page. `progress`, `comparing` and
`parameters` draw a search, `matrices` and `drawing` what a student sees: all take plain values and know nothing of
studies. `studied` opens the study's networks and runs val.
"""

from heterokd.pictures.colours import class_colours, paint
from heterokd.pictures.comparing import Member, Row, Strip, draw_front, draw_glance, draw_strips
from heterokd.pictures.drawing import draw_reliability, draw_samples
from heterokd.pictures.matrices import draw_confusion, draw_iou, draw_match
from heterokd.pictures.measured import Measured
from heterokd.pictures.parameters import Axis, Bar, Line, draw_importance, draw_parallel
from heterokd.pictures.progress import Curve, Dot, Level, draw_curves, draw_history
from heterokd.pictures.studied import draw_pictures
from heterokd.pictures.vector import Vector

__all__ = [
    "Axis",
    "Bar",
    "Curve",
    "Dot",
    "Level",
    "Line",
    "Measured",
    "Member",
    "Row",
    "Strip",
    "Vector",
    "class_colours",
    "draw_confusion",
    "draw_curves",
    "draw_front",
    "draw_glance",
    "draw_history",
    "draw_importance",
    "draw_iou",
    "draw_match",
    "draw_parallel",
    "draw_pictures",
    "draw_reliability",
    "draw_samples",
    "draw_strips",
    "paint",
]
