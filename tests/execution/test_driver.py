"""The whole path on a real Ray: an experiment in, a registered student out; failures, kills and resuming included."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import fabricated
import mlflow
import optuna
import pytest
import torch
import yaml
from conftest import TINY

from heterokd.config.reading import load_experiment
from heterokd.datasets import load_dataset
from heterokd.datasets.io.loaders import EvalLoader
from heterokd.errors import ConfigError, StudyError
from heterokd.execution import driver
from heterokd.execution.driver import search
from heterokd.networks.network import build_network
from heterokd.networks.weights import load_weights
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.trial_status import TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.study.search_result import SearchResult
from heterokd.study.summary import StudySummary
from heterokd.tracking.store import current
from heterokd.training.evaluation import predict

pytestmark = pytest.mark.usefixtures("local_ray")
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """One root for all searches of this module: they share the fitted teacher, as a user's do."""
    return Workspace(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def find(tiny_file: Write, shared_root: Workspace) -> Callable[..., SearchResult]:
    def run(name: str, *, resume: bool = False, listener: Any = None, **changes: Any) -> SearchResult:
        experiment = load_experiment(tiny_file(name=name, **changes))
        return search(experiment, shared_root, resume=resume, listener=listener)

    return run


def states(root: Workspace, name: str) -> list[str]:
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{root.study(name).database}")
    return [trial.state.name for trial in study.trials]


def outcomes(found: SearchResult) -> list[tuple[str, float]]:
    """Recipe and last validation loss of each trial: equal only if sampling and training are."""
    return [
        (trial.recipe.hash, trial.metrics()[-1]["val/loss"])
        for trial in found.folder.trials()
        if trial.status != "failed"
    ]


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, shared_root: Workspace
) -> tuple[SearchResult, Path, list[tuple[str, int]]]:
    """A finished search, its file and its events: what needs no search of its own reads this."""
    file = tmp_path_factory.mktemp("whole") / "whole.yaml"
    file.write_text(yaml.safe_dump({**TINY, "name": "whole"}))
    events: list[tuple[str, int]] = []

    def listener(event: str, trial: TrialFolder, summary: StudySummary) -> None:
        events.append((event, trial.number))

    return search(load_experiment(file), shared_root, listener=listener), file, events


def test_a_search_leaves_a_study_its_runs_a_page_and_a_registered_student(
    whole: tuple[SearchResult, Path, list[tuple[str, int]]], shared_root: Workspace
) -> None:
    found, _, events = whole
    progress = found.summary.progress
    assert progress.finished
    assert progress.complete + progress.pruned == progress.planned == 4
    assert progress.failed == 0
    assert "RUNNING" not in states(shared_root, "whole")
    trials = found.folder.trials()
    assert sorted(number for event, number in events if event == "finish") == [trial.number for trial in trials]

    client = mlflow.MlflowClient(found.uri)
    (experiment,) = client.search_experiments(filter_string="name = 'whole'")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    assert len(runs) == 1 + len(trials)
    assert {run.info.status for run in runs} == {"FINISHED"}
    by_trial = {run.data.tags["heterokd.trial"]: run for run in runs if "heterokd.trial" in run.data.tags}
    for trial in trials:
        run = next(run for key, run in by_trial.items() if int(key) == trial.number)
        history = client.get_metric_history(run.info.run_id, "val/top1")
        assert [point.step for point in history] == [int(report["epoch"]) for report in trial.metrics()]

    page = found.folder.report.read_text()
    assert found.summary.winner.method in page
    assert "http://" not in page
    assert "https://" not in page
    for chart in ("glance", "methods", "history", "curves", "confusion", "cka"):
        assert f'<figure id="{chart}">' in page
    (parent,) = (run for run in runs if "heterokd.trial" not in run.data.tags)
    assert "report.html" in [artifact.path for artifact in client.list_artifacts(parent.info.run_id)]

    assert found.model is not None
    name, version = found.model
    assert str(client.get_model_version_by_alias(name, "challenger").version) == version
    with current(found.uri):
        loaded = mlflow.pytorch.load_model(f"models:/{name}@challenger")
    winner = found.folder.trial(found.summary.winner.number)
    student = build_network(winner.recipe.student.network, 10, image_size=32)
    load_weights(student, winner.weights)
    splits = load_dataset("digits", image_size=32)
    wanted, labels = predict(student, EvalLoader(splits.val, 64))
    given = torch.cat([loaded(batch.images) for batch in EvalLoader(splits.val, 50)])
    assert torch.allclose(given, wanted, atol=1e-5)
    reported = winner.metrics()[-1]["val/top1"]
    assert float((wanted.argmax(1) == labels).float().mean()) == pytest.approx(reported, abs=1e-6)


