"""The decisions of a search, with a made-up objective in place of training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import fabricated
import optuna
import pytest

from heterokd.config.experiment import Experiment
from heterokd.config.methods import methods_of
from heterokd.errors import StudyError
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus
from heterokd.study.assignment import SEED_STEP, Assignment
from heterokd.study.options import StudyOptions
from heterokd.study.pruner import checkpoint_epochs
from heterokd.study.sampler import STOP_AFTER
from heterokd.study.storage import StudyFacts
from heterokd.study.study import Study
from heterokd.study.summary import StudySummary

METHODS = methods_of("classification")
TWO_METHODS = {"methods": ["scratch", "kd"]}
TINY_SPACE = {
    "methods": ["scratch", "kd"],
    "overrides": {"kd.temperature": {"options": [1.0, 2.0]}, "kd.weight": {"options": [0.5, 1.0]}},
}


def make_experiment(**changes: Any) -> Experiment:
    """Twenty-seven epochs: rungs at 3 and 9."""
    sections: dict[str, dict[str, Any]] = {
        "training": {"epochs": 27},
        "search": {
            "trials": 12,
            "space": TWO_METHODS,
            "confirm_leaders": 2,
            "confirm_seeds": 2,
            "confirm_references": False,
            "reduction_factor": 3,
        },
    }
    for key, value in changes.items():
        section = "training" if key in ("epochs", "learning_rate") else "search"
        sections[section][key] = value
    return Experiment.model_validate(
        {
            "name": "study",
            "data": {"dataset": "digits"},
            "teacher": {"network": "resnet18"},
            "student": {"network": "resnet10t"},
            **sections,
        }
    )


def top1(assignment: Assignment, epoch: int | None = None) -> float:
    """The made-up objective: best at temperature 4 and weight 2, a little noise by seed, rising over the epochs."""
    sample, recipe = assignment.sample, assignment.recipe
    distance = 0.0
    if recipe.method == "scratch":
        distance = 2.0
    elif recipe.method == "kd":
        distance = abs(math.log(float(recipe.params["temperature"]) / 4)) + abs(math.log(recipe.params["weight"] / 2))
    noise = 0.02 * math.sin(recipe.training.seed + 7 * len(sample) + 1000 * distance)
    return (0.9 - 0.1 * distance + noise) * (1.0 if epoch is None else epoch / (epoch + 1))


def run_one(study: Study, assignment: Assignment) -> None:
    for rung in assignment.rungs:
        metrics = {"val/top1": top1(assignment, rung), "val/loss": 1 - top1(assignment, rung)}
        if not study.report(assignment.number, rung, metrics):
            study.finish(assignment.number, "pruned", metrics)
            return
    study.finish(assignment.number, "complete", {"val/top1": top1(assignment), "val/loss": 1 - top1(assignment)})


def run(study: Study, most: int | None = None) -> list[Assignment]:
    """One trial at a time, to the end or `most` of them."""
    done: list[Assignment] = []
    while most is None or len(done) < most:
        assignment = study.next()
        if assignment is None:
            break
        assert not isinstance(assignment, str)
        run_one(study, assignment)
        done.append(assignment)
    return done


def reopen(experiment: Experiment, folder: StudyFolder) -> Study:
    return Study.open(experiment, folder)


def database(folder: StudyFolder) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="study", storage=f"sqlite:///{folder.database}").trials


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path / "study")


def test_a_sample_holds_the_values_of_its_own_method_only(folder):
    space = {"shared": {"training.learning_rate": {"low": 0.01, "high": 0.2, "log": True}}}
    experiment = make_experiment(space=space, trials=len(METHODS) + 15, confirm_leaders=0)
    done = run(Study.open(experiment, folder))
    assert {one.origin for one in done[len(METHODS) :]} == {"sampled"}
    for assignment in done:
        method = assignment.sample["method"]
        expected = {"method", *experiment.method_domains(str(method)), "training.learning_rate"}
        assert set(assignment.sample) == expected
        assert assignment.recipe == experiment.recipe(assignment.sample)


@pytest.mark.thorough
def test_samples_gather_around_what_is_best(folder):
    space = {"methods": ["scratch", "kd"], "shared": {"training.learning_rate": {"low": 0.01, "high": 0.2}}}
    study = Study.open(make_experiment(space=space, trials=60, prune=False, confirm_leaders=0), folder)
    values = []
    while isinstance(assignment := study.next(), Assignment):
        values.append(top1(assignment) - abs(float(assignment.sample["training.learning_rate"]) - 0.05))
        study.finish(assignment.number, "complete", {"val/top1": values[-1]})
    uniform, learned = sorted(values[2:12]), sorted(values[-10:])
    assert learned[5] > uniform[5]
    assert max(values) > 0.85


def test_published_settings_come_first_and_scratch_before_them(folder):
    experiment = make_experiment(space={}, trials=len(METHODS), confirm_leaders=0)
    done = run(Study.open(experiment, folder))
    assert done[0].sample["method"] == "scratch"
    assert {one.sample["method"] for one in done} == set(METHODS)
    assert {one.origin for one in done} == {"published"}
    assert [one.sample for one in done] == [experiment.published(one.recipe.method) for one in done]


def test_a_budget_smaller_than_the_starts_can_be_extended(folder):
    assert len(run(Study.open(make_experiment(space={}, trials=2, confirm_leaders=0), folder))) == 2
    later = run(reopen(make_experiment(space={}, trials=len(METHODS) + 1, confirm_leaders=0), folder))
    assert [one.origin for one in later] == ["published"] * (len(METHODS) - 2) + ["sampled"]


def test_rungs_grow_by_the_reduction_factor(folder):
    first = Study.open(make_experiment(), folder).next()
    assert isinstance(first, Assignment)
    assert first.rungs == (3, 9)


@pytest.mark.parametrize(
    ("epochs", "first_rung", "rungs"), [(30, 0.1, (3, 9)), (3, 0.5, (2,)), (2, 0.5, (1,)), (1, 0.1, ()), (10, 0.7, ())]
)
def test_nothing_is_stopped_after_two_thirds_of_the_epochs(folder, epochs, first_rung, rungs):
    first = Study.open(make_experiment(epochs=epochs, first_rung=first_rung, min_epochs=1), folder).next()
    assert isinstance(first, Assignment)
    assert first.rungs == rungs


@pytest.mark.parametrize(
    ("epochs", "warmup", "asked", "rungs"),
    [
        (12, 0, "auto", (3,)),
        (12, 0, 1, (1, 3)),
        (12, 4.5, "auto", (5,)),
        (12, 4.5, 2, (2, 6)),
        (60, 2, "auto", (6, 18)),
    ],
)
def test_nothing_is_stopped_before_learning_has_begun(folder, epochs, warmup, asked, rungs):
    experiment = make_experiment(epochs=epochs, min_epochs=asked)
    training = experiment.training.model_copy(update={"warmup_epochs": warmup})
    assert checkpoint_epochs(experiment.model_copy(update={"training": training}), epochs) == rungs


@pytest.mark.parametrize("first_rung", [0.1, 0.5])
@pytest.mark.parametrize("epochs", [1, 2, 9, 27, 40, 300])
def test_the_epochs_that_decisions_read_are_evaluated(folder, epochs, first_rung):
    first = Study.open(make_experiment(epochs=epochs, first_rung=first_rung, min_epochs=1), folder).next()
    assert isinstance(first, Assignment)
    evaluated = first.evaluated
    assert evaluated is not None
    newest = max(1, round(epochs / 3))
    read = {epoch for rung in first.rungs for epoch in range(max(1, rung - newest + 1), rung + 1)}
    assert read | {epochs} <= evaluated <= set(range(1, epochs + 1))
    ends = sorted(evaluated)
    assert max(after - before for before, after in zip([0, *ends], ends, strict=False)) <= math.ceil(epochs / 10)


def test_epochs_without_evaluation_decide_as_all_epochs_do(folder, tmp_path):
    """The value of a rung, which the sampler learns from, and whether a trial is stopped are the same."""

    def searched(evaluate, where):
        study, done = Study.open(make_experiment(epochs=30, evaluate=evaluate), StudyFolder(where)), []
        while isinstance(assignment := study.next(), Assignment):
            curve, reached = [], 0
            for epoch in range(1, 31):
                metrics = {"epoch": float(epoch)}
                if assignment.evaluated is None or epoch in assignment.evaluated:
                    metrics["val/top1"] = top1(assignment, epoch)
                curve.append(metrics)
                reached = epoch
                if epoch in assignment.rungs and not study.report(assignment.number, epoch, metrics, curve):
                    break
            study.finish(assignment.number, "complete" if reached == 30 else "pruned", curve[-1])
            done.append((assignment.sample, reached))
        return done, [trial.intermediate_values for trial in database(study.folder)]

    every, auto = searched("every", tmp_path / "every"), searched("auto", tmp_path / "auto")
    assert auto == every
    assert {reached for _, reached in auto[0]} > {30}


def test_a_pruner_of_optuna_reads_every_epoch(folder):
    first = Study.open(make_experiment(pruner="optuna.pruners:MedianPruner"), folder).next()
    assert isinstance(first, Assignment)
    assert first.evaluated is None


def test_behind_at_a_rung_is_pruned_and_recorded_as_pruned(folder):
    study = Study.open(make_experiment(trials=20), folder)
    done = run(study)
    trials = database(folder)
    pruned = [trial for trial in trials if trial.state == optuna.trial.TrialState.PRUNED]
    assert pruned
    assert all(set(trial.intermediate_values) <= {3, 9} for trial in trials)
    spared = [one.number for one in done if one.origin != "sampled"]
    assert len(spared) == 2 + 3 * 2
    assert not {trial.number for trial in pruned} & set(spared)
    assert study.progress().pruned == len(pruned)


def test_references_are_never_stopped_and_other_published_settings_are_like_samples(folder):
    study = Study.open(make_experiment(space={}, trials=len(METHODS) + 1, confirm_leaders=0), folder)
    starts = [start for _ in METHODS if isinstance(start := study.next(), Assignment)]
    assert {start.origin for start in starts} == {"published"}
    by_method = {start.recipe.method: start for start in starts}
    best = by_method.pop("hcd")
    assert study.report(best.number, 3, {"val/top1": 0.9})
    for place, (method, start) in enumerate(by_method.items()):
        is_reference = method in ("scratch", "kd")
        assert study.report(start.number, 3, {"val/top1": 0.8 - 0.01 * place}) == is_reference
        assert study.why(start.number) == (None if is_reference else "behind")


@pytest.mark.parametrize(
    ("values", "goes_on"),
    [
        ([0.5], True),
        ([0.5, 0.4], False),
        ([0.5, 0.6], True),
        ([0.5, 0.4, 0.3, 0.45], False),
        ([0.5, 0.4, 0.3, 0.55], True),
        ([0.5, 0.4, 0.3, 0.6, 0.7, 0.65], True),
        ([0.5, 0.4, 0.3, 0.6, 0.7, 0.55], False),
    ],
)
def test_a_rung_stops_all_but_the_best_third_and_of_few_all_but_the_best(folder, values, goes_on):
    study = Study.open(make_experiment(space={"methods": ["kd"]}), folder)
    for value in values[:-1]:
        assignment = study.next()
        assert isinstance(assignment, Assignment)
        study.report(assignment.number, 3, {"val/top1": value})
    last = study.next()
    assert isinstance(last, Assignment)
    assert study.report(last.number, 3, {"val/top1": values[-1]}) == goes_on


def test_a_rung_compares_learning_curves_and_not_their_last_points(folder):
    def curve(*values: float) -> list[dict[str, float]]:
        return [{"val/top1": value} for value in values]

    study = Study.open(make_experiment(space={"methods": ["kd"]}), folder)
    first, better, worse, lost = (study.next() for _ in range(4))
    for one in (first, better, worse, lost):
        assert isinstance(one, Assignment)
    assert study.report(first.number, 3, {"val/top1": 0.5}, curve(0.3, 0.4, 0.5))
    assert study.report(better.number, 3, {"val/top1": 0.45}, curve(0.4, 0.45, 0.45))
    assert not study.report(worse.number, 3, {"val/top1": 0.6}, curve(0.1, 0.2, 0.6))
    # One epoch that is no number makes the curve none.
    assert not study.report(lost.number, 3, {"val/top1": 0.9}, curve(0.9, math.nan, 0.9))
    assert study.why(lost.number) == "not finite"
    reported = [trial.intermediate_values[3] for trial in database(folder)[:3]]
    assert reported == pytest.approx([0.4, 1.3 / 3, 0.3])


def test_a_rung_forgets_how_a_curve_began(folder):
    study = Study.open(make_experiment(space={"methods": ["kd"]}), folder)
    slow = study.next()
    assert isinstance(slow, Assignment)
    curve = [{"val/top1": value} for value in (0.0, 0.0, 0.0, *[0.9] * 9)]
    assert study.report(slow.number, 9, {"val/top1": 0.9}, curve)
    assert database(folder)[0].intermediate_values[9] == pytest.approx(0.9)  # 9 of 27 epochs are compared


def test_a_study_of_an_older_version_goes_on_comparing_last_points(folder):
    experiment = make_experiment(space={"methods": ["kd"]})
    Study.open(experiment, folder)
    optuna.load_study(study_name=experiment.name, storage=f"sqlite:///{folder.database}").set_user_attr(
        "averages", False
    )
    study = reopen(experiment, folder)
    first = study.next()
    assert isinstance(first, Assignment)
    study.report(first.number, 3, {"val/top1": 0.5}, [{"val/top1": 0.1}, {"val/top1": 0.3}, {"val/top1": 0.5}])
    assert database(folder)[0].intermediate_values == {3: 0.5}


def test_each_rung_counts_its_own_arrivals(folder):
    study = Study.open(make_experiment(space={"methods": ["kd"]}), folder)
    running = [study.next() for _ in range(5)]
    for assignment, value in zip(running, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True):
        assert isinstance(assignment, Assignment)
        assert study.report(assignment.number, 3, {"val/top1": value})
    # The next rung compares what has arrived there.
    for assignment, value, goes_on in zip(running, (0.7, 0.8, 0.1, 0.9), (True, True, False, True), strict=False):
        assert isinstance(assignment, Assignment)
        assert study.report(assignment.number, 9, {"val/top1": value}) == goes_on


def test_a_trial_that_was_told_to_stop_is_told_so_again(folder):
    experiment = make_experiment()
    study = Study.open(experiment, folder)
    run(study, 3)
    worse = study.next()
    assert isinstance(worse, Assignment)
    assert not study.report(worse.number, 3, {"val/top1": 0.0})
    assert not study.report(worse.number, 3, {"val/top1": 0.0})
    again = reopen(experiment, folder)
    assert again.next() == worse
    assert not again.report(worse.number, 9, {"val/top1": 0.9})


@pytest.mark.thorough
def test_without_pruning_every_report_goes_on(folder):
    study = Study.open(make_experiment(prune=False), folder)
    run(study)
    assert study.progress().pruned == 0
    assert all(set(trial.intermediate_values) in ({3, 9}, set()) for trial in database(folder))


def test_nothing_is_recorded_between_rungs(folder):
    study = Study.open(make_experiment(), folder)
    first = study.next()
    assert isinstance(first, Assignment)
    assert study.report(first.number, 4, {"val/top1": 0.1})
    assert database(folder)[0].intermediate_values == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_metric_that_is_no_number_counts_as_worst(folder, value):
    metrics = {} if value is None else {"val/top1": value}
    study = Study.open(make_experiment(confirm_leaders=0), folder)
    run(study, 3)
    odd = study.next()
    assert isinstance(odd, Assignment)
    assert not study.report(odd.number, 3, metrics)
    study.finish(odd.number, "complete", metrics)
    assert study.leaders()[-1].number == odd.number
    run(study)
    assert json.loads(json.dumps(study.summary().to_json(), allow_nan=False))["standing"]["finished"]


def test_failed_trials_count_towards_the_budget(folder):
    study = Study.open(make_experiment(trials=6, confirm_leaders=0), folder)
    for _ in range(6):
        assignment = study.next()
        assert isinstance(assignment, Assignment)
        study.finish(assignment.number, "failed", {}, "abcdef"[assignment.number])  # each for another reason
    assert study.next() is None
    assert study.progress().failed == 6
    assert database(folder)[0].user_attrs["error"] == "a"
    assert study.leaders() == []
    assert study.summary().winner is None


def test_a_leader_says_how_many_classes_are_in_its_mean(folder):
    experiment = fabricated.scenes(training={"epochs": 3}, search={"space": {"methods": ["scratch"]}, "trials": 3})
    study = Study.open(experiment, folder)
    counts = iter([11.0, 9.0, 10.0])
    while (assignment := study.next()) is not None:
        metrics = {"val/miou": 0.5, "val/iou_classes": next(counts)}
        study.finish(assignment.number, "complete", metrics)
    (leader, *_) = reopen(experiment, folder).leaders()
    assert leader.iou_classes == study.leaders()[0].iou_classes
    assert leader.iou_classes == ((9, 10) if leader.confirmed else (11,))
    assert StudySummary.from_json(study.summary().to_json()).winner == leader


def test_a_second_end_changes_nothing(folder):
    study = Study.open(make_experiment(), folder)
    first = run(study, 1)[0]
    study.finish(first.number, "failed", {}, "late")
    assert study.progress().complete == 1
    assert not study.report(first.number, 3, {"val/top1": 1.0})


@pytest.mark.thorough
def test_no_recipe_is_trained_twice_and_a_tiny_space_ends(folder):
    study = Study.open(make_experiment(space=TINY_SPACE, trials=50, confirm_leaders=0), folder)
    done = run(study)
    assert len({one.recipe.hash for one in done}) == len(done) == 1 + 4
    standing = study.progress()
    assert standing.finished
    assert (standing.planned, standing.complete + standing.pruned) == (5, 5)
    known = [trial for trial in database(folder) if trial.user_attrs["assignment"]["duplicate_of"] is not None]
    assert STOP_AFTER <= len(known) <= 4 * STOP_AFTER
    for trial in known:
        original = database(folder)[trial.user_attrs["assignment"]["duplicate_of"]]
        assert (trial.state, trial.value) == (original.state, original.value)
        assert trial.intermediate_values.items() <= original.intermediate_values.items()
    assert reopen(study.experiment, folder).next() is None


def test_a_recipe_that_is_running_is_not_started_again(folder):
    study = Study.open(make_experiment(space=TINY_SPACE, trials=50), folder)
    handed_out = []
    while isinstance(assignment := study.next(), Assignment):
        handed_out.append(assignment)
    assert assignment == "wait"
    assert len({one.recipe.hash for one in handed_out}) == len(handed_out) == 5


def test_methods_without_freedom_only_start(folder):
    study = Study.open(make_experiment(space={"methods": ["scratch"]}, confirm_leaders=1), folder)
    origins = [one.origin for one in run(study)]
    assert origins == ["published", "confirm", "confirm"]
    assert study.progress().finished


def test_confirmations_wait_for_the_search_and_use_fresh_seeds(folder):
    study = Study.open(make_experiment(trials=4), folder)
    running = [study.next() for _ in range(4)]
    assert study.next() == "wait"
    for assignment in running:
        assert isinstance(assignment, Assignment)
        study.finish(assignment.number, "complete", {"val/top1": top1(assignment)})
    best = sorted(study.leaders(), key=lambda leader: -leader.search_value)
    repeats = run(study)
    expected = {best[0].number, best[1].number, 0}
    assert {one.confirms for one in repeats} == expected
    assert {one.recipe.training.seed for one in repeats} == {SEED_STEP, 2 * SEED_STEP}
    assert len(repeats) == 2 * len(expected)
    found = {one.number: one for one in running if isinstance(one, Assignment)}
    assert all(one.sample == found[one.confirms].sample for one in repeats)
    standing = study.progress()
    assert (standing.confirmations_done, standing.confirmations_planned) == (len(repeats), len(repeats))
    assert standing.finished


def test_without_confirmations_nothing_waits(folder):
    study = Study.open(make_experiment(trials=2, confirm_seeds=0), folder)
    study.next()
    study.next()
    assert study.next() is None
    assert not study.progress().finished


def test_a_confirmed_mean_leaves_the_lucky_search_value_out(folder):
    study = Study.open(make_experiment(trials=3, confirm_leaders=2, prune=False), folder)
    search = [study.next() for _ in range(3)]
    for assignment, value in zip(search, (0.5, 0.95, 0.90), strict=True):
        assert isinstance(assignment, Assignment)
        study.finish(assignment.number, "complete", {"val/top1": value})
    assert study.leaders()[0].low is None
    values = {0: [0.50, 0.52], 1: [0.80, 0.82], 2: [0.88, 0.90]}
    while isinstance(assignment := study.next(), Assignment):
        assert assignment.confirms is not None
        study.finish(assignment.number, "complete", {"val/top1": values[assignment.confirms].pop(0)})
    winner, second, scratch = study.leaders()
    assert (winner.number, second.number, scratch.method) == (2, 1, "scratch")
    assert second.mean == pytest.approx(0.81)
    assert second.search_value == 0.95
    assert second.values == (0.80, 0.82)
    assert second.seeds == (SEED_STEP, 2 * SEED_STEP)
    # Pooled: each pair has a sum of squares of 2 * 0.01^2; three degrees of freedom; t(0.975, 3) = 3.182446.
    half = 3.182446 * 0.01 * math.sqrt(2) / math.sqrt(2)
    assert second.low == pytest.approx(0.81 - half)
    assert second.high == pytest.approx(0.81 + half)
    summary = study.summary()
    assert summary.winner is not None
    assert summary.winner.number == 2
    assert summary.scratch is not None
    assert summary.scratch.number == 0
    assert [leader.number for leader in summary.leaders] == [2, 1, 0]


def confirm_with(study: Study, search: list[float], repeats: dict[int, list[float]]) -> None:
    """Train to the end with these values of the search's metric, by number; then confirm with these, by `confirms`."""
    metric = study.experiment.search.metric
    while isinstance(assignment := study.next(), Assignment):
        fresh = assignment.confirms is not None
        value = repeats[assignment.confirms].pop(0) if fresh else search[assignment.number]
        study.finish(assignment.number, "complete", {metric: value})


