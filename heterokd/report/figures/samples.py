"""Draw images and maps as PNG files; the functions take plain arrays.

All figures are one column wide, so that text keeps its size in print and on a page of 420 pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from heterokd.outputs import IGNORE
from heterokd.report.figures.class_labels import class_label
from heterokd.report.figures.palette import OTHERS, SCRATCH, STUDENT, class_colours, paint, rgb
from heterokd.report.figures.svg import WIDTH, Vector, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.patches import Patch

    from heterokd.method import Panel

DPI = 240
"""Dots per inch: about 1000 pixels a figure."""

LEGEND_COLUMNS = 4
LEGEND_LINE = 0.135
"""Height of a line of a legend, in inches."""

AGREEMENT = {
    "both correct": "#FFF7E0",
    "only student correct": STUDENT,
    "only teacher correct": SCRATCH,
    "both wrong": "#000000",
}
"""Colours of which network is correct; no class has them."""

Target = Path | Vector
"""A PNG file, or a chart of a page."""


@contextmanager
def figure(target: Target, height: float) -> Iterator[Figure]:
    """Give a figure of `WIDTH` and `height` inches, and write it to `target` on exit."""
    if isinstance(target, Vector):
        with target.drawing(height) as made:
            yield made
        return
    with new_figure(height, pad=0.02, space=0) as made:
        yield made
        target.parent.mkdir(parents=True, exist_ok=True)
        # Without version and date: the same figure is the same file.
        made.savefig(target, dpi=DPI, metadata={"Software": None})


# Six values that belong together: what a picture of a segmentation shows.
def draw_samples(
    file: Path,
    images: NDArray[np.uint8],
    labels: NDArray[np.integer],
    teacher: NDArray[np.integer],
    student: NDArray[np.integer],
    class_names: Sequence[str],
) -> None:
    """Draw images, their labels, the predictions of both networks, and where these differ.

    Args:
        file: PNG to write.
        images: [N, H, W, 3].
        labels: [N, H, W] class numbers, or `IGNORE`.
        teacher: [N, H, W] class numbers.
        student: [N, H, W] class numbers.
        class_names: names of all K classes.
    """
    colours = class_colours((labels, teacher, student), len(class_names))
    classes = [
        _patch(colour, class_label(class_names[number], number, 20))
        for number, colour in sorted(colours.items())
        if colour != OTHERS
    ]
    if len(classes) < len(colours):
        classes.append(_patch(OTHERS, "other classes"))
    if (labels == IGNORE).any():
        classes.append(_patch("#FFFFFF", "ignored", hatch="/////"))
    cases = [_patch(colour, name) for name, colour in AGREEMENT.items()]
    legends = {"classes": classes, "compared": cases}
    count, panel = len(images), WIDTH / 5 * images.shape[1] / images.shape[2]
    heights = [0.2 + count * panel]
    heights += [LEGEND_LINE * (1.6 + -(-len(patches) // LEGEND_COLUMNS)) for patches in legends.values()]
    with figure(file, sum(heights)) as made:
        grid, *below = made.subfigures(3, 1, squeeze=False, height_ratios=heights)[:, 0]
        axes = grid.subplots(count, 5, squeeze=False)
        for row in range(count):
            maps = [paint(each[row], colours) for each in (labels, teacher, student)]
            parts = (images[row], *maps, agreement(labels[row], teacher[row], student[row]))
            for column, part in enumerate(parts):
                axes[row, column].imshow(part, interpolation="nearest" if column else "antialiased")
                _bare(axes[row, column])
        for axis, title in zip(axes[0], ("image", "labels", "teacher", "student", "compared"), strict=True):
            axis.set_title(title, pad=2)
        for place, (title, patches) in zip(below, legends.items(), strict=True):
            _add_legend(place, title, patches)


def _add_legend(place: SubFigure, title: str, patches: Sequence[Patch]) -> None:
    """Add a legend whose lines read from left to right; matplotlib fills column by column."""
    order = [number for column in range(LEGEND_COLUMNS) for number in range(column, len(patches), LEGEND_COLUMNS)]
    place.legend(
        handles=[patches[number] for number in order], loc="upper center", ncols=min(LEGEND_COLUMNS, len(patches)),
        title=title, fontsize=7, title_fontproperties={"weight": "bold", "size": 7}, handlelength=1.2,
        handleheight=0.9, handletextpad=0.5, columnspacing=0.9, labelspacing=0.25, borderaxespad=0.1, borderpad=0.1,
    )  # fmt: skip


def _patch(colour: str, name: str, hatch: str | None = None) -> Patch:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, edgecolor="#7F7F7F", hatch=hatch, linewidth=0.4, label=name)


def agreement(
    labels: NDArray[np.integer], teacher: NDArray[np.integer], student: NDArray[np.integer]
) -> NDArray[np.uint8]:
    """Paint which network is correct at each pixel [H, W], in the colours of `AGREEMENT`: [H, W, 3]."""
    by_teacher, by_student = teacher == labels, student == labels
    cases = (by_teacher & by_student, by_student & ~by_teacher, by_teacher & ~by_student, ~by_teacher & ~by_student)
    image = paint(np.where(labels == IGNORE, IGNORE, 0), {0: "#FFFFFF"})
    for case, colour in zip(cases, AGREEMENT.values(), strict=True):
        image[case & (labels != IGNORE)] = rgb(colour)
    return image


def draw_method(file: Path, images: NDArray[np.uint8], panels: Sequence[Panel]) -> None:
    """Draw maps that a method computed, next to the images.

    Args:
        file: PNG to write.
        images: [N, H, W, 3].
        panels: a column each, with a colour bar; positions without a value are striped.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    count, panel = len(images), WIDTH / (1 + len(panels)) * images.shape[1] / images.shape[2]
    with figure(file, 0.5 + count * panel) as made:
        ratios = (*(panel for _ in range(count)), 0.09)
        axes = made.subplots(count + 1, 1 + len(panels), squeeze=False, gridspec_kw={"height_ratios": ratios})
        for row in range(count):
            axes[row, 0].imshow(images[row])
        axes[0, 0].set_title("image", pad=2)
        axes[count, 0].axis("off")
        for column, shown in enumerate(panels, start=1):
            values = shown.values.cpu().numpy()
            # Maps are coarse; stripes need room.
            enlarged = np.ones([max(1, images.shape[side] // values.shape[side]) for side in (1, 2)])
            ticks, labels = zip(*shown.ticks, strict=True)
            norm = Normalize(ticks[0], ticks[-1])
            for row in range(count):
                large = np.kron(values[row], enlarged)
                axes[row, column].imshow(large, cmap=shown.colormap, norm=norm, interpolation="nearest")
                striped = paint(np.where(np.isnan(large), IGNORE, 0), {})
                cover = np.where(np.isnan(large), 255, 0).astype(np.uint8)
                axes[row, column].imshow(np.dstack((striped, cover)), interpolation="nearest")
            axes[0, column].set_title(shown.title, pad=2)
            mappable = ScalarMappable(norm, shown.colormap)
            bar = made.colorbar(mappable, cax=axes[count, column], orientation="horizontal")
            bar.set_ticks(ticks, labels=labels)
            bar.ax.get_xticklabels()[0].set_horizontalalignment("left")
            bar.ax.get_xticklabels()[-1].set_horizontalalignment("right")
            bar.outline.set_linewidth(0.4)
            bar.ax.tick_params(length=2, width=0.4, pad=1)
        for axis in axes[:count].flat:
            _bare(axis)


def _bare(axis: Axes) -> None:
    """Remove ticks, draw a thin frame."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(True)
    axis.spines[:].set(linewidth=0.4, color="#7F7F7F")
