"""An event of a trial costs the same in a study of any size: its own trial's files, and no walk over the others."""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fabricated
import pytest
from fake_ray import FakeRay, Here
from torch import nn

from benchmarks.counted_store import CountedStore
from heterokd.config.experiment import Experiment
from heterokd.config.reading import dump_experiment, load_experiment
from heterokd.config.recipe import Recipe
from heterokd.execution.callbacks import Forwarding, TuneCallback
from heterokd.execution.failure_limit import FailureLimit
from heterokd.execution.node_watch import NodeWatch
from heterokd.execution.parallel import Parallelism
from heterokd.execution.placement import Cluster
from heterokd.execution.run import RunContext
from heterokd.execution.searcher import StudySearcher
from heterokd.execution.study_actor import StudyActor
from heterokd.execution.study_sync import Event, StoreEvents, download_study, trial_events
from heterokd.execution.trial import TrialJob, run_trial
from heterokd.execution.trial_deaths import TrialDeaths
from heterokd.storage.files import write_text
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.sync import FolderSync
from heterokd.storage.trial_status import TrialStatus
from heterokd.storage.workspace import open_workspace
from heterokd.study.assignment import Assignment
from heterokd.study.search_space import open_space
from heterokd.study.stored_question import as_stored
from heterokd.study.summary import StudySummary, stored_summary
from heterokd.training.train import Metrics, Report, TrainResult

FILES = ("recipe.yaml", "trial.json", "metrics.jsonl", "checkpoint.pt", "student.safetensors")
WATCHED = ("open", "os.scandir", "os.listdir", "sqlite3.connect")
"""What Python's audit hooks report of files that are opened and folders that are listed."""

touched: list[str] = []
watched: list[Path] = []


def note(event: str, arguments: tuple[object, ...]) -> None:
    if watched and event in WATCHED and str(arguments[0]).startswith(str(watched[0])):
        touched.append(event)


sys.addaudithook(note)  # a hook stays: it does nothing without a folder to watch


@contextmanager
def touches_of(folder: Path) -> Iterator[list[str]]:
    """Collect what is opened and listed below a folder."""
    watched.append(folder)
    touched.clear()
    try:
        yield touched
    finally:
        watched.clear()


def until(is_there: Callable[[], bool]) -> None:
    ends = time.monotonic() + 30
    while not is_there():
        assert time.monotonic() < ends
        time.sleep(0.005)


def study_of(trials: int, place: Path) -> tuple[StudyFolder, CountedStore]:
    """A study with ended trials, on the driver's disk and in a store, with a database that has grown with them."""
    folder, store = StudyFolder(place / "driver/study"), CountedStore(place / "store")
    for number in range(trials):
        for name in FILES:
            write_text(folder.trial(number).path / name, f"{name} of {number}")
    write_text(folder.experiment_file, "name: study")
    FolderSync(folder.path, store.folder("study")).push()
    with closing(sqlite3.connect(folder.database)) as database, database:
        database.execute("CREATE TABLE trials (content BLOB)")
        database.executemany("INSERT INTO trials VALUES (randomblob(5000))", [()] * trials)
    return folder, store


def trained(number: int, place: Path, store: CountedStore) -> tuple[TrialFolder, FolderSync]:
    """A trial that begins on a node."""
    here = StudyFolder(place / "node/study").trial(number)
    return here, FolderSync(here.path, store.folder(f"study/trials/{here.path.name}"))


