"""What a search loses, and how soon it goes on, when something dies under it. Every fault is injected for real.

    python benchmarks/faults.py [--only FAULT ...] [--out results.json] [--outage 60] [--prepared FOLDER]

    trial    kill -9 of a trial's process
    worker   kill -9 of one of the two workers that share a trial
    node     kill -9 of a node's raylet (a cluster of two nodes; another one joins)
    driver   kill -9 of `heterokd search`, then `--resume`
    moments  the same at ten random moments of one study, the teacher's fit and the registration among them
    term     SIGTERM to `heterokd search`, as a job scheduler sends it, then `--resume`
    server   the MLflow server killed, and started again a minute later (--outage), while trials run
    disk     a read-only mount over the study's folder for a while (needs root)
    spot     Ray's warning of a preemption (`ray drain-node`), and the node killed at its deadline
    start    kill -9 of every trial's process before its first epoch, until the search gives up; then `--resume`
    study    kill -9 of the actor that holds the study
    gcs      kill -9 of the GCS of a local Ray
    raylet   kill -9 of the raylet of a local Ray
    builder  kill -9 of a builder of the teacher's cache

Each fault hits a real `heterokd search` of small trials in a process of its own. "Recovered" is when a trial reports an
epoch that it had not reported before, less the time of the epochs that it trains for it; "again" are epochs since its
last checkpoint: what was reported before is kept and not reported twice. Afterwards the folders, the study, MLflow and
the teacher's cache are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Before Ray is imported: it stays on the loopback interface, and a search's children inherit it.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import psutil
import torch
from faults_of_ray import kill_builder, kill_gcs, kill_raylet, kill_study
from hurting import (
    EXPERIMENT,
    LONGEST,
    Asked,
    Hurt,
    Search,
    end_in_order,
    epochs,
    in_training,
    is_in_training,
    outcome,
    prepare,
    saved,
    searching,
    until,
    until_gone,
)
from mlflow import MlflowClient

from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.tracking.store import open_store
from heterokd.tracking.ui_server import ui_command
from heterokd.training.precision import device_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--only", nargs="+", choices=sorted(FAULTS), default=list(FAULTS))
    parser.add_argument("--outage", type=float, default=60.0, help="seconds without the MLflow server")
    parser.add_argument("--seed", type=int, default=0, help="of the ten moments")
    parser.add_argument("--prepared", type=Path, help="a root to begin with; made where there is none")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    end_in_order()
    results: dict[str, Any] = {"machine": f"{os.cpu_count()} cores, {device_name('cpu')}", "faults": {}}
    print(f"{'fault':<9}{'killed':<36}{'lost':>5}{'again':>7}{'recovered, s':>14}  trials  runs  whole", flush=True)
    with tempfile.TemporaryDirectory(prefix="hk") as folder:
        asked = Asked(arguments.prepared or Path(folder) / "runs", arguments.outage, arguments.seed)
        prepare(asked.prepared)
        for name in arguments.only:
            began = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="hk", dir="/tmp", ignore_cleanup_errors=True) as scratch:
                found = FAULTS[name](Path(scratch), asked)
            results["faults"][name] = found | {"seconds": round(time.monotonic() - began, 1)}
            shown = "-" if found["recovered"] is None else f"{found['recovered']:.1f}"
            print(
                f"{name:<9}{found['killed']:<36}{found['lost']:>5}{found['again']:>7}{shown:>14}  {found['trials']:>6}"
                f"{found['runs']:>6}  {'yes' if not found['problems'] else '; '.join(found['problems'])}",
                flush=True,
            )
            if arguments.out:
                arguments.out.write_text(json.dumps(results, indent=1))
    sys.exit(any(found["problems"] for found in results["faults"].values()))


TRIALS = 3
"""Of the study whose driver is killed ten times."""


# --- a process of the search


def kill_trial(scratch: Path, asked: Asked) -> dict[str, Any]:
    """A trial's process."""
    with searching(scratch, asked.prepared) as running:
        trial = until(lambda: in_training(running), running)
        hurt = Hurt.by(trial, lambda: os.kill(int(trial.snapshot.pid), signal.SIGKILL))
        recovered = hurt.recovered(running)
        running.wait()
        return outcome(running, "a trial's process", hurt, recovered)


