"""Importances of a study's parameters: from final values, or from the last rung that the trials have in common."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from heterokd.storage.study_dir import StudyFolder
from heterokd.study.importance import FEWEST, Importance, importances

DISTRIBUTIONS = {
    "method": CategoricalDistribution(("kd",)),
    "kd.temperature": FloatDistribution(1, 8),
    "training.learning_rate": FloatDistribution(0.01, 1),
}


def judged(path: Path, trials: list[optuna.trial.FrozenTrial]) -> Importance:
    folder = StudyFolder(path)
    database = optuna.create_study(study_name="tiny", storage=f"sqlite:///{folder.database}", direction="maximize")
    database.add_trials(trials)
    (found,) = importances(folder)
    return found


def trial(number: int, *, reached: int, rungs: tuple[str, ...] = ()) -> optuna.trial.FrozenTrial:
    """A pruned trial: its learning rate decides the first epoch, its temperature every later one."""
    temperature, rate = 1 + 7 * (number % 4) / 3, 0.01 + 0.99 * (number % 3) / 2
    values = {epoch: rate if epoch == 1 else temperature for epoch in range(1, reached + 1)}
    attrs = {"rungs": dict.fromkeys(rungs, temperature)} if rungs else {}
    params = {"method": "kd", "kd.temperature": temperature, "training.learning_rate": rate}
    return create_trial(
        state=TrialState.PRUNED, params=params, distributions=DISTRIBUTIONS, intermediate_values=values,
        user_attrs=attrs,
    )  # fmt: skip


def test_a_repetition_does_not_count(tmp_path: Path) -> None:
    repeated = trial(0, reached=4)
    repeated.user_attrs = {"assignment": {"confirms": 0}}
    found = judged(tmp_path, [trial(number, reached=4) for number in range(FEWEST - 1)] + [repeated])
    assert (found.trials, found.reason) == (FEWEST - 1, f"{FEWEST - 1} trials, of which {FEWEST} are needed")


def test_without_complete_trials_the_last_common_rung_counts(tmp_path: Path) -> None:
    found = judged(tmp_path, [trial(number, reached=4 + number % 2) for number in range(12)])
    assert (found.epoch, found.trials) == (4, 12)
    assert found.shares[0].name == "kd.temperature"


@pytest.mark.parametrize("without", [0, 2])
def test_a_pruner_that_reads_every_epoch_is_judged_at_rungs(tmp_path: Path, without: int) -> None:
    trials = [trial(number, reached=5, rungs=("3",)) for number in range(10)]
    trials += [trial(number, reached=2) for number in range(without)]
    found = judged(tmp_path, trials)
    assert (found.epoch, found.trials) == (3, 10), "epoch 1 is no rung, and those that ended before do not count"
    assert found.shares[0].name == "kd.temperature"
    assert sum(share.mean for share in found.shares) == pytest.approx(1)
