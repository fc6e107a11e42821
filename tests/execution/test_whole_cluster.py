"""A search on nodes that share nothing: data and root in a store, shared trials; a node dies, another joins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from object_store import s3_server
from own_ray import Head, ray_head
from test_data_on_nodes import variables
from test_doctor import second_node
from test_workers import WITHOUT_BATCH_NORM
from tiny_datasets import write_image_folder

from heterokd.storage.stored_data.push import push_data
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.workspace import Workspace, open_workspace

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.ray]
Write = Callable[..., Path]

ROOT = "s3://state/runs"
EPOCHS = 8
"""Of a trial: long enough for a node to die in the middle of one."""
SECONDS = 400


@dataclass(frozen=True)
class Outcome:
    """What a search has found, of its trials' folders and its last line."""

    winner: int
    points: dict[int, list[tuple[float, float, float]]]

    @classmethod
    def read(cls, study: StudyFolder, line: str) -> Outcome:
        """Read the epochs, scores and losses of all trials, and the winner that `--json` names."""
        trials = {trial.number: trial.metrics() for trial in study.trials()}
        points = {
            number: [
                (metrics["epoch"], metrics["val/top1"], metrics["val/loss"])
                for metrics in reports
                if "val/top1" in metrics
            ]
            for number, reports in trials.items()
        }
        return cls(json.loads(line)["winner"]["number"], points)


def searching(file: Path, root: str, environment: Mapping[str, str], log: Path, *more: str) -> subprocess.Popen[str]:
    """Start `heterokd search`."""
    command = [sys.executable, "-m", "heterokd", "search", str(file), "--root", root, "--json", *more]
    ours = {**environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    with log.open("w") as output:
        return subprocess.Popen(command, env=ours, stdout=subprocess.PIPE, stderr=output, text=True)


def last_line(process: subprocess.Popen[str], log: Path) -> str:
    """Wait for a search; return the last line of stdout."""
    try:
        printed, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    text = log.read_text()
    print(text[-6000:])
    assert process.returncode == 0, printed[-2000:] + text[-6000:]
    return printed.splitlines()[-1]


@contextmanager
def nodes(head: Head, homes: list[Path], s3: Mapping[str, str]) -> Iterator[list[ExitStack]]:
    """Start nodes with a core, a home and a disk of their own; closing an entry ends its node."""
    with ExitStack() as all_nodes:
        started = []
        for home in homes:
            node = all_nodes.enter_context(ExitStack())
            node.enter_context(second_node(head, [], {**head.environment, **s3, **variables(home)}, gpus=0))
            started.append(node)
        yield started


def test_a_search_on_nodes_that_share_nothing_finds_what_one_machine_finds(
    tiny_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials of two workers each, on two nodes; a node dies during a trial, another joins."""
    images = tmp_path / "images"
    images.mkdir()
    write_image_folder(images)
    with ExitStack() as stack:
        s3 = stack.enter_context(s3_server(tmp_path / "s3.log"))
        for name, value in s3.items():
            monkeypatch.setenv(name, value)
        data = {"dataset": "image_folder", "root": push_data(images, "s3://state/images").url, "labels_per_class": None}
        changes: dict[str, Any] = {
            "name": "whole",
            "data": data,
            "student": WITHOUT_BATCH_NORM,
            "training": {"epochs": EPOCHS, "learning_rate": 0.005},
        }
        settings = {"trials": 4, "confirm_leaders": 1, "confirm_seeds": 1, "parallel": 1, "min_epochs": 2}
        file = tiny_file(**changes, search=settings)
        head_at = variables(tmp_path / "head")
        head = stack.enter_context(ray_head(cpus=0, pages=True, environment={**head_at, **s3}))
        homes = [tmp_path / name for name in ("first", "second", "third")]
        _, second = stack.enter_context(nodes(head, homes[:2], s3))
        log = tmp_path / "log"
        process = searching(file, ROOT, head.environment, log, "--address", head.address, "--set", "training.workers=2")
        monkeypatch.setenv("HOME", head_at["HOME"])
        study = open_workspace(ROOT).study("whole")
        ends = time.monotonic() + SECONDS
        while study.trial(1).reported_epochs() < 3:
            assert process.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < ends
            time.sleep(0.1)
        second.close()
        stack.enter_context(nodes(head, homes[2:], s3))
        apart = Outcome.read(study, last_line(process, log))
        alone_log = tmp_path / "alone.log"
        root = Workspace(tmp_path / "alone")
        line = last_line(searching(file, str(root.path), dict(os.environ), alone_log), alone_log)
        alone = Outcome.read(root.study("whole"), line)
    assert apart.winner == alone.winner
    assert apart.points.keys() == alone.points.keys()
    for number, points in apart.points.items():
        for ours, theirs in zip(points, alone.points[number], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)
