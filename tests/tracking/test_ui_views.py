"""What a user sees of MLflow: `heterokd ui`, its links, and the pages behind them in a browser."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import fabricated
import playwright.sync_api
import psutil
import pytest
from browser import browser, needs_chromium, text_of
from command_line import Run

from heterokd.errors import TrackingError
from heterokd.storage.trial_status import TrialSnapshot
from heterokd.storage.workspace import Workspace
from heterokd.students.registry import log_student, register
from heterokd.study.assignment import Assignment
from heterokd.study.study import Study
from heterokd.tracking.labels import dataset_inputs
from heterokd.tracking.runs import StudyRuns
from heterokd.tracking.store import open_store
from heterokd.tracking.ui_server import serve
from heterokd.tracking.ui_views import TAG, study_links, varied, write_view
from heterokd.training.data import open_splits

MODEL = "digits-student"
PATIENCE = 120_000
"""Milliseconds for a page of a busy machine."""


def fill(root: Workspace, *, is_registered: bool = False) -> StudyRuns:
    """A finished study of three methods, projected as a search does: 7 trials, one pruned, one repeated."""
    question = fabricated.experiment("digits", search={"space": {"methods": ["scratch", "kd", "hcd"]}, "trials": 7})
    folder, splits = fabricated.study(root, question), open_splits(question.data)
    runs = StudyRuns(question, folder, open_store(root, None), root.artifacts, dataset_inputs(question.data, splits))
    methods = ("scratch", "kd", "hcd", "kd", "kd", "hcd", "hcd")
    student = fabricated.fitted_student(splits, 100)
    for number, method in enumerate(methods):
        sample = {"method": method, "training.learning_rate": 0.05 + number / 100}
        if method != "scratch":
            sample |= {f"{method}.temperature": 1.0 + number}
        state = "pruned" if number == 4 else "complete"
        origin = "published" if number < 3 else "sampled"
        trial = folder.trial(number)
        trial.start(question.recipe(sample), TrialSnapshot(origin=origin, sample=sample))
        for epoch in range(1, 3 if state == "pruned" else 4):
            trial.append({"train/loss": 1 / epoch, "val/top1": epoch / 10 + number / 100, "epoch": epoch})
        fabricated.change(trial, status=state, student={"params_m": 0.37})
        if number == 5:
            fabricated.save_weights(student, trial.weights)
    fabricated.trial(folder, question, 7, "hcd", seed=1000, confirms=5, origin="confirm")
    for trial in runs.folder.trials():
        runs.sync(trial)
    if is_registered:
        winner = folder.trial(5)
        version = register(runs, winner, log_student(runs, winner, splits), splits)
        runs.client.set_registered_model_alias(MODEL, "champion", version)
    runs.folder.report.write_text("<!doctype html><title>digits</title><p>A page</p>")
    winner = fabricated.ranked(5, "hcd", 0.35, 0.05)
    scratch = replace(winner, number=0, method="scratch", mean=0.3)
    assert runs.finish(fabricated.summary(winner, scratch))
    return runs


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return fabricated.root_with_store(tmp_path)


def state_of(runs: StudyRuns) -> dict[str, Any]:
    tags = runs.client.get_experiment(runs.experiment_id).tags
    (value,) = (value for key, value in tags.items() if key.startswith(TAG))
    kind, _, content = value.partition(";")
    assert kind == "deflate"
    state = json.loads(zlib.decompress(base64.b64decode(content)))
    assert isinstance(state, dict)
    return state


def test_runs_say_what_they_are(root: Workspace) -> None:
    runs = fill(root)
    found = {run.info.run_name: run for run in runs.client.search_runs([runs.experiment_id])}
    study, trial, again = found["digits"], found["005-hcd"], found["007-hcd-seed1000"]
    assert study.data.params == {
        "search.objectives": "val/top1",
        "search.methods": "scratch, kd, hcd",
        "search.students": "test_resnet",
        "search.extent": "7 trials",
        "search.epochs": "3",
    }
    assert not set(study.data.params) & set(trial.data.params), "a chart would mix them"
    said = study.data.tags["mlflow.note.content"]
    assert "what does test_resnet learn best from vit_tiny_patch16_224?" in said
    assert "**hcd** won with trial 5: val/top1 0.3500 (95 % interval 0.3000 to 0.4000, 2 fresh seeds)" in said
    assert "without a teacher (scratch): val/top1 0.3000" in said
    address = f"#/experiments/{runs.experiment_id}/runs/{study.info.run_id}"
    assert trial.data.tags["mlflow.note.content"] == (
        "A setting of **hcd** that the search proposed: learning_rate 0.1, temperature 6. "
        "vit_tiny_patch16_224 teaches test_resnet.\n\n"
        f"[Study]({address}) | [the study's page (once the search has ended)]({address}/artifacts/report.html)"
    )
    first = said.splitlines()[0]
    assert f"[best student](#/experiments/{runs.experiment_id}/runs/{trial.info.run_id})" in first
    assert "?viewStateShareKey=digits-" in first
    assert found["001-kd"].data.tags["mlflow.note.content"].startswith("The published setting of **kd**")
    assert again.data.tags["mlflow.note.content"].startswith("Trial 5 of **hcd** again, on seed 1000: ")
    for run in (study, trial, again):
        inputs = {one.dataset.name: one for one in run.inputs.dataset_inputs}
        assert set(inputs) == {"digits-train", "digits-val"}
        train = inputs["digits-train"]
        assert [(tag.key, tag.value) for tag in train.tags] == [("mlflow.data.context", "training")]
        assert json.loads(train.dataset.profile)["images"] == 200
        assert open_splits(runs.experiment.data).fingerprint.startswith(train.dataset.digest)
    tags = runs.client.get_experiment(runs.experiment_id).tags
    assert tags["mlflow.note.content"] == said, "the plain page of the experiment shows result and links"
    assert tags["mlflow.experiment.primaryMetric.name"] == "val/top1"


def test_a_description_of_the_user_is_kept(root: Workspace) -> None:
    runs = fill(root)
    runs.client.set_experiment_tag(runs.experiment_id, "mlflow.note.content", "ours")
    winner = fabricated.ranked(6, "hcd", 0.36, 0.05)
    assert runs.finish(fabricated.summary(winner))
    assert runs.client.get_experiment(runs.experiment_id).tags["mlflow.note.content"] == "ours"


def test_only_complete_trials_of_the_search_are_ranked(root: Workspace) -> None:
    runs = fill(root)
    found = {run.info.run_name: run.data.metrics for run in runs.client.search_runs([runs.experiment_id])}
    assert found["004-kd"]["val/top1"] > found["000-scratch"]["val/top1"] - 0.1
    for name in ("004-kd", "007-hcd-seed1000"):  # pruned, and a repetition
        assert not {"rank", "final/val/top1", "confirmed/val/top1"} & set(found[name])
    ranks = {name: metrics["rank"] for name, metrics in found.items() if "rank" in metrics}
    assert sorted(ranks, key=ranks.__getitem__) == ["005-hcd", "000-scratch", "006-hcd", "003-kd", "002-hcd", "001-kd"]
    assert found["005-hcd"]["confirmed/val/top1"] == 0.35
    assert found["005-hcd"]["final/val/top1"] == pytest.approx(0.35)
    assert found["005-hcd"]["setting/hcd.temperature"] == 6.0
    # The search continued, and another trial leads.
    assert runs.finish(fabricated.summary(fabricated.ranked(6, "hcd", 0.36, 0.05)))
    first, *_ = runs.client.search_runs([runs.experiment_id], order_by=["metrics.rank ASC"])
    assert first.info.run_name == "006-hcd"


def test_studies_of_older_versions_are_in_the_order_of_the_metric(root: Workspace) -> None:
    runs = fill(root)
    (study,) = runs.client.search_runs([runs.experiment_id], "tags.`heterokd.kind` = 'study'")
    runs.client.delete_tag(study.info.run_id, "heterokd.order")
    write_view(runs.client, runs.client.get_run(study.info.run_id))
    state = state_of(runs)
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`val/top1`", False)


def test_a_name_says_which_student_where_there_are_several(root: Workspace) -> None:
    question = fabricated.experiment("two", student={"network": ["test_resnet", "test_efficientnet"]})
    folder = fabricated.study(root, question)
    runs = StudyRuns(question, folder, open_store(root, None), root.artifacts)
    fabricated.trial(folder, question, 3)
    assert all(runs.sync(trial) for trial in runs.folder.trials())
    names = {run.info.run_name for run in runs.client.search_runs([runs.experiment_id])}
    assert names == {"two", "003-kd-test_resnet"}


def test_a_view_shows_what_was_searched(root: Workspace) -> None:
    runs = fill(root)
    state = state_of(runs)
    assert state["orderByKey"] == "metrics.`rank`"
    assert state["orderByAsc"] is True
    assert state["selectedColumns"] == [
        "metrics.`rank`",
        "metrics.`confirmed/val/top1`",
        "metrics.`final/val/top1`",
        "metrics.`val/top1`",
        "params.`method`",
        "tags.`heterokd.state`",
        "metrics.`setting/training.learning_rate`",
        "metrics.`student/params_m`",
        "params.`seed`",
        "attributes.`Models`",
        "metrics.`setting/hcd.temperature`",
        "metrics.`setting/kd.temperature`",
    ]
    axes = {chart["metricSectionId"]: chart for chart in state["compareRunCharts"] if chart["type"] == "PARALLEL"}
    assert axes["all settings, to val/top1"]["selectedParams"] == ["method", "training.learning_rate"]
    assert axes["hcd, to val/top1"]["selectedParams"] == ["hcd.temperature", "training.learning_rate"]
    assert all(chart["selectedMetrics"] == ["val/top1"] for chart in axes.values())
    assert list(axes) == ["all settings, to val/top1", "hcd, to val/top1", "kd, to val/top1"], "the better first"
    found = runs.client.search_runs(
        [runs.experiment_id], state["searchFilter"], order_by=[f"{state['orderByKey']} ASC"]
    )
    names = [run.info.run_name for run in found]
    assert names[:2] == ["005-hcd", "000-scratch"], "the leaders"
    assert set(names[-2:]) == {"004-kd", "007-hcd-seed1000"}, "pruned trials and repetitions last"
    assert len(found) == 8, "trials and repetitions, not the study"


def test_a_view_of_a_study_without_trials(root: Workspace) -> None:
    question = fabricated.experiment("early")
    runs = StudyRuns(question, fabricated.study(root, question), open_store(root, None), root.artifacts)
    assert runs.finish(None)
    (study,) = runs.client.search_runs([runs.experiment_id])
    assert write_view(runs.client, study).startswith("early-")
    assert varied([]) == ([], {})
    assert state_of(runs)["compareRunCharts"]


def test_links_name_what_there_is(root: Workspace) -> None:
    runs = fill(root, is_registered=True)
    (runs.folder.path / "study.db").write_bytes(b"")
    links = study_links(root, runs.uri, "http://127.0.0.1:5000")
    named = {name.strip(): link for name, link in links}
    assert named["all runs"] == "http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"
    runs_page = f"http://127.0.0.1:5000/#/experiments/{runs.experiment_id}/runs?workflowType=machine_learning"
    assert re.fullmatch(re.escape(f"{runs_page}&viewStateShareKey=digits-") + "[0-9a-f]{6}", named["trials"])
    assert named["compare"] == f"{named['trials']}&compareRunsMode=CHART"
    assert named["model"].endswith(f"/#/models/{MODEL}?workflowType=machine_learning")
    assert named["optuna"] == f"optuna-dashboard sqlite:///{runs.folder.database}"
    assert named["page"] == str(runs.folder.report)
    assert [name for name, _ in study_links(root, runs.uri, "http://127.0.0.1:5000", "other")] == ["all runs"]


def test_without_views_the_links_are_plain(root: Workspace) -> None:
    with closing(sqlite3.connect(root.mlflow_database)) as store:
        store.execute(
            f"CREATE TRIGGER refuse BEFORE INSERT ON experiment_tags WHEN new.key LIKE '{TAG}%' "
            "BEGIN SELECT RAISE(ABORT, 'no such tag'); END"
        )
    runs = fill(root)  # `finish`, which writes the view, is not disturbed
    links = dict(study_links(root, runs.uri, "http://127.0.0.1:5000"))
    address, _, query = links["  trials"].partition("?")
    facets = parse_qs(query)
    assert address == f"http://127.0.0.1:5000/#/experiments/{runs.experiment_id}/runs"
    assert "viewStateShareKey" not in facets
    assert facets["orderByKey"] == ["metrics.`rank`"]
    found = runs.client.search_runs([runs.experiment_id], facets["searchFilter"][0])
    assert len(found) == 8
    assert links["  compare"] == f"{links['  trials']}&compareRunsMode=CHART"


def test_no_store_yet(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, _, said = cli("ui", "--port", free_port())
    assert code == 2
    assert said == (
        "error: runs/mlflow.db: there is no MLflow store yet; `heterokd search EXPERIMENT` makes it, or name another "
        "folder (--root) or store (MLFLOW_TRACKING_URI)\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_store_that_is_none(cli: Run, root: Workspace) -> None:
    root.mlflow_database.write_text("no database")
    code, _, said = cli("ui", "--port", free_port())
    assert code == 2
    assert "mlflow.db is no SQLite database" in said
    code, _, said = cli("ui", "nothing", "--port", free_port())
    assert code == 2
    assert "there is no study 'nothing'" in said


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise SystemExit(3)", r"MLflow's server exited with code 3; see .*ui\.log"),
        ("import os; os.kill(os.getpid(), 9)", "exited with code -9; see"),
        (
            "import http.server as h, sys\n"
            "class One(h.BaseHTTPRequestHandler):\n"
            "    def do_GET(self): self.send_response(200); self.end_headers()\n"
            "server = h.HTTPServer(('127.0.0.1', int(sys.argv[1])), One)\n"
            "server.handle_request(); sys.exit(4)",
            "exited with code 4; see",
        ),
    ],
    ids=["at once", "killed", "later"],
)
def test_a_server_that_dies(tmp_path: Path, code: str, says: str) -> None:
    ready: list[bool] = []
    port = free_port()
    with pytest.raises(TrackingError, match=says):
        serve(
            [sys.executable, "-u", "-c", code, str(port)],
            dict(os.environ),
            port,
            tmp_path / "ui.log",
            lambda: ready.append(True),
        )
    assert len(ready) == ("4" in says)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def shown(root: Workspace) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """`heterokd ui` as a process of its own, and the links that it printed."""
    command = [sys.executable, "-m", "heterokd", "ui", "--root", str(root.path), "--port", str(free_port())]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    links: dict[str, str] = {}
    try:
        assert process.stdout is not None
        for line in process.stdout:
            name, _, link = line.strip().partition("  ")
            links[name.strip()] = link.strip()
            if "Ctrl-C" in line:
                break
        yield process, links
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> StudyRuns:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return fill(fabricated.root_with_store(tmp_path_factory.mktemp("pages")), is_registered=True)


def root_of(runs: StudyRuns) -> Workspace:
    return Workspace(runs.folder.path.parents[1])


@needs_chromium
@pytest.mark.slow
def test_the_pages_in_a_browser(filled: StudyRuns, tmp_path: Path) -> None:
    with shown(root_of(filled)) as (_, links), browser(2200) as context:
        page = context.new_page()

        def opened(name: str, *expected: str) -> str:
            page.goto("about:blank")
            page.goto(links[name])
            for text in expected:
                page.get_by_text(text, exact=False).first.wait_for(timeout=PATIENCE)
            if pictures := os.environ.get("HETEROKD_TEST_PICTURES"):
                page.wait_for_timeout(3000)
                page.screenshot(path=f"{pictures}/{name}.png")
            return text_of(page)

        # Every trial of the study, the best first, without a click; columns are what was searched.
        text = opened("trials", "006-hcd", "val/top1")
        names = re.findall(r"^\d{3}-[a-z]+(?:-seed\d+)?$", text, re.MULTILINE)
        assert names[:2] == ["005-hcd", "000-scratch"]
        assert sorted(names)[-1] == "007-hcd-seed1000"
        assert len(names) == 8
        for column in ("rank", "val/top1", "method", "training.learning_rate", "heterokd.state"):
            assert column in text
        assert "pruned" in text

        # The comparison: one drawn chart of settings that ends at the metric, one for each leading method.
        text = opened("compare", "all settings, to val/top1", "hcd, to val/top1", "Parallel Coordinates")
        area = page.locator("[data-testid='experiment-view-compare-runs-chart-area']")
        area.locator("svg").get_by_text("hcd.temperature").first.wait_for(timeout=PATIENCE)
        drawn = " ".join(area.locator("svg").all_text_contents())
        for axis in ("method", "val/top1", "hcd.temperature"):
            assert axis in drawn

        # From the front page to the best student: three clicks, of which a new browser needs one for MLflow's hint.
        opened("all runs", "Last modified")
        page.get_by_role("link", name="digits", exact=True).first.click()
        page.get_by_text("won with trial 5").first.wait_for(timeout=PATIENCE)
        hint = page.get_by_role("button", name="Got it")
        with contextlib.suppress(playwright.sync_api.TimeoutError):
            hint.click(timeout=10_000)
        with context.expect_page() as tab:
            page.get_by_role("link", name="best student").first.click()
        best = tab.value
        best.get_by_text("005-hcd").first.wait_for(timeout=PATIENCE)
        with context.expect_page() as tab:
            best.get_by_role("link", name="the study's page").first.click()
        tab.value.frame_locator("iframe").get_by_text("A page").first.wait_for(timeout=PATIENCE)

        text = opened("study", "what does test_resnet learn best", "digits-train")
        assert "hcd won with trial 5" in text
        text = opened("model", "champion", "challenger")
        assert "Students for digits" in text
        assert "Version 1" in text
        page.get_by_text("Version 1").first.click()
        page.get_by_text("distilled from vit_tiny_patch16_224 by hcd").first.wait_for(timeout=PATIENCE)
        for link in ("training", "study", "the study's page"):
            assert page.get_by_role("link", name=link, exact=True).first.get_attribute("href").startswith("#/exp")


@pytest.mark.slow
def test_the_server_dies_or_is_stopped(filled: StudyRuns) -> None:
    root = root_of(filled)
    with shown(root) as (process, links):
        assert "trials" in links
        servers = psutil.Process(process.pid).children(recursive=True)
        assert 1 <= len(servers) <= 3, "a lean server"
        assert sum(one.memory_info().rss for one in servers) < 1.2e9
        for server in servers:
            server.kill()
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2
        assert re.match(r"error: MLflow's server exited with code -9; see .*ui\.log", said)
        assert len(said.splitlines()) == 1
    with shown(root) as (process, links):
        servers = psutil.Process(process.pid).children(recursive=True)
        port = int(links["all runs"].split(":")[2].split("/")[0])
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=120)
        assert (process.returncode, out, said) == (0, "stopped\n", "")
    ends = time.monotonic() + 60
    while any(server.is_running() and server.status() != psutil.STATUS_ZOMBIE for server in servers):
        assert time.monotonic() < ends
        time.sleep(0.1)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@needs_chromium
@pytest.mark.slow
def test_the_study_opens_in_optuna_dashboard(root: Workspace) -> None:
    search = {"space": {"methods": ["scratch", "kd"]}, "trials": 6, "min_epochs": 1}
    question = fabricated.experiment("digits", search=search)
    folder = fabricated.study(root, question)
    study = Study.open(question, folder)
    for number, value in enumerate((0.5, 0.7, 0.6, 0.1, 0.65)):
        assignment = study.next()
        assert isinstance(assignment, Assignment)
        assert study.report(number, 1, {"val/top1": value}) or number > 1
        state = "pruned" if number == 3 else "complete"
        study.finish(number, state, {"val/top1": value, "epoch": 1 if state == "pruned" else 3})
    port = free_port()
    # The command that `heterokd ui`, the README and the docs say.
    command = [str(Path(sys.executable).with_name("optuna-dashboard")), f"sqlite:///{folder.database}"]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        ends = time.monotonic() + 60
        while (content := answer(f"http://127.0.0.1:{port}/api/studies")) is None:
            assert process.poll() is None
            assert time.monotonic() < ends
            time.sleep(0.3)
        (told,) = content["study_summaries"]
        assert (told["study_name"], told["directions"]) == ("digits", ["maximize"])
        detail = answer(f"http://127.0.0.1:{port}/api/studies/{told['study_id']}")
        assert detail is not None
        trials = detail["trials"]
        assert [trial["state"] for trial in trials] == ["Complete"] * 3 + ["Pruned", "Complete"]
        assert [trial["values"][0] for trial in trials if trial["state"] == "Complete"] == [0.5, 0.7, 0.6, 0.65]
        assert trials[3]["intermediate_values"] == [{"step": 1, "value": 0.1}]
        params = {one["name"]: one["param_external_value"] for one in trials[1]["params"]}
        assert params["method"] == "kd"
        assert params["kd.temperature"] == "4.0" or float(params["kd.temperature"]) > 0
        assert detail["objective_names"] == ["val/top1"]
        with browser() as context:
            page = context.new_page()
            page.goto(f"http://127.0.0.1:{port}/dashboard/studies/{told['study_id']}/trials")
            page.get_by_text("5 Trials").wait_for(timeout=PATIENCE)
            assert "Pruned" in text_of(page)
            assert "Best Trial" in text_of(page)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def answer(url: str) -> dict[str, Any] | None:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            content = json.loads(reply.read())
    except OSError:
        return None
    assert isinstance(content, dict)
    return content
