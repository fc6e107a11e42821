"""Plans: counts against a real study, the simulated search against sums and Optuna's pruners, and what was taken."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import fabricated
import optuna
import pytest
from tiny_datasets import write_image_folder

from heterokd.cli.terminal.tables import plan_lines
from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.execution.check import within_limits
from heterokd.execution.planning.plan import plan_experiment, plan_with, write_plan
from heterokd.execution.planning.plan_record import PlanRecorder
from heterokd.formatting import format_duration, format_size
from heterokd.report.page import write_report
from heterokd.report.study_data import read_study
from heterokd.report.tables import plan_table
from heterokd.storage.stored_data.push import push_data
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus
from heterokd.storage.typed_json import parse
from heterokd.storage.workspace import Workspace
from heterokd.study.plan import estimate as estimates
from heterokd.study.plan.costs import Costs, MethodCost
from heterokd.study.plan.counts import Counts, count
from heterokd.study.plan.estimate import DataFetch, Plan, Prices, Stock
from heterokd.study.plan.record import planned
from heterokd.study.plan.simulation import BETWEEN_TRIALS, MOST_ASKED, simulate
from heterokd.study.plugins import OptunaPruner
from heterokd.study.pruner import AsynchronousHalving, NoPruning, Pruner
from heterokd.study.study import Study
from heterokd.study.trials import TrialRecord, Trials
from heterokd.training.data import fetch_files, open_splits

Write = Callable[..., Path]

COUNTS = Counts(
    methods=("scratch", "kd"),
    students=("test_resnet",),
    starts=("scratch", "kd"),
    samples=10,
    sampled=("scratch", "kd"),
    epochs=9,
    rungs=(),
    factor=3,
    repeats=0,
    seeds=0,
)
COSTS = Costs(
    device="a processor",
    parallel=1,
    cpus=1.0,
    gpus=0.0,
    start=10.0,
    process=5.0,
    end=4.0,
    teacher=20.0,
    view=0.001,
    methods={name: MethodCost(begin=1.0, epoch=2.0, live=3.0, stored=False, disk=1000) for name in ("scratch", "kd")},
)
NOTHING = Stock(teacher_ready=False, teacher_bytes=500, cache_bytes=0, cache_ready=0.0, views=0)


def estimate(name: str, counts: Counts, costs: Costs, stock: Stock, prices: Prices = Prices()) -> Plan:  # noqa: B008
    """A plan with the search's usual pruner."""
    return estimates.estimate(name, counts, costs, stock, prices, lambda: AsynchronousHalving(counts.factor))


def test_without_chance_a_plan_is_a_sum() -> None:
    exact = replace(COSTS, speed_spread=0.0)
    training = 1.0 + 9 * 2.0
    plan = estimate("x", COUNTS, exact, NOTHING)
    around = 10 + 20 + 4 + 5
    assert plan.seconds.expected == pytest.approx(around + 12 * (training + BETWEEN_TRIALS))
    assert plan.seconds.low == pytest.approx(plan.seconds.high)
    assert plan.device_hours.expected == pytest.approx((12 * training + 20) / 3600)
    assert plan.disk.expected == 12 * 1000 + 500
    two = estimate("x", COUNTS, replace(exact, parallel=2), NOTHING)
    assert two.seconds.expected == pytest.approx(around + 6 * (training + BETWEEN_TRIALS))
    repeated = estimate("x", replace(COUNTS, repeats=6, seeds=2), replace(exact, parallel=4), NOTHING)
    assert repeated.phases["confirmation"] == pytest.approx(2 * (training + BETWEEN_TRIALS)), "six on four places"