def costs(trials: int, place: Path) -> dict[str, object]:
    """Requests and touched files of the events of two trials after `trials` others, and of the uploads at the end."""
    folder, store = study_of(trials, place)
    events = StoreEvents(folder, store.folder("study"), interval=600.0)

    def arrive(event: Event, trial: TrialFolder) -> None:
        events.put(event, trial)
        arrived: list[object] = []
        until(lambda: bool(arrived.extend(events.take()) or arrived))
        assert arrived == [(event, trial)]

    found: dict[str, object] = {}
    for number in (trials, trials + 1):
        here, sync = trained(number, place, store)
        steps: tuple[tuple[Event, str], ...] = (("start", "recipe.yaml"), ("report", "metrics.jsonl"))
        for event, written in (*steps, ("finish", "student.safetensors")):
            write_text(here.path / written, f"{event} {number:04d}")
            write_text(here.path / "trial.json", f"{event} {number:04d}")
            sync.push()
            if number == trials:  # the first event begins the uploads of the study's files
                arrive(event, folder.trial(number))
                continue
            store.take()
            with touches_of(folder.path) as files:
                arrive(event, folder.trial(number))
                found[event] = store.take(), sorted(files)
        if number == trials:
            until(lambda: store.folder("study").exists("study.db"))
    assert (folder.trial(trials + 1).path / "trial.json").read_text() == f"finish {trials + 1:04d}"
    assert not folder.trial(trials + 1).weights.exists()
    store.take()
    write_text(folder.summary_file, "{}")
    with touches_of(folder.path) as files:
        events.close()
        found["upload"] = store.take()["requests"], sorted(files)
    return found


def test_an_event_costs_the_same_in_a_study_of_any_size(tmp_path: Path) -> None:
    few, many = costs(20, tmp_path / "few"), costs(200, tmp_path / "many")
    assert few == many
    start, _ = few["start"]  # type: ignore[misc]
    assert start["requests"] <= 5  # a list of the trial's folder, and two files
    requests, _ = few["upload"]  # type: ignore[misc]
    assert requests == 2  # the database and what has changed


@pytest.mark.thorough
def test_the_study_touches_as_many_files_in_a_study_of_any_size(tmp_path: Path) -> None:
    search = {"space": {"methods": ["kd", "dkd"]}, "trials": 300, "prune": False}
    experiment = fabricated.experiment("grown", search=search)
    folder = StudyFolder(tmp_path / "grown")
    actor = StudyActor(experiment.model_dump_json(), folder.path, open_space(experiment, folder))

    def run_trial() -> None:
        assignment = actor.next()
        assert isinstance(assignment, Assignment)
        assert actor.assignment(assignment.number, "node") is not None
        trial, metrics = folder.trial(assignment.number), {"epoch": 3.0, "val/top1": 0.5}
        write_text(trial.path / "trial.json", "{}")
        actor.expire([assignment.number])
        actor.report(assignment.number, 3, metrics, [])
        actor.finish(assignment.number, TrialStatus.COMPLETE, metrics, None)
        actor.summary().write(folder)

    counts = []
    for trials in (10, 60):
        while actor.study.progress().done < trials:
            run_trial()
        with touches_of(folder.path) as files:
            run_trial()
            counts.append(sorted(files))
    assert counts[0] == counts[1]


def test_a_walk_over_all_trials_would_be_noticed(tmp_path: Path) -> None:
    counts = []
    for trials in (20, 200):
        folder, _ = study_of(trials, tmp_path / str(trials))
        with touches_of(folder.path) as files:
            list(folder.path.rglob("*"))
            counts.append(len(files))
    assert counts[1] > counts[0] + 100


def test_events_wait_for_a_store_that_does_not_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, store = study_of(1, tmp_path)
    here, sync = trained(1, tmp_path, store)
    write_text(here.path / "trial.json", "done")
    sync.push()
    store.is_away = True
    events = StoreEvents(folder, store.folder("study"), retry=0.02)
    events.put("finish", folder.trial(1))
    until(lambda: "does not answer" in caplog.text)
    assert events.take() == []
    store.is_away = False
    events.close()
    assert folder.trial(1).path.joinpath("trial.json").read_text() == "done"
    assert events.take() == [("finish", folder.trial(1))]


