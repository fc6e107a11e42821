"""What a search loses, and how soon it goes on, when something dies under it. Every fault is injected for real.

    python benchmarks/faults.py [--only trial node driver moments server disk spot] [--out results.json]

    trial    kill -9 of a trial's process
    node     kill -9 of a node's raylet (a cluster of two nodes; another one joins)
    driver   kill -9 of `heterokd search`, then `--resume`
    moments  the same at ten random moments of one study, the teacher's fit and the registration among them
    server   the MLflow server stopped for a minute (--outage) while trials run
    disk     a read-only mount over the study's folder for a while (needs root)
    spot     Ray's warning of a preemption (`ray drain-node`), and the node killed at its deadline

Each fault hits a real `heterokd search` of small trials in a process of its own. "Recovered" is when a trial reports an
epoch that it had not reported before, less the time of the epochs that it trains again; "again" are these epochs: what
was reported before is kept and not reported twice. Afterwards the folders, the study and MLflow are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before Ray is imported: it stays on the loopback interface, and a search's children inherit it.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import optuna
import psutil
import torch
import yaml
from mlflow import MlflowClient

from heterokd.precision import device_name
from heterokd.root import Root, StudyFolder, TrialFolder
from heterokd.tracking import open_store, ui_command

LONGEST = 400.0
"""Seconds after which a search counts as hanging."""

EXPERIMENT: dict[str, Any] = {
    "name": "hurt",
    "data": {"dataset": "digits", "image_size": 32, "labels_per_class": 10},
    "teacher": {
        "network": "test_vit",
        "options": {"img_size": 32, "patch_size": 8},
        "training": {"epochs": 4, "warmup_epochs": 0, "batch_size": 64, "precision": "fp32", "channels_last": False},
    },
    "student": {"network": "test_efficientnet"},
    "training": {"epochs": 40, "batch_size": 20, "learning_rate": 0.05, "precision": "fp32", "channels_last": False},
    "search": {
        "space": {
            "methods": ["kd", "dkd"],
            "shared": {"training.learning_rate": {"low": 0.01, "high": 0.2, "log": True}},
        },
        "trials": 2,
        "confirm_leaders": 0,
        "parallel": 1,
        "first_rung": 0.2,
        "prune": False,
    },
    "cache": {"enabled": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--only", nargs="+", choices=sorted(FAULTS), default=list(FAULTS))
    parser.add_argument("--outage", type=float, default=60.0, help="seconds without the MLflow server")
    parser.add_argument("--seed", type=int, default=0, help="of the ten moments")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # Whoever ends this process ends the searches that it runs, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results: dict[str, Any] = {"machine": f"{os.cpu_count()} cores, {device_name('cpu')}", "faults": {}}
    print(f"{'fault':<9}{'killed':<34}{'lost':>5}{'again':>7}{'recovered, s':>14}  trials  runs  whole", flush=True)
    for name in arguments.only:
        with tempfile.TemporaryDirectory(prefix="hk", dir="/tmp") as scratch:
            found = FAULTS[name](Path(scratch), arguments)
        results["faults"][name] = found
        shown = "-" if found["recovered"] is None else f"{found['recovered']:.1f}"
        print(
            f"{name:<9}{found['killed']:<34}{found['lost']:>5}{found['again']:>7}{shown:>14}  {found['trials']:>6}"
            f"{found['runs']:>6}  {'yes' if not found['problems'] else '; '.join(found['problems'])}",
            flush=True,
        )
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1))
    sys.exit(any(found["problems"] for found in results["faults"].values()))


# --- a search, and what is to be seen of it from outside


@dataclass
class Search:
    """A `heterokd search` in a process of its own.

    Attributes:
        file: the experiment.
        root: where state lies.
        scratch: for Ray's files and the search's output.
        more: arguments of the command.
    """

    file: Path
    root: Path
    scratch: Path
    more: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    killed: list[int] = field(default_factory=list)

    @property
    def folder(self) -> StudyFolder:
        """The study's."""
        return Root(self.root).study(str(EXPERIMENT["name"]))

    @property
    def output(self) -> str:
        """What it said so far, all starts together."""
        return (self.scratch / "output.txt").read_text(errors="replace")

    def start(self) -> None:
        """Run it; what was begun goes on."""
        command = [sys.executable, "-m", "heterokd", "search", str(self.file), "--resume", "--root", str(self.root)]
        ray_folder = Path(tempfile.mkdtemp(prefix="r", dir=self.scratch))
        self.began = time.monotonic()
        with (self.scratch / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                [*command, *self.more],
                env={**os.environ, "RAY_TMPDIR": str(ray_folder), "PYTHONUNBUFFERED": "1"},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Kill -9 of the driver alone; its Ray finds out by itself."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.killed.append(self.process.pid)
        self.process.wait()

    def wait(self) -> None:
        """To its end, in good order."""
        assert self.process is not None
        try:
            if self.process.wait(LONGEST):
                raise SystemExit(f"the search failed:\n{self.output[-4000:]}")
        finally:
            self.end()

    def end(self) -> None:
        """Leave nothing behind: its group, by its id."""
        for pid in [*self.killed, *([self.process.pid] if self.process else [])]:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)


