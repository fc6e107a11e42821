"""Draw confusion matrices, IoU per class and CKA between stages, as PNG or as SVG for a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from heterokd.methods import BASELINE
from heterokd.report.figures.class_labels import class_label, shortened
from heterokd.report.figures.palette import SCRATCH, STUDENT, TEACHER
from heterokd.report.figures.samples import Target, figure
from heterokd.report.figures.svg import Vector

MOST_BARS = 24
MOST_CLASSES = 20
NUMBERED = 12
"""Maximum number of classes for numbers in the cells of a confusion matrix."""


def draw_iou(target: Target, iou: Mapping[str, NDArray[np.float64]], class_names: Sequence[str]) -> None:
    """Draw bars of the IoU of each class; of more than `MOST_BARS` those with the largest gains and losses.

    Args:
        target: a PNG file, or a chart of the page.
        iou: [K] in [0, 1], NaN where a class is absent, of `teacher`, of the student by its method's name, and of the
            baseline if there is one.
        class_names: names of all K classes.
    """
    student = student_of(iou)
    against = iou[BASELINE] if BASELINE in iou and student != BASELINE else iou["teacher"]
    gain = np.nan_to_num(iou[student] - against)
    seen = np.flatnonzero(~np.isnan(list(iou.values())).all(axis=0))
    shown = seen[np.argsort(-gain[seen], kind="stable")]
    if len(shown) > MOST_BARS:
        shown = np.concatenate((shown[: MOST_BARS // 2], shown[-(MOST_BARS // 2) :]))
    looks = {
        "teacher": ("#D9D9D9", TEACHER, None),
        student: (STUDENT, STUDENT, None),
        BASELINE: ("#FFFFFF", "#B37400", "/////"),
    }
    thick = 0.8 / len(iou)
    with figure(target, 0.75 + 0.3 * len(shown)) as made:
        axis = made.subplots()
        for place, (name, values) in enumerate(iou.items()):
            at = np.arange(len(shown)) + (place - (len(iou) - 1) / 2) * thick
            fill, edge, hatch = looks[name]
            axis.barh(
                at, np.nan_to_num(values[shown]), thick * 0.92, linewidth=0.5, color=fill, edgecolor=edge, hatch=hatch,
                label=f"{name}, mIoU {np.nanmean(values):.3f} ({np.isfinite(values).sum()} classes)",
            )  # fmt: skip
        by_browser = isinstance(target, Vector)
        labels = [class_label(class_names[number], number, 20, by_browser=by_browser) for number in shown]
        axis.set_yticks(np.arange(len(shown)), labels)
        axis.set_ylim(len(shown) - 0.4, -0.6)
        axis.set_xlim(0, 1)
        axis.set_xlabel("IoU on val")
        axis.grid(axis="x", color="#DDDDDD", linewidth=0.5)
        axis.set_axisbelow(True)
        axis.tick_params(length=0)
        made.legend(loc="outside upper center", ncols=len(iou), columnspacing=1.0, handlelength=1.4, fontsize=6.8)


def student_of(names: Iterable[str]) -> str:
    """Return the name of the winner's method among those of `Measured.iou`; a study may have the baseline alone."""
    return next((name for name in names if name not in ("teacher", BASELINE)), BASELINE)