def test_the_interval_of_a_share_ends_at_0_and_1(folder):
    study = Study.open(make_experiment(trials=3, confirm_leaders=2), folder)
    confirm_with(study, [0.1, 0.9, 0.8], {0: [0.1, 0.1], 1: [0.9, 0.1], 2: [0.99, 0.6]})
    leaders = study.leaders()
    assert [leader.low for leader in leaders] == [0.0, 0.0, 0.0]
    assert [leader.high for leader in leaders[:2]] == [1.0, 1.0]
    # All three end at 0, which says nothing of their order; their means do.
    assert [leader.number for leader in leaders] == [2, 1, 0]


def test_the_interval_of_a_loss_does_not_end_at_1(folder):
    study = Study.open(make_experiment(metric="val/loss", trials=3, confirm_leaders=2), folder)
    confirm_with(study, [2.0, 1.0, 1.1], {0: [2.0, 2.0], 1: [0.9, 1.1], 2: [0.1, 1.1]})
    for leader in study.leaders():
        assert leader.low is not None
        assert leader.high is not None
        assert (leader.low + leader.high) / 2 == pytest.approx(leader.mean)
        assert leader.high > 1


def test_scratch_does_not_win_a_tie(folder):
    study = Study.open(make_experiment(trials=2, confirm_leaders=0), folder)
    for _ in range(2):
        assignment = study.next()
        assert isinstance(assignment, Assignment)
        study.finish(assignment.number, "complete", {"val/top1": 0.5})
    assert [leader.method for leader in study.leaders()] == ["kd", "scratch"]