@contextmanager
def searching(
    scratch: Path, *, root: Path | None = None, more: tuple[str, ...] = (), **search: Any
) -> Iterator[Search]:
    """A search that has been started, of the small experiment with some settings of `search` replaced."""
    content = {**EXPERIMENT, "search": {**EXPERIMENT["search"], **search.pop("search", {})}, **search}
    file = scratch / "hurt.yaml"
    file.write_text(yaml.safe_dump(content))
    running = Search(file, root or scratch / "runs", scratch, more)
    running.start()
    try:
        yield running
    finally:
        running.end()


def until(happened: Callable[[], Any], running: Search | None = None, longest: float = LONGEST) -> Any:
    """Wait for something; what it was."""
    ends = time.monotonic() + longest
    while not (found := happened()):
        if running is not None and running.process is not None and running.process.poll() is not None:
            raise SystemExit(f"the search ended too early:\n{running.output[-4000:]}")
        if time.monotonic() > ends:
            raise SystemExit(f"waited in vain; the search said:\n{running.output[-4000:] if running else ''}")
        time.sleep(0.02)
    return found


def epochs(trial: TrialFolder) -> int:
    """Epochs that it reported."""
    reports = trial.metrics()
    return int(reports[-1]["epoch"]) if reports else 0


def in_training(running: Search, after: int = 12) -> TrialFolder | None:
    """A trial in the middle of its training, past a rung."""
    for trial in running.folder.trials():
        if trial.status.get("state") == "running" and epochs(trial) >= after and trial.checkpoint.exists():
            return trial
    return None


def saved(trial: TrialFolder) -> int:
    """Epochs in its checkpoint."""
    return int(torch.load(trial.checkpoint, map_location="cpu", weights_only=True)["epoch"])


@dataclass
class Hurt:
    """A trial at the moment of a fault."""

    trial: TrialFolder
    reported: int
    saved: int
    epoch_seconds: float
    at: float

    @classmethod
    def now(cls, trial: TrialFolder) -> Hurt:
        """Right after the fault; by the times of its last epochs."""
        reported, checkpoint = epochs(trial), saved(trial)
        seconds = (trial.path / "metrics.jsonl").stat().st_mtime - float(trial.status["began"])
        return cls(trial, reported, checkpoint, seconds / max(reported, 1), time.monotonic())

    def recovered(self, running: Search, since: float | None = None) -> float:
        """Seconds until it reports what it had not reported, without the epochs that it trains again."""
        until(lambda: epochs(self.trial) > self.reported, running)
        again = self.reported - self.saved + 1
        return time.monotonic() - (since or self.at) - again * self.epoch_seconds


