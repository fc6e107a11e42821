"""Record a decision: promotions.jsonl, tags and aliases of the registry, the model card."""

from __future__ import annotations

from datetime import UTC, datetime

from heterokd.datasets.io.split import Splits
from heterokd.storage.files import write_text
from heterokd.storage.teacher_card import TeacherCard
from heterokd.storage.typed_json import parse
from heterokd.storage.workspace import Workspace
from heterokd.students.promotion.aliases import CHAMPION, LINES, append_line, last_line, previous_alias
from heterokd.students.promotion.challenger import Candidate
from heterokd.students.promotion.decision import Decision
from heterokd.students.promotion.model_card import Lineage, cache_of, model_card, shortened
from heterokd.students.registry import taken_size, version_links
from heterokd.study.gain import Gain, gain
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.read_summary import read_summary
from heterokd.study.summary import StudySummary
from heterokd.tracking.runs import StudyRuns


def decision_tag(alias: str) -> str:
    """Return the tag of a version that holds its decision."""
    return "decision" if alias == CHAMPION else f"decision.{alias}"


def record_decision(runs: StudyRuns, root: Workspace, decision: Decision, candidate: Candidate, splits: Splits) -> None:
    """Record a decision and move the alias; the alias is last, so that an interrupted promotion is repeated."""
    name, version, client = decision.model, str(candidate.version), runs.client
    now = datetime.now(UTC).isoformat(timespec="seconds")
    if not _is_recorded(runs, decision):
        append_line(runs.folder.path / LINES, now, decision.content())
    elif not decision.promoted:
        return
    tags = {
        decision_tag(decision.alias): decision.to_json(),
        "score": decision.metric,
        "test_score": f"{decision.test_score:.4f}",
        "test_digest": decision.test_digest,
        "data": splits.fingerprint,
    }
    if decision.promoted:
        tags["promoted_at"] = now
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    _write_card(runs, root, decision, candidate, splits)
    if decision.promoted:
        if decision.champion is not None:
            client.set_registered_model_alias(name, previous_alias(decision.alias), decision.champion)
        client.set_registered_model_alias(name, decision.alias, version)


def _scratch(summary: StudySummary | None, teacher: TeacherCard | None) -> float | None:
    """Return the value of the best student without a teacher if it is comparable with the teacher's score."""
    if summary is None or teacher is None or summary.scratch is None or teacher.metric != summary.metric:
        return None
    return summary.scratch.mean


def _gain(summary: StudySummary, config: RankedConfig) -> Gain | None:
    """Return the gain of a configuration over scratch; None if it is scratch, or without a scratch trial."""
    scratch = summary.scratch
    if scratch is None or config.method == scratch.method:
        return None
    return gain(config, scratch, maximise=summary.maximise)


def _write_card(runs: StudyRuns, root: Workspace, decision: Decision, candidate: Candidate, splits: Splits) -> None:
    """Write the model card to the version's description, the run's artifacts and the study's folder."""
    client, summary = runs.client, read_summary(runs.folder)
    version = client.get_model_version(decision.model, str(candidate.version))
    run = client.get_run(str(version.run_id))
    logged = client.get_logged_model(str(version.source).removeprefix("models:/"))
    teacher = None if summary is None else summary.teacher_of(candidate.recipe.teacher.network)
    config = None if summary is None else summary.leader(candidate.trial.number)
    lineage = Lineage(
        teacher=teacher,
        config=config,
        metric=runs.experiment.metric,
        gain=None if summary is None or config is None else _gain(summary, config),
        cache=cache_of(candidate.recipe, splits, None if teacher is None else teacher.weights, root),
        commit=run.data.tags.get("mlflow.source.git.commit"),
        weights=logged.tags.get("heterokd.weights", "unknown"),
        scratch=_scratch(summary, teacher),
    )
    taken = taken_size(f"models:/{decision.model}/{version.version}")
    card = model_card(decision, candidate.recipe, splits, taken, lineage)
    write_text(runs.folder.path / "model_card.md", card)
    client.log_text(run.info.run_id, card, "model_card.md")
    links = version_links(runs, run.info.run_id, ("model card", "model_card.md"))
    client.update_model_version(decision.model, version.version, shortened(f"{links}\n\n{card}"))


def _is_recorded(runs: StudyRuns, decision: Decision) -> bool:
    """Whether the last line holds the same decision, apart from measured costs."""
    line = last_line(runs.folder.path / LINES)
    try:
        last = parse(Decision, line)
    except ValueError:  # a rollback, or damaged
        return False
    before, now = ([(gate.name, gate.required, gate.passed) for gate in each.gates] for each in (last, decision))
    keys = ("alias", "promoted", "challenger", "champion", "test_digest", "test_score")
    return before == now and all(getattr(last, key) == getattr(decision, key) for key in keys)
