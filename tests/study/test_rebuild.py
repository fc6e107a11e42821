"""A study whose database is missing goes on from its trials' folders."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import fabricated
import pytest

from heterokd.config.experiment import Experiment
from heterokd.config.reading import dump_experiment
from heterokd.errors import StudyError
from heterokd.storage.files import write_text
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.study.assignment import Assignment
from heterokd.study.read_summary import read_summary
from heterokd.study.stored_question import as_stored
from heterokd.study.study import Study
from heterokd.study.summary import stored_summary

METRIC = "val/top1"
SPACE = {"methods": ["scratch", "kd", "dkd"], "shared": {"training.learning_rate": {"low": 0.01, "high": 0.2}}}
SEARCH = {"space": SPACE, "trials": 7, "min_epochs": 1, "confirm_leaders": 1, "confirm_seeds": 2}


def asked(**search: Any) -> Experiment:
    """Nine epochs, with rungs at 1 and 4."""
    training = {"epochs": 9, **search.pop("training", {})}
    return fabricated.experiment(training=training, search={**SEARCH, **search})


def curve(assignment: Assignment) -> list[dict[str, float]]:
    """Made-up metrics of each epoch, worse far from a learning rate of 0.1."""
    rate, seed = assignment.recipe.training.learning_rate, assignment.recipe.training.seed
    final = 0.9 - abs(rate - 0.1) + 0.01 * (assignment.recipe.method == "kd") + 1e-6 * seed
    return [{METRIC: final * epoch / (epoch + 1), "epoch": epoch} for epoch in range(1, 10)]


def train(study: Study, assignment: Assignment, until: int = 9) -> None:
    """Train a trial and write its folder, as `run_trial` does; `until`: the epoch before which its process dies."""
    folder, ended = study.folder.trial(assignment.number), TrialStatus.COMPLETE
    started = TrialSnapshot(
        origin=assignment.origin, confirms=assignment.confirms, sample=assignment.sample, pid=1, began=100.0
    )
    folder.start(assignment.recipe, started)
    reports = curve(assignment)
    for metrics in reports[:until]:
        folder.append(metrics)
        epoch = int(metrics["epoch"])
        if epoch in assignment.rungs and not study.report(assignment.number, epoch, metrics, reports[:epoch]):
            ended = TrialStatus.PRUNED
            break
    if until == 9:
        snapshot = replace(started, status=ended, metrics=metrics, reason=study.why(assignment.number), ended=160.0)
        folder.save(snapshot)
        study.finish(assignment.number, ended, metrics)


def search(study: Study, trials: int | None = None) -> list[Assignment]:
    """Run trials in turn: to the end of the search, or a number of them."""
    done: list[Assignment] = []
    while (trials is None or len(done) < trials) and isinstance(assignment := study.next(), Assignment):
        train(study, assignment)
        done.append(assignment)
    return done


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return fabricated.study(Workspace(tmp_path), asked())


def reopened(folder: StudyFolder, experiment: Experiment | None = None) -> Study:
    """The study opened as a search does, whose database is missing."""
    folder.database.unlink()
    return Study.open(as_stored(experiment or asked(), folder), folder)


@pytest.mark.parametrize(
    "trials", [pytest.param(2, marks=pytest.mark.thorough), 6, pytest.param(None, marks=pytest.mark.thorough)]
)
def test_a_rebuilt_study_goes_on_like_the_one_that_was_lost(
    folder: StudyFolder, trials: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search(Study.open(asked(), folder), trials)
    study = Study.open(asked(), StudyFolder(shutil.copytree(folder.path, tmp_path / "whole" / folder.name)))
    rebuilt = reopened(folder)
    assert "study.db: was missing; it is rebuilt from the folders of" in caplog.text
    assert replace(rebuilt.summary(), spent={}) == replace(study.summary(), spent={})
    assert rebuilt.spending.trainings == study.spending.trainings
    assert [each.number for each in search(rebuilt)] == [each.number for each in search(study)]
    assert rebuilt.summary().winner == study.summary().winner


def test_an_older_copy_of_the_database_gets_what_the_folders_record(
    folder: StudyFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A store's copy of the database may be a minute older than the trials' folders, which hold every report."""
    study = Study.open(asked(), folder)
    search(study, 1)
    goes_on, ends_later = study.next(), study.next()
    assert isinstance(ends_later, Assignment)
    assert isinstance(goes_on, Assignment)
    older = tmp_path / "copy.db"
    shutil.copy(folder.database, older)
    train(study, ends_later)
    train(study, goes_on, until=5)
    search(study, 2)  # trials that the copy does not have
    whole = Study.open(asked(), StudyFolder(shutil.copytree(folder.path, tmp_path / "whole" / folder.name)))
    shutil.copy(older, folder.database)
    caught_up = Study.open(asked(), folder)
    assert "study.db: is older than the folders of 2 trials, which are added to it" in caplog.text
    assert replace(caught_up.summary(), spent={}) == replace(whole.summary(), spent={})
    assert caught_up.spending.trainings == whole.spending.trainings
    assert caught_up._trials[goes_on.number].reports == whole._trials[goes_on.number].reports
    assert caught_up._trials[goes_on.number].reports.keys() == {1, 4}
    assert caught_up.next() == goes_on
    assert whole.next() == goes_on
    for resumed in (caught_up, whole):
        train(resumed, goes_on)
    assert [each.number for each in search(caught_up)] == [each.number for each in search(whole)]
    assert caught_up.summary().winner == whole.summary().winner


