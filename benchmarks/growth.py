"""What an event of a trial costs the driver's loop, from 50 trials to 2,000, with a store as root.

    python -m benchmarks.growth [--out results.json] [--trials 50 500 2000] [--running 128] [--latency 0.05]

The driver's parts are those of `heterokd search`: the study's actor on a local Ray, Ray Tune's callback and searcher,
the terminal, the sync with the store. Files are real; the store is a folder that answers each request after --latency
seconds and counts. No trial trains: their files are written and their events are sent, at twice the pace of trials of
five minutes. MLflow is left out: its thread does not grow with the trials (many_trials.py).

An event's milliseconds are those of all calls in the loop from this event to the next, by the clock and as processor
time of the loop's thread, which other work on the machine does not change. GPUs idle while a trial's process waits for
the store, and from the end of a trial to the start of the next, in a simulation with the times by the clock.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna

from benchmarks.counted_store import CountedStore
from heterokd.cli.terminal.live_search import SearchTerminal
from heterokd.config.experiment import Experiment
from heterokd.config.reading import dump_experiment, load_experiment
from heterokd.execution.callbacks import Forwarding, MlflowSync, RaySummary, TuneCallback
from heterokd.execution.executor import SearchJob, start_actor
from heterokd.execution.failure_limit import FailureLimit
from heterokd.execution.node_watch import NodeWatch
from heterokd.execution.parallel import Parallelism
from heterokd.execution.placement import Cluster
from heterokd.execution.ray_connection import connected
from heterokd.execution.ray_settings import ray
from heterokd.execution.ray_watch import RayWatch
from heterokd.execution.searcher import StudySearcher
from heterokd.execution.study_sync import StoreEvents
from heterokd.execution.trial_deaths import TrialDeaths
from heterokd.storage.files import write_text
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.sync import FolderSync
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.study.assignment import Assignment
from heterokd.study.options import StudyOptions
from heterokd.study.search_space import open_space
from heterokd.study.study import Study
from heterokd.study.summary import StudySummary
from heterokd.training.precision import device_name

EXPERIMENT = Path(__file__).resolve().parents[1] / "experiments" / "quickstart.yaml"
TRIAL_SECONDS = 300.0
CYCLES = 40
"""Trials that report, end and are followed by another, at each number of trials."""
STEP_SECONDS = 0.025
"""Between two steps of the loop; Ray Tune's wait at most 0.1 s."""
DISPATCH_SECONDS = 0.1
"""Ray Tune's own time between two trials of a process (quickstart.py)."""
GOAL_MS = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--trials", type=int, nargs="+", default=[50, 500, 2000], help="ended trials, increasing")
    parser.add_argument("--running", type=int, default=128, help="trials at a time")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds of a request to the store")
    parser.add_argument("--cycles", type=int, default=CYCLES)
    given = parser.parse_args()
    results: dict[str, Any] = {"machine": f"{os.cpu_count()} cores, {device_name('cpu')}", "rows": []}
    with tempfile.TemporaryDirectory(prefix="hk") as place, connected(None, cores=2):
        growing = Growing(Path(place), given.running, given.latency)
        for trials in given.trials:
            growing.grow(trials)
            row = growing.measure(given.cycles)
            row["idle"] = idle_share(row, given.running, given.latency)
            results["rows"].append(row)
            show(row)
    if given.out:
        given.out.write_text(json.dumps(results, indent=1))


@dataclass(frozen=True)
class RandomValues:
    """Draws values at random, so that a study of thousands of trials is made in a minute."""

    def estimator(self, seed: int) -> optuna.samplers.BaseSampler:
        """See `Sampler`."""
        return optuna.samplers.RandomSampler(seed)


class NoTracker:
    """A tracker that stores nothing."""

    def sync(self, trial: TrialFolder) -> bool:
        """See `Tracker`."""
        return True

    def finish(self, summary: StudySummary | None, status: str = "FINISHED") -> bool:
        """See `Tracker`."""
        return True