def kill_worker(scratch: Path, asked: Asked) -> dict[str, Any]:
    """The last of two workers that share a trial."""
    with searching(scratch, asked.prepared, training={"workers": 2}, search={"trials": 1}) as running:
        trial = until(lambda: in_training(running), running)
        workers = [one for one in running.processes() if "ray::RayTrainWorker" in " ".join(one.cmdline())]
        assert len(workers) == 2, workers
        workers[-1].kill()
        hurt = Hurt.now(trial)
        recovered = hurt.recovered(running)
        running.wait()
        return outcome(running, "one of a trial's two workers", hurt, recovered)


def kill_driver(scratch: Path, asked: Asked) -> dict[str, Any]:
    """The driver, in the middle of its second trial."""
    with searching(scratch, asked.prepared) as running:
        trial = until(lambda: in_training(running, first=1), running)
        orphans, process = running.processes(), psutil.Process(int(trial.snapshot.pid))
        running.signal(signal.SIGKILL)
        until_gone([process])
        hurt = Hurt.now(trial)  # until its process was gone, the trial may have reported
        running.start()
        recovered = hurt.recovered(running)
        until_gone(orphans)
        running.wait()
        return outcome(running, "the driver", hurt, recovered)


def end_driver(scratch: Path, asked: Asked) -> dict[str, Any]:
    """The driver is asked to end, in the middle of its second trial: all is kept, and it says how to go on."""
    # Long trials, or the one in training is at its end before the driver is.
    with searching(scratch, asked.prepared, training={"epochs": 200}) as running:
        trial = until(lambda: in_training(running, first=1), running)
        orphans, told = running.processes(), time.monotonic()
        code = running.signal(signal.SIGTERM)
        ended = time.monotonic() - told
        until_gone(orphans)
        hurt = Hurt.now(trial)
        running.start()
        recovered = hurt.recovered(running)
        running.wait()
        found = outcome(running, "the driver, by SIGTERM", hurt, recovered, code=code, ended=round(ended, 2))
        if code != 130 or "interrupted: all results are kept" not in running.output:
            found["problems"].append(f"it ended with {code} and did not say how to go on")
        return found


def moments(root: Path, seed: int) -> list[tuple[str, Callable[[], bool]]]:
    """Ten moments of one study in their order; each is past once it is there, and a random while later is the kill."""
    drawn = random.Random(seed)
    folder = Workspace(root).study(str(EXPERIMENT["name"]))

    def reached(some: int) -> Callable[[], bool]:
        return lambda: sum(map(epochs, folder.trials())) >= some

    everything = int(EXPERIMENT["training"]["epochs"]) * TRIALS
    return [
        ("before anything", lambda: True),
        ("in the teacher's fit", lambda: any(root.glob("teachers/*/.lock"))),
        ("in the teacher's fit again", lambda: any(root.glob("teachers/*/.lock"))),
        ("before the first trial", lambda: folder.database.exists()),
        *(
            (f"after {some} of {everything} epochs", reached(some))
            for some in sorted(drawn.sample(range(everything), 5))
        ),
        ("at the registration", lambda: folder.report.exists()),
    ]


def kill_at_moments(scratch: Path, asked: Asked) -> dict[str, Any]:
    """The driver, ten times, and started again at once; then an undisturbed search of the same question."""
    drawn = random.Random(asked.seed)
    settings = {"search": {"trials": TRIALS}}
    places: list[str] = []
    with searching(scratch, None, **settings) as running:
        for place, is_there in moments(running.root, asked.seed):
            if not running.is_running:
                running.start()
            until(is_there, running)
            time.sleep(drawn.random() * 0.5)
            if running.is_running:
                running.signal(signal.SIGKILL)
                places.append(place)
        running.start()
        running.wait()
        found = outcome(running, f"the driver, {len(places)} times", moments=places)
    (scratch / "whole").mkdir()
    with searching(scratch / "whole", asked.prepared, **settings) as undisturbed:
        undisturbed.wait()
        if found_by(running) != found_by(undisturbed):
            found["problems"].append("other trials or points than without a kill")
    return found


