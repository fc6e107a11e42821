"""A student becomes champion by its figures on the test split, once, and nobody else does."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import fabricated
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from processes import CONTEXT
from scipy.stats import binomtest

from heterokd.config.experiment import Experiment
from heterokd.datasets import load_dataset
from heterokd.datasets.io.loaders import open_test
from heterokd.datasets.io.split import Splits
from heterokd.errors import NetworkError, PromotionError, StudyError, TrackingError
from heterokd.networks.classifier import Network
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.workspace import Workspace
from heterokd.students.export.accuracy import Accuracy
from heterokd.students.export.parity import Parity
from heterokd.students.promotion.challenger import Candidate, task_of
from heterokd.students.promotion.decision import Decision, PairedComparison, reason
from heterokd.students.promotion.gates import cost_gates, export_gate, int8_gates, recall_gates
from heterokd.students.promotion.promote import promote
from heterokd.students.promotion.rollback import rollback
from heterokd.students.registry import log_student, register, remove_pending
from heterokd.study.progress import StudyProgress
from heterokd.study.read_summary import read_summary
from heterokd.tracking.runs import StudyRuns
from heterokd.tracking.store import open_store
from heterokd.training.data import open_splits
from heterokd.training.evaluation import evaluate, image_results
from heterokd.training.paired_tests import CorrectImages, ImageConfusions, ImageLogits, PairedTest
from heterokd.training.task_modules import SegmentationTask

NAME = "digits-student"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    # mlflow would keep it for the process, and the next search would log there.
    assert "MLFLOW_TRACKING_URI" not in os.environ


@pytest.fixture
def root(tmp_path: Path) -> Workspace:
    return fabricated.root_with_store(tmp_path)


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_dataset("digits", image_size=32, labels_per_class=20)


@pytest.fixture(scope="module")
def students(splits: Splits) -> dict[str, Network]:
    return {name: fabricated.fitted_student(splits, count) for name, count in (("good", 200), ("poor", 30))}


def studied(root: Workspace, question: Experiment, winner: Network, scratch: Network | None = None) -> StudyFolder:
    """A finished study: trial 0 is scratch, trial 1 the winner."""
    folder = fabricated.study(root, question)
    leaders = [fabricated.ranked(1)]
    if scratch is not None:
        fabricated.trial(folder, question, 0, "scratch", student=scratch)
        leaders.append(fabricated.ranked(0, "scratch", 0.2))
    fabricated.trial(folder, question, 1, "kd", student=winner)
    fabricated.summary(*leaders).write(folder)
    return folder


def registry(root: Workspace) -> MlflowClient:
    return MlflowClient(open_store(root, None))


def aliases(root: Workspace) -> dict[str, str]:
    return {name: str(version) for name, version in registry(root).get_registered_model(NAME).aliases.items()}


def lines(folder: StudyFolder) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder.path / "promotions.jsonl").read_text().splitlines()]


def gates(decision: Decision) -> dict[str, bool | None]:
    return {gate.name: gate.passed for gate in decision.gates}


def test_the_first_champion_beats_scratch_and_twice_is_once(root: Workspace, students: dict[str, Network]) -> None:
    folder = studied(root, fabricated.experiment(), students["good"], students["poor"])

    tried = promote(root, "tiny", dry_run=True)
    assert (tried.promoted, tried.changed, tried.challenger) == (True, False, None)
    assert tried.reason.startswith("would be promoted: ")
    assert not registry(root).search_registered_models()
    assert not (folder.path / "promotions.jsonl").exists()

    first = promote(root, "tiny")
    assert (first.promoted, first.changed, first.trial, first.champion) == (True, True, 1, None)
    assert first.reason == tried.reason.removeprefix("would be ")
    assert first.test_score == tried.test_score
    assert first.comparison.against == "scratch (trial 0)"
    assert first.comparison.gain == pytest.approx(first.test_score - first.comparison.score)
    assert first.comparison.low < first.comparison.gain < first.comparison.high
    assert aliases(root) == {"challenger": "1", "champion": "1"}
    version = registry(root).get_model_version(NAME, "1")
    assert version.tags["test_score"] == f"{first.test_score:.4f}"
    assert version.tags["score"] == first.metric == "top1"
    assert version.tags["test_digest"] == first.test_digest
    assert "promoted_at" in version.tags
    assert "| gain in test top-1 (over scratch (trial 0)) | > 0 |" in version.description
    assert [first.table()[0][i] for i in (0, 1, 3)] == ["gain in test top-1 (over scratch (trial 0))", "> 0", "yes"]

    experiment = registry(root).get_experiment_by_name("tiny")
    runs = {run.info.run_name: run for run in registry(root).search_runs([experiment.experiment_id])}
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(runs, "FINISHED")
    assert set(runs) == {"tiny", "000-scratch", "001-kd"}
    assert runs["001-kd"].data.metrics["val/top1"] == 0.3

    again = promote(root, "tiny")
    assert again == Decision.from_json(json.dumps({**json.loads(first.to_json()), "changed": False}))
    assert len(lines(folder)) == 1
    assert registry(root).get_model_version(NAME, "1").tags == version.tags


@pytest.mark.thorough
def test_another_trial_than_the_winner_is_promoted_when_it_is_named(
    root: Workspace, students: dict[str, Network]
) -> None:
    question = fabricated.experiment()
    folder = studied(root, question, students["poor"], students["poor"])
    fabricated.trial(folder, question, 2, "dkd", student=students["good"])
    decision = promote(root, "tiny", trial=2)
    assert (decision.trial, decision.method, decision.promoted) == (2, "dkd", True)
    assert registry(root).get_model_version_by_alias(NAME, "champion").tags["trial"] == "2"
    assert not promote(root, "tiny", trial=2).changed
    with pytest.raises(PromotionError, match=r"--trial 7: trial 7 of study 'tiny' does not exist"):
        promote(root, "tiny", trial=7)


@pytest.mark.thorough
def test_a_named_trial_is_judged_for_that_call_alone(root: Workspace, students: dict[str, Network]) -> None:
    question = fabricated.experiment()
    folder = studied(root, question, students["good"], students["poor"])
    fabricated.trial(folder, question, 2, "dist", student=students["poor"])
    named = promote(root, "tiny", trial=2)
    assert (named.trial, named.method) == (2, "dist")
    assert "challenger" not in aliases(root)
    plain = promote(root, "tiny")
    assert (plain.trial, plain.method) == (1, "kd")
    assert plain.subject.startswith(
        f"version {plain.challenger} of {NAME}: trial 1, kd (study tiny); champion before: "
    )
    assert aliases(root)["challenger"] == plain.challenger


@pytest.mark.thorough
def test_a_study_that_is_not_finished_is_refused_without_opening_test(
    root: Workspace, students: dict[str, Network]
) -> None:
    folder = studied(root, fabricated.experiment(), students["good"], students["poor"])
    summary = read_summary(folder)
    assert summary is not None
    replace(summary, progress=StudyProgress(finished=False)).write(folder)
    for options in ({}, {"dry_run": True}, {"trial": 1}):
        with pytest.raises(PromotionError, match=r"the study is not finished.*--unfinished"):
            promote(root, "tiny", **options)
    assert not registry(root).search_registered_models()
    decision = promote(root, "tiny", unfinished=True)
    assert decision.unfinished
    assert "which is not finished" in decision.subject
    assert lines(folder)[-1]["unfinished"] is True
    stored = registry(root).get_model_version(NAME, decision.challenger).tags["decision"]
    assert Decision.from_json(stored).unfinished


def test_models_that_a_killed_process_left_pending_are_removed(
    root: Workspace, splits: Splits, students: dict[str, Network]
) -> None:
    question = fabricated.experiment()
    folder = studied(root, question, students["good"])
    runs = StudyRuns(question, folder, open_store(root, None), root.artifacts)
    client, run_id = registry(root), runs.run_id(folder.trial(1))
    foreign = client.create_run(runs.experiment_id).info.run_id  # of no study
    for each in (run_id, foreign):
        client.create_logged_model(runs.experiment_id, "student", each)
    assert remove_pending(runs) == 1
    (left,) = client.search_logged_models([runs.experiment_id])
    assert left.source_run_id == foreign
    assert remove_pending(runs) == 0


def test_a_challenger_worse_than_scratch_stays_challenger(root: Workspace, students: dict[str, Network]) -> None:
    folder = studied(root, fabricated.experiment(), students["poor"], students["good"])
    for _ in range(2):
        refused = promote(root, "tiny")
        assert (refused.promoted, refused.changed) == (False, False)
        assert refused.comparison.p_value < 0.05
        assert refused.reason.startswith("refused: gain in test top-1 is -")
        assert aliases(root) == {"challenger": "1"}
    assert [line["promoted"] for line in lines(folder)] == [False]


@pytest.mark.thorough
def test_champions_follow_one_another(root: Workspace, students: dict[str, Network]) -> None:
    studied(root, fabricated.experiment("poor"), students["poor"])
    unchecked = promote(root, "poor")
    assert unchecked.promoted
    assert gates(unchecked)["gain in test top-1"] is None
    assert "no scratch trial" in unchecked.reason
    assert unchecked.table()[0][3] == "not checked"

    studied(root, fabricated.experiment("good"), students["good"], students["poor"])
    better = promote(root, "good")
    assert (better.promoted, better.champion, better.challenger) == (True, "1", "2")
    assert better.comparison.against == "champion (version 1)"
    assert better.comparison.score == unchecked.test_score
    assert aliases(root) == {"challenger": "2", "champion": "2", "previous": "1"}

    back = promote(root, "poor")
    assert (back.promoted, back.changed, back.challenger) == (False, False, "1")
    assert aliases(root) == {"challenger": "2", "champion": "2", "previous": "1"}

    undone = rollback(root, NAME)
    assert (undone.champion, undone.taken_back, undone.changed) == ("1", "2", True)
    assert aliases(root) == {"challenger": "2", "champion": "1"}
    again = rollback(root, f"models:/{NAME}@champion")
    assert (again.champion, again.taken_back, again.changed) == ("1", "2", False)
    assert "nothing was changed" in again.reason
    assert aliases(root) == {"challenger": "2", "champion": "1"}
    assert [(line.get("event"), line.get("taken_back")) for line in lines(root.study("good"))] == [
        (None, None),
        ("rollback", "2"),
    ]
    held = promote(root, "good")
    assert (held.promoted, gates(held)["rolled back"]) == (False, False)
    assert "version 2 was rolled back at" in held.reason
    assert aliases(root) == {"challenger": "2", "champion": "1"}
    registry(root).delete_model_version_tag(NAME, "2", "rolled_back")
    assert promote(root, "good").changed
    assert aliases(root) == {"challenger": "2", "champion": "2", "previous": "1"}


@pytest.mark.thorough
def test_a_rollback_needs_someone_to_go_back_to(root: Workspace, students: dict[str, Network]) -> None:
    with pytest.raises(TrackingError, match="the registry has no model of this name"):
        rollback(root, NAME)
    studied(root, fabricated.experiment(), students["good"])
    promote(root, "tiny")
    with pytest.raises(PromotionError, match="version 1 was the first with alias 'champion'") as caught:
        rollback(root, NAME)
    assert "\n" not in str(caught.value)
    with pytest.raises(TrackingError, match=r"no version has this alias; known: challenger, champion"):
        rollback(root, NAME, alias="production")


@pytest.mark.thorough
def test_a_rollback_that_was_cut_off_is_finished(
    root: Workspace, students: dict[str, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("poor", "good"):
        studied(root, fabricated.experiment(name), students[name])
        promote(root, name)
    for call in ("set_registered_model_tag", "set_registered_model_alias", "delete_registered_model_alias"):
        with monkeypatch.context() as cut:

            def die(*_: object, **__: object) -> None:
                raise KeyboardInterrupt

            cut.setattr(MlflowClient, call, die)
            with pytest.raises(KeyboardInterrupt):
                rollback(root, NAME)
    rollback(root, NAME)
    assert aliases(root) == {"challenger": "2", "champion": "1"}
    assert [line.get("event") for line in lines(root.study("good"))] == [None, "rollback"]


@pytest.mark.thorough
def test_the_model_card_says_where_a_student_comes_from(root: Workspace, students: dict[str, Network]) -> None:
    question = fabricated.experiment(promotion={"export_parity": True})
    folder = studied(root, question, students["good"], students["poor"])
    winner, scratch = fabricated.ranked(1, "kd", 0.31, 0.02), fabricated.ranked(0, "scratch", 0.2)
    fabricated.summary(winner, scratch, teacher=fabricated.card(val_score=0.97)).write(folder)
    decision = promote(root, "tiny")
    assert gates(decision)["largest difference of a logit after export to ONNX"] is True
    card = (folder.path / "model_card.md").read_text()
    version = registry(root).get_model_version(NAME, "1")
    weights = registry(root).get_logged_model(version.source.removeprefix("models:/")).tags["heterokd.weights"]
    assert decision.test_low < decision.test_score < decision.test_high
    for said in (
        f"Test top-1 {decision.test_score:.4f} (95 % interval {decision.test_low:.4f} to {decision.test_high:.4f})",
        "On val, when this was written: val/top1 0.3100 (95 % interval 0.2900 to 0.3300, 2 fresh seeds).",
        "https://arxiv.org/abs/1503.02531",
        "L = weight * tau^2 * KL( softmax(z_t / tau) || softmax(z_s / tau) )",
        "- teacher: vit_tiny_patch16_224, fitted here from random weights, val/top1 0.9700; licence: the licence of",
        "licence: CC BY 4.0",
        "## Limits",
        f"- student's weights (SHA-256): {weights}",
        "- teacher's weights (SHA-256): 5e1f",
        "- teacher's cache: none is stored: the teacher ran live, or its cache was deleted",
        f"- test images and labels (SHA-256): {decision.test_digest}",
        f"- recipe: {folder.trial(1).recipe.hash}",
        "learning_rate: 0.06",
    ):
        assert said in card, said
    assert len(version.description) <= 5000
    links, _, described = version.description.partition("\n\n")
    assert [text for text, _ in re.findall(r"\[([^]]+)\]\((#[^)]+)\)", links)] == [
        "training",
        "study",
        "the study's page",
        "model card",
    ]
    assert card.startswith(described.partition("\n\nThe other sections")[0])
    run = registry(root).get_run(version.run_id)
    assert "model_card.md" in {file.path for file in registry(root).list_artifacts(run.info.run_id)}


def test_an_export_that_fails_is_a_gate(root: Workspace, splits: Splits, students: dict[str, Network]) -> None:
    question = fabricated.experiment(promotion={"export_parity": True})
    folder = studied(root, question, students["good"])

    def refuse(*_: object) -> Parity:
        raise NetworkError("network 'test_resnet': ONNX cannot write it down (no such operator)")

    candidate = Candidate(folder.trial(1), None, students["good"])
    gate = export_gate(candidate, question.promotion, splits, export=refuse)
    assert gate.passed is False
    refused = reason([gate], None, "top1", 0.5)
    assert refused.endswith("ONNX: network 'test_resnet': ONNX cannot write it down (no such operator)")


def test_what_a_student_loses_in_8_bits_is_a_gate(
    root: Workspace, splits: Splits, students: dict[str, Network]
) -> None:
    question = fabricated.experiment(promotion={"max_int8_drop": 0.02})
    candidate = Candidate(studied(root, question, students["good"]).trial(1), None, students["good"])
    (gate,) = int8_gates(candidate, question.promotion, splits)
    # The classifier is solved on features of random weights: its large weights lose much.
    assert gate.passed is False
    assert 0.02 < gate.measured < 1
    assert gate.note.startswith("val/top1 0.")
    close = Accuracy("val/top1", student=0.95, file=0.94)
    (gate,) = int8_gates(candidate, question.promotion, splits, measure=lambda *_: close)
    assert (gate.required, gate.passed, gate.measured) == ("<= 0.02", True, pytest.approx(0.01))
    assert list(int8_gates(candidate, fabricated.experiment().promotion, splits)) == []


def test_limits_are_gates(root: Workspace, students: dict[str, Network]) -> None:
    limits = {
        "min_gain": 0.01,
        "max_params_m": 0.5,
        "max_latency_ms": 1e-6,
        "max_size_mb": 0.1,
        "limits": {"student/flops_g": 1e-6},
    }
    studied(root, fabricated.experiment(promotion=limits), students["good"], students["poor"])
    decision = promote(root, "tiny", dry_run=True)
    assert gates(decision) == {
        "gain in test top-1": True,
        "parameters in millions": True,
        "latency in ms": False,
        "FLOPs in billions": False,
        "weights in MB": False,
        "largest difference of a logit": True,
        "largest difference of a logit after export to ONNX": None,
    }
    assert not decision.promoted
    assert "1 thread" in decision.table()[2][0]


def test_limits_are_compared_with_what_the_search_counts(root: Workspace, students: dict[str, Network]) -> None:
    limits = {"max_latency_ms": 4.0, "limits": {"student/int8_ms": 1e3}}
    search = fabricated.experiment().search.model_dump(mode="json", exclude_unset=True)
    table = {"student/latency_ms": {"test_resnet": 3.5}}
    studied(root, fabricated.experiment(promotion=limits, search={**search, "costs": table}), students["good"])
    decided = {row[0]: row[1:] for row in promote(root, "tiny", dry_run=True).table()}
    assert decided["latency in ms (from a table of yours (search.costs))"] == ("<= 4", "3.5", "yes")
    (int8,) = (name for name in decided if name.startswith("int8 latency in ms"))
    assert "ONNX Runtime, CPU, 1 thread, static quantization" in int8
    assert decided[int8][0] == "<= 1000"
    assert decided[int8][2] == "yes"


def test_a_cost_that_is_unknown_passes_no_limit(root: Workspace, students: dict[str, Network]) -> None:
    limits = {"max_latency_ms": 4.0, "limits": {"student/int8_ms": 1.0}}
    search = fabricated.experiment().search.model_dump(mode="json", exclude_unset=True)
    search |= {"costs": {"student/latency_ms": {"resnet10t": 3.5}}, "latency": {"threads": 1024}}
    question = fabricated.experiment(promotion=limits, search=search)
    candidate = Candidate(studied(root, question, students["good"]).trial(1), None, students["good"])
    found = {gate.name: gate for gate in cost_gates(candidate, question, 10)}
    latency, int8 = found["latency in ms"], found["int8 latency in ms"]
    assert (latency.measured, latency.passed, latency.note) == (
        None,
        False,
        "search.costs has no value for test_resnet",
    )
    assert (int8.measured, int8.passed) == (None, False)
    assert int8.note.startswith("search.latency.threads is 1024, but this machine has")
    without = fabricated.experiment(search=search)
    assert [gate.passed for gate in cost_gates(candidate, without, 10)] == [None, None, None]


def test_the_recall_of_a_class_is_a_gate(root: Workspace, splits: Splits, students: dict[str, Network]) -> None:
    question = fabricated.experiment(promotion={"min_recall": {"3": 0.05, "8": 1.0}})
    studied(root, question, students["good"], students["poor"])
    decision = promote(root, "tiny", dry_run=True)
    task = task_of(question, splits)
    results = image_results(students["good"], open_test(splits), task)
    found, count = results.found(3)
    of_class = splits.test.labels == 3
    assert (found, count) == (int(results.images.numpy()[of_class].sum()), int(of_class.sum()))
    assert gates(decision)["recall of 3 on test"] is True
    assert gates(decision)["recall of 8 on test"] is False
    assert (
        "recall of 3 on test" + f" ({found} of {count})",
        ">= 0.05",
        f"{found / count:.4g}",
        "yes",
    ) in decision.table()
    assert "recall of 8 on test is" in decision.reason
    settings = question.promotion.model_copy(update={"min_recall": {"3": 0.5}})
    absent = CorrectImages(torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.long), 1.0)
    (gate,) = recall_gates(absent, splits.class_names, settings)
    assert (gate.measured, gate.passed, gate.note) == (None, False, "test has none of it")


def test_the_recall_of_every_kind_of_results() -> None:
    labels, logits = torch.tensor([0, 0, 1]), torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert ImageLogits(logits, labels, 0.5, "macro_f1").found(0) == (1, 2)
    maps = torch.tensor([[[5, 1], [0, 2]], [[1, 0], [3, 0]]])
    pixels = ImageConfusions(maps, maps.sum(dim=2), 0.5)
    assert (pixels.found(0), pixels.found(1)) == ((6, 7), (2, 5))
    intervals = pixels.class_intervals()
    iou = np.array([6 / 10, 2 / 6])
    assert (intervals[:, 0] <= iou).all()
    assert (iou <= intervals[:, 1]).all()


def _promote(root: str, study: str, barrier, results) -> None:
    barrier.wait()
    decision = promote(Workspace(Path(root)), study)
    results.put((study, decision.promoted, decision.champion))


@pytest.mark.thorough
def test_two_promotions_at_once_are_serialised(root: Workspace, splits: Splits, students: dict[str, Network]) -> None:
    for name in ("good", "poor"):
        question = fabricated.experiment(name)
        folder = studied(root, question, students[name])
        runs = StudyRuns(question, folder, open_store(root, None), root.artifacts)
        trial = folder.trial(1)
        register(runs, trial, log_student(runs, trial, splits), splits)
    barrier, results = CONTEXT.Barrier(2), CONTEXT.Queue()
    processes = [CONTEXT.Process(target=_promote, args=(str(root.path), n, barrier, results)) for n in ("good", "poor")]
    for process in processes:
        process.start()
    found = {study: (promoted, champion) for study, promoted, champion in (results.get(timeout=120) for _ in processes)}
    for process in processes:
        process.join()
    # Whoever came second was measured against the first.
    if found["good"] == (True, None):
        assert found["poor"] == (False, "1")
        assert aliases(root)["champion"] == "1"
    else:
        assert found == {"poor": (True, None), "good": (True, "2")}
        assert (aliases(root)["champion"], aliases(root)["previous"]) == ("1", "2")


def _roll_back(root: str, barrier, results) -> None:
    barrier.wait()
    done = rollback(Workspace(Path(root)), NAME)
    results.put((done.champion, done.taken_back, done.changed))


@pytest.mark.slow
def test_two_rollbacks_at_once_are_one_step(root: Workspace, students: dict[str, Network]) -> None:
    for name in ("poor", "good"):
        studied(root, fabricated.experiment(name), students[name])
        promote(root, name)
    barrier, results = CONTEXT.Barrier(2), CONTEXT.Queue()
    processes = [CONTEXT.Process(target=_roll_back, args=(str(root.path), barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert found == [("1", "2", False), ("1", "2", True)]
    assert aliases(root) == {"challenger": "2", "champion": "1"}


@pytest.mark.thorough
def test_a_champion_of_other_classes_is_refused(root: Workspace, splits: Splits, students: dict[str, Network]) -> None:
    question = fabricated.experiment()
    folder = studied(root, question, students["good"])
    runs = StudyRuns(question, folder, open_store(root, None), root.artifacts)
    other = fabricated.trial(folder, question, 2, student=fabricated.random_student(num_classes=4))
    of_four = Splits(splits.train, splits.val, splits.test, splits.class_names[:4], 32, "four")
    register(runs, other, log_student(runs, other, of_four), of_four, "champion")
    with pytest.raises(PromotionError, match=r"version 1\) has 4 classes, digits has 10") as caught:
        promote(root, "tiny")
    assert "\n" not in str(caught.value)


@pytest.mark.thorough
def test_a_champion_of_another_split_is_refused(root: Workspace, splits: Splits, students: dict[str, Network]) -> None:
    studied(root, fabricated.experiment(), students["good"])
    assert promote(root, "tiny").promoted
    data = {"dataset": "digits", "image_size": 32, "labels_per_class": 20, "seed": 1}
    studied(root, fabricated.experiment("other", data=data), students["good"])
    with pytest.raises(PromotionError, match="may have seen these test images"):
        promote(root, "other", dry_run=True)


def test_nothing_to_promote(root: Workspace) -> None:
    with pytest.raises(StudyError, match="there is no study 'tiny'"):
        promote(root, "tiny")
    question = fabricated.experiment()
    folder = fabricated.study(root, question)
    with pytest.raises(PromotionError, match="run `heterokd search` first"):
        promote(root, "tiny")
    fabricated.trial(folder, question, 1)
    fabricated.summary(fabricated.ranked(1)).write(folder)
    with pytest.raises(PromotionError, match="the winner's weights are missing"):
        promote(root, "tiny")


def compare_correct(correct: torch.Tensor, other: torch.Tensor) -> PairedTest:
    labels = torch.zeros(len(correct))
    return CorrectImages(correct, labels, 0.0).compared(CorrectImages(other, labels, 0.0))


def compare_confusions(counts: torch.Tensor, other: torch.Tensor, **more: int) -> PairedTest:
    labels = counts.sum(dim=2)
    return ImageConfusions(counts, labels, 0.0).compared(ImageConfusions(other, labels, 0.0), **more)


def test_compare_is_the_exact_mcnemar_test() -> None:
    correct = torch.tensor([True] * 50 + [True] * 9 + [False] * 2 + [False] * 39)
    other = torch.tensor([True] * 50 + [False] * 9 + [True] * 2 + [False] * 39)
    found = compare_correct(correct, other)
    assert (found.wins, found.losses, found.score) == (9, 2, pytest.approx(0.52))
    assert found.gain == pytest.approx(0.07)
    assert found.p_value == pytest.approx(binomtest(9, 11).pvalue, rel=1e-12) == pytest.approx(134 / 2**11)
    # Wald for paired proportions: sqrt(b + c - (b - c)^2 / n) / n.
    assert found.high - found.gain == pytest.approx(1.959964 * (11 - 49 / 100) ** 0.5 / 100, rel=1e-6)
    assert compare_correct(correct, correct).p_value == 1.0
    assert compare_correct(torch.tensor([True, False]), torch.tensor([False, True])).p_value == 1.0
    many, none = torch.ones(5000, dtype=torch.bool), torch.arange(5000) % 3 == 0
    assert compare_correct(none, ~none).p_value == pytest.approx(binomtest(1667, 5000).pvalue, rel=1e-9)
    assert compare_correct(many, none).p_value == pytest.approx(binomtest(3333, 3333).pvalue, rel=1e-9)


def confusions_of(images: int, classes: int, accuracy: float, seed: int) -> torch.Tensor:
    """Random confusion matrices [N, K, K] of images of 100 labelled pixels; the labels do not depend on accuracy."""
    labels = torch.randint(classes, (images, 100), generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(seed)
    wrong = torch.randint(classes, labels.shape, generator=draws)
    decided = torch.where(torch.rand(labels.shape, generator=draws) < accuracy, labels, wrong)
    counts = torch.zeros(images, classes, classes, dtype=torch.int64)
    for image in range(images):
        for label, decision in zip(labels[image].tolist(), decided[image].tolist(), strict=True):
            counts[image, label, decision] += 1
    return counts


def miou(confusion: np.ndarray) -> float:
    found = []
    for number in range(len(confusion)):
        union = confusion[number].sum() + confusion[:, number].sum() - confusion[number, number]
        if union:
            found.append(confusion[number, number] / union)
    return float(np.mean(found))


def test_the_paired_bootstrap_is_that_of_a_loop() -> None:
    own, other = confusions_of(12, 5, 0.6, 1), confusions_of(12, 5, 0.5, 2)
    own[:, 4], other[:, 4] = 0, 0  # a class that only decisions hold
    found = compare_confusions(own, other, seed=3, resamples=300)
    generator, gains = np.random.default_rng(3), []
    for _ in range(300):
        times = generator.multinomial(12, np.full(12, 1 / 12))
        drawn = np.repeat(np.arange(12), times)
        gains.append(miou(own.numpy()[drawn].sum(0)) - miou(other.numpy()[drawn].sum(0)))
    assert found.score == pytest.approx(miou(other.numpy().sum(0)))
    assert found.gain == pytest.approx(miou(own.numpy().sum(0)) - found.score)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(gains, (2.5, 97.5))))
    tail = min(sum(gain <= 0 for gain in gains), sum(gain >= 0 for gain in gains))
    assert found.p_value == pytest.approx(min(1.0, 2 * (1 + tail) / 301))
    assert (found.wins, found.losses) == (None, None)
    shown = str(PairedComparison(against="other", **asdict(found)))
    assert "paired bootstrap p = " in shown
    assert "right alone" not in shown


def test_the_bootstrap_tells_a_real_gain_from_none() -> None:
    own, alike = confusions_of(60, 5, 0.7, 1), confusions_of(60, 5, 0.7, 2)
    itself = compare_confusions(own, own)
    assert (itself.gain, itself.low, itself.high, itself.p_value) == (0, 0, 0, 1.0)
    noise = compare_confusions(own, alike)
    assert noise.low < 0 < noise.high
    assert noise.p_value > 0.05
    worse = compare_confusions(own, confusions_of(60, 5, 0.6, 3))
    assert 0 < worse.low < worse.gain < worse.high
    assert worse.p_value == pytest.approx(2 / 2001)
    assert worse == compare_confusions(own, confusions_of(60, 5, 0.6, 3)), "seeded"


@pytest.mark.thorough
def test_a_segmentation_becomes_champion_by_its_miou(root: Workspace) -> None:
    question = fabricated.scenes(promotion={"max_latency_ms": 1e6})
    splits = open_splits(question.data)
    poor, good = fabricated.scene_student(splits, 1), fabricated.scene_student(splits, 25)
    folder = studied(root, question, good, poor)

    first = promote(root, "scenes")
    assert (first.promoted, first.metric, first.test_images) == (True, "miou", len(splits.test))
    assert first.comparison.against == "scratch (trial 0)"
    assert first.comparison.test == "paired bootstrap"
    assert 0 < first.comparison.low < first.comparison.gain < first.comparison.high
    task, loader = SegmentationTask(splits.num_classes), open_test(splits)
    # 72 pixels are no multiple of 32: at the right and lower border, half a stride wide, the filled image is another.
    assert first.test_score == pytest.approx(dict(evaluate(good, loader, task))["miou"], abs=1e-3)
    assert gates(first) == {
        "gain in test mIoU": True,
        "classes in the mean of mIoU on test": None,
        "parameters in millions": None,
        "latency in ms": True,
        "weights in MB": None,
        "largest difference of a logit": True,
        "largest difference of a logit after export to ONNX": None,
    }
    assert "64 x 48 pixels" in first.table()[3][0]
    assert first.reason.startswith(f"promoted: {first.test_score:.4f} mIoU on test against ")
    assert promote(root, "scenes") == Decision.from_json(first.to_json().replace('"changed": true', '"changed": false'))
    version = registry(root).get_model_version("scenes-student", "1")
    assert (version.tags["score"], version.tags["test_score"]) == ("miou", f"{first.test_score:.4f}")
    assert version.tags["task"] == "segmentation"
    assert "logits at every pixel of background" in version.description
    assert "paired bootstrap" in version.description
    assert f"Test mIoU {first.test_score:.4f} (11 classes) (95 % interval" in version.description
    assert len(lines(folder)) == 1

    studied(root, fabricated.scenes("worse", data={**question.data.model_dump(), "crop": [64, 64]}), poor)
    worse = promote(root, "worse")
    assert (worse.promoted, worse.champion, worse.comparison.score) == (False, "1", first.test_score)
    assert worse.reason.startswith("refused: gain in test mIoU is -")
    classes = fabricated.experiment("digits", tracking={"registered_model": "scenes-student"})
    studied(root, classes, fabricated.random_student())
    with pytest.raises(PromotionError, match="is for segmentation, this study for classification; give"):
        promote(root, "digits", dry_run=True)