def test_a_cache_is_built_beside_the_first_trials() -> None:
    stored = {name: replace(cost, stored=True) for name, cost in COSTS.methods.items()}
    costs = replace(COSTS, methods=stored, speed_spread=0.0)
    stock = replace(NOTHING, cache_bytes=10**6, views=100_000)
    plan, ready = (estimate("x", COUNTS, costs, one) for one in (stock, replace(stock, cache_ready=1.0)))
    building = 100_000 * 0.001
    assert plan.seconds.expected - ready.seconds.expected == pytest.approx(building)
    assert plan.device_hours.expected - ready.device_hours.expected == pytest.approx(building / 3600)
    assert plan.disk.expected - ready.disk.expected == 10**6
    two = estimate("x", COUNTS, replace(costs, parallel=2), stock)
    live = two.device_hours.expected * 3600 - (ready.device_hours.expected * 3600 + building + 20)
    assert live > 0, "who trains while the cache is built runs the teacher itself"
    confirmed = estimate("x", replace(COUNTS, repeats=6, seeds=3), costs, replace(stock, cache_ready=1.0))
    sure = 3 * (2 * (1 + 9 * 2 + BETWEEN_TRIALS) + building)
    assert confirmed.phases["confirmation"] == pytest.approx(sure), "each fresh seed has its own cache"


def test_money_is_the_nodes_for_the_whole_time() -> None:
    plan = estimate("x", COUNTS, COSTS, NOTHING, Prices(7.2, 99.0, "EUR"))
    assert plan.money is not None
    assert plan.money.expected == pytest.approx(plan.seconds.expected * 0.002)
    assert plan.money.low <= plan.money.expected <= plan.money.high
    by_device = estimate("x", COUNTS, COSTS, NOTHING, Prices(None, 3.0))
    assert by_device.money == by_device.device_hours.times(3.0)
    assert parse(Plan, json.loads(json.dumps(plan.to_json()))) == plan
    assert parse(Costs, json.loads(json.dumps(asdict(COSTS)))) == COSTS


def test_prices_are_of_all_nodes(tiny_file: Write) -> None:
    nodes = {"head": {"price_per_hour": 0.5}, "gpu": {"count": 4, "price_per_hour": 2.0}}
    assert load_experiment(tiny_file(cluster={"nodes": nodes})).cluster.price_per_hour == 8.5
    assert load_experiment(tiny_file()).cluster.price_per_hour is None


@pytest.mark.parametrize("factor", [2, 3])
def test_halving_stops_whom_optunas_stops(factor: int) -> None:
    reference = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=1, reduction_factor=factor, min_early_stopping_rate=0
    )
    theirs = optuna.create_study(direction="maximize", pruner=reference)
    ours, pruner = Trials(optuna.create_study(direction="maximize"), is_kept=False), AsynchronousHalving(factor)
    draw, stopped = random.Random(factor), 0
    attrs = {"sample": {"method": "kd"}, "origin": "sampled", "seed": 0, "hash": "", "student": "", "epochs": 9}
    for number in range(60):
        value = draw.random()
        trial = theirs.ask()
        trial.report(value, 1)
        record = ours.add(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                user_attrs={"assignment": {**attrs, "confirms": None, "duplicate_of": None}},
            )
        )
        ours.report(number, 1, value)
        reason = pruner.decide(ours, record, 1)
        assert (reason is not None) == trial.should_prune()
        stopped += reason is not None
    assert 0 < stopped < 60


def pruned_and_busy(pruner: Callable[[], Pruner], **changes: Any) -> tuple[float, float]:
    """Means over simulated searches of thirty samples: trainings that were pruned, seconds of all places."""
    counts = replace(COUNTS, **{"samples": 30, "rungs": (1, 3), **changes})
    found = [simulate(counts, COSTS, 0, 0, seed, pruner()) for seed in range(5)]
    return statistics.fmean(one.pruned for one in found), statistics.fmean(one.busy for one in found)


def test_pruning_saves_what_it_ends() -> None:
    assert pruned_and_busy(lambda: AsynchronousHalving(3), rungs=())[0] == 0
    plain = pruned_and_busy(NoPruning)
    assert plain[0] == 0
    pruned, busy = pruned_and_busy(lambda: AsynchronousHalving(3))
    assert 0 < pruned < 32
    assert busy < 0.9 * plain[1]


