"""Arrays in, a PNG out: each function draws one picture and knows nothing of studies.

All are as wide as a column of a paper, so that letters keep their size in print and on a page of 420 pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterokd.outputs import IGNORE
from heterokd.pictures.colours import OTHERS, SCRATCH, STUDENT, TEACHER, class_colours, paint, rgb

WIDTH, DPI = 4.2, 240
"""Inches, and dots an inch: 420 pixels at a hundred dots, a thousand in print."""
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
}
MOST_BARS = 24
MOST_CLASSES = 20
NUMBERED = 12
"""Up to so many classes a confusion matrix has numbers in its cells."""

AGREEMENT = {
    "both right": "#E8E8E8",
    "student alone right": STUDENT,
    "teacher alone right": SCRATCH,
    "both wrong": "#333333",
}


@contextmanager
def figure(file: Path, height: float) -> Iterator[Any]:
    """A figure of `WIDTH` and `height` inches that is written to `file` on leaving; no window, no global state."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with mpl.rc_context(STYLE):  # type: ignore[arg-type]  # its keys are literals
        made = Figure(
            figsize=(WIDTH, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
        )
        FigureCanvasAgg(made)
        yield made
        file.parent.mkdir(parents=True, exist_ok=True)
        # Without the version and date of the program: the same picture is the same file.
        made.savefig(file, metadata={"Software": None})


def draw_samples(
    file: Path,
    images: NDArray[np.uint8],
    labels: NDArray[np.integer],
    teacher: NDArray[np.integer],
    student: NDArray[np.integer],
    class_names: Sequence[str],
) -> None:
    """Images beside their labels, both networks' decisions, and where these two part.

    Args:
        file: to write.
        images: [N, H, W, 3].
        labels: [N, H, W] class numbers, or `IGNORE`.
        teacher: [N, H, W] class numbers.
        student: [N, H, W] class numbers.
        class_names: of all K classes.
    """
    colours = class_colours((labels, teacher, student), len(class_names))
    classes = [_patch(colour, class_names[number]) for number, colour in sorted(colours.items()) if colour != OTHERS]
    if len(classes) < len(colours):
        classes.append(_patch(OTHERS, "other classes"))
    if (labels == IGNORE).any():
        classes.append(_patch("#FFFFFF", "counts nowhere", hatch="/////"))
    cases = [_patch(colour, name) for name, colour in AGREEMENT.items()]
    count, panel = len(images), WIDTH / 5 * images.shape[1] / images.shape[2]
    heights = (0.2 + count * panel, *(LEGEND_LINE * (1.6 + -(-len(some) // 4)) for some in (classes, cases)))
    with figure(file, sum(heights)) as made:
        grid, *legends = made.subfigures(3, 1, height_ratios=heights)
        axes = grid.subplots(count, 5, squeeze=False)
        for row in range(count):
            parts = (
                images[row],
                paint(labels[row], colours),
                paint(teacher[row], colours),
                paint(student[row], colours),
                agreement(labels[row], teacher[row], student[row]),
            )
            for column, part in enumerate(parts):
                axes[row, column].imshow(part, interpolation="nearest" if column else "antialiased")
                _bare(axes[row, column])
        for axis, title in zip(axes[0], ("image", "labels", "teacher", "student", "compared"), strict=True):
            axis.set_title(title, pad=2)
        for place, some, title in zip(legends, (classes, cases), ("classes", "compared"), strict=True):
            # Taken from the left, each line from left to right, as one reads.
            lines = -(-len(some) // 4)
            order = [
                some[line * 4 + column] for column in range(4) for line in range(lines) if line * 4 + column < len(some)
            ]
            place.legend(handles=order, loc="upper center", ncols=min(4, len(some)), title=title, **_TIGHT)


LEGEND_LINE = 0.135
_TIGHT: dict[str, Any] = {
    "fontsize": 7,
    "handlelength": 1.2,
    "handleheight": 0.9,
    "handletextpad": 0.5,
    "columnspacing": 0.9,
    "labelspacing": 0.25,
    "borderaxespad": 0.1,
    "borderpad": 0.1,
    "title_fontproperties": {"weight": "bold", "size": 7},
}


def _patch(colour: str, name: str, hatch: str | None = None) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, edgecolor="#7F7F7F", hatch=hatch, linewidth=0.4, label=_short(name, 20))


def agreement(
    labels: NDArray[np.integer], teacher: NDArray[np.integer], student: NDArray[np.integer]
) -> NDArray[np.uint8]:
    """Who is right at each pixel [H, W], in the colours of `AGREEMENT`; [H, W, 3], `IGNORE` striped."""
    by_teacher, by_student = teacher == labels, student == labels
    cases = (by_teacher & by_student, by_student & ~by_teacher, by_teacher & ~by_student, ~by_teacher & ~by_student)
    image = paint(np.where(labels == IGNORE, IGNORE, 0), {0: "#FFFFFF"})
    for case, colour in zip(cases, AGREEMENT.values(), strict=True):
        image[case & (labels != IGNORE)] = rgb(colour)
    return image


def draw_iou(file: Path, iou: Mapping[str, NDArray[np.float64]], class_names: Sequence[str]) -> None:
    """Bars of the IoU of every class; of more than `MOST_BARS` those with the largest gains and losses.

    Args:
        file: to write.
        iou: [K] of each network in [0, 1], NaN where a class is not there: `teacher`, the student by its method's name,
            and, if there is one, `scratch`.
        class_names: of all K classes.
    """
    names = list(iou)
    # A study of scratch alone has no other student.
    student = next((name for name in names if name not in ("teacher", "scratch")), "scratch")
    against = iou["scratch"] if "scratch" in iou and student != "scratch" else iou["teacher"]
    gain = np.nan_to_num(iou[student] - against)
    seen = np.flatnonzero(~np.all([np.isnan(one) for one in iou.values()], axis=0))
    shown = seen[np.argsort(-gain[seen], kind="stable")]
    if len(shown) > MOST_BARS:
        shown = np.concatenate((shown[: MOST_BARS // 2], shown[-(MOST_BARS // 2) :]))
    looks = {
        "teacher": {"color": "#D9D9D9", "edgecolor": TEACHER},
        student: {"color": STUDENT, "edgecolor": STUDENT},
        "scratch": {"color": "#FFFFFF", "edgecolor": "#B37400", "hatch": "/////"},
    }
    thick = 0.8 / len(names)
    with figure(file, 0.75 + 0.3 * len(shown)) as made:
        axis = made.subplots()
        for place, name in enumerate(names):
            at = np.arange(len(shown)) + (place - (len(names) - 1) / 2) * thick
            mean = np.nanmean(iou[name])
            label = f"{name}, mIoU {mean:.3f}"
            axis.barh(at, np.nan_to_num(iou[name][shown]), thick * 0.92, linewidth=0.5, label=label, **looks[name])
        axis.set_yticks(np.arange(len(shown)), [_short(class_names[number], 20) for number in shown])
        axis.set_ylim(len(shown) - 0.4, -0.6)
        axis.set_xlim(0, 1)
        axis.set_xlabel("IoU on val")
        axis.grid(axis="x", color="#DDDDDD", linewidth=0.5)
        axis.set_axisbelow(True)
        axis.tick_params(length=0)
        made.legend(loc="outside upper center", ncols=len(names), columnspacing=1.0, handlelength=1.4, fontsize=6.8)


def draw_reliability(
    file: Path,
    images: NDArray[np.uint8],
    labels: NDArray[np.integer],
    share: NDArray[np.floating],
    weight: NDArray[np.floating],
) -> None:
    """HeteroAKD's two maps for the class of each pixel's label, beside the images.

    Args:
        file: to write.
        images: [N, H, W, 3].
        labels: [N, h, w] class numbers, or `IGNORE`, on the maps' grid.
        share: [N, K, h, w] S, the share of the teacher in the mixed scores.
        weight: [N, K, h, w] W, what a pixel counts for a class.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    def of_label(maps: NDArray[np.floating]) -> NDArray[np.float64]:
        known = np.where(labels == IGNORE, 0, labels)[:, None]
        chosen = np.take_along_axis(maps, known, axis=1)[:, 0].astype(np.float64)
        return np.where(labels == IGNORE, np.nan, chosen)

    # W sums to 1 over an image's valid pixels, or over the classes: in multiples of the average it can be read.
    valid = (labels != IGNORE).sum(axis=(1, 2), keepdims=True)
    over_pixels = bool(np.all(weight.sum(axis=(2, 3)) < 1.01))
    shares, weights = of_label(share), of_label(weight) * (valid if over_pixels else weight.shape[1])
    top = max(2.0, float(np.nanquantile(weights, 0.99))) if np.isfinite(weights).any() else 2.0
    panels = (
        (shares, Normalize(0, 1), "PuOr", "S: who is followed", (0, 0.5, 1), ("student", "both", "teacher")),
        (weights, Normalize(0, top), "cividis", "W: what a pixel counts", (0, 1, top), ("0", "1", f"{top:.1f}")),
    )
    count, panel = len(images), WIDTH / 3 * images.shape[1] / images.shape[2]
    # Maps are coarse: enlarged, the stripes of what counts nowhere have room.
    enlarged = np.ones((max(1, images.shape[1] // labels.shape[1]), max(1, images.shape[2] // labels.shape[2])))
    with figure(file, 0.5 + count * panel) as made:
        ratios = (*(panel for _ in range(count)), 0.09)
        axes = made.subplots(count + 1, 3, squeeze=False, gridspec_kw={"height_ratios": ratios})
        for row in range(count):
            axes[row, 0].imshow(images[row])
            for column, (maps, norm, colours, *_) in enumerate(panels, start=1):
                shown = np.kron(maps[row], enlarged)
                axes[row, column].imshow(shown, cmap=colours, norm=norm, interpolation="nearest")
                striped = paint(np.where(np.isnan(shown), IGNORE, 0), {})
                cover = np.where(np.isnan(shown), 255, 0).astype(np.uint8)
                axes[row, column].imshow(np.dstack((striped, cover)), interpolation="nearest")
            for axis in axes[row]:
                _bare(axis)
        axes[0, 0].set_title("image", pad=2)
        axes[count, 0].axis("off")
        for column, (_, norm, colours, title, ticks, words) in enumerate(panels, start=1):
            axes[0, column].set_title(title, pad=2)
            bar = made.colorbar(ScalarMappable(norm, colours), cax=axes[count, column], orientation="horizontal")
            bar.set_ticks(ticks, labels=words)
            for label, side in zip(bar.ax.get_xticklabels(), ("left", "center", "right"), strict=True):
                label.set_horizontalalignment(side)
            bar.outline.set_linewidth(0.4)
            bar.ax.tick_params(length=2, width=0.4, pad=1)


def draw_confusion(
    file: Path,
    confusion: NDArray[np.integer],
    class_names: Sequence[str],
    scratch: NDArray[np.integer] | None = None,
) -> None:
    """The confusion matrix, and beside it what each class gained over the student without a teacher.

    Of more than `MOST_CLASSES` classes those with most errors are shown; what is taken for another one of the rest
    stands in the last column.

    Args:
        file: to write.
        confusion: [K, K] images, rows are labels and columns decisions.
        class_names: of all K classes.
        scratch: the same of the student without a teacher.
    """
    from matplotlib.colors import PowerNorm

    names, shares, kept = shown_confusion(confusion, class_names)
    size = len(kept)
    numbered = size <= NUMBERED
    with figure(file, 0.75 + (2.6 if scratch is not None else 3.4) * size / max(size, shares.shape[1])) as made:
        columns = 1 if scratch is None else 2
        ratios = (1.0,) if scratch is None else (shares.shape[1], 0.42 * size)
        axes = made.subplots(1, columns, squeeze=False, gridspec_kw={"width_ratios": ratios})[0]
        axis = axes[0]
        axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="auto")
        axis.spines[:].set_visible(False)
        axis.set_yticks(range(size), names[:size])
        axis.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names)) < 3 else 90)
        axis.tick_params(length=0, pad=2, labelsize=7.5 if numbered else 6)
        axis.set(xlabel="decision", ylabel="label", title="per cent of the label's images" if numbered else "")
        for row, column in np.argwhere(shares >= 0.005) if numbered else ():
            value = shares[row, column]
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5,
                      color="white" if value > 0.35 else "#1A1A1A")  # fmt: skip
        if scratch is not None:
            gains = 100 * (_recalls(confusion) - _recalls(scratch))[kept]
            axis = axes[1]
            looks = [STUDENT if gain >= 0 else SCRATCH for gain in gains]
            axis.barh(range(size), gains, 0.7, color=looks)
            axis.axvline(0, color="#1A1A1A", linewidth=0.6)
            axis.set_ylim(size - 0.5, -0.5)
            axis.set_yticks([])
            axis.spines["left"].set_visible(False)
            edge = max(1.0, float(np.abs(gains).max()) * 1.15)
            axis.set_xlim(-edge, edge)
            axis.tick_params(length=2, width=0.4)
            axis.set(xlabel="points", title="gain over scratch")


def draw_match(file: Path, similarity: Sequence[Sequence[float]], teacher: str, student: str) -> None:
    """How alike two networks' stages are, as a heat map with numbers.

    Args:
        file: to write.
        similarity: [student's stage, teacher's stage], about 0 to 1.
        teacher: its name.
        student: its name.
    """
    values = np.asarray(similarity, np.float64)
    with figure(file, 0.9 + 0.62 * len(values)) as made:
        axis = made.subplots()
        axis.imshow(np.clip(values, 0, 1), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.spines[:].set_visible(False)
        axis.set_yticks(range(len(values)), [f"stage {number + 1}" for number in range(len(values))])
        axis.set_xticks(range(values.shape[1]), [f"stage {number + 1}" for number in range(values.shape[1])])
        axis.tick_params(length=0, pad=2)
        axis.set(xlabel=f"teacher: {_short(teacher, 40)}", ylabel=f"student: {_short(student, 24)}")
        for (row, column), value in np.ndenumerate(values):
            axis.text(column, row, f"{value:.2f}", ha="center", va="center",
                      color="white" if value > 0.55 else "#1A1A1A")  # fmt: skip


def shown_confusion(
    confusion: NDArray[np.integer], class_names: Sequence[str]
) -> tuple[list[str], NDArray[np.float64], NDArray[np.intp]]:
    """Column names, shares of each label's images [R, C], and the classes [R] that are shown, in their own order."""
    counts = confusion.astype(np.float64)
    kept = np.arange(len(counts))
    if len(kept) > MOST_CLASSES:
        errors = counts.sum(axis=1) + counts.sum(axis=0) - 2 * counts.diagonal()
        kept = np.sort(np.argsort(-errors, kind="stable")[:MOST_CLASSES])
    shares = counts[kept] / np.maximum(counts[kept].sum(axis=1, keepdims=True), 1)
    names, chosen = [_short(class_names[int(number)], 14) for number in kept], shares[:, kept]
    if len(kept) < len(counts):
        names.append("others")
        chosen = np.column_stack((chosen, 1 - chosen.sum(axis=1)))
    return names, chosen, kept


def _recalls(confusion: NDArray[np.integer]) -> NDArray[np.float64]:
    recalls: NDArray[np.float64] = confusion.diagonal() / np.maximum(confusion.sum(axis=1), 1)
    return recalls


def _bare(axis: Any) -> None:
    """No ticks, a thin frame."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(True)
    axis.spines[:].set(linewidth=0.4, color="#7F7F7F")


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
