"""Whether a plan comes true: `heterokd plan`, then the search itself, as a user runs both, and their ratio.

    python benchmarks/plan.py [--experiment FILE] [--set KEY=VALUE]... [--out results.json]

Both share a fresh root; the search's time is that of the whole command. The plan's time is reported as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from heterokd.storage.workspace import Workspace
from heterokd.training.precision import device_name

REPOSITORY = Path(__file__).resolve().parents[1]
EXPERIMENT = REPOSITORY / "experiments" / "quickstart.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--experiment", type=Path, default=EXPERIMENT)
    parser.add_argument("--set", action="append", default=[], help="key=value of the experiment")
    arguments = parser.parse_args()
    overrides = [part for text in arguments.set for part in ("--set", text)]
    results: dict[str, Any] = {"machine": f"{os.cpu_count()} cores, {device_name('cpu')}"}
    with tempfile.TemporaryDirectory() as folder:
        planning, plan = run("plan", str(arguments.experiment), *overrides, "--root", folder)
        searching, found = run("search", str(arguments.experiment), *overrides, "--root", folder)
        study = Workspace(Path(folder)).study(plan["name"])
        kept = json.loads((study.path / "plan.json").read_text())["actual"]
    expected = plan["seconds"]["expected"]
    results |= {
        "seconds of the plan": round(planning, 1),
        "planned seconds (range)": f"{expected:.0f} ({plan['seconds']['low']:.0f} to {plan['seconds']['high']:.0f})",
        "seconds of the search": round(searching, 1),
        "planned over taken": round(expected / searching, 3),
        "planned by phase": {key: round(value, 1) for key, value in plan["phases"].items()},
        "core- or GPU-hours, planned over taken": round(plan["device_hours"]["expected"] / kept["device_hours"], 3),
        "stopped early, planned and real": f"{plan['trainings']['pruned']:.0f}, {found['standing']['pruned']}",
        "again on fresh seeds, planned and real": (
            f"{plan['trainings']['repeated']:.0f}, {found['standing']['confirmations_done']}"
        ),
    }
    for key, value in results.items():
        print(f"{key:<44}{value}")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def run(*arguments: str) -> tuple[float, dict[str, Any]]:
    """Seconds of a command, and the JSON object that it prints."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "heterokd", *arguments, "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - started, json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