@pytest.mark.parametrize("maximise", [True, False])
@pytest.mark.parametrize(
    ("pruner", "least", "most"),
    [
        (optuna.pruners.NopPruner, 0, 0),
        (optuna.pruners.MedianPruner, 12, 28),  # those trained to the end get better, and so does their median
        (partial(optuna.pruners.SuccessiveHalvingPruner, min_resource=1, reduction_factor=3), 15, 30),
        (optuna.pruners.WilcoxonPruner, 12, 30),
    ],
)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_the_searchs_pruner_decides_in_the_simulation(
    pruner: Callable[[], optuna.pruners.BasePruner], least: int, most: int, maximise: bool
) -> None:
    pruned, busy = pruned_and_busy(lambda: OptunaPruner(pruner()), maximise=maximise)
    assert least <= pruned <= most
    assert (busy < 0.9 * pruned_and_busy(NoPruning)[1]) == (most > 0)


def test_a_pruner_is_asked_about_the_first_trainings_of_a_long_search() -> None:
    """Later trainings are pruned as often as these."""

    class Counting(OptunaPruner):
        def decide(self, trials: Trials, trial: TrialRecord, epoch: int) -> str | None:
            asked.add(trial.number)
            return super().decide(trials, trial, epoch)

    shares = []
    for samples in (MOST_ASKED, 3 * MOST_ASKED):
        asked: set[int] = set()
        pruned, _ = pruned_and_busy(lambda: Counting(optuna.pruners.MedianPruner()), samples=samples)
        shares.append(pruned / samples)
        assert asked == set(range(MOST_ASKED))
    assert shares[1] == pytest.approx(shares[0], abs=0.05)


def test_a_larger_student_takes_its_time() -> None:
    both = replace(COSTS, students={"test_resnet": 1.0, "resnet18": 9.0})
    asked = replace(COUNTS, students=("test_resnet", "resnet18"))
    assert (
        estimate("x", asked, both, NOTHING).seconds.expected
        > 2 * estimate("x", COUNTS, COSTS, NOTHING).seconds.expected
    )


@pytest.mark.parametrize("references", [False, True])
def test_counts_are_those_of_the_study(tiny_file: Write, tmp_path: Path, *, references: bool) -> None:
    """One after the other, nothing pruned: a real study hands out what was counted."""
    asked = {"prune": False, "trials": 5, "confirm_leaders": 2, "confirm_seeds": 2, "confirm_references": references}
    experiment = load_experiment(tiny_file(search=asked))
    folder = Workspace(tmp_path / "runs").study("tiny")
    counts = count(experiment, {})
    assert counts.rungs == ()
    study = Study.open(experiment, folder)
    origins: list[str] = []
    while (assignment := study.next()) is not None:
        assert assignment != "wait"
        origins.append(assignment.origin)
        trial = folder.trial(assignment.number)
        snapshot = TrialSnapshot(TrialStatus.COMPLETE, assignment.origin, assignment.confirms)
        trial.start(assignment.recipe, snapshot)
        study.finish(assignment.number, "complete", {"val/top1": (1 + assignment.number) / 20})  # scratch is worst
        left = count(experiment, {}, folder)
        assert left.done == len(origins)
        assert left.trainings == counts.trainings - len(origins)
    assert origins.count("published") == len(counts.starts) == 3
    assert origins.count("sampled") == counts.samples == 2
    if references:  # whether the winner's method is plain KD, and whether it leads, is known only at the end
        assert 6 < origins.count("confirm") <= counts.repeats == 10
    else:
        assert origins.count("confirm") == counts.repeats == 6


