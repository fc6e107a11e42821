"""Failures teach the sampler, leave out a method, and decide a verdict: searches with made-up trainings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import optuna
import pytest
import test_study
from test_study import make_experiment

from heterokd.report.wording import notes, verdict
from heterokd.storage.study_dir import StudyFolder, exception_line
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.assignment import Assignment
from heterokd.study.failures import IN_A_ROW, failure_kind
from heterokd.study.options import StudyOptions
from heterokd.study.plugins import OptunaSampler
from heterokd.study.study import Study
from heterokd.study.summary import StudySummary

SEVERAL = {"methods": ["scratch", "kd", "dist", "hcd"]}
Fails = Callable[[Assignment], str | None]


def fails_with(method: str, message: str) -> Fails:
    """Trials of a method fail with a message, in which {} is the trial's number."""
    return lambda trial: message.format(trial.number) if trial.recipe.method == method else None


def search(study: Study, fails: Fails, status: str = "failed", most: int = 200) -> list[Assignment]:
    """Run a study, one trial at a time; `fails` returns the error of a trial that fails."""
    done: list[Assignment] = []
    while len(done) < most and isinstance(trial := study.next(), Assignment):
        done.append(trial)
        error = fails(trial)
        if error is None:
            test_study.run_one(study, trial)
        else:
            study.finish(trial.number, TrialStatus(status), {}, error)
    return done


def opened(folder: Path, storage: Literal["disk", "memory"] = "memory", **changes: Any) -> Study:
    given = {"space": SEVERAL, "confirm_leaders": 0, "trials": 30, **changes}
    return Study.open(make_experiment(**given), StudyFolder(folder / "study"), StudyOptions(storage=storage))


def counted(trials: list[Assignment]) -> Counter[str]:
    return Counter(trial.recipe.method for trial in trials)


def test_a_method_that_always_fails_is_left_out(tmp_path):
    study = opened(tmp_path)
    done = search(study, fails_with("hcd", "RuntimeError: shapes {}x512 and 384x100 differ"))
    assert len(done) == 30
    assert counted(done)["hcd"] == IN_A_ROW
    summary = study.summary()
    assert list(summary.failing) == ["hcd"]
    assert summary.failing["hcd"].startswith("RuntimeError: shapes ")
    assert StudySummary.from_json(summary.to_json()).failing == summary.failing
    (sentence,) = [note for note in notes(summary) if "hcd" in note]
    assert sentence.startswith("hcd failed 3 times in a row for the same reason and was left out of the rest of the")
    assert sentence.endswith(summary.failing["hcd"])


def test_a_method_stays_left_out_after_a_restart(tmp_path):
    failing = fails_with("hcd", "ValueError: no")
    search(opened(tmp_path, "disk", trials=9), failing)
    later = search(opened(tmp_path, "disk", trials=12), failing)
    assert later
    assert counted(later)["hcd"] == 0


def test_starts_of_a_method_that_is_left_out_are_skipped(tmp_path):
    study = opened(tmp_path, space={"methods": ["scratch", "hcd"]}, trials=20)
    done = search(study, fails_with("hcd", "ValueError: no"))
    assert counted(done) == {"scratch": 1, "hcd": IN_A_ROW}
    assert study.progress().finished


def test_failures_for_other_reasons_do_not_leave_a_method_out_but_teach_the_sampler(tmp_path):
    words = ["alpha", "beta", "gamma", "delta"]
    done = search(
        study := opened(tmp_path),
        lambda trial: f"ValueError: {words[trial.number % 4]}" if trial.recipe.method == "hcd" else None,
    )
    assert study.summary().failing == {}
    assert counted(done)["hcd"] <= 10


def test_a_success_in_between_keeps_a_method(tmp_path):
    seen: Counter[str] = Counter()

    def fails(trial: Assignment) -> str | None:
        seen[trial.recipe.method] += 1
        return "ValueError: no" if trial.recipe.method == "hcd" and seen["hcd"] % 3 else None

    study = opened(tmp_path)
    search(study, fails)
    assert study.summary().failing == {}


@pytest.mark.parametrize("known", [True, False])
def test_diverged_trials_leave_a_method_out_only_if_it_never_trained(known, tmp_path):
    seen: Counter[str] = Counter()

    def fails(trial: Assignment) -> str | None:
        seen[trial.recipe.method] += 1
        is_first = known and seen["hcd"] == 1
        return "TrainingDiverged: loss is nan" if trial.recipe.method == "hcd" and not is_first else None

    study = opened(tmp_path, prune=False)
    search(study, fails, status="diverged")
    assert bool(study.summary().failing) == (not known)