def found_by(running: Search) -> list[tuple[str, list[tuple[float, float]]]]:
    """Recipe and validation losses of each trial."""
    return [
        (trial.recipe.hash, [(report["epoch"], report["val/loss"]) for report in trial.metrics()])
        for trial in running.folder.trials()
    ]


def kill_at_start(scratch: Path, asked: Asked) -> dict[str, Any]:
    """Every trial's process, as soon as it has begun; then no more of them."""
    killed: set[int] = set()
    with searching(scratch, asked.prepared, search={"trials": 4}) as running:

        def has_ended() -> bool:
            for trial in running.folder.trials():
                pid = int(trial.snapshot.pid or 0)
                if pid and pid not in killed and not epochs(trial):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
            return not running.is_running

        until(has_ended)
        seconds, begun = time.monotonic() - running.began, len(running.folder.trials())
        running.start()
        running.wait()
        found = outcome(
            running, f"trials' processes at their start, {len(killed)}", stopped_seconds=round(seconds, 1), begun=begun
        )
        if running.output.count("error: ") != 1 or "before any trial had reported an epoch" not in running.output:
            found["problems"].append("it did not say why it gave up")
        return found


# --- what a search relies on


def stop_server(scratch: Path, asked: Asked) -> dict[str, Any]:
    """The MLflow server, for a while."""
    store = Workspace(scratch / "server")
    store.path.mkdir()
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    database = open_store(store, None)
    server = serve(store, port, database)
    try:
        # Some of it is left when the server comes back.
        settings = {"search": {"trials": 4 + int(asked.outage / 2.5)}}
        with searching(scratch, asked.prepared, tracking={"uri": uri}, **settings) as running:
            until(lambda: in_training(running), running)
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            before, ends = sum(map(epochs, running.folder.trials())), time.monotonic() + asked.outage
            until(lambda: time.monotonic() > ends)
            went_on = sum(map(epochs, running.folder.trials()))
            server = serve(store, port, database)
            back = time.monotonic()
            until(lambda: mlflow_points(database, running.folder) >= went_on, longest=LONGEST)
            recovered = time.monotonic() - back
            running.wait()
            found = outcome(
                running,
                f"the MLflow server, {asked.outage:.0f} s",
                recovered=recovered,
                uri=database,
                meanwhile=went_on - before,
            )
            if not found["meanwhile"]:
                found["problems"].append("trials waited for the server")
            return found
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def serve(store: Workspace, port: int, database: str) -> subprocess.Popen[bytes]:
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


def lock_disk(scratch: Path, asked: Asked) -> dict[str, Any]:
    """The disk that holds the root: a read-only mount is laid over it.

    A remount would be refused as long as anybody has a file open for writing, which a server that goes read-only does
    not ask; a mount on top shows everyone who opens a file the same error (EROFS).
    """
    root = scratch / "shared"
    root.mkdir()
    seconds = 12
    mount("-t", "tmpfs", "none", str(root))
    try:
        with searching(scratch, asked.prepared, root=root / "runs") as running:
            trial = until(lambda: in_training(running), running)
            mount("--bind", str(root), str(root))
            try:
                mount("-o", "remount,bind,ro", str(root))
                time.sleep(1)
                hurt = Hurt.now(trial)
                time.sleep(seconds)
                stood = epochs(trial) == hurt.reported
            finally:
                subprocess.run(["umount", str(root)], check=True)
            back = time.monotonic()
            until(lambda: epochs(trial) > hurt.reported, running)
            recovered = time.monotonic() - back
            running.wait()
            found = outcome(running, f"the disk, read-only for {seconds + 1} s", recovered=recovered)
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