def test_a_loss_is_minimised(folder):
    study = Study.open(make_experiment(metric="val/loss", trials=15), folder)
    run(study)
    leaders = [leader for leader in study.leaders() if leader.confirmed]
    assert [leader.high for leader in leaders] == sorted(leader.high for leader in leaders if leader.high is not None)
    assert leaders[0].method == "kd"
    assert study.summary().maximise is False


@pytest.mark.parametrize("cut", [11, pytest.param(18, marks=pytest.mark.thorough)])
def test_an_interrupted_study_goes_on_as_if_it_had_not_been(tmp_path, cut):
    experiment = make_experiment(trials=16)
    whole = run(Study.open(experiment, StudyFolder(tmp_path / "whole")))
    folder = StudyFolder(tmp_path / "parts")
    study = Study.open(experiment, folder)
    done = run(study, cut)
    lost = study.next()
    assert isinstance(lost, Assignment)
    study = reopen(experiment, folder)
    again = run(study)
    assert again[0] == lost
    assert done + again == whole
    assert study.progress().finished


def test_the_same_seed_gives_the_same_trials_and_another_does_not(tmp_path):
    runs = [
        [
            one.sample
            for one in run(
                Study.open(make_experiment(seed=seed, trials=12, confirm_leaders=0), StudyFolder(tmp_path / name))
            )
        ]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_result_that_the_database_missed_is_adopted_from_the_folder(folder):
    experiment = make_experiment(trials=4)
    study = Study.open(experiment, folder)
    lost = [study.next() for _ in range(4)]
    snapshots = [
        TrialSnapshot(TrialStatus.COMPLETE, metrics={"val/top1": 0.7}),
        TrialSnapshot(TrialStatus.FAILED),
        TrialSnapshot(TrialStatus.PRUNED, metrics={"val/top1": 0.1}),
        TrialSnapshot(),
    ]
    for assignment, snapshot in zip(lost, snapshots, strict=True):
        assert isinstance(assignment, Assignment)
        folder.trial(assignment.number).start(assignment.recipe, snapshot)
    (folder.trial(1).path / "error.txt").write_text("Traceback\nMemoryError: too large\n")
    study = reopen(experiment, folder)
    assert study.next() == lost[3]
    standing = study.progress()
    assert (standing.complete, standing.failed, standing.pruned, standing.running) == (1, 1, 1, 1)
    assert study.leaders()[0].search_value == 0.7
    assert database(folder)[1].user_attrs["error"] == "MemoryError: too large"


def test_a_trial_that_somebody_else_asked_for_costs_no_budget(folder):
    experiment = make_experiment(trials=6, confirm_leaders=0)
    run(Study.open(experiment, folder), 4)
    optuna.load_study(study_name="study", storage=f"sqlite:///{folder.database}").ask()
    study = reopen(experiment, folder)
    assert len(run(study)) == 2
    assert study.progress().failed == 0


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"epochs": 30}, "training.epochs was 27 when this study started and is 30 now"),
        ({"seed": 5}, "search.seed was 0 .* and is 5 now"),
        ({"metric": "val/loss"}, 'search.metric was "val/top1" .* and is "val/loss" now'),
        ({"reduction_factor": 4}, "search.reduction_factor was 3 .* and is 4 now"),
    ],
)
def test_another_question_is_refused_by_the_key_that_differs(folder, changes, key):
    Study.open(make_experiment(), folder)
    with pytest.raises(StudyError, match=key):
        reopen(make_experiment(**changes), folder)


