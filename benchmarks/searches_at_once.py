"""Searches and promotions at once in one workspace: nothing is lost, doubled or left open.

    python benchmarks/searches_at_once.py [--out results.json] [--prepared FOLDER]

Three searches with the same registered model run in one root. Meanwhile the first study is searched a second time,
which must be refused; when the first has ended, it is promoted twice at once, beside the searches that still run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Before Ray is imported: it stays on the loopback interface, and a search's children inherit it.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import shutil

import torch
import yaml
from hurting import EXPERIMENT, LONGEST, Search, end_in_order, in_training, outcome, prepare, until
from mlflow import MlflowClient

from heterokd.storage.machine_load import under_load
from heterokd.storage.sqlite_url import mlflow_sqlite_uri

NAMES = ("one", "two", "three")
MODEL = "shared-student"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--prepared", type=Path, help="a root to begin with; made where there is none")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    end_in_order()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hk", dir="/tmp", ignore_cleanup_errors=True) as folder:
        prepared = arguments.prepared or Path(folder) / "prepared"
        prepare(prepared)
        found = searched(Path(folder), prepared)
    found["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(found, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))
    sys.exit(bool(found["problems"]))


def searched(scratch: Path, prepared: Path) -> dict[str, Any]:
    """Run the searches and the promotions; what is found afterwards."""
    root = scratch / "runs"
    shutil.copytree(prepared, root)
    searches = [search_of(name, root, scratch) for name in NAMES]
    with ExitStack() as stack:
        for running in searches:
            stack.callback(running.end)
            running.start()
        first = searches[0]
        until(lambda: in_training(first), first)
        again = heterokd("search", str(first.file), "--resume", "--root", str(root))
        ended(first)
        promotions = [started("promote", "one", "--root", str(root)) for _ in range(2)]
        results = [process.communicate(timeout=under_load(LONGEST)) for process in promotions]
        for running in searches[1:]:
            ended(running)
        found = [outcome(running, running.folder.name) for running in searches]
    client = MlflowClient(mlflow_sqlite_uri(root / "mlflow.db"))
    versions = len(client.search_model_versions(f"name = '{MODEL}'"))
    locks = [tag for tag in client.get_registered_model(MODEL).tags if tag.startswith("heterokd.lock")]
    said = [running.output for running in searches] + [again.stderr] + [text for each in results for text in each]
    problems = [problem for each in found for problem in each["problems"]]
    problems += ["the study was searched twice"] * (
        again.returncode != 2 or "is running this study" not in again.stderr
    )
    problems += [f"a promotion ended with {each.returncode}" for each in promotions if each.returncode not in (0, 1)]
    problems += ["a traceback was printed"] * any("Traceback" in text for text in said)
    return {
        "searches": len(searches),
        "trials": sum(each["trials"] for each in found),
        "lost": sum(each["lost"] for each in found),
        "doubled": versions - len(searches),
        "open": len(locks),
        "refused": again.stderr.strip().splitlines()[-1:],
        "promotions": [each.returncode for each in promotions],
        "problems": problems,
    }


def search_of(name: str, root: Path, scratch: Path) -> Search:
    """A search of the small experiment under another name, not started."""
    place = scratch / name
    place.mkdir()
    file = place / f"{name}.yaml"
    content = {**EXPERIMENT, "name": name, "tracking": {"registered_model": MODEL}}
    file.write_text(yaml.safe_dump(content))
    return Search(file, root, place)


def ended(running: Search) -> None:
    """Wait for the end of a search, which must be in good order; what it has started is left alone."""
    assert running.process is not None
    if running.process.wait(under_load(LONGEST)):
        raise SystemExit(f"the search failed:\n{running.output[-4000:]}")


def started(*arguments: str) -> subprocess.Popen[str]:
    """A command of heterokd in a process."""
    command = [sys.executable, "-m", "heterokd", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def heterokd(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of heterokd, run to its end."""
    process = started(*arguments)
    output, errors = process.communicate(timeout=under_load(LONGEST))
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


if __name__ == "__main__":
    main()
