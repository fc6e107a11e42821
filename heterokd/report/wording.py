"""Sentences on a study's results, for the page and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from heterokd.config.costs import FROM_TABLE
from heterokd.formatting import format_score, join_words, metric_name
from heterokd.methods import BASELINE
from heterokd.networks.student_costs import STUDENT_COSTS
from heterokd.storage.teacher_card import TeacherCard
from heterokd.study.failures import IN_A_ROW
from heterokd.study.gain import Gain, gain
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.summary import StudySummary

MORE_SEEDS = "raise search.confirm_share or the budget for more fresh seeds"
"""Advice where a difference is not decided."""


def notes(summary: StudySummary) -> list[str]:
    """List problems of the teachers, what a search excluded, stopped or paused, and its budget: a sentence each."""
    found = [f"Teacher {card.network}: {problem}." for card in _teachers(summary) for problem in card.problems()]
    found += summary.changes
    if summary.warm_studies:
        named = ", ".join(f"{name} ({weight:.2f})" for name, weight in summary.warm_studies.items())
        found.append(f"The best settings of finished studies were tried first (similarity): {named}.")
    found += [f"Excluded: {reason}." for reasons in (summary.left_out, summary.excluded) for reason in reasons.values()]
    found += [
        f"{method} failed {IN_A_ROW} times in a row for the same reason and was left out of the rest of the search: "
        f"{reason}"
        for method, reason in summary.failing.items()
    ]
    found += [
        f"Node {address} was avoided, and its trials ran on other nodes: {reason}."
        for address, reason in summary.failing_nodes.items()
    ]
    harmful = summary.negative_transfer
    if harmful:
        worse = ", ".join(f"trial {trial.number} ({trial.method}, epoch {trial.epoch})" for trial in harmful)
        found.append(f"Negative transfer, stopped early as clearly worse than the student without a teacher: {worse}.")
    progress = summary.progress
    if progress.diverged:
        found.append(f"{progress.diverged} trial(s) diverged: a loss or a metric was not finite.")
    if progress.paused:
        found.append(f"The budget paused {progress.paused} trial(s); raise it and use --resume to continue them.")
    if summary.limits:
        parts = [
            f"{summary.spent.get(key) or 0:.4g} of {limit:g} {key.replace('_', ' ')}"
            for key, limit in summary.limits.items()
        ]
        found.append(f"Spent: {', '.join(parts)}.")
    return found


def student_costs(summary: StudySummary, student: str, costs: Sequence[str]) -> str:
    """Format costs of a student: `0.36 M parameters, 1.2 ms latency`."""
    measured = summary.students.get(student, {})
    return ", ".join(STUDENT_COSTS[key].figure(measured[key]) for key in costs)


def listed_costs(summary: StudySummary, costs: Sequence[str]) -> str:
    """Name those of some costs that are from the user's table: `latency from a table of yours`; empty without any."""
    listed = [STUDENT_COSTS[key].name for key in costs if summary.cost_conditions.get(key) == FROM_TABLE]
    return f"{join_words(listed)} {FROM_TABLE}" if listed else ""


def cost_sources(conditions: Mapping[str, str]) -> list[str]:
    """Say where costs come from: `Latency: median of 30, batch 1, ...`; `conditions` are texts by cost."""
    names = {key: STUDENT_COSTS[key].name for key in conditions}
    return [f"{name[0].upper()}{name[1:]}: {conditions[key]}." for key, name in names.items()]


def _teachers(summary: StudySummary) -> tuple[TeacherCard, ...]:
    return summary.teachers or (() if summary.teacher is None else (summary.teacher,))


def weak_teacher(summary: StudySummary) -> str | None:
    """Return the sentence that every teacher is near chance or worse than the student without a teacher, or None."""
    cards = [card for card in _teachers(summary) if card.metric == summary.metric]
    if not cards or len(cards) < len(_teachers(summary)) or not summary.maximise:
        return None
    best = max(cards, key=lambda card: card.val_score)
    reach = f"{best.network} reaches {format_score(best.val_score)}{best.classes}"
    scratch, half = (None, None) if summary.scratch is None else (summary.scratch.mean, summary.scratch.half_width)
    advice = "fit or choose a better teacher (`heterokd teacher EXPERIMENT` measures it), then search again"
    if scratch is not None and best.val_score < scratch - (half or 0):
        return (
            f"The teacher is the problem: {reach}, less than the student without a teacher "
            f"({format_score(scratch)}); {advice}."
        )
    if all(card.is_near_chance for card in cards):
        return f"The teacher is the problem: {reach}, which is near chance; {advice}."
    return None