def test_trials_confirmations_and_parallelism_may_change(folder):
    run(Study.open(make_experiment(trials=5), folder))
    study = reopen(make_experiment(trials=8, parallel=2, confirm_seeds=3, max_failures=0), folder)
    assert not study.progress().finished
    later = run(study)
    assert [one.origin for one in later].count("sampled") == 3
    standing = study.progress()
    assert (standing.planned, standing.complete + standing.pruned + standing.failed) == (8, 8)
    assert standing.finished


def test_excluded_methods_are_remembered_with_their_reason(folder):
    study = Study.open(make_experiment(), folder, StudyOptions(StudyFacts(excluded={"kd": "no logits"})))
    assert study.methods == ("scratch",)
    assert reopen(make_experiment(), folder).summary().excluded == {"kd": "no logits"}


def test_no_method_left_is_an_error(folder):
    with pytest.raises(StudyError, match=r"no method is left to search \(scratch: a; kd: b\)"):
        Study.open(make_experiment(), folder, StudyOptions(StudyFacts(excluded={"scratch": "a", "kd": "b"})))


def test_a_damaged_database_is_an_error(folder):
    folder.path.mkdir(parents=True)
    folder.database.write_text("this is no database, and long enough to be sure of it\n" * 100)
    with pytest.raises(StudyError, match=r"study.db: cannot be used"):
        Study.open(make_experiment(), folder)