def test_an_unfinished_trial_goes_on_first(folder: StudyFolder) -> None:
    study = Study.open(asked(), folder)
    search(study, 3)
    unfinished = study.next()
    assert isinstance(unfinished, Assignment)
    train(study, unfinished, until=4)
    assert reopened(folder).next() == unfinished


def test_numbers_without_a_usable_folder_are_not_used_again(folder: StudyFolder) -> None:
    study = Study.open(asked(), folder)
    done = search(study, 5)
    (folder.trial(1).path / "trial.json").write_text("{half")
    (folder.trial(3).path / "recipe.yaml").unlink()
    rebuilt = reopened(folder)
    progress = rebuilt.progress()
    assert progress.complete + progress.pruned == 3
    following = rebuilt.next()
    assert isinstance(following, Assignment)
    assert following.number == len(done)


def test_the_time_that_was_spent_is_kept(folder: StudyFolder) -> None:
    study = Study.open(asked(), folder)
    search(study, 3)
    assert reopened(folder).spending.seconds == pytest.approx(3 * 60, abs=1)
    replace(study.summary(), spent={"hours": 2.0, "gpu_hours": 1.0}).write(folder)
    spending = reopened(folder).spending
    assert (spending.seconds, spending.device_seconds) == (pytest.approx(7200, abs=1), pytest.approx(3600, abs=1))


def test_another_experiment_is_refused(folder: StudyFolder) -> None:
    search(Study.open(asked(), folder), 2)
    with pytest.raises(StudyError, match=r"training.epochs was 9 when this study started and is 5 now"):
        reopened(folder, asked(training={"epochs": 5}))
    # Without experiment.yaml, the trials' recipes are compared.
    folder.experiment_file.unlink()
    with pytest.raises(StudyError, match=r"0000/recipe.yaml: training.epochs was 9 in this trial and is 5 now; set"):
        Study.open(as_stored(asked(training={"epochs": 5}), folder), folder)
    write_text(folder.experiment_file, dump_experiment(asked()))
    assert len(reopened(folder).leaders()) == 2


def test_a_study_without_its_database_and_experiment_is_not_begun_anew(tmp_path: Path, folder: StudyFolder) -> None:
    search(Study.open(asked(), folder), 1)
    folder.database.unlink()
    folder.experiment_file.unlink()
    with pytest.raises(StudyError, match="exists already; go on with it"):
        Workspace(tmp_path).check_new(folder.name)


def test_an_edited_experiment_of_a_study_is_noticed(folder: StudyFolder) -> None:
    Study.open(asked(), folder)
    text = folder.experiment_file.read_text()
    for changed in (text.replace("trials: 7", "trials: 70"), "{damaged"):
        write_text(folder.experiment_file, changed)
        assert as_stored(asked(), folder).training.epochs == 9
    write_text(folder.experiment_file, text.replace("epochs: 9", "epochs: 20"))
    with pytest.raises(StudyError, match=r"experiment.yaml: training.epochs was 9 .* and is 20 now; set it back"):
        as_stored(asked(), folder)


@pytest.mark.parametrize("content", [None, b"{half", b'{"name": 3}'])
def test_a_damaged_summary_is_written_again(content: bytes | None, folder: StudyFolder) -> None:
    study = Study.open(asked(), folder)
    search(study, 3)
    unfinished = study.next()
    if content is not None:
        folder.summary_file.write_bytes(content)
    assert read_summary(folder) == study.summary() == stored_summary(folder)
    # The study may be running: nothing of it was ended.
    assert isinstance(unfinished, Assignment)
    assert Study.open(asked(), folder).next() == unfinished
    folder.database.unlink()
    folder.summary_file.write_bytes(b"{half")
    with pytest.raises(StudyError, match=r"summary\.json: is damaged"):
        read_summary(folder)


def test_optunas_pruner_reads_every_epoch_again(folder: StudyFolder) -> None:
    experiment = asked(pruner={"name": "optuna.pruners:MedianPruner"})
    write_text(folder.experiment_file, dump_experiment(experiment))
    study = Study.open(experiment, folder)
    search(study, 3)
    rebuilt = reopened(folder, experiment)
    assert rebuilt._trials.epochs_of(0) == {int(each["epoch"]): each[METRIC] for each in folder.trial(0).metrics()}
    assert rebuilt._trials[0].reports.keys() == {1, 4}
