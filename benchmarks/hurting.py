"""A small search in a process of its own, and all that is to be seen of it from outside: for `faults.py`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import psutil
import torch
import yaml
from mlflow import MlflowClient

from heterokd.cli.cache import verify
from heterokd.storage.machine_load import under_load
from heterokd.storage.sqlite_url import mlflow_sqlite_uri, sqlite_url
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.tracking.store import open_store

LONGEST = 600.0
"""Seconds after which a search counts as hanging; more on a busy machine, as of all waits here."""

TIMED = 4
"""Epochs after a recovery by which the duration of one is known."""

POLL = 0.03

EXPERIMENT: dict[str, Any] = {
    "name": "hurt",
    "data": {"dataset": "digits", "image_size": 32, "labels_per_class": 5},
    "teacher": {
        "network": "test_vit",
        "options": {"img_size": 32, "patch_size": 8},
        "training": {"epochs": 4, "warmup_epochs": 0, "batch_size": 64, "precision": "fp32", "channels_last": False},
    },
    "student": {"network": "test_efficientnet"},
    "training": {"epochs": 40, "batch_size": 10, "learning_rate": 0.05, "precision": "fp32", "channels_last": False},
    "search": {
        "space": {
            "methods": ["kd", "dkd"],
            "shared": {"training.learning_rate": {"low": 0.01, "high": 0.2, "log": True}},
        },
        "trials": 2,
        "confirm_leaders": 0,
        "parallel": 2,
        "first_rung": 0.2,
        "prune": False,
    },
    "cache": {"views": 2},
}


@dataclass(frozen=True)
class Asked:
    """What the command line says.

    Attributes:
        prepared: a root that each search begins with.
        outage: seconds without the MLflow server.
        seed: of the ten moments.
    """

    prepared: Path
    outage: float
    seed: int


def prepare(root: Path) -> None:
    """A root as an earlier search leaves it: MLflow's empty tables and the fitted teacher."""
    if root.exists():
        return
    with tempfile.TemporaryDirectory(prefix="hk") as scratch:
        fresh = Path(scratch) / "runs"
        open_store(Workspace(fresh), None)
        file = Path(scratch) / "hurt.yaml"
        file.write_text(yaml.safe_dump(EXPERIMENT))
        command = [sys.executable, "-m", "heterokd", "teacher", str(file), "--root", str(fresh)]
        subprocess.run(command, check=True, capture_output=True)
        shutil.move(fresh, root)


def end_in_order() -> None:
    """Whoever ends this process ends the searches that it runs, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


@dataclass
class Search:
    """A `heterokd search` in a process of its own.

    Attributes:
        file: the experiment.
        root: where state lies.
        scratch: for Ray's files and the search's output.
        more: arguments of the command.
        began: when it was last started.
    """

    file: Path
    root: Path
    scratch: Path
    more: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    ended: list[int] = field(default_factory=list)

    @property
    def folder(self) -> StudyFolder:
        """The study's."""
        return Workspace(self.root).study(yaml.safe_load(self.file.read_text())["name"])

    @property
    def output(self) -> str:
        """What it said so far, all starts together."""
        return (self.scratch / "output.txt").read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self.process is not None and self.process.poll() is None

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
        self.ended.append(self.process.pid)

    def processes(self) -> list[psutil.Process]:
        """All that it has started."""
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def signal(self, number: signal.Signals) -> int:
        """Send a signal to the driver alone; its exit code. Its Ray finds out by itself."""
        assert self.process is not None
        os.kill(self.process.pid, number)
        return self.process.wait(under_load(LONGEST))

    def wait(self, code: int = 0) -> None:
        """To its end, in good order."""
        assert self.process is not None
        try:
            if self.process.wait(under_load(LONGEST)) != code:
                raise SystemExit(f"the search failed:\n{self.output[-4000:]}")
        finally:
            self.end()

    def end(self) -> None:
        """Leave nothing behind: its groups, by their ids."""
        for pid in self.ended:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)


@contextmanager
def searching(
    scratch: Path, prepared: Path | None, *, root: Path | None = None, more: tuple[str, ...] = (), **changes: Any
) -> Iterator[Search]:
    """A search that has been started, of the small experiment with some of its sections' keys replaced.

    Args:
        scratch: for its files.
        prepared: a root to begin with; None: an empty one.
        root: where its state lies, when not in `scratch`.
        more: arguments of the command.
        **changes: by section.
    """
    content = {**EXPERIMENT}
    for section, values in changes.items():
        content[section] = {**content.get(section, {}), **values}
    file = scratch / "hurt.yaml"
    file.write_text(yaml.safe_dump(content))
    running = Search(file, root or scratch / "runs", scratch, more)
    if prepared is not None:
        shutil.copytree(prepared, running.root)
    running.start()
    try:
        yield running
    finally:
        running.end()