def test_failed_and_diverged_trials_are_the_worst_for_the_sampler(tmp_path):
    study = opened(tmp_path, space={"methods": ["scratch", "kd"]}, trials=3, prune=False)
    (first, second, third) = (study.next() for _ in range(3))
    assert isinstance(first, Assignment)
    assert isinstance(second, Assignment)
    assert isinstance(third, Assignment)
    study.finish(first.number, TrialStatus.COMPLETE, {"val/top1": 0.5})
    study.report(second.number, 3, {"val/top1": 0.9})
    study.finish(second.number, TrialStatus.DIVERGED, {"epoch": 5}, "TrainingDiverged: loss")
    study.finish(third.number, TrialStatus.FAILED, {}, "ValueError: no")
    seen: list[Any] = []

    class Reading(optuna.samplers.RandomSampler):
        def sample_independent(self, study, *rest):
            seen.extend(study.get_trials(deepcopy=False))
            return super().sample_independent(study, *rest)

    from heterokd.study.sampler import propose

    class Made:
        def estimator(self, seed: int) -> optuna.samplers.BaseSampler:
            return Reading(seed)

    space = {"kd": study.experiment.method_domains("kd")}
    propose(study._trials, space, Made(), 0)
    states = {trial.number: (trial.state.name, trial.intermediate_values) for trial in seen}
    assert states[0][0] == "COMPLETE"
    assert states[1] == states[2] == ("PRUNED", {})  # TPE ranks these last


def test_the_verdict_of_a_search_whose_distillation_failed(tmp_path):
    reasons = iter(["ValueError: 1 is bad", "OSError: none", "ValueError: 2 is bad"])
    study = opened(tmp_path, space={"methods": ["scratch", "kd"]}, trials=4, confirm_leaders=2)
    done = search(study, lambda trial: next(reasons) if trial.recipe.method == "kd" else None)
    assert len(done) == 4  # no repetition of scratch alone
    summary = study.summary()
    assert summary.winner is not None
    assert summary.winner.method == "scratch"
    assert summary.has_failed
    assert verdict(summary) == "All 3 distillation trials failed: ValueError: 1 is bad"
    assert verdict(StudySummary.from_json(summary.to_json())) == verdict(summary)


def test_a_search_with_one_distilled_student_has_not_failed(tmp_path):
    count = Counter[str]()

    def fails(trial: Assignment) -> str | None:
        count[trial.recipe.method] += 1
        return "ValueError: no" if trial.recipe.method == "kd" and count["kd"] > 1 else None

    study = opened(tmp_path, space={"methods": ["scratch", "kd"]}, trials=4)
    search(study, fails)
    assert not study.summary().has_failed
    assert study.summary().distillation_failure is None


def test_a_summary_without_failures_has_no_further_key(tmp_path):
    study = opened(tmp_path, trials=4)
    search(study, lambda trial: None)
    assert not {"failing", "distillation_failure"} & study.summary().to_json().keys()


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("RuntimeError: shapes 32x512", "RuntimeError: shapes 16x384", True),
        ("OSError: /tmp/a/b.pt is missing", "OSError: /data/c.pt is missing", True),
        ("RuntimeError: at 0x7f01", "RuntimeError: at 0x7E02ab", True),
        ("RuntimeError: loss 1.5e-3", "RuntimeError: loss -2", True),
        ("RuntimeError: no", "ValueError: no", False),
        ("KeyError: 'a'", "KeyError: 'b'", False),
    ],
)
def test_messages_are_compared_without_numbers_paths_and_addresses(first, second, same):
    assert (failure_kind(first) == failure_kind(second)) == same


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Traceback (most recent call last):\n  File x\nValueError: a\nb\n  c\n", "ValueError: a"),
        (
            "Traceback (most recent call last):\n  x\nKeyError: 1\n\nDuring handling:\n\n"
            "Traceback (most recent call last):\n  y\nCudaError: x\nCompile with y\n",
            "CudaError: x",
        ),
        ("only a sentence", "only a sentence"),
        ("Traceback (most recent call last):", "Traceback (most recent call last):"),
        ("", None),
    ],
)
def test_an_error_is_named_by_type_and_first_line(text, line):
    assert exception_line(text) == line


def test_samplers_of_optuna_learn_failures_as_the_worst_complete_value(tmp_path):
    seen: list[Any] = []

    class Reading(optuna.samplers.RandomSampler):
        def sample_independent(self, study, *rest):
            seen[:] = study.get_trials(deepcopy=False)
            return super().sample_independent(study, *rest)

    study = opened(tmp_path, space={"methods": ["scratch", "kd"]}, trials=6, prune=False)
    study._proposer._sampler = OptunaSampler(Reading(0))
    search(study, lambda trial: "ValueError: no" if trial.number in (2, 3) else None)
    found = {trial.number: trial for trial in seen}
    worst = min(record.value for record in study._trials.search if record.value is not None)
    assert [(found[number].state.name, found[number].value) for number in (2, 3)] == [("COMPLETE", worst)] * 2
