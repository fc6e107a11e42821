"""Charts of parameters: importances and parallel coordinates, for all methods together and for each method.

A method's parameters exist in its trials alone, so each method has its pair of charts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from heterokd.domains import Choice, Domain
from heterokd.formatting import format_score, metric_name
from heterokd.methods import PLUS
from heterokd.report.chart import Chart, NothingToShow, draw_chart
from heterokd.report.figures.parameters import Axis, Bar, Line, draw_importance, draw_parallel
from heterokd.report.figures.svg import Vector
from heterokd.report.parameter_facts import ParameterFacts, parameter_facts
from heterokd.report.search_charts import tooltip
from heterokd.report.study_data import StudyReport
from heterokd.report.tables import methods_in_order
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.importance import ALL, Importance
from heterokd.study.trial_view import TrialView

MOST_METHODS = 6
"""Maximum number of methods with charts: those with most complete trials."""

FEWEST_LINES = 3
MOST_LINES = 200
MOST_AXES = 8


def parameter_charts(report: StudyReport) -> list[Chart]:
    """Draw importances and parallel coordinates: all methods first, then each method that has enough trials."""
    facts = parameter_facts(report)
    known = facts.importances
    methods = methods_in_order(report)
    domains = {name: _domains(report, facts, name) for name in (ALL, *methods)}
    names = [name for name in methods if domains[name]]
    counts = {name: sum(trial.method == name and trial.is_complete for trial in report.search) for name in names}
    first = sorted(names, key=lambda name: -counts[name])[:MOST_METHODS]
    ranked = {group for group, found in known.items() if found.shares}
    groups = [ALL] if len(methods) > 1 else []
    groups += [name for name in names if name in first and (counts[name] >= FEWEST_LINES or name in ranked)]
    charts: list[Chart] = []
    for group in groups:
        label = group.replace(" ", "-").replace(PLUS, "-")
        if known or not charts:  # without the database, the reason is given once
            draw = partial(_importance, known.get(group), facts.problem)
            charts.append(draw_chart(f"importance-{label}", f"Parameter importance: {group}", draw))
        draw = partial(_parallel, report, group, domains[group])
        charts.append(draw_chart(f"parallel-{label}", f"Parameter combinations: {group}", draw))
    return charts


def _domains(report: StudyReport, facts: ParameterFacts, group: str) -> dict[str, Domain]:
    """Return the domains of a group's parameters, without those that have a single value."""
    experiment = report.experiment
    found = experiment.shared_domains()
    if group == ALL:
        tried = methods_in_order(report)
        found = {"method": Choice(*dict.fromkeys((*experiment.listed_methods, *tried)))} | found
    else:
        found = {**facts.domains[group], **found}
    return {key: domain for key, domain in found.items() if not _is_constant(domain)}


def _is_constant(domain: Domain) -> bool:
    return len(domain.options) == 1 if isinstance(domain, Choice) else domain.low == domain.high


def _importance(known: Importance | None, problem: str, made: Vector) -> str:
    if known is None or not known.shares:
        reason = known.reason if known is not None else problem or "the database has no trial of it"
        raise NothingToShow(f"The importances are unknown: {reason}.")
    bars = [Bar(_short(share.name), share.mean, share.low, share.high) for share in known.shares[:MOST_AXES]]
    draw_importance(made, bars)
    where = "complete trials" if known.epoch is None else f"trials at epoch {known.epoch}, their last common rung"
    caption = (
        f"{bars[0].label} explains {100 * bars[0].mean:.0f} % of the variance of {known.trials} {where} "
        "(fANOVA; whiskers: range over three forests)."
    )
    return caption if known.trials >= 30 else f"{caption} With so few trials the order is uncertain."


def _parallel(report: StudyReport, group: str, searched: Mapping[str, Domain], made: Vector) -> str:
    trials = [
        trial
        for trial in report.search
        if group in (ALL, trial.method) and trial.status != TrialStatus.RUNNING and not trial.status.is_failure
    ]
    trials.sort(key=lambda trial: (not trial.is_complete, trial.number))
    values = {trial.number: trial.value for trial in trials if trial.is_complete and trial.value is not None}
    if len(values) < FEWEST_LINES:
        raise NothingToShow(f"{len(values)} trials are complete; {FEWEST_LINES} are needed.")
    domains = dict(list(searched.items())[: MOST_AXES - 1])
    # The worst values are far from the others: only the better nine tenths share the axis.
    ordered = sorted(values.values(), reverse=report.summary.maximise)
    best, worst = ordered[0], ordered[math.ceil(0.9 * len(ordered)) - 1]
    axes = [Axis(_short(key), _ticks(domain)) for key, domain in domains.items()]
    axes.append(Axis(metric_name(report.summary.metric), [(0.0, format_score(worst)), (1.0, format_score(best))]))
    top = max(values, key=lambda number: report.sign * values[number])
    shown = trials[:MOST_LINES]

    def line(trial: TrialView) -> Line:
        places = [_place(domain, trial.sample.get(key)) for key, domain in domains.items()]
        result = None
        if trial.number in values:
            result = 1.0 if best == worst else _clip((values[trial.number] - worst) / (best - worst))
        return Line([*places, result], trial.number == top, tooltip(trial, len(shown)))

    draw_parallel(made, axes, [line(trial) for trial in shown])
    stopped = len(trials) - len(values)
    caption = f"{len(values)} complete trials, darker is better; thick: the best of them, trial {top}"
    return f"{caption}. {stopped} that were stopped early are faint." if stopped else f"{caption}."


def _clip(place: float) -> float:
    return min(max(place, 0.0), 1.0)


def _place(domain: Domain, value: object) -> float | None:
    """Return the position of a value on its axis, in [0, 1]; None if it was not sampled or is not an option."""
    if isinstance(domain, Choice):
        options = list(domain.options)
        return options.index(value) / max(1, len(options) - 1) if value in options else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    low, high = float(domain.low), float(domain.high)
    if domain.log and value > 0:
        return _clip(math.log(value / low) / math.log(high / low))
    return _clip((float(value) - low) / (high - low))


def _ticks(domain: Domain) -> Sequence[tuple[float, str]]:
    if isinstance(domain, Choice):
        count = max(1, len(domain.options) - 1)
        return [(place / count, _text(option)) for place, option in enumerate(domain.options)]
    ends = [(0.0, _text(domain.low)), (1.0, _text(domain.high))]
    if isinstance(domain.low, int):
        return ends
    middle = math.sqrt(domain.low * domain.high) if domain.log else (domain.low + domain.high) / 2
    return [ends[0], (0.5, _text(middle)), ends[1]]


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _short(key: str) -> str:
    return key.rsplit(".", 1)[-1].replace("_", " ") if not key.startswith("student") else "student"
