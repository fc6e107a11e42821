"""What a search loses when processes of a kind are killed at random moments, for each kind of process.

    python benchmarks/random_kills.py [--only KIND ...] [--kills 10] [--seconds S] [--seed 0]
                                      [--out results.json] [--prepared FOLDER] [--keep FOLDER]

    driver   `heterokd search`, which is started again with `--resume`
    study    the actor that holds the study
    trial    the process of a trial
    worker   a worker of a trial that is trained by two
    builder  a builder of the teacher's cache
    gcs      the GCS of the local Ray
    raylet   the raylet of the local Ray

A process is killed (kill -9) a random time after it has appeared, then the next of its kind, until a small search has
ended; as many searches are run as the kills need. A search that ends with a sentence, as when a fourth local Ray dies
or a trial is interrupted, is started again with `--resume`. What the trials had reported at each kill is compared with
what they hold at the end, and the trials' folders, the study, MLflow and the teacher's cache with each other.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before Ray is imported: it stays on the loopback interface, and a search's children inherit it.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import psutil
import torch
from hurting import LONGEST, POLL, Search, end_in_order, epochs, outcome, prepare, searching
from mlflow import MlflowClient

from heterokd.storage.machine_load import under_load
from heterokd.storage.sqlite_url import mlflow_sqlite_uri
from heterokd.training.precision import device_name

Reports = dict[tuple[int, int], dict[str, float]]
"""Metrics by trial and epoch."""


@dataclass(frozen=True)
class Kind:
    """A kind of process.

    Attributes:
        shown: for the table.
        part: of its command line; empty: the driver.
        window: seconds after its appearance in which the moment is drawn.
        changes: keys of the small search that differ, by section.
        is_prepared: whether the search begins with a fitted teacher.
        ends: exit codes with which a search may end before it has finished.
    """

    shown: str
    part: str
    window: float
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    is_prepared: bool = True
    ends: tuple[int, ...] = ()


SHORTER = {"training": {"epochs": 40}, "search": {"trials": 2, "parallel": 1}}
LONGER = {"training": {"epochs": 40}, "search": {"trials": 3, "confirm_leaders": 1, "confirm_seeds": 1}}

KINDS = {
    "driver": Kind("the driver", "", 25.0, LONGER, is_prepared=False),
    "study": Kind("the study's actor", "ray::StudyActor", 6.0, LONGER),
    "trial": Kind("a trial's process", "ray::ImplicitFunc", 12.0, LONGER, ends=(1,)),
    "worker": Kind(
        "a worker of a trial",
        "ray::RayTrainWorker",
        12.0,
        {"training": {"workers": 2, "epochs": 40}, "search": {"trials": 2}},
        ends=(1,),
    ),
    "builder": Kind("a builder of the teacher's cache", "ray::Builder", 4.0, {"cache": {"views": 60}}),
    "gcs": Kind("the GCS of a local Ray", "gcs_server", 15.0, SHORTER, ends=(1,)),
    "raylet": Kind("the raylet of a local Ray", "raylet/raylet", 15.0, SHORTER, ends=(1,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--only", nargs="+", choices=sorted(KINDS), default=list(KINDS))
    parser.add_argument("--kills", type=int, default=10, help="of each kind")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of a kind, after which no kill begins")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--prepared", type=Path, help="a root to begin with; made where there is none")
    parser.add_argument("--keep", type=Path, help="a folder for the output and the log of each search")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    end_in_order()
    results: dict[str, Any] = {"machine": f"{os.cpu_count()} cores, {device_name('cpu')}", "kinds": {}}
    head = f"{'killed':<34}{'kills':>6}{'searches':>10}{'starts':>8}{'trials':>8}"
    print(f"{head}{'lost':>6}{'failed':>8}{'doubled':>9}{'open':>6}{'seconds':>9}  whole", flush=True)
    with tempfile.TemporaryDirectory(prefix="hk") as folder:
        prepared = arguments.prepared or Path(folder) / "runs"
        prepare(prepared)
        for name in arguments.only:
            began = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="hk", dir="/tmp", ignore_cleanup_errors=True) as scratch:
                drawn = random.Random(f"{name} {arguments.seed}")
                keep = arguments.keep and arguments.keep / name
                plan = Plan(KINDS[name], drawn, arguments.kills, began + arguments.seconds, keep)
                found = kill_at_random(plan, Path(scratch), prepared)
            found["seconds"] = round(time.monotonic() - began, 1)
            results["kinds"][name] = found
            numbers = f"{len(found['moments']):>6}{found['searches']:>10}{found['starts']:>8}{found['trials']:>8}"
            losses = f"{found['lost']:>6}{found['failed']:>8}{found['doubled']:>9}{found['open']:>6}"
            whole = "; ".join(found["problems"]) or "yes"
            print(f"{KINDS[name].shown:<34}{numbers}{losses}{found['seconds']:>9}  {whole}", flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(results, indent=1))
    sys.exit(any(found["problems"] for found in results["kinds"].values()))


@dataclass
class Plan:
    """The kills of a kind.

    Attributes:
        kind: the kind.
        drawn: of which the moments are drawn.
        left: number of kills.
        ends: moment after which no kill begins.
        keep: folder for the output and the log of each search, or None.
    """

    kind: Kind
    drawn: random.Random
    left: int
    ends: float
    keep: Path | None = None

    @property
    def is_over(self) -> bool:
        """Whether no kill begins."""
        return not self.left or time.monotonic() > self.ends


def kill_at_random(plan: Plan, scratch: Path, prepared: Path) -> dict[str, Any]:
    """Kill processes of a kind in as many searches as that takes; what is found afterwards, of all together."""
    kind = plan.kind
    total: dict[str, Any] = {"moments": [], "problems": []} | dict.fromkeys(COUNTED, 0)
    while not plan.is_over:
        place = scratch / str(total["searches"])
        place.mkdir()
        with searching(place, prepared if kind.is_prepared else None, **kind.changes) as running:
            try:
                seen, moments = kill_in(running, plan)
                found = compared(running, kind, seen)
            finally:
                if plan.keep is not None:
                    keep(running, plan.keep / str(total["searches"]))
        total["moments"] += moments
        total["problems"] += found.pop("problems")
        for key, value in found.items():
            total[key] += value
    return total


def keep(running: Search, folder: Path) -> None:
    """Copy the output and the log of a search."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "output.txt").write_text(running.output)
    if running.folder.log_file.exists():
        shutil.copy(running.folder.log_file, folder)


