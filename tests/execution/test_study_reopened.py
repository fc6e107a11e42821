"""A study whose actor died is opened again while its trials run on: none is lost, doubled or written off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from heterokd.config.experiment import Experiment
from heterokd.execution.study_actor import StudyActor
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.trial_status import TIMED_OUT, TrialSnapshot, TrialStatus
from heterokd.study.assignment import Assignment
from heterokd.study.search_space import open_space
from heterokd.study.storage import StudyFacts

CALLS_LIKE_THESE = ("assignment", "finish", "expire", "summary")


def make_experiment(**search: Any) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "study",
            "data": {"dataset": "digits"},
            "teacher": {"network": "resnet18"},
            "student": {"network": "resnet10t"},
            "training": {"epochs": 9},
            "search": {"trials": 4, "space": {"methods": ["scratch", "kd"]}, "confirm_leaders": 0, **search},
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path / "study")


def opened(folder: StudyFolder, **search: Any) -> StudyActor:
    """The actor as its process starts, for the first time or again."""
    experiment = make_experiment(**search)
    space = open_space(experiment, folder, StudyFacts())
    return StudyActor(experiment.model_dump_json(), folder.path, space)


def begun(actor: StudyActor, *running: int) -> Assignment:
    """The next trial, whose process has begun."""
    assignment = actor.next(running)
    assert isinstance(assignment, Assignment)
    started = TrialSnapshot(origin=assignment.origin, sample=assignment.sample, began=1.0)
    files(actor, assignment).start(assignment.recipe, started)
    assert actor.assignment(assignment.number, "here") == assignment
    return assignment


def files(actor: StudyActor, assignment: Assignment) -> TrialFolder:
    return actor.study.folder.trial(assignment.number)


def end(actor: StudyActor, assignment: Assignment) -> None:
    metrics = {"epoch": 9, "val/top1": 0.5}
    files(actor, assignment).save(TrialSnapshot(TrialStatus.COMPLETE, metrics=metrics))
    actor.finish(assignment.number, TrialStatus.COMPLETE, metrics, None)


@pytest.mark.parametrize(
    "first_call",
    ["next", "report", *(pytest.param(name, marks=pytest.mark.thorough) for name in CALLS_LIKE_THESE)],
)
def test_a_trial_that_runs_on_is_adopted_by_whatever_call_comes_first(folder: StudyFolder, first_call: str) -> None:
    before = opened(folder)
    trial = begun(before)
    other = begun(before, trial.number)
    running = [trial.number, other.number]
    again = opened(folder)
    if first_call == "next":
        following = again.next(running)
        assert isinstance(following, Assignment)
        assert following.number not in running
        end(again, following)
    elif first_call == "report":
        assert again.report(trial.number, trial.rungs[0], {"epoch": 1, "val/top1": 0.4}, [])
    elif first_call == "assignment":
        assert again.assignment(trial.number, "here") == trial
    elif first_call == "finish":
        end(again, trial)
    elif first_call == "expire":
        assert again.expire(running) == []
    else:
        assert again.summary(running).progress.running == 2
    seen: list[int] = list(running)
    while isinstance(following := again.next([number for number in seen if not is_over(again, number)]), Assignment):
        seen.append(following.number)
        end(again, following)
    assert len(seen) == len(set(seen))
    for each in (trial, other):
        end(again, each)
    progress = again.summary().progress
    assert progress.finished
    assert (progress.complete, progress.failed) == (4, 0)


def is_over(actor: StudyActor, number: int) -> bool:
    return actor.study.folder.trial(number).status.is_final


def test_a_trial_whose_assignment_was_not_answered_is_given_again(folder: StudyFolder) -> None:
    unanswered = opened(folder).next()
    again = opened(folder).next()
    assert isinstance(unanswered, Assignment)
    assert again == unanswered


@pytest.mark.thorough
def test_calls_that_are_repeated_change_nothing(folder: StudyFolder) -> None:
    trial = begun(opened(folder))
    for _ in range(2):
        actor = opened(folder)
        assert actor.report(trial.number, trial.rungs[0], {"epoch": 1, "val/top1": 0.4}, [])
        assert actor.summary([trial.number]).progress.running == 1
    for _ in range(2):
        actor = opened(folder)
        end(actor, trial)
        assert actor.assignment(trial.number, "here") is None
        assert actor.summary([trial.number]).progress.complete == 1
    assert len(actor.study.folder.trials()) == 1


def test_an_interrupted_trial_is_resumed_once_whatever_dies_meanwhile(folder: StudyFolder) -> None:
    actor = opened(folder)
    trial = begun(actor)
    files(actor, trial).append({"epoch": 1, "val/top1": 0.4})
    again = opened(folder)
    for _ in range(2):
        again.interrupt(trial.number, "OSError: the disk is slow", True)
    assert again.next() == trial
    following = again.next([trial.number])
    assert isinstance(following, Assignment)
    assert following.number != trial.number
    assert again.interrupted() == {}


def test_what_is_interrupted_without_progress_is_left_to_the_next_search(folder: StudyFolder) -> None:
    actor = opened(folder, confirm_leaders=1, confirm_seeds=1)
    trial = begun(actor)
    actor.interrupt(trial.number, "OSError: [Errno 5]", False)
    while isinstance(following := actor.next(), Assignment):  # confirmations would wait for the trial for ever
        assert following.number != trial.number
        end(actor, following)
    assert following is None
    assert actor.interrupted() == {trial.number: "OSError: [Errno 5]"}
    progress = actor.summary().progress
    assert not progress.finished
    assert progress.failed == 0
    assert files(actor, trial).status == TrialStatus.RUNNING
    resumed = opened(folder, confirm_leaders=1, confirm_seeds=1).next()
    assert isinstance(resumed, Assignment)
    assert resumed.number == trial.number


def test_a_trial_that_was_ended_is_not_adopted(folder: StudyFolder) -> None:
    actor = opened(folder, trial_timeout=1e-9)
    trial = begun(actor)
    assert actor.expire([trial.number]) == [trial.number]
    again = opened(folder, trial_timeout=1e-9)
    assert again.assignment(trial.number, "here") is None
    ended = again.end(trial.number)
    assert ended is not None
    assert (ended.status, ended.reason) == (TrialStatus.FAILED, TIMED_OUT)


@pytest.mark.thorough
def test_the_time_before_counts_once(folder: StudyFolder) -> None:
    actor = opened(folder, budget={"hours": 1.0})
    actor.spent(600.0)
    trial = begun(actor)
    end(actor, trial)
    seconds = actor.study.spending.seconds
    assert seconds == pytest.approx(600.0, abs=60.0)
    assert opened(folder, budget={"hours": 1.0}).study.spending.seconds == pytest.approx(seconds)
