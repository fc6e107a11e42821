"""A search whose space grows while it is resumed, on a real Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Run

from heterokd.storage.study_dir import StudyFolder

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow, pytest.mark.ray]


def test_a_method_and_a_student_are_added_to_a_finished_search(
    tiny_file: Callable[..., Path], cli: Run, tmp_path: Path
) -> None:
    """Finished, registered and extended: the verdict is over both methods and students."""
    search: dict[str, Any] = {"space": {"methods": ["scratch", "kd"]}, "trials": 2, "prune": False}
    command = ["search", str(tiny_file(search=search)), "--root", "runs", "--resume"]
    first = cli(*command, "--json")
    assert (first.code, first.last["registered"]["version"]) == (0, "1"), first.err
    grown = [
        "--set",
        "search.space.methods=[scratch, kd, dist]",
        "--set",
        "student.network=[test_resnet, test_efficientnet]",
    ]
    refused = cli(*command, *grown)
    assert refused.code == 2
    assert "2 are allowed, so none is left for method dist and student test_resnet; raise the number" in refused.err
    folder = StudyFolder(tmp_path / "runs/studies/tiny")
    ended = len(folder.trials())
    done = cli(*command, *grown, "--trials", "6", "--json")
    assert done.code == 0, done.err
    added = "The search space has changed: method dist and student test_resnet added."
    told = f"{added} The {ended} trials that have ended count on."
    assert folder.log_file.read_text(encoding="utf-8").count(told) == 1
    assert done.last["changes"][0].endswith(told)
    trials = [trial for trial in folder.trials() if trial.snapshot.confirms is None]
    trained = [(trial.recipe.method, trial.recipe.student.network) for trial in trials]
    assert trained[:2] == [("scratch", "test_efficientnet"), ("kd", "test_efficientnet")]
    assert set(trained[2:5]) == {("scratch", "test_resnet"), ("kd", "test_resnet"), ("dist", "test_resnet")}
    assert len(trained) == 6
    assert done.last["standing"]["finished"]
    leaders = {(leader["method"], leader["student"]) for leader in done.last["leaders"]}
    assert leaders >= set(trained[:5])
    winner = done.last["winner"]
    assert winner["confirmed"]
    assert done.last["registered"]["version"] in ("1", "2")
    (entry,) = json.loads(folder.changes_file.read_text())["changes"]
    assert entry["added"] == {"methods": ["dist"], "students": ["test_resnet"]}
    assert told in folder.report.read_text(encoding="utf-8")
    report = cli("report", "tiny", "--root", "runs")
    assert report.out.startswith(winner["method"]), report.err
    # Finished: nothing is left, and the sentence is not repeated.
    again = cli(*command, *grown, "--trials", "6", "--json")
    assert again.code == 0, again.err
    assert folder.log_file.read_text(encoding="utf-8").count(told) == 1
    less = cli(*command, "--trials", "6", "--json")
    assert less.code == 0, less.err
    assert "method dist and student test_resnet removed" in folder.log_file.read_text(encoding="utf-8")
    assert less.last["winner"]["student"] == "test_efficientnet"
    chosen = next(trial for trial in trials if trial.recipe.method == "dist")
    promoted = cli("promote", "tiny", "--root", "runs", "--trial", str(chosen.number), "--dry-run")
    assert f"trial {chosen.number}" in promoted.out, promoted.err
