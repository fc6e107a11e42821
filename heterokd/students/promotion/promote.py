"""promote(): compare a study's challenger with the champion on the test split, and move the alias if it is better."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace

from filelock import FileLock
from mlflow.entities.model_registry import ModelVersion

from heterokd.config.reading import load_study_experiment
from heterokd.datasets.io.split import Splits
from heterokd.errors import PromotionError
from heterokd.formatting import metric_name
from heterokd.methods import BASELINE
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.workspace import Workspace
from heterokd.students.promotion.aliases import CHAMPION, LOCK, check_alias, described_version
from heterokd.students.promotion.challenger import (
    Candidate,
    find_challenger,
    open_challenger,
    version_with,
)
from heterokd.students.promotion.decision import Decision, Gate, PairedComparison, reason
from heterokd.students.promotion.evaluation import Evaluate, evaluate_here, task_of
from heterokd.students.promotion.gates import (
    cost_gates,
    export_gate,
    int8_gates,
    iou_gates,
    parity_gate,
    recall_gates,
    rollback_gates,
)
from heterokd.students.promotion.opponent import baseline_results, champion_results
from heterokd.students.promotion.record import decision_tag, record_decision
from heterokd.students.registry import CHALLENGER, create_model
from heterokd.students.registry_lock import locked_model
from heterokd.study.read_summary import read_summary
from heterokd.tracking.runs import StudyRuns
from heterokd.tracking.store import answering, current, open_store, quiet
from heterokd.training.data import open_splits
from heterokd.training.paired_tests import ImageConfusions, ImageResults


# One parameter for each option of the command line.
def promote(
    root: Workspace,
    study_name: str,
    *,
    dry_run: bool = False,
    alias: str = CHAMPION,
    uri: str | None = None,
    trial: int | None = None,
    unfinished: bool = False,
    evaluate: Evaluate = evaluate_here,
) -> Decision:
    """Evaluate a study's challenger on the test split and, if every gate is passed, make it champion.

    Args:
        root: workspace.
        study_name: name of a study with a winner.
        dry_run: decide, but change nothing.
        alias: alias for the version; the version that had it gets `previous` (`previous-ALIAS` for another alias).
        uri: URI of the tracking store; default: the experiment's.
        trial: trial to promote instead of the study's winner, such as another member of the Pareto front; for this call
            alone.
        unfinished: also judge a study that is not finished; the decision records it.
        evaluate: function that evaluates a student on the test split.

    Raises:
        StudyError: there is no such study.
        PromotionError: the alias cannot be used, the study is not finished, there is no student to promote, or it
            cannot be compared with the champion.
        TrackingError: the store does not answer.
    """
    check_alias(alias)
    folder = root.existing_study(study_name)
    experiment = load_study_experiment(folder.experiment_file)
    uri = open_store(root, uri or experiment.tracking.uri)
    runs = StudyRuns(experiment, folder, uri, root.artifacts)
    is_unfinished = _is_unfinished(folder)
    if is_unfinished and not unfinished:
        raise PromotionError(
            f"{folder.path}: the study is not finished, and its winner may change; finish it (`heterokd search` with "
            "--resume), or use --unfinished to open the test split now"
        )
    with FileLock(root.path / LOCK), answering(uri), quiet(), current(uri), _lock(runs, trial, dry_run=dry_run):
        champion = version_with(runs, alias)
        challenger, version = find_challenger(runs, trial)
        is_champion = champion is not None and str(champion.version) == version
        if champion is not None and is_champion and decision_tag(alias) in champion.tags:
            return replace(Decision.from_json(champion.tags[decision_tag(alias)]), changed=False)
        splits = open_splits(experiment.data)
        candidate = open_challenger(
            runs, challenger, version, splits, dry_run=dry_run, alias=CHALLENGER if trial is None else None
        )
        if is_champion:
            # The alias was set by hand: the version is evaluated, and keeps the alias.
            decision = _decide(runs, candidate, None, splits, alias, evaluate, dry_run=dry_run)
            return replace(decision, changed=False, promoted=True, unfinished=is_unfinished)
        decision = _decide(runs, candidate, champion, splits, alias, evaluate, dry_run=dry_run)
        decision = replace(decision, unfinished=is_unfinished)
        if not dry_run and candidate.version is not None:
            record_decision(runs, root, decision, candidate, splits)
        return decision


def _is_unfinished(folder: StudyFolder) -> bool:
    summary = read_summary(folder)
    return summary is not None and not summary.progress.finished


def _lock(runs: StudyRuns, trial: int | None, *, dry_run: bool) -> AbstractContextManager[None]:
    """Return the lock of the registered model, which is created; a dry run changes nothing, so it needs none."""
    if dry_run:
        return nullcontext()
    find_challenger(runs, trial)  # raises before an empty model is registered
    create_model(runs)
    return locked_model(runs.client, runs.experiment.registered_model)


# Two models and what is asked of them.
def _decide(
    runs: StudyRuns,
    candidate: Candidate,
    champion: ModelVersion | None,
    splits: Splits,
    alias: str,
    evaluate: Evaluate,
    *,
    dry_run: bool,
) -> Decision:
    experiment, settings = runs.experiment, runs.experiment.promotion
    task = task_of(experiment, splits)
    results = evaluate(candidate.tested(experiment), experiment)
    comparison = _comparison(runs, alias, champion, splits, results, evaluate)
    name = f"gain in test {metric_name(task.metric)}"
    gain = Gate(name, "-", None, None, f"no {BASELINE} trial to compare with")
    if comparison is not None:
        passed = comparison.gain > settings.min_gain
        gain = Gate(name, f"> {settings.min_gain:g}", comparison.gain, passed, f"over {comparison.against}")
    gates = (
        gain,
        *recall_gates(results, splits.class_names, settings),
        *iou_gates(results, splits.class_names, settings),
        *cost_gates(candidate, experiment, splits.num_classes),
        parity_gate(candidate, splits),
        export_gate(candidate, settings, splits),
        *int8_gates(candidate, settings, splits),
        *rollback_gates(runs, candidate, alias),
    )
    low, high = results.interval()
    failed = [gate for gate in gates if gate.passed is False]
    return Decision(
        study=experiment.name,
        model=experiment.registered_model,
        alias=alias,
        promoted=not failed,
        changed=not failed and not dry_run,
        reason=reason(failed, comparison, task.metric, results.score, dry_run=dry_run),
        trial=candidate.trial.number,
        method=candidate.recipe.method,
        challenger=candidate.version,
        champion=None if champion is None else str(champion.version),
        champion_student="" if champion is None else described_version(champion),
        metric=task.metric,
        test_score=results.score,
        test_images=len(results),
        test_digest=splits.test.digest,
        comparison=comparison,
        gates=gates,
        test_low=low,
        test_high=high,
        iou_classes=results.classes if isinstance(results, ImageConfusions) else None,
    )


# See `champion_results`.
def _comparison(
    runs: StudyRuns,
    alias: str,
    champion: ModelVersion | None,
    splits: Splits,
    results: ImageResults,
    evaluate: Evaluate,
) -> PairedComparison | None:
    """Compare the challenger with the champion, or with the baseline if there is no champion."""
    if champion is not None:
        against = f"{alias} (version {champion.version})"
        other = champion_results(runs, alias, champion, splits, results, evaluate)
    else:
        baseline = baseline_results(runs, splits, evaluate)
        if baseline is None:
            return None
        number, other = baseline
        against = f"{BASELINE} (trial {number})"
    return PairedComparison(against=against, **asdict(results.compared(other)))
