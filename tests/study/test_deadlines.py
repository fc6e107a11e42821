"""Trials that hang end at their limit, or after the budget; a resumed search does not begin with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from test_study import make_experiment

from heterokd.config.experiment import Experiment
from heterokd.errors import ConfigError
from heterokd.storage.study_dir import StudyFolder, TrialEnd
from heterokd.storage.trial_status import TIMED_OUT, TrialSnapshot, TrialStatus
from heterokd.study.assignment import BUDGET, Assignment
from heterokd.study.deadlines import FACTOR, GRACE_SECONDS, LEAST_SECONDS
from heterokd.study.options import StudyOptions
from heterokd.study.plan.costs import Costs, MethodCost
from heterokd.study.question import question
from heterokd.study.study import Study

SPACE = {"methods": ["scratch", "kd", "dist"]}
HOUR = 3600.0


class Clock:
    """Time that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def opened(
    folder: Path,
    clock: Clock,
    storage: Literal["memory", "disk"] = "memory",
    *,
    trial_seconds: float | None = None,
    load: float = 0.0,
    **changes: Any,
) -> Study:
    made = make_experiment(**{"space": SPACE, "confirm_leaders": 0, "trials": 8, **changes})
    options = StudyOptions(clock=clock, load=lambda: load, trial_seconds=trial_seconds, storage=storage)
    return Study.open(made, StudyFolder(folder / "study"), options)


def begin(study: Study) -> Assignment:
    """The next trial, whose process begins at once."""
    trial = study.next()
    assert isinstance(trial, Assignment)
    study.started(trial.number)
    return trial


@pytest.mark.parametrize("timeout", [60, "auto"])
def test_the_limit_begins_with_the_process_which_may_wait_for_resources(tmp_path, clock, timeout):
    study = opened(tmp_path, clock, trial_timeout=timeout, trial_seconds=60.0)
    trial = study.next()
    clock.now = 24 * HOUR
    assert study.expire() == []
    study.started(trial.number)
    clock.now += 60
    assert study.expire() == []
    clock.now += HOUR
    assert [each.number for each in study.expire()] == [trial.number]


def test_a_trial_that_exceeds_its_timeout_has_failed_for_that_reason(tmp_path, clock):
    study = opened(tmp_path, clock, trial_timeout="2h")
    trial = begin(study)
    clock.now = 2 * HOUR
    assert study.expire() == []
    study.seen(trial.number)  # an explicit limit holds for the whole trial
    clock.now += 1
    (expired,) = study.expire()
    assert (expired.number, expired.reason) == (trial.number, TIMED_OUT)
    assert expired.sentence.startswith("TrialTimeout: the trial did not end in 2 h 0 min")
    assert study.expire() == []
    assert study.why(trial.number) == TIMED_OUT
    assert study.progress().failed == 1
    assert not study.report(trial.number, 3, {"val/top1": 0.5})
    study.finish(trial.number, TrialStatus.COMPLETE, {"val/top1": 0.9})  # too late
    assert study.summary().winner is None


def test_a_resumed_search_does_not_begin_with_a_trial_that_timed_out(tmp_path, clock):
    study = opened(tmp_path, clock, "disk", trial_timeout=60)
    hanging, other = begin(study), begin(study)
    clock.now = 30.0
    study.started(other.number)  # its process began later
    clock.now = 80.0
    assert [trial.number for trial in study.expire()] == [hanging.number]
    assert begin(opened(tmp_path, clock, "disk")).number == other.number


def test_without_a_plan_and_a_complete_trial_there_is_no_limit(tmp_path, clock):
    study = opened(tmp_path, clock)
    begin(study)
    clock.now = 1000 * HOUR
    assert study.expire() == []


def test_null_is_no_limit(tmp_path, clock):
    study = opened(tmp_path, clock, trial_timeout=None, trial_seconds=1.0)
    begin(study)
    clock.now = 1000 * HOUR
    assert study.expire() == []


def test_the_default_is_a_multiple_of_the_plan_without_an_epoch(tmp_path, clock):
    study = opened(tmp_path, clock, trial_seconds=HOUR)
    slow, hanging = begin(study), begin(study)
    clock.now = 0.9 * FACTOR * HOUR
    study.seen(slow.number)
    clock.now = FACTOR * HOUR + 1
    (expired,) = study.expire()
    assert expired.number == hanging.number
    assert expired.sentence.startswith("TrialTimeout: no epoch ended in 10 h 0 min")


def test_the_default_is_a_multiple_of_complete_trials_of_the_method(tmp_path, clock):
    study = opened(tmp_path, clock, prune=False)
    trials = [begin(study) for _ in range(3)]
    clock.now = HOUR
    for trial in trials:
        study.finish(trial.number, TrialStatus.COMPLETE, {"val/top1": 0.5})
    hanging = begin(study)
    clock.now += FACTOR * HOUR + 1
    assert [trial.number for trial in study.expire()] == [hanging.number]


def test_short_trainings_have_a_minimum(tmp_path, clock):
    study = opened(tmp_path, clock, trial_seconds=1.0)
    begin(study)
    clock.now = LEAST_SECONDS - 1
    assert study.expire() == []
    clock.now = LEAST_SECONDS + 1
    assert len(study.expire()) == 1