class Growing:
    """A study with a store as root, whose trials are made without training."""

    def __init__(self, place: Path, running: int, latency: float) -> None:
        settings = ["search.trials=100000", "search.confirm_leaders=0", f"search.parallel={running}"]
        self.experiment: Experiment = load_experiment(EXPERIMENT, [*settings, "cache.enabled=false"])
        self.root, self.running = Workspace(place / "driver"), running
        self.folder = self.root.study(self.experiment.name)
        self.nodes = StudyFolder(place / "nodes" / self.experiment.name)
        write_text(self.folder.experiment_file, dump_experiment(self.experiment))
        self.space = open_space(self.experiment, self.folder)
        self.slow = CountedStore(place / "store", latency)
        self.of_nodes = CountedStore(place / "store")
        self.yaml = ""

    def path_of(self, trial: TrialFolder) -> str:
        """Path of a trial's folder in the store."""
        return f"{self.folder.name}/trials/{trial.path.name}"

    def grow(self, trials: int) -> None:
        """Let the study have `trials` ended trials, with their files here and in the store."""
        study = Study.open(self.experiment, self.folder, StudyOptions(space=self.space, sampler=RandomValues()))
        while study.progress().done < trials:
            assignment: Any = study.next()
            node = self.begin(assignment)
            self.train(node, assignment, assignment.rungs[0])
            study.report(assignment.number, assignment.rungs[0], {self.experiment.metric: 0.5})
            metrics = self.end(node, assignment)
            study.finish(assignment.number, TrialStatus.COMPLETE, metrics)
            FolderSync(self.folder.trial(assignment.number).path, self.of_nodes.folder(self.path_of(node))).fetch()

    def begin(self, assignment: Assignment) -> TrialFolder:
        """Write what a trial's process writes at its start, and store it."""
        node = self.nodes.trial(assignment.number)
        # Every trial of this study has a recipe of the same size.
        self.yaml = self.yaml or assignment.recipe.to_yaml()
        write_text(node.path / "recipe.yaml", self.yaml)
        node.save(TrialSnapshot(origin=assignment.origin, sample=assignment.sample, pid=1, began=time.time()))
        self.push(node)
        return node

    def train(self, node: TrialFolder, assignment: Assignment, epoch: int) -> None:
        """Write what a trial's process writes until a rung, and store it."""
        report = {"val/top1": 0.5 + assignment.number % 89 / 200, "val/loss": 1.0, "train/loss": 1.0}
        lines = (json.dumps({**report, "epoch": each}) for each in range(1, epoch + 1))
        write_text(node.path / "metrics.jsonl", "\n".join(lines) + "\n")
        node.checkpoint.write_bytes(bytes(1000))
        self.push(node)

    def end(self, node: TrialFolder, assignment: Assignment) -> dict[str, float]:
        """Write what a trial's process writes at its end, and store it; return the metrics."""
        metrics = {"val/top1": 0.5 + assignment.number % 89 / 200, "epoch": float(self.epochs)}
        node.weights.write_bytes(bytes(1000))
        node.save(replace(node.snapshot, status=TrialStatus.COMPLETE, metrics=metrics, ended=time.time()))
        self.push(node)
        return metrics

    @property
    def epochs(self) -> int:
        """Epochs of a trial."""
        return self.experiment.training.epochs

    def push(self, node: TrialFolder) -> None:
        """Store a trial's files, as its process does."""
        FolderSync(node.path, self.of_nodes.folder(self.path_of(node))).push()

    def measure(self, cycles: int) -> dict[str, Any]:
        """Return milliseconds, requests and bytes of events of a study with many running trials."""
        with Loop(self) as loop:
            for _ in range(self.running):
                loop.start()
            loop.warm_up()
            for _ in range(cycles):
                loop.report()
                loop.finish()
                loop.start()
            loop.upload()
            ended = self.experiment.search.trials and ray.get(loop.actor.summary.remote()).progress.done
        return {"trials": ended, **loop.figures(), "trial": self.requests_of_a_trial()}

    def requests_of_a_trial(self) -> dict[str, int]:
        """Count the requests that a trial's process waits for: at its start, at a rung, and at its end."""
        place = Path(tempfile.mkdtemp(dir=self.root.path.parent))
        store = CountedStore(place / "store")
        sync = FolderSync(place / "trial", store.folder("trial"))
        found = {}
        for when, names in (
            ("start", ("recipe.yaml", "trial.json")),
            ("rung", ("metrics.jsonl", "checkpoint.pt", "checkpoint.previous.pt")),
            ("end", ("metrics.jsonl", "trial.json", "student.safetensors")),
        ):
            if when == "start":
                sync.replace()
            for name in names:
                write_text(sync.local / name, when)
            sync.push()
            found[when] = store.take()["requests"]
        return found


