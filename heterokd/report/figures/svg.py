"""Vector: a matplotlib figure as SVG text for an HTML page, with a title, a description and tooltips.

Text stays text: screen readers, search and copying work, and a figure takes about ten kilobytes (a plotting library in
the page would be four megabytes). A tooltip is an SVG title, which browsers show without a script. All charts are one
column wide, so that text keeps its size on a phone, in two columns and in print.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import BytesIO
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

from heterokd.methods import BASELINE
from heterokd.report.figures.palette import SCRATCH, STUDENT, TEACHER

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 4.2
"""Inches. Units of an SVG are points, 72 per inch."""

DEFAULT = "#009E73"
FAILED = "#D55E00"
INK, SOFT, FAINT, GRID = "#1A1A1A", "#5A5A5A", "#BDBDBD", "#E4E4E4"

LOOKS: dict[str, dict[str, Any]] = {
    "winner": {"color": STUDENT, "marker": "D", "linestyle": "-"},
    BASELINE: {"color": SCRATCH, "marker": "s", "linestyle": "--"},
    "default": {"color": DEFAULT, "marker": "^", "linestyle": ":"},
    "teacher": {"color": TEACHER, "marker": "P", "linestyle": "-."},
}
"""Colour, marker and line of a role: roles never differ by colour alone."""

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "heterokd",
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "axes.linewidth": 0.6,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.2,
    "hatch.linewidth": 0.5,
}
"""matplotlib's style of all figures, PNG or SVG."""

_REFERENCE = re.compile(r"url\(#([^)]+)\)")


class Vector:
    """A chart. Draw on `figure` inside the context manager; `text` is set on exit.

    Args:
        name: prefix of the ids, which are unique in a page with several charts.
        title: what the chart shows.
        description: alternative text.
        height: in inches.

    Attributes:
        figure: matplotlib's.
        tips: by the `gid` of a collection of marks, a tooltip for each mark.
        text: the SVG.
    """

    def __init__(self, name: str, title: str, description: str, height: float) -> None:
        self.name, self.title, self.description, self.height = name, title, description, height
        self.tips: dict[str, Sequence[str]] = {}
        self.text = ""

    def __enter__(self) -> Vector:
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        self._context = mpl.rc_context(STYLE)  # type: ignore[arg-type]  # its keys are literals
        self._context.__enter__()
        layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)
        self.figure = Figure(figsize=(WIDTH, self.height), layout=layout)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                file = BytesIO()
                # Without date and version: the same chart is the same text.
                self.figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
                self.text = _inline(file.getvalue(), self.name, self.title, self.description, self.tips)
        finally:
            self._context.__exit__(kind, value, traceback)

    def axis(self, *, grid: Literal["x", "y", "both"] = "y") -> Axes:
        """Create the only axes, with a light grid behind the data."""
        axis = self.figure.subplots()
        axis.grid(axis=grid, color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(length=2, width=0.5)
        return axis


def _inline(content: bytes, name: str, title: str, description: str, tips: dict[str, Sequence[str]]) -> str:
    """Convert matplotlib's SVG to a part of a page: unique ids, no global style, no URLs."""
    root = ElementTree.fromstring(content)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # HTML needs no namespaces
        for key in list(element.attrib):
            if key.startswith("{"):
                element.attrib[key.rpartition("}")[2]] = element.attrib.pop(key)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    for gid, texts in tips.items():
        _tip(root, gid, texts)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.attrib[key] = f"{name}-{value}"
            elif key == "href" and value.startswith("#"):
                element.attrib[key] = f"#{name}-{value[1:]}"
            elif "url(#" in value:
                element.attrib[key] = _REFERENCE.sub(rf"url(#{name}-\1)", value)
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(place, element)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
        "style": "stroke-linejoin:round;stroke-linecap:butt",
    }
    return re.sub(r"\n\s*", "\n", ElementTree.tostring(root, encoding="unicode"))


def _tip(root: ElementTree.Element, gid: str, texts: Sequence[str]) -> None:
    """Add a tooltip to each mark of a collection."""
    for group in root.iter("g"):
        if group.get("id") == gid:
            marks = list(group.iter("use")) or list(group.iter("path"))  # a single mark is not defined apart
            if len(marks) == len(texts):
                for mark, text in zip(marks, texts, strict=True):
                    ElementTree.SubElement(mark, "title").text = text