@pytest.mark.thorough
def test_the_same_seed_gives_the_same_trials_and_results(find: Callable[..., SearchResult]) -> None:
    first, second, other = find("twin"), find("twin-again"), find("cousin", search={"seed": 1})
    assert [value for _, value in outcomes(first)] == [value for _, value in outcomes(second)]
    assert outcomes(first) != outcomes(other)


def test_a_second_search_of_the_same_name_asks_for_resume_and_resuming_a_finished_one_trains_nothing(
    whole: tuple[SearchResult, Path, list[tuple[str, int]]], shared_root: Workspace
) -> None:
    first, file, _ = whole

    def weights(result: SearchResult) -> dict[int, float]:
        return {
            trial.number: trial.weights.stat().st_mtime for trial in result.folder.trials() if trial.weights.exists()
        }

    with pytest.raises(StudyError, match=r"exists already.*--resume"):
        search(load_experiment(file), shared_root)
    before = weights(first)
    with pytest.raises(StudyError, match=r"training\.epochs|epochs"):
        search(load_experiment(file, ["training.epochs=4"]), shared_root, resume=True)
    second = search(load_experiment(file), shared_root, resume=True)
    assert weights(second) == before
    assert second.model == first.model


@pytest.mark.thorough
def test_trials_are_added_to_a_finished_search(find: Callable[..., SearchResult]) -> None:
    first = find("again")
    more = find("again", resume=True, search={"trials": 5})
    assert more.summary.progress.planned == 5
    assert [trial.recipe.hash for trial in more.folder.trials()][:4] == [
        trial.recipe.hash for trial in first.folder.trials()
    ][:4]


@pytest.mark.thorough
def test_a_trial_that_fails_is_recorded_with_its_traceback_and_the_search_goes_on(
    find: Callable[..., SearchResult], shared_root: Workspace
) -> None:
    # Half of the learning rates make the loss overflow.
    changes = {"training.learning_rate": {"options": [0.05, 1e30]}}
    found = find("failing", search={"space": {"methods": ["scratch", "kd"], "shared": changes}, "trials": 6})
    failed = [trial for trial in found.folder.trials() if trial.status == TrialStatus.DIVERGED]
    assert failed
    assert found.summary.progress.failed == len(failed)
    assert found.summary.progress.complete > 0
    assert states(shared_root, "failing").count("FAIL") == len(failed)
    assert all("TrainingDiverged" in (trial.error or "") for trial in failed)
    assert "TrainingDiverged" in found.folder.report.read_text()
    client = mlflow.MlflowClient(found.uri)
    (experiment,) = client.search_experiments(filter_string="name = 'failing'")
    runs = client.search_runs([experiment.experiment_id], "attributes.status = 'FAILED'", max_results=100)
    assert len(runs) == len(failed)
    for run in runs:
        assert any("error" in artifact.path for artifact in client.list_artifacts(run.info.run_id))


@pytest.mark.thorough
def test_a_search_in_which_every_trial_fails_ends_and_says_so(find: Callable[..., SearchResult]) -> None:
    space = {"methods": ["kd"], "shared": {"training.learning_rate": {"options": [1e30, 1e31]}}}
    found = find("hopeless", search={"space": space, "trials": 2})
    assert found.model is None
    assert found.summary.winner is None
    assert "No trial is complete" in found.folder.report.read_text()


@pytest.mark.thorough
def test_pruned_trials_are_recorded_as_pruned_and_keep_their_checkpoint(
    find: Callable[..., SearchResult], shared_root: Workspace
) -> None:
    space = {"methods": ["kd"], "shared": {"training.learning_rate": {"low": 1e-6, "high": 0.2, "log": True}}}
    settings = {"space": space, "trials": 10, "confirm_leaders": 0, "first_rung": 0.2}
    found = find("pruning", search=settings, training={"epochs": 6})
    pruned = [trial for trial in found.folder.trials() if trial.status == "pruned"]
    assert pruned
    assert states(shared_root, "pruning").count("PRUNED") == len(pruned)
    for trial in pruned:
        assert trial.checkpoint.exists()
        assert len(trial.metrics()) < 6
        assert not trial.weights.exists()
    # Rungs compare the mean of the newest epochs, a third of all.
    study = optuna.load_study(study_name="pruning", storage=f"sqlite:///{found.folder.database}")
    reported = {trial.number: trial.intermediate_values for trial in study.trials}
    for trial in found.folder.trials():
        curve = [report["val/top1"] for report in trial.metrics()]
        means = {1: curve[:1], 4: curve[2:4]}
        expected = {rung: pytest.approx(fmean(values)) for rung, values in means.items() if rung <= len(curve)}
        assert reported[trial.number] == expected


