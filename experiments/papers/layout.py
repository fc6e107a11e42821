"""Format the papers' experiments: comments and lines of at most `WIDTH` columns."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import wrap

from heterokd.study.published import PublishedPair

WIDTH = 120


def comment(text: str) -> list[str]:
    """Return the lines of a comment."""
    return wrap(text, WIDTH, initial_indent="# ", subsequent_indent="#   ", break_long_words=False)


def deviations(texts: Iterable[str]) -> list[str]:
    """Return the deviations as comments, with a title."""
    lines = ["# Deviations:"]
    for text in texts:
        lines += wrap(text, WIDTH, initial_indent="# - ", subsequent_indent="#   ", break_long_words=False)
    return lines


def flow(key: str, value: str, room: int = WIDTH) -> list[str]:
    """Format `key: {...}` in lines of at most `room` columns, with breaks after commas only."""
    lines = [f"{key}:"]
    for number, part in enumerate(value.split(", ")):
        text = part if number == value.count(", ") else f"{part},"
        if len(lines[-1]) + 1 + len(text) <= room:
            lines[-1] += f" {text}"
        else:
            lines.append(f"  {text}")
    return lines


def published_table(pair: PublishedPair) -> list[str]:
    """Return the published numbers as comments, best first."""
    extra = " (top-5)" if pair.metric == "top1" else ""
    teacher = "" if pair.teacher_value is None else f"; teacher {pair.teacher_value:.2f}"
    lines = [f"# Published {pair.metric_name}{extra} in per cent{teacher}:"]
    for result in sorted(pair.results, key=lambda result: -result.value):
        top5 = "" if result.top5 is None else f" ({result.top5:.2f})"
        lines.append(f"#   {result.method:<10}{result.value:.2f}{top5}  {result.source}")
    return lines


def teacher_head(title: str, file: str) -> list[str]:
    """Return the header of the experiment that fits a teacher: `file` is its path in this folder."""
    lines = [f"# {title}", "#", f"#   heterokd teacher experiments/papers/{file}", "#"]
    lines += comment("It prints the path of the weights, which the experiment of a pair takes with")
    return [*lines, "#   --set teacher.checkpoint=FILE --set teacher.pretrained=false", "#"]
