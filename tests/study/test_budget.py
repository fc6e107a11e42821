"""Budgets: what a search costs, that it stops in good order, and that what was spent is remembered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.config.search import MOST_TRIALS, BudgetSettings
from heterokd.errors import ConfigError
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus
from heterokd.study.assignment import Assignment
from heterokd.study.budget import Spending
from heterokd.study.options import StudyOptions
from heterokd.study.study import Study


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_experiment(budget: dict[str, Any], **search: Any) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "study",
            "data": {"dataset": "digits"},
            "teacher": {"network": "resnet18"},
            "student": {"network": "resnet10t"},
            "training": {"epochs": 10},
            "search": {"space": {"methods": ["scratch", "kd"]}, "prune": False, "budget": budget, **search},
        }
    )


def simulate(study: Study, clock: Clock, workers: int, seconds: float) -> list[Assignment]:
    """Each epoch takes `seconds / 10`; all workers step together. Returns what was begun."""
    running: dict[int, list[Any]] = {}
    begun = []
    while True:
        while len(running) < workers and isinstance(step := study.next(), Assignment):
            running[step.number] = [step, 0]
            begun.append(step)
        if not running:
            return begun
        clock.now += seconds / 10
        for number, (assignment, epoch) in list(running.items()):
            metrics = {"val/top1": 0.5 + 0.001 * number, "epoch": epoch + 1}
            running[number][1] = epoch + 1
            asked = epoch + 1 in assignment.rungs or assignment.is_timed
            if asked and not study.report(number, epoch + 1, metrics):
                study.finish(number, "pruned", metrics)
                del running[number]
            elif epoch + 1 == 10:
                study.finish(number, "complete", metrics)
                del running[number]


@pytest.mark.parametrize(
    ("budget", "workers", "most"),
    [
        ({"hours": 1.0}, 1, 10),  # trainings of six minutes
        ({"hours": 1.0}, 4, 40),
        ({"gpu_hours": 1.0}, 4, 10),
        ({"money": 5.0, "price": 2.5}, 2, 20),
        ({"trials": 7}, 2, 7),
        ({"trainings": 7.0}, 2, 7),
        ({"hours": 1.0, "gpu_hours": 0.5}, 1, 5),
    ],
)
def test_a_limit_is_reached_and_not_passed(tmp_path: Path, budget: dict[str, float], workers: int, most: int) -> None:
    clock = Clock()
    study = Study.open(make_experiment(budget), StudyFolder(tmp_path), StudyOptions(storage="memory", clock=clock))
    begun = simulate(study, clock, workers, 360.0)
    assert most - workers <= len(begun) <= most
    spent = study.spending.as_dict()
    for key, limit in budget.items():
        if key != "price":
            assert spent[key] is not None
            assert spent[key] <= limit * 1.0001
    standing = study.progress()
    assert standing.finished
    assert standing.paused == 0  # nothing was begun that could not end
    assert standing.complete + standing.confirmations_done == len(begun)


def test_what_runs_too_long_pauses_and_a_larger_budget_goes_on_with_it(tmp_path: Path) -> None:
    clock, folder = Clock(), StudyFolder(tmp_path / "study")
    study = Study.open(make_experiment({"hours": 1.0}), folder, StudyOptions(clock=clock))
    first = study.next()
    assert isinstance(first, Assignment)
    assert first.is_timed
    clock.now = 3000.0
    assert study.report(first.number, 2, {"val/top1": 0.5})
    clock.now = 3601.0
    assert not study.report(first.number, 3, {"val/top1": 0.5})
    assert study.why(first.number) == "budget"
    folder.trial(first.number).start(first.recipe, TrialSnapshot(TrialStatus.PAUSED, reason="budget"))
    study.finish(first.number, "pruned", {"val/top1": 0.5, "epoch": 3})
    assert study.next() is None
    standing = study.progress()
    assert (standing.paused, standing.pruned, standing.running, standing.finished) == (1, 0, 0, True)

    # The same budget again: the hour is over, whatever the clock says.
    again = Study.open(make_experiment({"hours": 1.0}), folder, StudyOptions(clock=Clock()))
    assert again.next() is None
    assert again.progress() == standing
    assert again.spending.seconds == pytest.approx(3601.0)
    assert again.summary().spent["hours"] == pytest.approx(3601 / 3600)

    later = Study.open(make_experiment({"hours": 2.0}), folder, StudyOptions(clock=Clock()))
    assert later.next() == replace(first, experiment=later.experiment)
    assert later.report(first.number, 4, {"val/top1": 0.5})
    later.finish(first.number, "complete", {"val/top1": 0.6})
    assert later.progress().complete == 1


def test_time_in_which_nothing_runs_costs_nothing(tmp_path: Path) -> None:
    clock = Clock()
    study = Study.open(
        make_experiment({"gpu_hours": 1.0}),
        StudyFolder(tmp_path),
        StudyOptions(storage="memory", clock=clock, devices=0.5),
    )
    clock.now = 1000.0
    first, second = study.next(), study.next()
    assert isinstance(first, Assignment)
    assert isinstance(second, Assignment)
    clock.now = 1100.0
    study.finish(first.number, "complete", {"val/top1": 0.5})
    clock.now = 1200.0
    study.finish(second.number, "complete", {"val/top1": 0.5})
    clock.now = 9000.0
    study.progress()
    assert study.next() is not None
    assert study.spending.seconds == 200.0
    assert study.spending.device_seconds == (100 * 2 + 100) * 0.5


def test_failures_at_once_are_not_free(tmp_path: Path) -> None:
    study = Study.open(
        make_experiment({"trainings": 2.0}), StudyFolder(tmp_path), StudyOptions(storage="memory", clock=Clock())
    )
    count = 0
    while isinstance(step := study.next(), Assignment):
        study.finish(step.number, "failed", {}, "out of memory")
        count += 1
    assert count < 25
    assert study.progress().finished


def test_a_budget_alone_decides_how_many_trials_there_are() -> None:
    assert make_experiment({"hours": 2.0}).search.trials == MOST_TRIALS
    assert make_experiment({"hours": 2.0}, trials=9).search.trials == 9
    assert make_experiment({}).search.trials == 24
    assert make_experiment({"price": 2.0}).search.trials == 24


def test_money_needs_a_price() -> None:
    with pytest.raises(ValueError, match=r"set search\.budget\.price"):
        BudgetSettings(money=10.0)


def test_the_total_is_read_from_what_was_spent() -> None:
    spending = Spending(BudgetSettings(gpu_hours=2.0, hours=10.0), devices=0.5)
    assert spending.total(0.0) is None
    spending.search = 4.0
    spending.pass_time(1800.0, running=2)
    # Half an hour on two halves of a device: 0.5 of 2 device hours, 0.5 of 10 hours.
    assert spending.total(0.0) == pytest.approx(16.0)
    assert spending.fits(running=0, underway=0.0)
    spending.pass_time(1.4 * 3600, running=2)
    assert not spending.fits(running=0, underway=0.0)


def test_the_file_says_where_a_budget_is_wrong(tiny_file: Any) -> None:
    with pytest.raises(ConfigError, match=r"search\.budget"):
        load_experiment(tiny_file(search={"budget": {"hourss": 2}}))
