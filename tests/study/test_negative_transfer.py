"""A trial that is clearly worse than the same student on labels alone is ended and told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from heterokd.config.experiment import Experiment
from heterokd.report.wording import notes
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.assignment import Assignment
from heterokd.study.options import StudyOptions
from heterokd.study.study import Study
from heterokd.study.summary import HarmfulTrial

SPACE = {"methods": ["scratch", "dkd", "dist", "ofa", "rsd", "fitnet"]}


def open_study(folder: Path, **search: Any) -> Study:
    content = {
        "name": "study",
        "data": {"dataset": "digits"},
        "teacher": {"network": "resnet18"},
        "student": {"network": "resnet10t"},
        "training": {"epochs": 27},
        "search": {"space": SPACE, "trials": 12, "reduction_factor": 3, **search},
    }
    return Study.open(Experiment.model_validate(content), StudyFolder(folder), StudyOptions(storage="memory"))


def begin(study: Study, value: float, epoch: int = 9, *, first: float | None = None) -> tuple[Assignment, bool]:
    """The next trial up to a rung; at its first one it may have another value."""
    step = study.next()
    assert isinstance(step, Assignment)
    goes_on = True
    for rung in step.rungs:
        if rung <= epoch and goes_on:
            reached = first if first is not None and rung == step.rungs[0] else value
            goes_on = study.report(step.number, rung, {"val/top1": reached})
    return step, goes_on


@pytest.mark.parametrize(("last", "why"), [(0.30, "negative transfer"), (0.595, "behind"), (0.65, None)])
def test_clearly_below_scratch_is_harm_and_within_noise_is_not(tmp_path: Path, last: float, why: str | None) -> None:
    study = open_study(tmp_path)
    for value in (0.60, 0.61, 0.62, 0.63, 0.64):
        assert begin(study, value)[1]
    harmful, went_on = begin(study, last, first=0.7)
    assert went_on == (why is None)
    assert study.why(harmful.number) == why
    if why == "negative transfer":
        assert harmful.origin == "published"
        assert study.why(harmful.number) == "negative transfer"
        study.finish(harmful.number, "pruned", {"val/top1": last, "epoch": 9})
        summary = study.summary()
        assert summary.negative_transfer == (HarmfulTrial(harmful.number, harmful.recipe.method, 9),)
        assert summary.progress.negative_transfer == summary.progress.pruned == 1
        assert any(f"trial {harmful.number} ({harmful.recipe.method}, epoch 9)" in note for note in notes(summary))


def test_a_twin_has_the_same_conditions_of_training(tmp_path: Path) -> None:
    """With a searched learning rate, scratch at another one says nothing."""
    space = {**SPACE, "shared": {"training.learning_rate": {"low": 0.01, "high": 0.2}}}
    study = open_study(tmp_path, space=space, trials=20, confirm_leaders=0)
    for value in (0.60, 0.61, 0.62, 0.63, 0.64, 0.65):
        begin(study, value)
    sampled, goes_on = begin(study, 0.30)
    assert sampled.origin == "sampled"
    assert not goes_on
    assert study.why(sampled.number) == "behind"


def test_the_first_rung_is_too_early_to_speak_of_harm(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    for value in (0.60, 0.61, 0.62, 0.63, 0.64):
        begin(study, value, epoch=3)
    early, _ = begin(study, 0.30, epoch=3)
    assert study.why(early.number) == "behind"


def test_a_metric_that_is_no_number_ends_a_trial_at_once(tmp_path: Path) -> None:
    study = open_study(tmp_path, prune=False)
    first = study.next()
    assert isinstance(first, Assignment)
    assert not study.report(first.number, 3, {"val/top1": math.nan})
    assert study.why(first.number) == "not finite"


def test_a_loss_that_diverged_counts_as_failed_and_teaches_the_sampler(tmp_path: Path) -> None:
    import optuna

    study = open_study(tmp_path)
    first = study.next()
    assert isinstance(first, Assignment)
    study.finish(first.number, "diverged", {"epoch": 2}, "TrainingDiverged: train/kd is not finite")
    standing = study.progress()
    assert (standing.failed, standing.diverged, standing.pruned) == (1, 1, 0)
    (learned,) = study._trials.memory.get_trials(deepcopy=False)
    assert learned.state == optuna.trial.TrialState.PRUNED
