"""Chart: a figure of the page, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from heterokd.report.figures.svg import Vector


@dataclass(frozen=True)
class Chart:
    """A figure of the page.

    Attributes:
        name: id in the page.
        title: what it shows.
        svg: the drawing; "" if there is none.
        caption: what is to be seen, or why there is nothing.
    """

    name: str
    title: str
    svg: str
    caption: str


class NothingToShow(Exception):
    """Why a chart has nothing to show, in a sentence."""


def draw_chart(name: str, title: str, draw: Callable[[Vector], str]) -> Chart:
    """Draw a chart; a failure becomes its caption, since a chart is no reason to lose the page.

    Args:
        name: id in the page.
        title: what it shows.
        draw: draws on a `Vector` and returns the caption.
    """
    made = Vector(name, title)
    try:
        caption = draw(made)
        return Chart(name, title, made.render(caption), caption)
    except NothingToShow as reason:
        return Chart(name, title, "", str(reason))
    except Exception as error:  # noqa: BLE001  whatever fails, the page is of use without this chart
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        return Chart(name, title, "", f"This chart could not be drawn ({first}).")
