"""Which values mattered and which met in good students: for all methods together, and for each method by itself.

A method's own values exist in its trials alone, so each method has its own two charts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from heterokd.config.experiment import Experiment
from heterokd.domains import Choice, Domain
from heterokd.formatting import format_score, metric_name
from heterokd.report.figures.parameters import Axis, Bar, Line, draw_importance, draw_parallel
from heterokd.report.search_charts import Chart, NothingToShow, chart, tip
from heterokd.report.study_data import StudyReport
from heterokd.report.tables import methods_in_order
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.importance import ALL, Importance, importances
from heterokd.study.trial_view import TrialView

MOST_METHODS = 6
"""Methods with charts of their own: those with most trials that were trained to the end."""

FEWEST_LINES = 3
MOST_LINES = 200
MOST_AXES = 8


def value_charts(report: StudyReport) -> list[Chart]:
    """Pairs of importance and parallel coordinates: all methods first, then each method that has enough trials."""
    try:
        known = {one.group: one for one in importances(report.folder)}
        why = "" if report.folder.database.exists() else "the study's database is not here"
    except Exception as error:  # noqa: BLE001  a database that cannot be read costs these charts, not the page
        known, why = {}, f"{type(error).__name__}: {error}".splitlines()[0]
    found: list[Chart] = []
    names = [one for one in methods_in_order(report) if _varied(report.experiment, one)]
    counts = {name: sum(one.method == name and one.is_complete for one in report.search) for name in names}
    chosen = sorted(names, key=lambda name: -counts[name])[:MOST_METHODS]
    groups = [ALL] if len(methods_in_order(report)) > 1 else []
    groups += [name for name in names if name in chosen and (counts[name] >= FEWEST_LINES or _says(known.get(name)))]
    for group in groups:
        label = group.replace(" ", "-")
        title = f"What mattered: {group}"
        if known or not found:  # what is missing for all of them is said once
            found.append(chart(f"importance-{label}", title, lambda g=group: _importance(known.get(g), g, why)))  # type: ignore[misc]
        title = f"Which values met: {group}"
        found.append(chart(f"parallel-{label}", title, lambda g=group: _parallel(report, g)))  # type: ignore[misc]
    return found


def _says(known: Importance | None) -> bool:
    return known is not None and bool(known.shares)


def _varied(experiment: Experiment, method: str) -> bool:
    return bool(_domains(experiment, method))


def _domains(experiment: Experiment, group: str) -> dict[str, Domain]:
    """What is searched in a group: a method's own values and those that all share, but none that is pinned."""
    found = experiment.shared_domains()
    if group == ALL:
        found = {"method": Choice(*experiment.methods)} | found
    else:
        found = experiment.method_domains(group) | found
    return {key: domain for key, domain in found.items() if not _is_pinned(domain)}


def _is_pinned(domain: Domain) -> bool:
    return len(domain.options) == 1 if isinstance(domain, Choice) else domain.low == domain.high


def _importance(known: Importance | None, group: str, why: str) -> tuple[str, str]:
    if known is None:
        raise NothingToShow(f"Nothing can be said of what mattered: {why or 'no trial of it is in the database'}.")
    if not known.shares:
        raise NothingToShow(f"Nothing can be said of what mattered yet: {known.reason}.")
    bars = [Bar(_short(share.name), share.mean, share.low, share.high) for share in known.shares[:MOST_AXES]]
    first = known.shares[0]
    of = "their end" if known.epoch is None else f"epoch {known.epoch}, their first rung"
    caption = (
        f"{_short(first.name)} explains {100 * first.mean:.0f} % of how far {known.trials} trials scatter at {of} "
        "(fANOVA; whiskers: range over three forests)."
    )
    if known.trials < 30:
        caption += " With so few trials the order is a hint."
    title = f"What mattered: {group}"
    return draw_importance(f"importance-{group.replace(' ', '-')}", title, caption, bars), caption


def _parallel(report: StudyReport, group: str) -> tuple[str, str]:
    experiment, maximise = report.experiment, bool(report.summary.maximise)
    own = [
        one
        for one in report.search
        if group in (ALL, one.method) and one.status != TrialStatus.RUNNING and not one.status.is_failure
    ]
    reached = [one for one in own if one.is_complete]
    if len(reached) < FEWEST_LINES:
        raise NothingToShow(f"{len(reached)} trials were trained to the end; {FEWEST_LINES} are needed.")
    domains = dict(list(_domains(experiment, group).items())[: MOST_AXES - 1])
    values = [one.value for one in reached if one.value is not None]
    # Of all values that were reached the lowest are far below: the better nine tenths share the axis.
    ordered = sorted(values, reverse=maximise)
    best, worst = ordered[0], ordered[min(len(ordered) - 1, math.ceil(0.9 * len(ordered)) - 1)]
    axes = [Axis(_short(key), _ticks(domain, experiment)) for key, domain in domains.items()]
    axes.append(Axis(metric_name(report.summary.metric), [(0.0, format_score(worst)), (1.0, format_score(best))]))
    top = (max if maximise else min)(reached, key=lambda one: one.value or 0.0)
    shown = sorted(own, key=lambda one: (not one.is_complete, one.number))[:MOST_LINES]
    lines = [
        Line(
            [*(_place(domain, one.sample.get(key)) for key, domain in domains.items()), _reached(one, best, worst)],
            one.value if one.is_complete else None,
            one.number == top.number,
            tip(one, len(shown)),
        )
        for one in shown
    ]
    caption = f"{len(reached)} trials to the end, the darker the better; thick: the best of them, trial {top.number}"
    stopped = len(own) - len(reached)
    caption += f". {stopped} that were stopped early are faint." if stopped else "."
    title = f"Which values met: {group}"
    return draw_parallel(f"parallel-{group.replace(' ', '-')}", title, caption, axes, lines), caption


def _reached(one: TrialView, best: float, worst: float) -> float | None:
    if not one.is_complete or one.value is None:
        return None
    return 1.0 if best == worst else min(max((one.value - worst) / (best - worst), 0.0), 1.0)


def _place(domain: Domain, value: object) -> float | None:
    """Where a value stands on its axis, in [0, 1]; None where it was not sampled or lies outside."""
    if isinstance(domain, Choice):
        options = list(domain.options)
        return options.index(value) / max(1, len(options) - 1) if value in options else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    low, high = float(domain.low), float(domain.high)
    place = (
        math.log(value / low) / math.log(high / low)
        if domain.log and value > 0
        else (float(value) - low) / (high - low)
    )
    return min(max(place, 0.0), 1.0)


def _ticks(domain: Domain, experiment: Experiment) -> Sequence[tuple[float, str]]:
    if isinstance(domain, Choice):
        count = max(1, len(domain.options) - 1)
        return [(place / count, _text(option)) for place, option in enumerate(domain.options)]
    middle: float = math.sqrt(domain.low * domain.high) if domain.log else (domain.low + domain.high) / 2
    if not isinstance(domain.low, int):
        return [(0.0, _text(domain.low)), (0.5, _text(middle)), (1.0, _text(domain.high))]
    return [(0.0, _text(domain.low)), (1.0, _text(domain.high))]


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _short(key: str) -> str:
    return key.rsplit(".", 1)[-1].replace("_", " ") if not key.startswith("student") else "student"