class Loop:
    """Ray Tune's loop around the driver's callback and searcher; a context manager."""

    def __init__(self, growing: Growing) -> None:
        self.growing, folder = growing, growing.folder
        experiment = growing.experiment
        self.actor = start_actor(SearchJob(experiment, growing.root, growing.space), devices=1.0)
        plan = Parallelism(experiment, Cluster(growing.running, 1, 1.0))
        failures = FailureLimit(folder, growing.running)
        self.searcher = StudySearcher(self.actor, failures, TrialDeaths(folder), plan)
        self.sync = MlflowSync(NoTracker(), folder)
        self.events = StoreEvents(folder, growing.slow.folder(folder.name))
        self.forwarding = Forwarding(
            folder,
            self.events,
            self.sync,
            lambda: RaySummary(self.actor.summary.remote(self.searcher.running)),
            SearchTerminal(experiment, quiet=True),
        )
        nodes = NodeWatch(self.actor, None, plan, failures)
        self.callback = TuneCallback(folder, self.searcher, self.forwarding, RayWatch(str), [], nodes)
        self.begun: list[tuple[str, Assignment, TrialFolder]] = []
        self.times: dict[str, list[float]] = defaultdict(list)
        self.processor: dict[str, list[float]] = defaultdict(list)
        self.costs: dict[str, list[dict[str, int]]] = defaultdict(list)
        self.uploaded: dict[str, int] = {}
        self.count = 0
        self.is_timed = False

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self.forwarding.close()
        self.sync.close()
        ray.kill(self.actor)

    def start(self) -> None:
        """Start another trial: the searcher suggests it, its process begins, and its event arrives."""
        self.count += 1
        name = f"trial-{self.count}"
        with self.timed("suggestion"):
            config = self.searcher.suggest(name)
        assert isinstance(config, dict)
        assignment: Assignment = ray.get(self.actor.assignment.remote(config["number"], "node"))
        node = self.growing.begin(assignment)
        self.begun.append((name, assignment, node))
        self.event("start", {"number": assignment.number, "epoch": 0})

    def report(self) -> None:
        """Let the oldest trial report a rung."""
        _, assignment, node = self.begun[0]
        rung = assignment.rungs[0]
        self.growing.train(node, assignment, rung)
        metrics = {self.growing.experiment.metric: 0.5 + assignment.number % 89 / 200, "epoch": float(rung)}
        ray.get(self.actor.report.remote(assignment.number, rung, metrics, [metrics]))
        self.event("report", {"number": assignment.number, "epoch": rung})

    def finish(self) -> None:
        """Let the oldest trial end."""
        name, assignment, node = self.begun.pop(0)
        metrics = self.growing.end(node, assignment)
        ray.get(self.actor.finish.remote(assignment.number, TrialStatus.COMPLETE, metrics, None))
        result = {"number": assignment.number, "epoch": self.growing.epochs, "finished": True}
        self.event("finish", result, lambda: self.searcher.on_trial_complete(name, result))

    def event(self, kind: str, result: dict[str, Any], more: Callable[[], object] = lambda: None) -> None:
        """Send an event, and step until the next."""
        if not self.is_timed:
            self.callback.on_trial_result(0, [], None, result)
            self.callback.on_step_begin(0, [])
            more()
            return
        self.growing.slow.take()
        with self.timed(kind):
            self.callback.on_trial_result(0, [], None, result)
            more()
        # Three events of each trial, at twice the pace of trials of five minutes.
        ends = time.monotonic() + TRIAL_SECONDS / (3 * self.growing.running) / 2
        while time.monotonic() < ends:
            time.sleep(STEP_SECONDS)
            with self.timed(kind, goes_on=True):
                self.callback.on_step_begin(0, [])
        self.costs[kind].append(self.growing.slow.take())

    def warm_up(self) -> None:
        """Wait until the events so far are handled and the study's files are stored; time what follows."""
        store = self.growing.of_nodes.folder(self.growing.folder.name)
        ends = time.monotonic() + 10
        while time.monotonic() < ends or not store.exists(self.growing.folder.database.name):
            time.sleep(STEP_SECONDS)
            self.callback.on_step_begin(0, [])
        self.times.clear()
        self.processor.clear()
        self.is_timed = True

    def upload(self) -> None:
        """Upload the study's files once more, as happens at most once a minute."""
        self.is_timed = False
        self.growing.slow.take()
        self.events.close()
        self.uploaded = self.growing.slow.take()

    def figures(self) -> dict[str, Any]:
        """Milliseconds, requests and bytes of each kind of event."""
        found: dict[str, Any] = {"upload": self.uploaded}
        for kind, times in self.times.items():
            found[kind] = {"ms": 1e3 * statistics.median(times), "most_ms": 1e3 * max(times)}
            found[kind]["cpu_ms"] = 1e3 * statistics.median(self.processor[kind])
            costs = self.costs.get(kind, [])
            for key in ("requests", "read", "written") if costs else ():
                found[kind][key] = statistics.median(cost[key] for cost in costs)
        return found

    @contextmanager
    def timed(self, kind: str, *, goes_on: bool = False) -> Iterator[None]:
        """Add the time of a call to a new event, or to the last."""
        began, processor = time.perf_counter(), time.thread_time()
        yield
        taken = time.perf_counter() - began, time.thread_time() - processor
        for times, seconds in zip((self.times[kind], self.processor[kind]), taken, strict=True):
            if goes_on and times:
                times[-1] += seconds
            else:
                times.append(seconds)