def test_wrong_pairs_are_refused_before_anything_is_launched(
    find: Callable[..., SearchResult], shared_root: Workspace
) -> None:
    space = {"methods": ["fbt"], "overrides": {"fbt.back_stage": 9}}
    with pytest.raises(ConfigError, match=r"fbt.*back_stage"):
        find("wrong", search={"space": space})
    assert not shared_root.study("wrong").path.exists()


KILLED_DRIVER = """
import os, signal, sys
from pathlib import Path
from statistics import fmean
from heterokd.config.reading import load_experiment
from heterokd.storage.workspace import Workspace
from heterokd.execution.driver import search

finished = []
def listener(event, trial, summary):
    if event == "finish":
        finished.append(trial.number)
    if len(finished) >= int(sys.argv[3]) and event != "finish":
        os.kill(os.getpid(), signal.SIGKILL)

search(load_experiment(sys.argv[1]), Workspace(Path(sys.argv[2])), resume=True, listener=listener)
"""


@pytest.mark.slow
def test_a_killed_driver_loses_nothing(tiny_file: Write, tmp_path: Path) -> None:
    """Kill -9 in the middle of the second trial, then run again: same trials, no point twice, no zombie."""
    file, root = tiny_file(name="killed"), Workspace(tmp_path / "runs")
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(KILLED_DRIVER))
    command = [sys.executable, str(script), str(file), str(root.path)]
    for survivors in (1, 3):
        ended = subprocess.run([*command, str(survivors)], capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
    found = search(load_experiment(file), root, resume=True)
    undisturbed = search(load_experiment(tiny_file(name="undisturbed")), root)
    assert [value for _, value in outcomes(found)] == [value for _, value in outcomes(undisturbed)]
    client = mlflow.MlflowClient(found.uri)
    (experiment,) = client.search_experiments(filter_string="name = 'killed'")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    trials = found.folder.trials()
    assert len(runs) == 1 + len(trials)
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        history = client.get_metric_history(run.info.run_id, "val/top1")
        assert len({point.step for point in history}) == len(history)


@pytest.mark.slow
def test_a_killed_trial_process_goes_on_from_its_rung(find: Callable[..., SearchResult]) -> None:
    killed: list[int] = []

    def listener(event: str, trial: TrialFolder, summary: StudySummary) -> None:
        if event == "report" and not killed:
            killed.append(trial.number)
            os.kill(trial.snapshot.pid, signal.SIGKILL)

    settings = {"space": {"methods": ["kd"]}, "trials": 1, "confirm_leaders": 0}
    found = find("wounded", listener=listener, search=settings, training={"epochs": 40})
    assert killed
    (trial,) = found.folder.trials()
    assert trial.status == "complete"
    assert [report["epoch"] for report in trial.metrics()] == list(range(1, 41))


def test_a_page_that_cannot_be_drawn_does_not_lose_the_search(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    question, root = fabricated.experiment(), Workspace(tmp_path)
    folder = fabricated.study(root, question)
    folder.summary_file.write_text('{"name": "tiny", "metric": "val/top1", "maximise": "damaged"}')
    driver._report(folder, question, root, {})
    folder.report.mkdir()
    fabricated.summary().write(folder)
    driver._report(folder, question, root, {})
    # Warned of, whatever MLflow makes of the root logger's level when it is imported.
    assert "the study's figures are not drawn (" in caplog.text
    assert "summary.json: is damaged (maximise: Input should be a valid boolean" in caplog.text
    assert "the report is not written (" in caplog.text
    assert "`heterokd report tiny` regenerates it" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MedianPruner", "WilcoxonPruner"])
def test_optunas_pruner_and_sampler_search(find: Callable[..., SearchResult], name: str) -> None:
    """A lossy learning rate for whoever comes after the starts: some of them are stopped, and the page says by whom."""
    options = {"n_startup_trials": 2} if name == "MedianPruner" else {"p_threshold": 0.3}
    found = find(
        name,
        training={"epochs": 6},
        search={
            "trials": 9,
            "confirm_leaders": 0,
            "pruner": {"name": f"optuna.pruners:{name}", "options": options},
            "sampler": {"name": "optuna.samplers:GPSampler", "options": {"n_startup_trials": 4}},
        },
    )
    standing = found.summary.progress
    assert standing.finished
    assert standing.failed == 0
    assert standing.complete + standing.pruned == 9
    pruned = [trial for trial in found.folder.trials() if trial.status == "pruned"]
    assert pruned
    assert {trial.snapshot.reason for trial in pruned} == {name}
    assert all(trial.checkpoint.exists() for trial in pruned)
    assert f"stopped early: {name}" in found.folder.report.read_text()