def draw_confusion(
    target: Target,
    confusion: NDArray[np.integer],
    class_names: Sequence[str],
    scratch: NDArray[np.integer] | None = None,
) -> None:
    """Draw the confusion matrix, and the gain of each class over the student without a teacher.

    Of more than `MOST_CLASSES` classes those with most errors are shown; predictions of the rest are summed in the
    last column.

    Args:
        target: a PNG file, or a chart of the page.
        confusion: [K, K] images, rows are labels and columns predictions.
        class_names: names of all K classes.
        scratch: confusion matrix of the student without a teacher.
    """
    from matplotlib.colors import PowerNorm

    names, shares, kept = shown_confusion(confusion, class_names, by_browser=isinstance(target, Vector))
    size = len(kept)
    numbered = size <= NUMBERED
    with figure(target, 0.75 + (2.6 if scratch is not None else 3.4) * size / max(size, shares.shape[1])) as made:
        columns = 1 if scratch is None else 2
        ratios = (1.0,) if scratch is None else (shares.shape[1], 0.42 * size)
        axes = made.subplots(1, columns, squeeze=False, gridspec_kw={"width_ratios": ratios})[0]
        axis = axes[0]
        axis.pcolormesh(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), edgecolors="#FFFFFF", linewidth=0.4)
        axis.set(xlim=(0, shares.shape[1]), ylim=(size, 0))
        axis.spines[:].set_visible(False)
        axis.set_yticks(np.arange(size) + 0.5, names[:size])
        axis.set_xticks(np.arange(len(names)) + 0.5, names, rotation=0 if max(map(len, names)) < 3 else 90)
        axis.tick_params(length=0, pad=2, labelsize=7.5 if numbered else 6)
        axis.set(xlabel="prediction", ylabel="label", title="per cent of the label's images" if numbered else "")
        for row, column in np.argwhere(shares >= 0.005) if numbered else ():
            value = shares[row, column]
            axis.text(column + 0.5, row + 0.5, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5,
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


def draw_match(target: Target, similarity: Sequence[Sequence[float]], teacher: str, student: str) -> None:
    """Draw the similarity of two networks' stages as a heat map with numbers.

    `similarity` is [student's stage, teacher's stage], about 0 to 1; `teacher` and `student` are names.
    """
    values = np.asarray(similarity, np.float64)
    with figure(target, 0.9 + 0.62 * len(values)) as made:
        axis = made.subplots()
        axis.pcolormesh(np.clip(values, 0, 1), cmap="Blues", vmin=0, vmax=1, edgecolors="#FFFFFF", linewidth=0.8)
        axis.set_ylim(len(values), 0)
        axis.spines[:].set_visible(False)
        axis.set_yticks(np.arange(len(values)) + 0.5, [f"stage {number + 1}" for number in range(len(values))])
        axis.set_xticks(np.arange(values.shape[1]) + 0.5, [f"stage {number + 1}" for number in range(values.shape[1])])
        axis.tick_params(length=0, pad=2)
        axis.set(xlabel=f"teacher: {shortened(teacher, 40)}", ylabel=f"student: {shortened(student, 24)}")
        for (row, column), value in np.ndenumerate(values):
            axis.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center",
                      color="white" if value > 0.55 else "#1A1A1A")  # fmt: skip


def shown_confusion(
    confusion: NDArray[np.integer], class_names: Sequence[str], *, by_browser: bool = False
) -> tuple[list[str], NDArray[np.float64], NDArray[np.intp]]:
    """Return column names, shares of each label's images [R, C], and the numbers [R] of the classes that are shown."""
    counts = confusion.astype(np.float64)
    kept = np.arange(len(counts))
    if len(kept) > MOST_CLASSES:
        errors = counts.sum(axis=1) + counts.sum(axis=0) - 2 * counts.diagonal()
        kept = np.sort(np.argsort(-errors, kind="stable")[:MOST_CLASSES])
    shares = counts[kept] / np.maximum(counts[kept].sum(axis=1, keepdims=True), 1)
    names = [class_label(class_names[number], number, 14, by_browser=by_browser) for number in kept.tolist()]
    chosen = shares[:, kept]
    if len(kept) < len(counts):
        names.append("others")
        chosen = np.column_stack((chosen, 1 - chosen.sum(axis=1)))
    return names, chosen, kept


def _recalls(confusion: NDArray[np.integer]) -> NDArray[np.float64]:
    recalls: NDArray[np.float64] = confusion.diagonal() / np.maximum(confusion.sum(axis=1), 1)
    return recalls
