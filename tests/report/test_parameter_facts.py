"""Importances and domains are kept with the study until a trial changes; a page of a finished study imports little."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fabricated
import pytest

from heterokd.config.experiment import Experiment
from heterokd.config.reading import read_study_experiment
from heterokd.report.page import render_report
from heterokd.report.parameter_facts import parameter_facts
from heterokd.report.study_data import read_study
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.study.assignment import Assignment
from heterokd.study.options import StudyOptions
from heterokd.study.study import Study


@pytest.fixture
def study(tmp_path: Path) -> tuple[StudyFolder, Experiment]:
    """A study of ten complete trials of kd and scratch."""
    space = {"methods": ["scratch", "kd"], "shared": {"training.learning_rate": {"low": 0.01, "high": 0.1}}}
    question = fabricated.experiment(search={"space": space, "trials": 10, "prune": False, "confirm_leaders": 0})
    folder = fabricated.study(Workspace(tmp_path), question)
    found = Study.open(question, folder, StudyOptions())
    while isinstance(assignment := found.next(), Assignment):
        made = folder.trial(assignment.number)
        made.start(assignment.recipe, TrialSnapshot(sample=assignment.sample))
        metrics = {"val/top1": 0.5 + assignment.number % 7 / 20, "epoch": 3.0}
        made.append(metrics)
        found.finish(assignment.number, TrialStatus.COMPLETE, metrics)
        fabricated.change(made, status=TrialStatus.COMPLETE, metrics=metrics)
    found.summary().write(folder)
    return folder, question


def without_time(page: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", page)


def test_the_second_page_reads_them_and_is_the_same(study: tuple[StudyFolder, Experiment]) -> None:
    folder, question = study
    first = render_report(read_study(folder, question))
    assert '<figure id="importance-all-methods">' in first
    stored = folder.path / "parameters.json"
    written = stored.stat().st_mtime_ns
    assert without_time(render_report(read_study(folder, question))) == without_time(first)
    assert stored.stat().st_mtime_ns == written

    content = json.loads(stored.read_text())
    content["importances"][0]["trials"] = 99
    stored.write_text(json.dumps(content))
    assert "of the variance of 99 complete trials" in render_report(read_study(folder, question)), "they are read"


def test_they_are_computed_again_when_a_trial_changes_or_the_file_is_damaged(
    study: tuple[StudyFolder, Experiment], caplog: pytest.LogCaptureFixture
) -> None:
    folder, question = study
    report = read_study(folder, question)
    facts = parameter_facts(report)
    stored = folder.path / "parameters.json"
    digest = json.loads(stored.read_text())["digest"]

    changed = replace(report, trials=(replace(report.trials[0], value=0.1), *report.trials[1:]))
    parameter_facts(changed)
    assert json.loads(stored.read_text())["digest"] != digest

    for text in ("{", json.dumps({"digest": digest}), json.dumps({"digest": digest, "importances": 1, "domains": {}})):
        stored.write_text(text)
        assert parameter_facts(report) == facts
        assert json.loads(stored.read_text())["digest"] == digest
    assert "computed again" in caplog.text


def test_without_a_database_the_reason_is_not_kept(study: tuple[StudyFolder, Experiment]) -> None:
    folder, question = study
    folder.database.unlink()
    facts = parameter_facts(read_study(folder, question))
    assert facts.problem == "the study's database is not here"
    assert "kd.temperature" in facts.domains["kd"]
    assert not (folder.path / "parameters.json").exists()


def test_a_page_of_a_finished_study_imports_neither_torch_nor_optuna(study: tuple[StudyFolder, Experiment]) -> None:
    folder, question = study
    parameter_facts(read_study(folder, question))
    root = folder.path.parents[1]
    code = (
        "import sys\nfrom heterokd.cli.app import main\n"
        f"try: main({['report', folder.name, '--root', str(root)]!r})\n"
        "finally: print(sorted({'torch', 'timm', 'optuna', 'mlflow', 'ray', 'sklearn', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    code = code.replace("'report'", "'compare'")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_trial_of_an_earlier_version_is_read_from_its_recipe(study: tuple[StudyFolder, Experiment]) -> None:
    folder, question = study
    known = read_study(folder, question).trials
    for trial in folder.trials():
        trial.save(replace(trial.snapshot, recipe=None))
    assert read_study(folder, read_study_experiment(folder.experiment_file)).trials == known


def test_repetitions_have_the_configuration_of_their_trial() -> None:
    question = fabricated.experiment()
    recipe = question.recipe({"method": "kd"}, seed=1)
    assert recipe.configuration == question.recipe({"method": "kd"}, seed=2).configuration
    assert recipe.configuration != question.recipe({"method": "kd", "kd.temperature": 2.0}).configuration
    assert recipe.hash != question.recipe({"method": "kd"}, seed=2).hash