def test_adaptive_repetitions_and_budgets_are_counted(tiny_file: Write) -> None:
    def counted(affordable: float | None = None, **search: Any) -> Counts:
        asked = {"prune": False, "trials": 60, "confirm_leaders": None, "confirm_references": False, **search}
        return count(load_experiment(tiny_file(search=asked)), {}, None, affordable)

    plain = counted()
    assert plain.is_adaptive
    assert plain.repeats == pytest.approx(0.4 / 0.6 * 60, abs=1), "0.4 of all training"
    assert counted(trials=8).repeats == 0, "below COLD"
    assert counted(trials=8, confirm_references=True).repeats == 0
    assert counted(confirm_references=True).repeats == plain.repeats + 2 * 3 + 1, "KD, the winner's method, scratch"
    assert counted(confirm_references=True).seeds == plain.seeds
    limited = counted(budget={"trainings": 30}, trials=10_000)
    assert len(limited.starts) + limited.samples + limited.repeats == pytest.approx(30, abs=1)
    assert counted(30.0, trials=10_000) == limited
    assert counted(1000.0) == plain, "more than it needs"
    fixed = counted(confirm_leaders=3, confirm_seeds=2)
    assert (fixed.repeats, fixed.seeds, fixed.is_adaptive) == (8, 2, False)


def made_search(root: Workspace) -> tuple[Any, Any]:
    """Both starts of a search that began a minute ago."""
    question = fabricated.experiment(search={"space": {"methods": ["scratch", "kd"]}, "trials": 6})
    folder = fabricated.study(root, question)
    now = time.time()
    for number, (method, seconds) in enumerate((("scratch", 3.0), ("kd", 9.0))):
        trial = fabricated.trial(folder, question, number, method)
        spent = {"began": now - 30, "ended": now - 30 + seconds, "pid": number, "origin": "published"}
        fabricated.change(trial, **spent, metrics={"val/top1": 0.5})
    return question, folder


def planned_search(root: Workspace, **sections: Any) -> tuple[Experiment, StudyFolder, PlanRecorder]:
    """A search that was planned and began a minute ago."""
    question = fabricated.experiment(search={"space": {"methods": ["scratch", "kd"]}, "trials": 6}, **sections)
    write_plan(root.study("tiny"), question, plan_with(question, root, {}, COSTS, None), COSTS)
    recorder = PlanRecorder(question, root.study("tiny"))
    recorder.began -= 60
    return question, root.study("tiny"), recorder


def test_a_plan_says_what_the_fetch_of_the_data_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, root = tmp_path / "images", Workspace(tmp_path / "runs")
    images.mkdir()
    write_image_folder(images)
    monkeypatch.setenv("HETEROKD_DATA_CACHE", str(tmp_path / "cache"))
    url = push_data(images, (tmp_path / "store").as_uri()).url
    search = {"space": {"methods": ["scratch", "kd"]}, "trials": 6}
    data = {"dataset": "image_folder", "root": url, "labels_per_class": None}
    question = fabricated.experiment(search=search, data=data, cluster={"store_gbit": 0.001})
    plan = plan_with(question, root, {}, replace(COSTS, nodes=16), None)
    assert plan.fetch is not None
    shard = next((tmp_path / "store").glob("*.tar")).stat().st_size
    assert plan.fetch == DataFetch(shard, 16, 0.001)
    assert plan.phases["start"] == COSTS.start + shard * 8 / 1e6
    took = f"{format_duration(plan.fetch.seconds)} at 0.001 Gbit/s (cluster.store_gbit)"
    assert f"data       {format_size(shard)} to each of 16 nodes, {took}" in plan_lines(plan)
    write_plan(root.study("tiny"), question, plan, COSTS)
    known = planned(root.study("tiny"))
    assert known is not None
    assert known.plan == plan

    fetch_files(open_splits(question.data))
    alone = plan_with(question, root, {}, COSTS, None)
    assert alone.fetch == DataFetch(0, 1, 0.001)
    assert DataFetch(150 * 10**9, 16, 5.0).seconds == 240