def until(happened: Callable[[], Any], running: Search | None = None, longest: float = LONGEST) -> Any:
    """Wait for something; what it was."""
    began = time.monotonic()
    while not (found := happened()):
        if running is not None and not running.is_running:
            raise SystemExit(f"the search ended too early:\n{running.output[-4000:]}")
        if time.monotonic() - began > under_load(longest):
            raise SystemExit(f"waited in vain; the search said:\n{running.output[-4000:] if running else ''}")
        time.sleep(POLL)
    return found


def until_gone(processes: Sequence[psutil.Process]) -> float:
    """Wait for processes to end by themselves; how many seconds that took.

    Ray's agents on a node tell the cluster's store of their raylet's death before they end, and try for a minute where
    it died as well.
    """
    began = time.monotonic()
    _, alive = psutil.wait_procs(processes, timeout=under_load(120.0))
    if alive:
        raise SystemExit(f"still there: {[' '.join(one.cmdline())[:80] for one in alive]}")
    return time.monotonic() - began


def epochs(trial: TrialFolder) -> int:
    """Epochs that it reported."""
    reports = trial.metrics()
    return int(reports[-1]["epoch"]) if reports else 0


def saved(trial: TrialFolder) -> int:
    """Epochs in its checkpoint."""
    return int(torch.load(trial.checkpoint, map_location="cpu", weights_only=True)["epoch"])


def is_in_training(trial: TrialFolder, after: int = 12) -> bool:
    """Whether it is in the middle of its training, past a rung."""
    return trial.status == "running" and epochs(trial) >= after and trial.checkpoint.exists()


def in_training(running: Search, first: int = 0) -> TrialFolder | None:
    """A trial in the middle of its training, whose number is at least `first`."""
    return next((one for one in running.folder.trials() if one.number >= first and is_in_training(one)), None)


@dataclass
class Hurt:
    """A trial at the moment of a fault.

    Attributes:
        trial: its files.
        reported: epochs.
        saved: epochs in its checkpoint.
        at: the moment.
    """

    trial: TrialFolder
    reported: int
    saved: int
    at: float

    @classmethod
    def now(cls, trial: TrialFolder) -> Hurt:
        """Right after the fault."""
        return cls(trial, epochs(trial), saved(trial), time.monotonic())

    @classmethod
    def by(cls, trial: TrialFolder, kill: Callable[[], object]) -> Hurt:
        """Kill what its process depends on; as long as the process lives, it may report."""
        process = psutil.Process(int(trial.snapshot.pid))
        at = time.monotonic()
        kill()
        until_gone([process])
        return cls(trial, epochs(trial), saved(trial), at)

    @property
    def again(self) -> int:
        """Epochs that are trained once more."""
        return self.reported - self.saved

    def recovered(self, running: Search) -> float:
        """Seconds from the fault until it reports what it had not reported, without the epochs that it trains for it.

        How long one takes is read from those that follow: the machine is then as busy as it was a moment ago.
        """
        until(lambda: epochs(self.trial) > self.reported, running)
        first, there = time.monotonic(), epochs(self.trial)
        until(lambda: epochs(self.trial) >= there + TIMED or self.trial.status != "running", running)
        followed = epochs(self.trial) - there
        each = (time.monotonic() - first) / followed if followed else 0.0
        return first - self.at - (there - self.saved) * each


def outcome(
    running: Search, killed: str, hurt: Hurt | None = None, recovered: float | None = None, **more: Any
) -> dict[str, Any]:
    """Compare folders, study, MLflow and cache after the end of a search."""
    problems: list[str] = []
    folder = running.folder
    trials = folder.trials()
    lost = 0
    for trial in trials:
        reports = [int(report["epoch"]) for report in trial.metrics()]
        lost += len(set(range(1, max(reports, default=0) + 1)) - set(reports))
        if trial.status not in ("complete", "pruned"):
            problems.append(f"trial {trial.number} is {trial.status}")
    name = folder.name
    study = optuna.load_study(study_name=name, storage=sqlite_url(folder.database))
    trained = [one for one in study.trials if (one.user_attrs.get("assignment") or {}).get("duplicate_of") is None]
    problems += [f"the study has trial {one.number} {one.state.name}" for one in trained if not one.state.is_finished()]
    if len(trained) != len(trials):
        problems.append(f"{len(trained)} trials in the study, {len(trials)} folders")
    caches = verify(Workspace(running.root), ())
    problems += [f"cache {name}: {problem}" for name, found in caches.items() for problem in found]
    if not caches:
        problems.append("there is no cache")
    runs = check_mlflow(folder, trials, problems, more.pop("uri", mlflow_sqlite_uri(running.root / "mlflow.db")))
    return {
        "killed": killed,
        "lost": lost,
        "again": 0 if hurt is None else hurt.again,
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
        # Not all epochs are evaluated.
        if sorted(points) != [int(report["epoch"]) for report in trial.metrics() if "val/top1" in report]:
            problems.append(f"MLflow has other points than trial {trial.number}")
    return len(runs)
