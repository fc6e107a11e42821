"""Vector: a matplotlib figure as SVG text for an HTML page, with a title, a description and tooltips.

Text stays text: screen readers, search and copying work, and a figure takes about ten kilobytes (a plotting library in
the page would be four megabytes). A tooltip is an SVG title, which browsers show without a script. All charts are one
column wide, so that text keeps its size on a phone, in two columns and in print.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Literal, NamedTuple
from xml.etree import ElementTree

from heterokd.methods import BASELINE
from heterokd.report.figures.class_labels import families
from heterokd.report.figures.palette import SCRATCH, STUDENT, TEACHER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.2
"""Inches. Units of an SVG are points, 72 per inch."""

FAILED = "#D55E00"
INK, SOFT, FAINT, GRID = "#1A1A1A", "#5A5A5A", "#BDBDBD", "#E4E4E4"


class Look(NamedTuple):
    """Colour, marker and line style of a role."""

    color: str
    marker: str
    line: str


LOOKS = {
    "winner": Look(STUDENT, "D", "-"),
    BASELINE: Look(SCRATCH, "s", "--"),
    "default": Look("#009E73", "^", ":"),
    "teacher": Look(TEACHER, "P", "-."),
}
"""By role: roles never differ by colour alone."""

STYLE: dict[str, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "heterokd",
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


@contextmanager
def new_figure(height: float, *, pad: float = 0.03, space: float = 0.02) -> Iterator[Figure]:
    """Create a figure of `WIDTH` x `height` inches; `STYLE` holds inside the context, also for saving it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=pad, h_pad=pad, wspace=space, hspace=space)
    style = {**STYLE, "font.family": list(families())}
    with mpl.rc_context(style):  # type: ignore[arg-type]  # its keys are literals
        yield Figure(figsize=(WIDTH, height), layout=layout)


class Vector:
    """A chart of a page: draw in `drawing`, then `render`.

    Args:
        name: prefix of the ids, which are unique in a page with several charts.
        title: what the chart shows.

    Attributes:
        tips: by the `gid` of a collection of marks, a tooltip for each mark.
    """

    def __init__(self, name: str, title: str) -> None:
        self.name, self.title = name, title
        self.tips: dict[str, Sequence[str]] = {}
        self._content = b""

    @contextmanager
    def drawing(self, height: float) -> Iterator[Figure]:
        """Give a figure of `height` inches to draw on."""
        file = BytesIO()
        with new_figure(height) as figure:
            yield figure
            with warnings.catch_warnings():
                # A name in a script that no font here has: the browser's fonts draw it.
                warnings.filterwarnings("ignore", "Glyph .* missing from")
                # Without date and version: the same chart is the same text.
                figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        self._content = file.getvalue()

    def render(self, description: str) -> str:
        """Return the SVG as a part of a page: unique ids, no global style, no URLs; `description` is its text."""
        root = ElementTree.fromstring(self._content)
        for element in root.iter():
            element.tag = element.tag.rpartition("}")[2]  # HTML needs no namespaces
            for key in list(element.attrib):
                if key.startswith("{"):
                    element.attrib[key.rpartition("}")[2]] = element.attrib.pop(key)
        for parent in list(root.iter()):
            for child in list(parent):
                if child.tag in ("metadata", "style"):
                    parent.remove(child)
        for gid, texts in self.tips.items():
            _add_tips(root, gid, texts)
        name = self.name
        for element in root.iter():
            for key, value in element.attrib.items():
                if key == "id":
                    element.attrib[key] = f"{name}-{value}"
                elif key == "href" and value.startswith("#"):
                    element.attrib[key] = f"#{name}-{value[1:]}"
                elif "url(#" in value:
                    element.attrib[key] = _REFERENCE.sub(rf"url(#{name}-\1)", value)
        for place, (tag, text) in enumerate((("title", self.title), ("desc", description))):
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


def _add_tips(root: ElementTree.Element, gid: str, texts: Sequence[str]) -> None:
    """Add a tooltip to each mark of a collection."""
    for group in root.iter("g"):
        if group.get("id") == gid:
            # matplotlib defines the shape of several marks once and `use`s it; a single mark is a `path`.
            marks = list(group.iter("use")) or list(group.iter("path"))
            if len(marks) == len(texts):
                for mark, text in zip(marks, texts, strict=True):
                    ElementTree.SubElement(mark, "title").text = text


def new_axes(figure: Figure, grid: Literal["x", "y", "both"] = "y") -> Axes:
    """Create a figure's only axes, with a light grid behind the data."""
    axes = figure.subplots()
    axes.grid(axis=grid, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=2, width=0.5)
    return axes


def add_legend(figure: Figure) -> None:
    """Add a legend above the first axes, each label once, if anything in them has a label."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    if named:
        figure.legend(
            list(named.values()), list(named), loc="outside upper left", ncols=3, columnspacing=1.0, handlelength=1.7,
            handletextpad=0.5, borderaxespad=0.2, labelcolor=INK,
        )  # fmt: skip
