"""Many at once on one MLflow store, and a server that answers wrongly: nothing is lost, doubled or left open.

    python benchmarks/mlflow_faults.py                  all
    python benchmarks/mlflow_faults.py --only server    one of: open, promote, server

`open`: processes that open a fresh store at once. `promote`: two promotions and a rollback of the same model at once,
in one workspace on SQLite, then from two workspaces over a server. `server`: the runs of trials, logged to MLflow's
server behind a layer that answers with 500, 429, nothing, or too late, whether or not the request is carried out. Its
waits and the client's timeout are a twentieth of the real ones.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[1]
sys.path += [str(TOP), str(TOP / "tests")]

SCALE = 20
TIMEOUT_S, LATE_S = 20 / SCALE, 30 / SCALE
"""The client's timeout (heterokd's is 20 s), and the late answer (after 30 s)."""
os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = f"{TIMEOUT_S:.0f}"
os.environ["MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR"] = "0"
os.environ["MLFLOW_HTTP_REQUEST_BACKOFF_JITTER"] = "0"

import fabricated  # noqa: E402  in tests/
from golden_files import unpack  # noqa: E402
from mlflow import MlflowClient  # noqa: E402

from heterokd.storage.workspace import Workspace  # noqa: E402
from heterokd.tracking.runs import StudyRuns  # noqa: E402
from heterokd.tracking.store import open_store  # noqa: E402

MODEL = "digits-student"
FAULTS = ("500", "429", "nothing", "late")


class Faulty:
    """WSGI application that does wrong to a share of another's requests.

    Args:
        app: the application.
        share: share of the requests.
        seed: of the choice.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]], share: float, seed: int = 0) -> None:
        self.app, self.share, self.random = app, share, random.Random(seed)
        self.counts = Counter[str]()
        self.lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self.lock:
            wrong = self.random.random() < self.share and not environ["PATH_INFO"].endswith("/health")
            fault = self.random.choice(FAULTS) if wrong else ""
            is_done = self.random.random() < 0.5  # whether the request is carried out nevertheless
            self.counts["requests"] += 1
            if fault:
                self.counts[f"{fault}{', carried out' if is_done else ''}"] += 1
        if not fault:
            return self.app(environ, start_response)
        if fault == "late":  # the client no longer waits when the request is carried out
            time.sleep(LATE_S)
        if is_done:
            b"".join(self.app(environ, lambda *_: None))
        if fault == "nothing":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        status = "429 Too Many Requests" if fault == "429" else "500 Internal Server Error"
        start_response(status, [("Content-Type", "text/plain")])
        return [b"wrong"]


@contextmanager
def server(folder: Path, share: float = 0.0) -> Iterator[tuple[str, Faulty]]:
    """Serve a store in `folder` from this process; yield its address and the layer of faults."""
    from werkzeug.serving import make_server

    uri = open_store(Workspace(folder), None)
    os.environ["_MLFLOW_SERVER_FILE_STORE"] = uri
    os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = str(folder / "artifacts")
    from mlflow.server import app

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    layer = Faulty(app, share)
    listening = make_server("127.0.0.1", 0, layer, threaded=True)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}", layer
    finally:
        listening.shutdown()
        thread.join()
        for name in ("_MLFLOW_SERVER_FILE_STORE", "_MLFLOW_SERVER_ARTIFACT_ROOT"):
            os.environ.pop(name, None)


def _open(folder: str, barrier: Any, results: Any) -> None:
    barrier.wait()
    try:
        uri = open_store(Workspace(Path(folder)), None)
        MlflowClient(uri).create_experiment(f"of-{os.getpid()}")
        results.put("opened")
    except Exception as error:  # noqa: BLE001  what goes wrong is the result
        results.put(repr(error))