COUNTED = ("searches", "starts", "trials", "lost", "failed", "doubled", "open")


def kill_in(running: Search, plan: Plan) -> tuple[Reports, list[str]]:
    """Kill processes of a search until it has ended; what trials had reported at the kills, and the moments."""
    seen: Reports = {}
    moments: list[str] = []
    known: set[int] = set()
    while not has_finished(running, plan.kind):
        found = [] if plan.is_over else [one for one in of_kind(running, plan.kind) if one.pid not in known]
        if not found:
            time.sleep(POLL)
            continue
        process = plan.drawn.choice(found)
        known.add(process.pid)
        ends = time.monotonic() + plan.drawn.random() * plan.kind.window
        while time.monotonic() < ends and process.is_running() and running.is_running:
            time.sleep(POLL)
        with suppress(psutil.NoSuchProcess):
            process.kill()
            plan.left -= 1
            moments.append(moment(running))
            seen |= reports(running)
    return seen, moments


def has_finished(running: Search, kind: Kind) -> bool:
    """Whether a search has ended by itself; one that was killed, or that has ended with a sentence, goes on.

    Raises:
        SystemExit: it hangs, or has ended in another way.
    """
    assert running.process is not None
    code = running.process.poll()
    if code is None:
        if time.monotonic() - running.began > under_load(LONGEST):
            raise SystemExit(f"waited in vain; the search said:\n{running.output[-4000:]}")
        return False
    if code == 0:
        return True
    if code not in (*kind.ends, *(() if kind.part else (-9,))):
        raise SystemExit(f"the search ended with {code}:\n{running.output[-4000:]}")
    if code > 0 and not says_how_to_go_on(running):
        raise SystemExit(f"the search did not say how to go on:\n{running.output[-4000:]}")
    running.start()
    return False


def says_how_to_go_on(running: Search) -> bool:
    """Whether the last line of an ended search names `--resume`; a shell may print it just after the end."""
    ends = time.monotonic() + 2.0
    while "--resume" not in "".join(running.output.splitlines()[-1:]):
        if time.monotonic() > ends:
            return False
        time.sleep(POLL)
    return True


def of_kind(running: Search, kind: Kind) -> list[psutil.Process]:
    """The processes of a kind that a search has now."""
    assert running.process is not None
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in running.processes() if kind.part else [psutil.Process(running.process.pid)]:
            with suppress(psutil.NoSuchProcess):
                if kind.part in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found


def moment(running: Search) -> str:
    """How far a search is."""
    folder = running.folder
    if folder.report.exists():
        return "at the end"
    if trials := folder.trials():
        return f"trial {trials[-1].number}, after {sum(map(epochs, trials))} epochs"
    return "before the first trial" if folder.database.exists() else "before the study"


def reports(running: Search) -> Reports:
    """What the trials have reported."""
    return {(one.number, int(each["epoch"])): each for one in running.folder.trials() for each in one.metrics()}


def compared(running: Search, kind: Kind, seen: Reports) -> dict[str, Any]:
    """What has become of a search that has ended."""
    running.end()
    found = outcome(running, kind.shown)
    folder, now = running.folder, reports(running)
    lost = found["lost"] + sum(now.get(key) != each for key, each in seen.items())
    states = [str(trial.status) for trial in folder.trials()]
    client = MlflowClient(mlflow_sqlite_uri(running.root / "mlflow.db"))
    (experiment,) = client.search_experiments(filter_string=f"name = '{folder.name}'")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    lines = sum(len((trial.path / "metrics.jsonl").read_bytes().splitlines()) for trial in folder.trials())
    names = Counter(run.data.tags.get("heterokd.trial", "the study") for run in runs)
    versions = [len(client.search_model_versions(f"name = '{one.name}'")) for one in client.search_registered_models()]
    problems = found["problems"]
    problems += ["points were lost"] * bool(lost) + ["a traceback was printed"] * ("Traceback" in running.output)
    problems += [f"{versions} versions were registered"] * (versions != [1])
    return {
        "searches": 1,
        "starts": len(running.ended),
        "trials": len(states),
        "lost": lost,
        "failed": sum(state in ("failed", "diverged") for state in states),
        "doubled": lines - len(now) + sum(number - 1 for number in (*names.values(), *versions)),
        "open": sum(run.info.status == "RUNNING" for run in runs) + states.count("running"),
        "problems": problems,
    }


if __name__ == "__main__":
    main()