@pytest.mark.thorough
def test_a_search_over_all_methods_in_parallel_ends(folder):
    study = Study.open(make_experiment(space={}, trials=len(METHODS) + 12), folder)
    running: list[Assignment] = []
    count = 0
    while True:
        assignment = study.next() if len(running) < 4 else "wait"
        if isinstance(assignment, Assignment):
            running.append(assignment)
            count += 1
            continue
        if not running:
            assert assignment is None
            break
        run_one(study, running.pop(0))
    standing = study.progress()
    assert standing.finished
    assert standing.planned == len(METHODS) + 12
    assert count == standing.planned + standing.confirmations_done


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_estimator_learns_from_the_newest_and_the_best_trials_alone(direction: str) -> None:
    from heterokd.study.sampler import BEST, LEARNED, _Learned

    study = optuna.create_study(direction=direction)
    values = random.Random(0).sample(range(10_000), 3 * LEARNED)
    for value in values:
        study.add_trial(optuna.trial.create_trial(value=float(value)))
    kept = _Learned(study)._get_trials(deepcopy=False)
    numbers = [trial.number for trial in kept]
    assert len(kept) <= LEARNED
    assert numbers == sorted(set(numbers))
    assert numbers[-(LEARNED - BEST) :] == list(range(len(values) - (LEARNED - BEST), len(values)))
    best = sorted(range(len(values)), key=lambda number: values[number], reverse=direction == "maximize")
    assert set(best[:BEST]) <= set(numbers)
    few = optuna.create_study(direction=direction)
    few.add_trials(study.trials[:LEARNED])
    assert len(_Learned(few)._get_trials()) == LEARNED