def open_at_once(processes: int = 6) -> dict[str, int]:
    """Open a fresh store in several processes at once, and create an experiment in each."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        barrier, results = context.Barrier(processes), context.Queue()
        started = [context.Process(target=_open, args=(folder, barrier, results)) for _ in range(processes)]
        for process in started:
            process.start()
        answers = Counter(results.get(timeout=300) for _ in started)
        for process in started:
            process.join()
        client = MlflowClient(open_store(Workspace(Path(folder)), None))
        found = [each.name for each in client.search_experiments() if each.name.startswith("of-")]
    return {"processes": processes, "opened": answers["opened"], "experiments": len(found)}


def promote_at_once(over_server: bool) -> dict[str, Any]:
    """Promote two trials and roll back at once; return what is left in the registry."""
    with tempfile.TemporaryDirectory() as name:
        first = unpack("finished", Path(name))
        second = Path(name) / "second"
        shutil.copytree(first, second)
        environment = {**os.environ, "PYTHONPATH": str(TOP)}
        if over_server:
            with server(first) as (address, _):
                return _race((first, second), {**environment, "MLFLOW_TRACKING_URI": address}, address)
        return _race((first, first), environment, open_store(Workspace(first), None))


def _race(roots: tuple[Path, Path], environment: dict[str, str], uri: str) -> dict[str, Any]:
    commands = (
        ("promote", "finished", "--trial", "2", "--root", str(roots[0])),
        ("promote", "finished", "--trial", "0", "--root", str(roots[1])),
        ("rollback", MODEL, "--root", str(roots[1])),
    )
    environment = {**environment, "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "heterokd", *words], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for words in commands
    ]
    said = [process.communicate(timeout=600)[1].decode() for process in running]
    codes = [process.returncode for process in running]
    client = MlflowClient(uri)
    versions = client.search_model_versions(f"name = '{MODEL}'")
    model = client.get_registered_model(MODEL)
    runs = Counter(version.run_id for version in versions)
    return {
        "exit codes": codes,
        "tracebacks": sum("Traceback" in text for text in said),
        "aliases": {key: str(value) for key, value in sorted(model.aliases.items())},
        "versions": len(versions),
        "doubled": sum(count > 1 for count in runs.values()),
        "locks left": sum(key.startswith("heterokd.lock.") for key in model.tags),
        "pending": sum(str(version.status) != "READY" for version in versions),
    }


def trials_against_faults(trials: int, share: float) -> dict[str, Any]:
    """Log the runs of trials to a faulty server, in the order of a search; compare runs and folders."""
    began = time.perf_counter()
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        with server(Path(name) / "server", share) as (address, layer):
            root = Workspace(Path(name) / "runs")
            question = fabricated.experiment()
            folder = fabricated.study(root, question)
            runs = StudyRuns(question, folder, address, None)
            refused = 0
            for number in range(trials):
                made = fabricated.trial(folder, question, number, status="running", epochs=1)
                refused += not runs.sync(made)
                for epoch in (2, 3):
                    fabricated.report(made, epoch)
                fabricated.change(made, status=("complete", "pruned", "failed")[number % 3])
                refused += not runs.sync(made)
            tries = 1
            while not runs.finish(None) and tries < 50:
                tries += 1
            layer.share = 0.0
            counts = dict(layer.counts)
        client = MlflowClient(open_store(Workspace(Path(name) / "server"), None))
        experiment = client.get_experiment_by_name(question.experiment_name)
        found = client.search_runs([experiment.experiment_id], max_results=5000)
        of_trials = [run for run in found if run.data.tags["heterokd.kind"] == "trial"]
        numbers = Counter(int(run.data.tags["heterokd.trial"]) for run in of_trials)
        steps = [
            sorted({point.step for point in client.get_metric_history(run.info.run_id, "val/top1")})
            for run in of_trials
        ]
    return {
        "trials": trials,
        **counts,
        "calls that the server refused": refused,
        "calls until the end was stored": tries,
        "lost": trials - len(numbers) + sum(points != [1, 2, 3] for points in steps),
        "doubled": sum(count - 1 for count in numbers.values()) + len(found) - len(of_trials) - 1,
        "left open": sum(run.info.status == "RUNNING" for run in found),
        "seconds": round(time.perf_counter() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--only", choices=("open", "promote", "server"))
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--share", type=float, default=0.1, help="of the requests that are answered wrongly")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for name, measure in (
        ("open", lambda: {"fresh store": open_at_once()}),
        ("promote", lambda: {"SQLite": promote_at_once(False), "server": promote_at_once(True)}),
        ("server", lambda: {"faults": trials_against_faults(arguments.trials, arguments.share)}),
    ):
        if arguments.only in (None, name):
            results |= measure()
            print(json.dumps(results, indent=1), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