def outcome(
    running: Search, killed: str, hurt: Hurt | None = None, recovered: float | None = None, **more: Any
) -> dict[str, Any]:
    """Compare folders, study and MLflow after the end of a search."""
    problems: list[str] = []
    folder = running.folder
    trials = folder.trials()
    lost = 0
    for trial in trials:
        reports = [int(report["epoch"]) for report in trial.metrics()]
        lost += len(set(range(1, max(reports, default=0) + 1)) - set(reports))
        if trial.status.get("state") not in ("complete", "pruned"):
            problems.append(f"trial {trial.number} is {trial.status.get('state')}")
    name = str(EXPERIMENT["name"])
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{folder.database}")
    trained = [one for one in study.trials if (one.user_attrs.get("assignment") or {}).get("duplicate_of") is None]
    problems += [f"the study has trial {one.number} {one.state.name}" for one in trained if not one.state.is_finished()]
    if len(trained) != len(trials):
        problems.append(f"{len(trained)} trials in the study, {len(trials)} folders")
    runs = check_mlflow(folder, trials, problems, more.pop("uri", f"sqlite:///{running.root / 'mlflow.db'}"))
    return {
        "killed": killed,
        "lost": lost,
        "again": 0 if hurt is None else hurt.reported - hurt.saved,
        "recovered": None if recovered is None else round(recovered, 2),
        "trials": len(trials),
        "runs": runs,
        "problems": problems,
        **more,
    }


def check_mlflow(folder: StudyFolder, trials: list[TrialFolder], problems: list[str], uri: str) -> int:
    """One run for the study and one for each trial, each with the points of its folder, once; how many runs."""
    client = MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string=f"name = '{folder.name}'")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    problems += [f"run {run.info.run_name} is {run.info.status}" for run in runs if run.info.status != "FINISHED"]
    numbers = Counter(int(run.data.tags["heterokd.trial"]) for run in runs if "heterokd.trial" in run.data.tags)
    if numbers != Counter(trial.number for trial in trials) or len(runs) != 1 + len(trials):
        problems.append(f"{len(runs)} runs for {len(trials)} trials")
    by_number = {int(run.data.tags["heterokd.trial"]): run for run in runs if "heterokd.trial" in run.data.tags}
    for trial in trials:
        run = by_number.get(trial.number)
        if run is None:
            continue
        points = [point.step for point in client.get_metric_history(run.info.run_id, "val/top1")]
        if sorted(points) != [int(report["epoch"]) for report in trial.metrics()]:
            problems.append(f"MLflow has other points than trial {trial.number}")
    return len(runs)


# --- the faults


