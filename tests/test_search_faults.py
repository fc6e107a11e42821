"""Faults under a running search, injected for real by the benchmark: nothing is lost, doubled or left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.faults

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def measured(script: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Figures of a benchmark, run as its command says."""
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / script), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.exists(), done.stdout + done.stderr
    figures: dict[str, Any] = json.loads(out.read_text())
    return figures


def after(fault: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = measured("faults.py", tmp_path, "--only", fault, *arguments)["faults"][fault]
    # Folders, study and MLflow agree: each trial once, at its end, each epoch once.
    assert found["problems"] == []
    assert found["lost"] == 0
    return found


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["trial", "node", "driver", "disk"])
def test_a_search_goes_on_after(fault: str, tmp_path: Path) -> None:
    found = after(fault, tmp_path)
    assert found["trials"] == found["runs"] - 1


@pytest.mark.slow
def test_a_search_goes_on_without_its_mlflow_server(tmp_path: Path) -> None:
    after("server", tmp_path, "--outage", "20")


@pytest.mark.slow
def test_a_spot_node_leaves_a_checkpoint_and_its_end_is_no_failure(tmp_path: Path) -> None:
    """`search.max_failures` is 0 there: a restart that counted would fail the trial."""
    found = after("spot", tmp_path)
    assert found["written"] < 15
    assert found["again"] < 12  # epochs to the rung before


@pytest.mark.slow
def test_a_driver_killed_at_ten_moments_leaves_the_search_that_was_never_killed(tmp_path: Path) -> None:
    found = after("moments", tmp_path)
    assert len(found["moments"]) == 10
    assert found["trials"] == 3


@pytest.mark.slow
def test_many_trials_cost_what_a_few_do(tmp_path: Path) -> None:
    """Counts and memory; times are for the benchmark, on a machine that does nothing else."""
    found = measured("many_trials.py", tmp_path, "--trials", "300", "--study", "600")
    whole, alone = found["search"], found["study"]
    assert (whole["trials"], whole["failed"], whole["runs"], whole["runs_not_finished"]) == (300, 0, 301, 0)
    assert alone["trials"] == 600
    # MiB of the driver, from the second hundred to the third.
    assert whole["rows"][-1]["driver_mib"] - whole["rows"][-2]["driver_mib"] < 8
    assert alone["rows"][-1]["mib"] - alone["rows"][-2]["mib"] < 8