@pytest.mark.parametrize(("load", "factor"), [(0.3, 1.0), (10.0, 10.0)])
def test_minimum_limits_grow_with_the_load_of_the_machine(tmp_path, clock, load, factor):
    hanging = opened(tmp_path / "hanging", clock, trial_seconds=1.0, load=load)
    spent = opened(tmp_path / "spent", clock, budget={"hours": 1.0}, trial_timeout=None, load=load)
    for study in (hanging, spent):
        begin(study)
    clock.now = factor * LEAST_SECONDS - 1
    assert hanging.expire() == []
    clock.now += 2
    assert len(hanging.expire()) == 1
    clock.now = max(clock.now, HOUR) + 1
    assert spent.expire() == []
    clock.now += factor * GRACE_SECONDS - 1
    assert spent.expire() == []
    clock.now += 2
    assert len(spent.expire()) == 1


def test_a_budget_of_hours_ends_a_trial_that_does_not_report(tmp_path, clock):
    study = opened(tmp_path, clock, budget={"hours": 1.0}, trial_timeout=None)
    trial = begin(study)
    clock.now = HOUR + 1
    assert study.expire() == []  # it may report soon
    clock.now += GRACE_SECONDS + 1
    (expired,) = study.expire()
    assert (expired.number, expired.reason) == (trial.number, BUDGET)
    assert study.progress().paused == 1
    assert study.next() is None
    assert study.progress().finished


def test_after_the_budget_a_trial_has_time_for_two_epochs(tmp_path, clock):
    study = opened(tmp_path, clock, budget={"hours": 1.0}, trial_timeout=None)
    trial = begin(study)
    clock.now = 0.5 * HOUR
    study.seen(trial.number)
    clock.now = 1.2 * HOUR
    assert study.expire() == []
    clock.now = 1.9 * HOUR
    assert study.expire() == []
    clock.now = 2.3 * HOUR
    assert len(study.expire()) == 1


def interrupted(study: Study, trial: Assignment, epochs: int) -> None:
    """What the process of a trial leaves that was killed."""
    folder = study.folder.trial(trial.number)
    folder.start(trial.recipe, TrialSnapshot(origin=trial.origin, sample=trial.sample, began=1000.0))
    for epoch in range(1, epochs + 1):
        folder.append({"epoch": epoch, "val/top1": 0.1})


def test_trials_without_an_epoch_are_resumed_after_the_samples(tmp_path, clock):
    study = opened(tmp_path, clock, "disk", trials=5, prune=False)
    trials = [begin(study) for _ in range(4)]  # scratch, dist, kd (a reference as scratch is), and a sample
    for trial, epochs in zip(trials, (0, 0, 0, 2), strict=True):
        interrupted(study, trial, epochs)
    later = opened(tmp_path, clock, "disk", trials=5, prune=False)
    order = []
    while isinstance(trial := later.next(), Assignment):
        order.append(trial.number)
        later.finish(trial.number, TrialStatus.COMPLETE, {"val/top1": 0.5})
    assert order == [0, 2, 3, 4, 1]
    assert later.progress().finished


def test_the_end_of_a_trial_that_hangs_is_written_to_its_folder(tmp_path, clock):
    study = opened(tmp_path, clock)
    trial = begin(study)
    folder = study.folder.trial(trial.number)
    TrialEnd(TrialStatus.FAILED, TIMED_OUT, "TrialTimeout: late").write(folder)
    assert not folder.path.exists()  # it has not begun
    interrupted(study, trial, 1)
    TrialEnd(TrialStatus.FAILED, TIMED_OUT, "TrialTimeout: late").write(folder)
    assert (folder.status, folder.snapshot.reason, folder.error_line) == ("failed", TIMED_OUT, "TrialTimeout: late")
    TrialEnd(TrialStatus.PAUSED, BUDGET, "").write(folder)
    assert folder.status == TrialStatus.FAILED  # the first end stays


@pytest.mark.parametrize(("value", "seconds"), [("90m", 5400), ("2h", 7200), (5, 5), ("auto", "auto"), (None, None)])
def test_timeouts_are_periods_or_seconds(value, seconds):
    made = make_experiment(trial_timeout=value)
    assert made.search.trial_timeout == seconds
    again = Experiment.model_validate(json.loads(made.model_dump_json()))
    assert again.search.trial_timeout == seconds


@pytest.mark.parametrize("value", [0, -1, "2 parsecs", "nan", float("inf"), True, "", [1]])
def test_other_timeouts_are_refused(value):
    with pytest.raises((ConfigError, ValueError), match="trial_timeout"):
        make_experiment(trial_timeout=value)


def test_a_timeout_may_change_between_runs_of_a_study():
    assert question(make_experiment(trial_timeout=60), ["kd"]) == question(make_experiment(), ["kd"])


def test_the_longest_training_of_a_plan_runs_the_teacher_on_the_slowest_student():
    methods = {"kd": MethodCost(10, 1, 3, stored=True), "dist": MethodCost(1, 2, 2, stored=True)}
    costs = Costs("cpu", 1, 1, 0, 0, 0, 0, 0, 0, methods, {"a": 1.0, "b": 2.0})
    assert costs.longest(5) == 2 * (10 + 5 * 3)
    assert Costs("cpu", 1, 1, 0, 0, 0, 0, 0, 0, {}).longest(5) is None
