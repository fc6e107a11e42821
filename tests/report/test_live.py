"""The page of a study that runs, as `heterokd ui STUDY --live` serves it."""

from __future__ import annotations

import threading
import urllib.request
from dataclasses import replace
from pathlib import Path
from urllib.error import HTTPError

import fabricated
import pytest
from command_line import Run

from heterokd.config.experiment import Experiment
from heterokd.report.decisions import decisions, running_rows
from heterokd.report.live import RELOAD_SECONDS, LivePage, live_server
from heterokd.report.page import render_report
from heterokd.report.study_data import read_study
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.study.progress import StudyProgress


@pytest.fixture
def running(tmp_path: Path) -> tuple[StudyFolder, Experiment]:
    """A search with four ended trials, a failed one and one that runs."""
    question = fabricated.experiment(training={"epochs": 20}, search={"trials": 8, "min_epochs": 1})
    folder = fabricated.study(Workspace(tmp_path), question)
    for number, value in enumerate((0.5, 0.9, 0.7)):
        made = folder.trial(number)
        made.start(question.recipe({"method": "kd"}), made.snapshot)
        for epoch in range(1, 21):
            made.append({"val/top1": value, "epoch": epoch})
        fabricated.change(made, status="complete", metrics={"val/top1": value, "epoch": 20})
    fabricated.trial(folder, question, 3, "kd", status="pruned", epochs=5)
    behind = folder.trial(3)
    behind.save(replace(behind.snapshot, reason="behind"))
    failed = fabricated.trial(folder, question, 4, "kd", status="failed", epochs=0)
    (failed.path / "error.txt").write_text("Traceback\nRuntimeError: no <memory>\n")
    fabricated.trial(folder, question, 5, "scratch", status="running", epochs=3)
    progress = StudyProgress(planned=8, complete=3, pruned=1, failed=1)
    fabricated.summary(fabricated.ranked(1, mean=0.9), progress=progress).write(folder)
    return folder, question


def test_decisions_and_running_trials(running: tuple[StudyFolder, Experiment]) -> None:
    report = read_study(*running)
    (row,) = running_rows(report)
    assert (row["number"], row["method"], row["epoch"], row["planned"]) == (5, "scratch", 3, 20)
    assert str(row["next"]).startswith("compared at epoch ")
    told = decisions(report)
    assert told[0] == "0004 (kd) failed: RuntimeError: no <memory>", "the newest first"
    assert told[1] == "0003 (kd) stopped at epoch 5: 4th of the 4 that have reached it, by the mean of 5 epochs"
    assert "0001 (kd) was trained to the end with 0.9000" in told
    page = render_report(report, reload_seconds=10)
    assert "location.reload(), 10000" in page
    assert "<h2>Now</h2>" in page
    assert "RuntimeError: no &lt;memory&gt;" in page
    assert "location.reload" not in render_report(report)


def test_a_finished_study_has_no_running_part(running: tuple[StudyFolder, Experiment]) -> None:
    folder, question = running
    made = folder.trial(5)
    fabricated.change(made, status=TrialStatus.COMPLETE)
    fabricated.summary(fabricated.ranked(1, mean=0.9)).write(folder)
    page = LivePage(folder, question, "runs").content()
    assert "<h2>Now</h2>" not in page
    assert "location.reload" not in page


def test_the_page_is_drawn_again_when_it_is_old(running: tuple[StudyFolder, Experiment]) -> None:
    folder, question = running
    now = [0.0]
    page = LivePage(folder, question, "runs", clock=lambda: now[0])
    first = page.content()
    assert "4 of 8" not in first
    progress = StudyProgress(planned=8, complete=4, pruned=1, failed=1)
    fabricated.summary(fabricated.ranked(1, mean=0.9), progress=progress).write(folder)
    assert page.content() == first
    now[0] = float(RELOAD_SECONDS)
    assert "4 are complete" in page.content()


def test_the_server(running: tuple[StudyFolder, Experiment]) -> None:
    folder, question = running
    with live_server(LivePage(folder, question, "runs"), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        with urllib.request.urlopen(f"{address}/") as answer:
            assert "<h2>Now</h2>" in answer.read().decode()
        with pytest.raises(HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/../recipe.yaml")
        server.shutdown()
        thread.join()


def test_before_the_first_trial_the_page_waits(tmp_path: Path) -> None:
    question = fabricated.experiment()
    folder = fabricated.study(Workspace(tmp_path), question)
    assert "no trial has finished yet" in LivePage(folder, question, "runs").content()


def test_live_needs_a_study(cli: Run) -> None:
    code, _, said = cli("ui", "--live", "--port", "59871")
    assert code == 2
    assert "name the study whose page is to be served" in said