def kill_trial(scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A trial's process."""
    with searching(scratch) as running:
        trial = until(lambda: in_training(running), running)
        os.kill(int(trial.status["pid"]), signal.SIGKILL)
        hurt = Hurt.now(trial)
        recovered = hurt.recovered(running)
        running.wait()
        return outcome(running, "a trial's process", hurt, recovered)


def kill_driver(scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The driver, in the middle of its second trial."""
    with searching(scratch) as running:
        trial = until(lambda: next((one for one in [in_training(running)] if one and one.number), None), running)
        running.kill()
        hurt = Hurt.now(trial)
        # What it had started dies a moment later; until then a trial may report.
        time.sleep(3)
        hurt = Hurt.now(trial)
        running.start()
        recovered = hurt.recovered(running, running.began)
        running.wait()
        return outcome(running, "the driver", hurt, recovered)


def moments(root: Path, seed: int) -> list[tuple[str, Callable[[], bool]]]:
    """Ten moments of one study in their order; each is past once it is there, and a random while later is the kill."""
    drawn = random.Random(seed)
    folder = Root(root).study(str(EXPERIMENT["name"]))

    def reached(number: int, epoch: int) -> Callable[[], bool]:
        return lambda: epochs(folder.trial(number)) >= epoch

    places = sorted(drawn.sample([(number, epoch) for number in range(3) for epoch in range(1, 40, 3)], 5))
    return [
        ("before anything", lambda: True),
        ("in the teacher's fit", lambda: any(root.glob("teachers/*/.lock"))),
        ("in the teacher's fit again", lambda: any(root.glob("teachers/*/.lock"))),
        ("before the first trial", lambda: folder.database.exists()),
        *((f"trial {number}, epoch {epoch}", reached(number, epoch)) for number, epoch in places),
        ("at the registration", lambda: folder.report.exists()),
    ]


def kill_at_moments(scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The driver, ten times; then an undisturbed search of the same question."""
    drawn = random.Random(arguments.seed)
    settings = {"search": {"trials": 3}}
    places: list[str] = []
    with searching(scratch, **settings) as running:
        for place, is_there in moments(running.root, arguments.seed):
            if running.process is None or running.process.poll() is not None:
                running.start()
            until(is_there, running)
            time.sleep(drawn.random() * 0.5)
            if running.process is not None and running.process.poll() is None:
                running.kill()
                places.append(place)
        running.start()
        running.wait()
        hurt = outcome(running, f"the driver, {len(places)} times", moments=places)
    (scratch / "whole").mkdir()
    with searching(scratch / "whole", **settings) as undisturbed:
        undisturbed.wait()
        if found_by(running) != found_by(undisturbed):
            hurt["problems"].append("other trials or points than without a kill")
    return hurt


def found_by(running: Search) -> list[tuple[str, list[tuple[float, float]]]]:
    """Recipe and validation losses of each trial."""
    return [
        (trial.recipe.hash, [(report["epoch"], report["val/loss"]) for report in trial.metrics()])
        for trial in running.folder.trials()
    ]


def stop_server(scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The MLflow server, for a while."""
    store = Root(scratch / "server")
    store.path.mkdir()
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    database = open_store(store, None)
    server = serve(store, port, database)
    try:
        settings = {"search": {"trials": 4}, "training": {"epochs": 80}}
        with searching(scratch, tracking={"uri": uri}, **settings) as running:
            until(lambda: in_training(running), running)
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()
            before = len(running.folder.trials())
            time.sleep(arguments.outage)
            went_on = sum(epochs(trial) for trial in running.folder.trials())
            server = serve(store, port, database)
            back = time.monotonic()
            until(lambda: mlflow_points(database, running.folder) >= went_on, longest=LONGEST)
            recovered = time.monotonic() - back
            running.wait()
            return outcome(
                running,
                f"the MLflow server, {arguments.outage:.0f} s",
                recovered=recovered,
                uri=database,
                before=before,
            )
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def mlflow_points(database: str, folder: StudyFolder) -> int:
    """Epochs of all trials that MLflow holds."""
    client = MlflowClient(database)
    (experiment,) = client.search_experiments(filter_string=f"name = '{folder.name}'")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    return sum(len(client.get_metric_history(run.info.run_id, "val/top1")) for run in runs)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def serve(store: Root, port: int, database: str) -> subprocess.Popen[bytes]:
    """A real MLflow server that answers."""
    command, environment = ui_command(store, port, database)
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return True
        except OSError:
            return False

    until(answers, longest=120)
    return server


def lock_disk(scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The disk that holds the root: a read-only mount is laid over it.

    A remount would be refused as long as anybody has a file open for writing, which a server that goes read-only does
    not ask; a mount on top shows everyone who opens a file the same error (EROFS).
    """
    root = scratch / "shared"
    root.mkdir()
    mount("-t", "tmpfs", "none", str(root))
    try:
        with searching(scratch, root=root / "runs") as running:
            trial = until(lambda: in_training(running), running)
            mount("--bind", str(root), str(root))
            try:
                mount("-o", "remount,bind,ro", str(root))
                time.sleep(1)
                hurt = Hurt.now(trial)
                time.sleep(20)
                stood = epochs(trial) == hurt.reported
            finally:
                subprocess.run(["umount", str(root)], check=True)
            back = time.monotonic()
            until(lambda: epochs(trial) > hurt.reported, running)
            recovered = time.monotonic() - back
            running.wait()
            found = outcome(running, "the disk, read-only for 20 s", recovered=recovered)
            if not stood:
                found["problems"].append("something was written to a read-only disk")
            if "cannot be written (Read-only file system)" not in running.output:
                found["problems"].append("nobody said why nothing went on")
            return found
    finally:
        # Lazily: processes of the search that are just ending may stand in it.
        subprocess.run(["umount", "--lazy", str(root)], check=True)


def mount(*arguments: str) -> None:
    """Needs root."""
    subprocess.run(["mount", *arguments], check=True)


@contextmanager
def two_nodes(scratch: Path) -> Iterator[Any]:
    """A Ray of a head with one core, and a node with one core, as `cluster`."""
    from ray.cluster_utils import Cluster

    # A port of its own: the usual one may belong to another Ray of this machine.
    head = {"num_cpus": 1, "include_dashboard": False, "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def on_node(running: Search, node: Any) -> TrialFolder | None:
    """A trial in the middle of its training on a node: its process is a child of the node's raylet."""
    raylet = node.all_processes["raylet"][0].process.pid
    for trial in running.folder.trials():
        with suppress(psutil.NoSuchProcess, KeyError):
            parents = [parent.pid for parent in psutil.Process(int(trial.status["pid"])).parents()]
            if raylet in parents and in_training(running) and epochs(trial) >= 12 and trial.checkpoint.exists():
                return trial
    return None


def kill_node(scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A node: its raylet, and with it what runs there; another node joins."""
    settings = {"search": {"parallel": 2, "trials": 4}}
    with two_nodes(scratch) as cluster:
        (node,) = cluster.worker_nodes
        with searching(scratch, more=("--address", cluster.address), **settings) as running:
            trial = until(lambda: on_node(running, node), running)
            cluster.remove_node(node, allow_graceful=False)
            hurt = Hurt.now(trial)
            cluster.add_node(num_cpus=1)
            recovered = hurt.recovered(running)
            running.wait()
            return outcome(running, "a node (its raylet)", hurt, recovered)


def warn_spot(scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A node that is told to leave, and is gone at its deadline; no failure is allowed."""
    settings = {
        "search": {"parallel": 2, "trials": 4, "max_failures": 0, "first_rung": 0.1},
        "training": {"epochs": 120},
    }
    window = 15
    with two_nodes(scratch) as cluster:
        (node,) = cluster.worker_nodes
        with searching(scratch, more=("--address", cluster.address), **settings) as running:
            trial = until(lambda: on_node(running, node), running)
            before = saved(trial)
            command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address]
            command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
            command += ["--reason-message", "spot", "--deadline-remaining-seconds", str(window)]
            told = time.monotonic()
            subprocess.run(command, check=True, capture_output=True)
            until(lambda: saved(trial) not in (before, *rungs_of(trial)), running, window)
            written = time.monotonic() - told
            time.sleep(max(0.0, window + 0.5 - (time.monotonic() - told)))
            cluster.remove_node(node, allow_graceful=False)
            hurt = Hurt.now(trial)
            cluster.add_node(num_cpus=1)
            recovered = hurt.recovered(running)
            running.wait()
            return outcome(running, f"a spot node, {window} s warning", hurt, recovered, written=round(written, 2))


def rungs_of(trial: TrialFolder) -> Mapping[int, None]:
    """Epochs after which a checkpoint is written anyway."""
    first = round(0.1 * trial.recipe.training.epochs)
    return dict.fromkeys(first * 3**power for power in range(5))


FAULTS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "trial": kill_trial,
    "node": kill_node,
    "driver": kill_driver,
    "moments": kill_at_moments,
    "server": stop_server,
    "disk": lock_disk,
    "spot": warn_spot,
}


if __name__ == "__main__":
    main()
