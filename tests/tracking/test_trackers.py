"""Trackers beside MLflow: found by name, never written to twice, and no fault of theirs stops a trial."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import fabricated
import pytest

from heterokd.config.experiment import Experiment
from heterokd.errors import ConfigError
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.summary import StudySummary
from heterokd.tracking.csv import CsvTracker
from heterokd.tracking.tracker import Status, with_others


class Lists:
    """A tracker that keeps what it is called with, and raises when it is to."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.is_broken = False

    def sync(self, trial: TrialFolder) -> bool:
        self.calls.append(trial.number)
        if self.is_broken:
            raise RuntimeError("service is down")
        return True

    def finish(self, summary: StudySummary | None, status: Status = "FINISHED") -> bool:
        self.calls.append(status)
        return True


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    return fabricated.study(Workspace(tmp_path), fabricated.experiment())


def asked(*also: str) -> Experiment:
    return fabricated.experiment(tracking={"also": list(also)})


def rows(folder: StudyFolder) -> list[tuple[str, str, str]]:
    with (folder.path / "metrics.csv").open(newline="") as file:
        return [(row["trial"], row["epoch"], row["metric"]) for row in csv.DictReader(file)]


def test_every_report_is_in_the_table_once(study: StudyFolder) -> None:
    question, mlflow = asked("csv"), Lists()
    trackers = with_others(mlflow, question, study)
    made = fabricated.trial(study, question, 0, status="running", epochs=1)
    assert trackers.sync(made)
    fabricated.report(made, 2)
    assert trackers.sync(made)
    assert trackers.sync(made)
    unseen = fabricated.trial(study, question, 3, epochs=1)
    resumed = with_others(mlflow, question, study)
    assert resumed.sync(made)
    assert resumed.finish(None, "KILLED")
    metrics = ("train/loss", "val/top1", "val/loss")
    reports = ((0, 1), (0, 2), (unseen.number, 1))
    assert rows(study) == [(str(trial), str(epoch), metric) for trial, epoch in reports for metric in metrics]
    assert mlflow.calls == [0, 0, 0, 0, "KILLED"]


def test_a_tracker_of_a_file_that_raises_costs_a_warning(
    study: StudyFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "class Mine:\n"
        "    def __init__(self, experiment, folder): self.folder = folder.path\n"
        "    def sync(self, trial): raise ConnectionError('nobody listens')\n"
        "    def finish(self, summary, status='FINISHED'): (self.folder / 'mine').write_text(status); return True\n"
    )
    mlflow = Lists()
    trackers = with_others(mlflow, asked(f"{file}:Mine", "csv"), study)
    made = fabricated.trial(study, fabricated.experiment(), 0)
    with caplog.at_level(logging.WARNING):
        assert trackers.sync(made)
        assert trackers.sync(made)
    assert [record.message.split(" failed ")[1] for record in caplog.records] == ["(ConnectionError: nobody listens)"]
    assert trackers.finish(None)
    assert (study.path / "mine").read_text() == "FINISHED"
    assert {trial for trial, _, _ in rows(study)} == {"0"}
    assert mlflow.calls == [0, 0, "FINISHED"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cvs", "tracking.also: 'cvs' is not a valid name; give one of csv, package.module:Name, ./file.py:Name"),
        ("heterokd.trackers:X", "tracking.also: heterokd.trackers cannot be imported"),
        ("./absent.py:X", "tracking.also: there is no file ./absent.py; relative paths start at the current directory"),
        ("heterokd.tracking.csv:CsvTraker", "has no 'CsvTraker'; did you mean 'CsvTracker'?"),
        ("heterokd.tracking.csv:COLUMNS", "tracking.also: heterokd.tracking.csv:COLUMNS is not a class"),
    ],
)
def test_an_unknown_tracker_is_refused(study: StudyFolder, name: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        with_others(Lists(), asked(name), study)
    assert sentence in str(refused.value)


def test_trackers_change_no_recipe(study: StudyFolder) -> None:
    sample = {"method": "kd"}
    assert asked("csv").recipe(sample).hash == fabricated.experiment().recipe(sample).hash
    assert CsvTracker(asked("csv"), study).finish(None)
    assert not (study.path / "metrics.csv").exists()