# --- a node


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A Ray of a head with one core, and a node with one core, as `cluster`."""
    from ray.cluster_utils import Cluster

    # A port of its own: the usual one may belong to another Ray of this machine.
    head = {"num_cpus": 1, "include_dashboard": False, "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1)
        end_in_order()  # each of its nodes takes SIGTERM for itself
        cluster.wait_for_nodes()
        yield cluster
    finally:
        for node in [*cluster.worker_nodes, cluster.head_node]:
            cluster.remove_node(node, allow_graceful=False)


def on_node(running: Search, node: Any) -> TrialFolder | None:
    """A trial in the middle of its training on a node: its process is a child of the node's raylet."""
    raylet = node.all_processes["raylet"][0].process.pid
    for trial in running.folder.trials():
        with suppress(psutil.NoSuchProcess, KeyError):
            pid = trial.snapshot.pid
            if pid is None:  # its folder exists, and its process has not written yet
                continue
            parents = [parent.pid for parent in psutil.Process(int(pid)).parents()]
            if raylet in parents and is_in_training(trial):
                return trial
    return None


def kill_node(scratch: Path, asked: Asked) -> dict[str, Any]:
    """A node: its raylet, and with it what runs there; another node joins."""
    settings = {"search": {"trials": 4}}
    with two_nodes() as cluster:
        (node,) = cluster.worker_nodes
        with searching(scratch, asked.prepared, more=("--address", cluster.address), **settings) as running:
            trial = until(lambda: on_node(running, node), running)
            hurt = Hurt.by(trial, lambda: cluster.remove_node(node, allow_graceful=False))
            cluster.add_node(num_cpus=1)
            recovered = hurt.recovered(running)
            running.wait()
            return outcome(running, "a node (its raylet)", hurt, recovered)


def warn_spot(scratch: Path, asked: Asked) -> dict[str, Any]:
    """A node that is told to leave, and is gone at its deadline; no failure is allowed."""
    window = 10
    settings: dict[str, Any] = {
        "search": {"max_failures": 0, "first_rung": 0.05},
        "training": {"epochs": 200},
    }
    with two_nodes() as cluster:
        (node,) = cluster.worker_nodes
        with searching(scratch, asked.prepared, more=("--address", cluster.address), **settings) as running:
            trial = until(lambda: on_node(running, node), running)
            before = saved(trial)
            command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address]
            command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
            command += ["--reason-message", "spot", "--deadline-remaining-seconds", str(window)]
            subprocess.run(command, check=True, capture_output=True)
            told = time.monotonic()
            until(lambda: saved(trial) not in (before, *rungs_of(trial, 0.05)), running, window)
            written = time.monotonic() - told
            time.sleep(max(0.0, window + 0.5 - (time.monotonic() - told)))
            hurt = Hurt.by(trial, lambda: cluster.remove_node(node, allow_graceful=False))
            cluster.add_node(num_cpus=1)
            recovered = hurt.recovered(running)
            running.wait()
            return outcome(running, f"a spot node, {window} s warning", hurt, recovered, written=round(written, 2))


def rungs_of(trial: TrialFolder, first: float) -> Mapping[int, None]:
    """Epochs after which a checkpoint is written anyway."""
    return dict.fromkeys(round(first * trial.recipe.training.epochs) * 3**power for power in range(5))


FAULTS: dict[str, Callable[[Path, Asked], dict[str, Any]]] = {
    "trial": kill_trial,
    "worker": kill_worker,
    "node": kill_node,
    "driver": kill_driver,
    "moments": kill_at_moments,
    "term": end_driver,
    "server": stop_server,
    "disk": lock_disk,
    "spot": warn_spot,
    "start": kill_at_start,
    "study": kill_study,
    "gcs": kill_gcs,
    "raylet": kill_raylet,
    "builder": kill_builder,
}


if __name__ == "__main__":
    main()
