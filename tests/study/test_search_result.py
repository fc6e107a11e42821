"""What a search leaves, as a user of Optuna and pandas reads it."""

from __future__ import annotations

import pickle
from pathlib import Path

import fabricated
import optuna
import pytest

from heterokd.errors import StudyError
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.study.assignment import Assignment
from heterokd.study.progress import StudyProgress
from heterokd.study.search_result import SearchResult
from heterokd.study.study import Study


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """Of four trials, of which one failed."""
    search = {"space": {"methods": ["scratch", "kd"]}, "trials": 4, "confirm_leaders": 0, "prune": False}
    question = fabricated.experiment(search=search)
    folder = fabricated.study(Workspace(tmp_path_factory.mktemp("found")), question)
    study = Study.open(question, folder)
    while isinstance(one := study.next(), Assignment):
        status = TrialStatus.FAILED if one.number == 2 else TrialStatus.COMPLETE
        metrics = {} if one.number == 2 else {"val/top1": 0.5 + one.number / 10, "epoch": 3}
        snapshot = TrialSnapshot(status, one.origin, sample=one.sample, metrics=metrics, began=10.0, ended=12.5)
        folder.trial(one.number).start(one.recipe, snapshot)
        study.finish(one.number, status, metrics, "out of memory")
    return SearchResult(folder, study.summary(), fabricated.card(), "sqlite:///mlflow.db")


def test_trials_are_a_data_frame(found: SearchResult) -> None:
    frame = found.trials
    assert list(frame["number"]) == [0, 1, 2, 3]
    assert list(frame["state"]) == ["complete", "complete", "failed", "complete"]
    assert list(frame["method"][:2]) == ["scratch", "kd"]
    assert list(frame["origin"]) == ["published", "published", "sampled", "sampled"]
    assert frame["value"].isna().tolist() == [False, False, True, False]
    assert frame["seconds"].tolist() == [2.5] * 4
    assert frame["params_kd.temperature"].isna().tolist()[:2] == [True, False], "scratch has none"
    assert Path(frame["path"][3]) == found.folder.trial(3).path
    assert frame.sort_values("value").iloc[2]["number"] == 3


def test_the_best_trial_is_the_winners(found: SearchResult) -> None:
    assert found.finished
    assert found.winner is not None
    assert found.winner.number == 3
    assert found.best_params == found.winner.sample
    assert (found.best_trial.number, found.best_trial.value) == (3, pytest.approx(0.8))
    assert found.report == found.folder.report


def test_the_optuna_study_is_read_not_written(found: SearchResult) -> None:
    assert [trial.state.name for trial in found.study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert found.study.trials[2].user_attrs["ended"]["status"] == "failed"
    with pytest.raises(optuna.exceptions.StorageInternalError):
        found.study.ask()


def test_a_result_can_be_sent_to_another_process(found: SearchResult) -> None:
    assert pickle.loads(pickle.dumps(found)).summary == found.summary


def test_a_search_without_a_student_says_so(tmp_path: Path) -> None:
    folder = fabricated.study(Workspace(tmp_path), fabricated.experiment())
    found = SearchResult(folder, fabricated.summary(progress=StudyProgress()), fabricated.card(), "")
    assert not found.finished
    assert found.trials.empty
    with pytest.raises(StudyError, match="no trial is complete"):
        _ = found.best_params