def test_what_a_search_takes_is_written_into_its_plan(tmp_path: Path) -> None:
    root = Workspace(tmp_path)
    question, folder, recorder = planned_search(root)
    recorder.prepared(20.0)
    recorder.ended()
    known = planned(folder)
    assert known is not None
    assert known.taken is None, "nothing has been trained"
    made_search(root)
    recorder.ended()
    known = planned(folder)
    assert known is not None
    assert known.taken is not None
    assert 60 < known.taken.seconds < time.time() - recorder.began
    assert known.taken.device_hours == pytest.approx((12 * COSTS.cpus + 20 * COSTS.cpus * COSTS.parallel) / 3600)
    assert known.taken.trainings == 2
    resumed = PlanRecorder(question, folder)
    resumed.ended()
    assert planned(folder) == known, "a run that trains nothing takes nothing"
    resumed.done -= 1
    resumed.ended()
    again = planned(folder)
    assert again is not None
    assert again.taken.device_hours == known.taken.device_hours, "the teacher was there"


def test_the_page_has_the_plan_beside_what_was_taken(tmp_path: Path) -> None:
    root = Workspace(tmp_path)
    prices = {"nodes": {"one": {"price_per_hour": 36.0}}, "currency": "EUR"}
    question, folder, recorder = planned_search(root, cluster=prices)
    made_search(root)
    recorder.ended()
    table = plan_table(planned(folder))
    assert table is not None
    rows = {row["name"]: row for row in table["rows"]}
    assert float(rows["EUR"]["taken"]) == pytest.approx(0.6, abs=0.02)
    assert float(rows["EUR"]["planned"]) == pytest.approx(36 / 60 * float(rows["minutes"]["planned"]), rel=0.1)
    assert rows["trainings"]["planned"] == "6"
    fabricated.summary().write(folder)
    write_report(read_study(folder, question))
    assert "Planned and actual cost" in folder.report.read_text()


def test_a_plan_of_another_question_is_not_this_searchs(tiny_file: Write, tmp_path: Path) -> None:
    root = Workspace(tmp_path)
    folder = root.study("tiny")
    folder.path.mkdir(parents=True)
    (folder.path / "plan.json").write_text(json.dumps({"question": "other", "plan": {}, "costs": {}}))
    PlanRecorder(load_experiment(tiny_file()), folder)
    assert not (folder.path / "plan.json").exists()


@pytest.mark.thorough
@pytest.mark.usefixtures("local_ray")
def test_a_plan_is_measured_and_found_by_its_search(tiny_file: Write, tmp_path: Path) -> None:
    # Two at a time: each has one thread, which two on a busy machine would wait for.
    search = {"parallel": 2, "max_params_m": 1.0}
    experiment = load_experiment(tiny_file(student={"network": ["test_efficientnet", "resnet18"]}, search=search))
    root = Workspace(tmp_path / "runs")
    said: list[str] = []
    plan = plan_experiment(experiment, root, say=said.append)
    assert said[-1] == "timing 3 kinds of training, 2 at a time"
    pruned = plan.trainings["pruned"]
    assert plan.trainings == {"published": 3, "sampled": 1, "pruned": pruned, "repeated": 2, "done": 0}
    # Scratch and KD are not stopped; of the third and the fourth to arrive, whoever is not the best so far.
    assert pruned == pytest.approx(2 / 3 + 3 / 4, abs=0.15)
    assert plan.source == "measured"
    assert 0 < plan.seconds.low < plan.seconds.expected < plan.seconds.high
    assert all(seconds > 0 for seconds in plan.phases.values())
    assert plan.memory is not None
    assert plan.memory > 2e8
    assert plan.ready == {"teacher": 0.0, "cache": 0.0}
    assert not root.teachers.exists(), "nothing was fitted"
    # resnet18 is over the limit: neither counted nor timed.
    assert set(plan.left_out) == {"resnet18"}
    assert plan_lines(plan)[-1].startswith("excluded   resnet18: 11.2 M parameters, search.max_params_m allows 1")
    known = planned(root.study("tiny"))
    assert known is not None
    assert (known.plan, known.taken) == (plan, None)
    left, _ = within_limits(experiment, root)
    assert left.student.networks == ("test_efficientnet",)
    PlanRecorder(left, root.study("tiny"))
    assert planned(root.study("tiny")) is not None, "the search finds the plan of its own question"