def idle_share(row: dict[str, Any], running: int, latency: float, rungs: int = 3, rounds: int = 20) -> float:
    """Simulate `running` GPUs with trials of five minutes; return the share of time that they wait.

    The loop handles an event at a time, in their order. A GPU waits for the requests of its trial's process, and from
    the end of a trial until the loop has handled it, has suggested another and has dispatched it.
    """
    drawn = random.Random(0)
    handled = {kind: row[kind]["ms"] / 1e3 for kind in ("start", "report", "finish", "suggestion")}
    requests = {when: count * latency for when, count in row["trial"].items()}
    # Time, order, GPU and the number of reports until the trial's end; below 0: a start.
    waiting = [(drawn.uniform(0, TRIAL_SECONDS), gpu, gpu, rungs) for gpu in range(running)]
    heapq.heapify(waiting)
    free, idle, busy, order = 0.0, 0.0, 0.0, running
    while busy < running * rounds * TRIAL_SECONDS:
        arrives, _, gpu, left = heapq.heappop(waiting)
        order += 1
        begins = max(free, arrives)
        if left > 0:
            free = begins + handled["report"]
            trained = drawn.uniform(0.8, 1.2) * TRIAL_SECONDS / (rungs + 1)
            busy += trained
            idle += requests["rung"]
            heapq.heappush(waiting, (arrives + trained + requests["rung"], order, gpu, left - 1))
            continue
        free = begins + handled["finish"] + handled["suggestion"]
        starts = free + DISPATCH_SECONDS + requests["start"]
        free += handled["start"]
        trained = drawn.uniform(0.8, 1.2) * TRIAL_SECONDS / (rungs + 1)
        busy += trained
        idle += starts - arrives + requests["end"]
        heapq.heappush(waiting, (starts + trained, order, gpu, rungs))
    return idle / (idle + busy)


def show(row: dict[str, Any]) -> None:
    """Print the figures at a number of trials."""
    print(f"{row['trials']} trials")
    for kind in ("start", "report", "finish"):
        cost = row[kind]
        print(
            f"  {kind:<11}{cost['ms']:7.1f} ms, loop (most {cost['most_ms']:.1f}, processor {cost['cpu_ms']:.1f}, "
            f"goal {GOAL_MS:.0f}), "
            f"{cost['requests']:.0f} requests, {cost['read']:.0f} bytes"
        )
    print(f"  {'suggestion':<11}{row['suggestion']['ms']:7.1f} ms (most {row['suggestion']['most_ms']:.1f})")
    print(f"  upload, at most once a minute: {row['upload']['requests']} requests, {row['upload']['written']} bytes")
    waits = ", ".join(f"{when} {count}" for when, count in row["trial"].items())
    print(f"  a trial's process waits for requests: {waits}")
    print(f"  GPUs idle: {100 * row['idle']:.2f} % (goal: under 2 %)", flush=True)


if __name__ == "__main__":
    main()