class Machine:
    """A driver and a node of its own, without Ray, that search with a store as root; the folder is all that it has."""

    def __init__(self, place: Path, experiment: Experiment, store: str, patch: pytest.MonkeyPatch) -> None:
        place.mkdir()
        patch.setenv("HOME", str(place))
        self.root = open_workspace(store)
        folder = self.root.study(experiment.name)
        download_study(self.root, folder)
        experiment = as_stored(experiment, folder)
        write_text(folder.experiment_file, dump_experiment(experiment))
        self.folder = folder
        self.study = StudyActor(experiment.model_dump_json(), folder.path, open_space(experiment, folder))
        self.actor: Any = Here(self.study)
        failures, plan = FailureLimit(folder, 1), Parallelism(experiment, Cluster(1, 1, 0))
        self.searcher = StudySearcher(self.actor, failures, TrialDeaths(folder, lambda: 0), plan)
        events = trial_events(self.root, folder)
        assert isinstance(events, StoreEvents)
        self.heard: list[tuple[str, int]] = []
        quiet: Any = SimpleNamespace(put=lambda trial: None, raise_if_lost=lambda: None)
        self.forwarding = Forwarding(folder, events, quiet, self.ask, self.listen)
        nodes = NodeWatch(self.actor, None, plan, failures)
        self.callback = TuneCallback(folder, self.searcher, self.forwarding, quiet, [], nodes)

    def ask(self) -> Any:
        summary = self.study.summary(self.searcher.running)
        return SimpleNamespace(is_ready=lambda: True, get=lambda: summary)

    def listen(self, event: str, trial: TrialFolder, summary: StudySummary) -> None:
        assert (trial.path / "recipe.yaml").exists()  # on the driver's disk
        self.heard.append((event, trial.number))

    def run(self, fake: FakeRay, trials: int) -> None:
        """Run trials in turn; each of them stores its files and reports."""
        for name in map(str, range(trials)):
            config = self.searcher.suggest(name)
            if not isinstance(config, dict):
                return
            fake.reports.clear()
            run_trial(config, self.actor, TrialJob(self.root, self.folder.name, {}, {}), train)  # type: ignore[arg-type]
            for report in fake.reports:
                self.callback.on_trial_result(0, [], None, report)  # type: ignore[arg-type]
                self.callback.on_step_begin(0, [])
            self.searcher.on_trial_complete(name)


def train(recipe: Recipe, folder: TrialFolder, context: RunContext, on_epoch: Report) -> TrainResult:
    metrics: Metrics = {}
    for epoch in range(1, recipe.training.epochs + 1):
        metrics = {"val/top1": 0.5 + epoch / 100 + recipe.training.learning_rate / 100, "epoch": float(epoch)}
        folder.append(metrics)
        on_epoch(metrics)
    return TrainResult(nn.Linear(1, 1), metrics, recipe.training.epochs, stopped=False)  # type: ignore[arg-type]


def test_a_driver_that_is_lost_with_its_disk_loses_nothing_that_was_reported(
    tmp_path: Path,
    tiny_file: Callable[..., Path],
    fake_ray: FakeRay,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The copy of its database in the store is older than the trials' folders; another machine goes on."""
    search = {"trials": 6, "confirm_leaders": 0, "parallel": 1, "prune": False}
    experiment = load_experiment(tiny_file(name="stored", search=search))
    store, stored = f"file://{tmp_path}/mount", StudyFolder(tmp_path / "mount/studies/stored")
    lost = Machine(tmp_path / "a", experiment, store, monkeypatch)
    lost.run(fake_ray, 1)
    until(stored.database.exists)
    lost.run(fake_ray, 3)
    with closing(sqlite3.connect(stored.database)) as copy:
        (known,) = copy.execute("SELECT count(*) FROM trials WHERE state = 'COMPLETE'").fetchone()
    before = {trial.number: ((trial.path / "trial.json").read_text(), trial.metrics()) for trial in stored.trials()}
    assert known < len(before) == 4

    other = Machine(tmp_path / "b", experiment, store, monkeypatch)
    assert "study.db: is older than the folders of" in caplog.text
    assert other.study.summary().progress.complete == 4
    other.run(fake_ray, 10)
    other.forwarding.close()
    assert other.heard == [(event, number) for number in (4, 5) for event in ("start", "report", "finish")]
    after = {trial.number: ((trial.path / "trial.json").read_text(), trial.metrics()) for trial in stored.trials()}
    assert {number: after[number] for number in before} == before
    assert len(after) == 6
    summary = stored_summary(stored)
    assert summary is not None
    assert (summary.progress.complete, summary.progress.finished) == (6, True)
    lost.forwarding.close()
