"""Faults under a running search, injected for real by the benchmark: nothing is lost, doubled or left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.slow]

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root that the benchmark makes once: MLflow's tables and the fitted teacher."""
    return tmp_path_factory.mktemp("prepared") / "runs"


def measured(script: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Figures of a benchmark, run as its command says."""
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / script), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.exists(), done.stdout + done.stderr
    figures: dict[str, Any] = json.loads(out.read_text())
    return figures


def after(fault: str, tmp_path: Path, prepared: Path, *arguments: str) -> dict[str, Any]:
    figures = measured("faults.py", tmp_path, "--only", fault, "--prepared", str(prepared), *arguments)
    found: dict[str, Any] = figures["faults"][fault]
    # Folders, study, MLflow and cache agree: each trial once, at its end, each epoch once, every byte as it was.
    assert found["problems"] == []
    assert found["lost"] == 0
    assert found["runs"] == found["trials"] + 1
    return found


@pytest.mark.parametrize("fault", ["trial", "worker", "node", "driver"])
def test_a_search_goes_on_from_the_last_rung_after(fault: str, tmp_path: Path, prepared: Path) -> None:
    found = after(fault, tmp_path, prepared)
    assert found["again"] < 16  # epochs between the two rungs


@pytest.mark.parametrize("fault", ["study", "gcs", "raylet", "builder"])
def test_a_search_outlives_the_processes_of_a_local_ray(fault: str, tmp_path: Path, prepared: Path) -> None:
    after(fault, tmp_path, prepared)


def test_a_driver_that_is_asked_to_end_keeps_everything(tmp_path: Path, prepared: Path) -> None:
    assert after("term", tmp_path, prepared)["code"] == 130


def test_a_search_goes_on_without_its_mlflow_server(tmp_path: Path, prepared: Path) -> None:
    assert after("server", tmp_path, prepared, "--outage", "10")["meanwhile"] > 0


def test_a_search_waits_for_a_disk_that_cannot_be_written(tmp_path: Path, prepared: Path) -> None:
    place = tmp_path / "mounted"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system, which makes the disk read-only")
    subprocess.run(["umount", str(place)], check=True)
    after("disk", tmp_path, prepared)


def test_a_spot_node_leaves_a_checkpoint_and_its_end_is_no_failure(tmp_path: Path, prepared: Path) -> None:
    """`search.max_failures` is 0 there: a restart that counted would fail the trial."""
    found = after("spot", tmp_path, prepared)
    assert found["written"] < 10


def test_a_search_whose_trials_all_die_at_their_start_gives_up_and_can_go_on(tmp_path: Path, prepared: Path) -> None:
    found = after("start", tmp_path, prepared)
    assert found["begun"] == 2  # as many as run at a time
    assert found["trials"] == 4


def test_a_driver_killed_at_ten_moments_leaves_the_search_that_was_never_killed(tmp_path: Path, prepared: Path) -> None:
    found = after("moments", tmp_path, prepared)
    assert len(found["moments"]) == 10
    assert found["trials"] == 3


@pytest.mark.parametrize("kind", ["driver", "study", "trial", "worker", "builder", "gcs", "raylet"])
def test_processes_killed_at_random_moments_cost_nothing(kind: str, tmp_path: Path, prepared: Path) -> None:
    arguments = ("--only", kind, "--kills", "3", "--prepared", str(prepared))
    found = measured("random_kills.py", tmp_path, *arguments)["kinds"][kind]
    assert found["problems"] == []
    assert len(found["moments"]) == 3
    assert [found[key] for key in ("lost", "failed", "doubled", "open")] == [0, 0, 0, 0]


def test_many_trials_cost_what_a_few_do(tmp_path: Path) -> None:
    """Counts and memory; times are for the benchmark, on a machine that does nothing else."""
    found = measured("many_trials.py", tmp_path, "--trials", "300", "--study", "600")
    whole, alone = found["search"], found["study"]
    assert (whole["trials"], whole["failed"], whole["runs"], whole["runs_not_finished"]) == (300, 0, 301, 0)
    assert alone["trials"] == 600
    # MiB of the driver, from the second hundred to the third.
    assert whole["rows"][-1]["driver_mib"] - whole["rows"][-2]["driver_mib"] < 8
    assert alone["rows"][-1]["mib"] - alone["rows"][-2]["mib"] < 8
