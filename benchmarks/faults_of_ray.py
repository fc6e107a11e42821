"""Faults of the processes that a search on a local Ray relies on, for `faults.py`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
from hurting import Asked, Hurt, Search, epochs, in_training, outcome, searching, until


def process(running: Search, part: str) -> psutil.Process | None:
    """A process of the search whose command line has a part."""
    for each in running.processes():
        try:
            if part in " ".join(each.cmdline()):
                return each
        except psutil.NoSuchProcess:
            continue
    return None


def kill_study(scratch: Path, asked: Asked) -> dict[str, Any]:
    """The study's actor: it is opened again, and the trials' processes go on."""
    with searching(scratch, asked.prepared, search={"trials": 1}) as running:
        trial = until(lambda: in_training(running), running)
        pid = trial.snapshot.pid
        until(lambda: process(running, "ray::StudyActor"), running).kill()
        began, reported = time.monotonic(), epochs(trial)
        until(lambda: epochs(trial) > reported, running)
        recovered = time.monotonic() - began
        running.wait()
        found = outcome(running, "the study's actor", recovered=recovered)
        if trial.snapshot.pid != pid:
            found["problems"].append("the trial's process was restarted")
        return found


def kill_gcs(scratch: Path, asked: Asked) -> dict[str, Any]:
    """The GCS: the search goes on with another local Ray."""
    return kill_of_ray(scratch, asked, "gcs_server", "the GCS of a local Ray")


def kill_raylet(scratch: Path, asked: Asked) -> dict[str, Any]:
    """The raylet: the search goes on with another local Ray."""
    return kill_of_ray(scratch, asked, "raylet/raylet", "the raylet of a local Ray")


def kill_of_ray(scratch: Path, asked: Asked, part: str, killed: str) -> dict[str, Any]:
    """A process of a local Ray without which nothing goes on."""
    with searching(scratch, asked.prepared, search={"trials": 1}) as running:
        trial = until(lambda: in_training(running), running)
        worker = psutil.Process(int(trial.snapshot.pid))
        hurt = Hurt.by(trial, until(lambda: process(running, part), running).kill)
        recovered = hurt.recovered(running)
        running.wait()
        found = outcome(running, killed, hurt, recovered)
        if worker.is_running():
            found["problems"].append("the trial's first process runs on")
        if "the search continues on a new local Ray" not in running.output:
            found["problems"].append("it did not say that Ray was started again")
        if "Traceback" in running.output:
            found["problems"].append("it printed a traceback")
        return found


def kill_builder(scratch: Path, asked: Asked) -> dict[str, Any]:
    """A builder of the teacher's cache: another one completes the cache."""
    with searching(scratch, asked.prepared, search={"trials": 1}) as running:
        until(lambda: process(running, "ray::Builder"), running).kill()
        trial = until(lambda: in_training(running), running)
        hurt = Hurt.now(trial)
        running.wait()
        found = outcome(running, "a builder of the cache", hurt)
        if not list(running.root.glob("caches/*/manifest.json")):
            found["problems"].append("the cache is not complete")
        return found
