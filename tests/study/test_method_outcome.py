"""Why a method did not win, in a sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fabricated
import pytest

from heterokd.storage.trial_status import TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.study.method_outcome import method_outcomes, stop_reason
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.trial_view import TrialView, read_trials

WINNER = fabricated.ranked(0, "kd", 0.9, 0.03)


@pytest.fixture
def trials(tmp_path: Path) -> tuple[TrialView, ...]:
    """A complete trial of kd, dkd and scratch each."""
    question = fabricated.experiment(search={"space": {"methods": ["scratch", "kd", "dkd"]}, "trials": 4})
    folder = fabricated.study(Workspace(tmp_path), question)
    for number, method in enumerate(("kd", "dkd", "scratch")):
        fabricated.trial(folder, question, number, method)
    return tuple(read_trials(folder, "val/top1"))


def outcome(trials: tuple[TrialView, ...], *leaders: RankedConfig, **changes: Any) -> str:
    """The sentence on dkd if its trial is changed so."""
    found = [replace(trial, **changes) if trial.method == "dkd" else trial for trial in trials]
    return method_outcomes(fabricated.summary(WINNER, *leaders), found)["dkd"]


@pytest.mark.parametrize(
    ("mean", "half", "said"),
    [
        (0.80, 0.04, "-0.1000 to the winner (95 % interval -0.1500 to -0.0500): significantly worse"),
        (0.86, 0.04, "-0.0400 to the winner (95 % interval -0.0900 to +0.0100): probably worse"),
        (0.89, 0.04, "-0.0100 to the winner (95 % interval -0.0600 to +0.0400): not known to be worse"),
        (0.94, 0.04, "+0.0400 to the winner (95 % interval -0.0100 to +0.0900): probably better, but not certain"),
        (0.80, None, "-0.1000 to the winner: one seed each, so the difference may be noise"),
    ],
)
def test_a_repeated_method_is_compared_on_fresh_seeds(
    trials: tuple[TrialView, ...], mean: float, half: float | None, said: str
) -> None:
    assert outcome(trials, fabricated.ranked(1, "dkd", mean, half)) == said


def test_the_winner_and_methods_that_were_not_repeated(trials: tuple[TrialView, ...]) -> None:
    assert method_outcomes(fabricated.summary(WINNER), trials)["kd"] == "the winner"
    said = "best value of the search 0.3000, of the winner 0.9000; not repeated on fresh seeds"
    assert outcome(trials) == said
    assert outcome(trials, fabricated.ranked(1, "dkd", 0.3, confirmed=False)) == said
    assert method_outcomes(fabricated.summary(), trials)["dkd"] == "complete"


def test_methods_whose_trials_did_not_end(trials: tuple[TrialView, ...]) -> None:
    stopped = {"status": TrialStatus.PRUNED, "epochs": (1, 2), "curve": (0.05, 0.1), "value": 0.1, "reason": "behind"}
    said = "its trial was stopped early, trial 1 at epoch 2 of 3: 3rd of the 3 that have reached it, by the value of"
    assert outcome(trials, **stopped) == f"{said} the epoch"
    assert outcome(trials, **stopped | {"reason": "MedianPruner"}).endswith("at epoch 2 of 3: MedianPruner")
    failed = {"status": TrialStatus.FAILED, "value": None, "epochs": (), "error": "RuntimeError: no memory"}
    assert outcome(trials, **failed) == "1 of 1 trials failed: RuntimeError: no memory"
    assert outcome(trials, status=TrialStatus.RUNNING) == "not finished: running"


def test_the_place_of_a_stopped_trial_follows_the_direction(trials: tuple[TrialView, ...]) -> None:
    stopped = replace(trials[1], status=TrialStatus.PRUNED, epochs=(1,), curve=(0.4,), reason="behind")
    search = (trials[0], stopped, trials[2])  # the others have 0.1 after an epoch
    assert stop_reason(stopped, search, 1) == "1st of the 3 that have reached it, by the value of the epoch"
    assert stop_reason(stopped, search, -1) == "3rd of the 3 that have reached it, by the value of the epoch"