def lead(summary: StudySummary) -> str:
    """Name the winner with its value, or say that there is none."""
    winner = summary.winner
    if winner is None:
        return verdict(summary)
    value = f"{metric_name(summary.metric)} on val {winner.score}"
    return f"{winner.method} (trial {winner.number}) gives the best student: {value}{winner_interval(winner)}."


def winner_interval(winner: RankedConfig) -> str:
    """Return what follows the winner's value in a sentence: its interval and its number of fresh seeds."""
    interval = winner.estimate.removeprefix(winner.score)
    return interval if winner.confirmed else f"{interval}, the best of its search: a fresh seed will reach less"


def verdict(summary: StudySummary) -> str:
    """Say how sure it is that the winner is better than scratch, and whether the teacher is the problem."""
    found, weak = _gain(summary), weak_teacher(summary)
    if weak is None or summary.winner is None or summary.distillation_failure is not None:
        return found
    return f"{weak} {found}"


def _gain(summary: StudySummary) -> str:
    winner, scratch, failure = summary.winner, summary.scratch, summary.distillation_failure
    if failure is not None:
        return f"All {failure.trials} distillation trials failed: {failure.reason}"
    if winner is None:
        return "No trial is complete."
    if scratch is None:
        return "The study has no scratch trial, so the gain of distillation is unknown."
    if winner.method == scratch.method:
        return _without_gain(summary, scratch)
    found = gain(winner, scratch, maximise=summary.maximise)
    if found is None or found.grade == "unknown":
        return "One seed each, so the difference may be noise: run more trials, or raise search.confirm_share."
    text = f"{found.difference:+.4f} over scratch ({_sureness(found)})"
    if found.grade == "significant":
        return f"The gain is significant: {text}."
    if found.grade == "likely":
        return f"The gain is likely, but not certain: {text}; {MORE_SEEDS}."
    if found.grade == "tie":
        return f"Tie: the winner is not known to be better than scratch: {text}; {MORE_SEEDS}."
    return f"The winner's mean is below that of scratch: {text}; {MORE_SEEDS}."


def _without_gain(summary: StudySummary, scratch: RankedConfig) -> str:
    """Compare the best distilled student with scratch, which won."""
    best = best_distilled(summary)
    if best is None:
        stopped = summary.progress.pruned
        ended = f"{stopped} {'was' if stopped == 1 else 'were'} stopped early" if stopped else "none was completed"
        return f"Distillation is not compared here: no student was distilled to the end ({ended})."
    name = f"{best.method} (trial {best.number})"
    found = gain(best, scratch, maximise=summary.maximise)
    if found is None or found.grade == "unknown":
        return (
            f"Not known: {name}, the best distilled student, and the student trained without a teacher have one seed "
            "each, so their difference may be noise; run more trials, or raise search.confirm_share."
        )
    text = f"{found.difference:+.4f} to scratch ({_sureness(found)})"
    if found.grade == "worse":
        return f"Distillation did not help here: {name}, the best distilled student, is worse: {text}."
    if found.grade == "likely worse":
        return f"Distillation probably did not help here: {name}, the best distilled student: {text}; {MORE_SEEDS}."
    return (
        f"Tie: {name}, the best distilled student, is not known to be better or worse than the student trained without "
        f"a teacher: {text}; {MORE_SEEDS}."
    )


def best_distilled(summary: StudySummary) -> RankedConfig | None:
    """Return the first leader that was trained with a teacher; with costs as objectives, of the winner's student."""
    distilled = [leader for leader in summary.leaders if leader.method != BASELINE]
    if len(summary.objectives) > 1 and summary.winner is not None:
        distilled = [leader for leader in distilled if leader.student == summary.winner.student]
    return next(iter(distilled), None)


def _sureness(found: Gain) -> str:
    return found.interval if found.is_fresh else f"{found.interval}, from single seeds"
