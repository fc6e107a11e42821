"""Heavy work of a driver in tasks on a node: which work, what it leaves, and how faults of nodes are told."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fabricated
import pytest
import torch
from object_store import s3_server
from own_ray import ray_head
from test_doctor import second_node

from heterokd.config.reading import load_experiment
from heterokd.datasets import load_dataset
from heterokd.errors import CheckpointError, ConfigError
from heterokd.execution.node_checks import NodeProbe, needed_files, probe_node
from heterokd.execution.node_task import Tasks, _collected, tasks_on
from heterokd.execution.placement import Cluster
from heterokd.execution.prepare import prepare_here
from heterokd.execution.promote import evaluate_on_node
from heterokd.execution.this_node import NodeCheck, this_node
from heterokd.storage.workspace import Workspace, open_workspace
from heterokd.students.promotion.evaluation import EvaluatedStudent, evaluate_here
from heterokd.students.promotion.promote import promote
from heterokd.teachers.prepare import prepare_teacher
from heterokd.training.paired_tests import ImageResults

Write = Callable[..., Path]

SEARCH = """
import json, sys

from heterokd.config.reading import load_experiment
from heterokd.execution.driver import search
from heterokd.execution.node_task import Tasks
from heterokd.execution.promote import promote_on
from heterokd.storage.workspace import open_workspace

file, url, address = sys.argv[1:]
asked, root, ran, epochs, run = load_experiment(file), open_workspace(url), [], [], Tasks.run

def recording(tasks, what, report, function, *arguments):
    ran.append(what)
    return run(tasks, what, report, function, *arguments)

Tasks.run = recording
told = lambda metrics, network: epochs.append(metrics["epoch"]) is None
found = search(asked, root, address=address, teacher_progress=told)
decision = promote_on(address, root, asked.name)
print(json.dumps({"ran": ran, "epochs": epochs, "weights": found.teacher.weights, "folder": str(found.folder.path),
                  "gates": len(decision.gates), "images": decision.test_images, "score": decision.test_score}))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_teachers_caches_figures_and_test_are_computed_on_a_node(tiny_file: Write, tmp_path: Path) -> None:
    """The driver's node has no cores, and shares nothing with the other but a store."""
    settings = {"space": {"methods": ["scratch", "kd"]}, "trials": 2, "confirm_leaders": 0, "prune": False}
    file = tiny_file(name="away", search=settings, training={"epochs": 2})
    homes = [tmp_path / name for name in ("driver", "node")]
    for home in homes:
        home.mkdir()
    script = tmp_path / "search.py"
    script.write_text(SEARCH)
    with (
        s3_server(tmp_path / "s3.log") as s3,
        ray_head(cpus=0, environment={"HOME": str(homes[0]), **s3}) as head,
        second_node(head, [], {**head.environment, "HOME": str(homes[1])}, gpus=0),
    ):
        done = subprocess.run(
            [sys.executable, str(script), str(file), "s3://state/runs", head.address],
            env={**head.environment, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    preparing, verifying, drawing, *evaluating = found["ran"]
    assert preparing == "preparing the teacher test_vit"
    assert verifying == "verifying the cache of test_vit"
    assert drawing == "drawing the figures of away"
    assert evaluating[0].startswith("evaluating models:/")
    assert all(what.endswith(" on test") for what in evaluating)
    assert found["epochs"] == [1, 2]
    assert found["images"] == 357, "of test"
    assert found["gates"] >= 5
    folder = Path(found["folder"])
    assert (folder / "pictures" / "confusion.png").exists()
    assert set(json.loads((folder / "measured.json").read_text())["networks"]) == {"student", "teacher"}
    assert '<figure id="confusion">' in (folder / "report.html").read_text(), "drawn from what the node measured"
    for home in homes:
        assert len(list(home.glob(".cache/heterokd/*/*/teachers/*/teacher.safetensors"))) >= 1
    alone = prepare_teacher(load_experiment(file), Workspace(tmp_path / "alone"))
    assert found["weights"] == alone.card.weights


@pytest.mark.slow
@pytest.mark.ray
def test_a_fit_is_not_computed_without_the_gpu_that_it_was_promised(tiny_file: Write, tmp_path: Path) -> None:
    file = tiny_file(name="promised")
    command = [sys.executable, "-m", "heterokd", "teacher", str(file), "--root", str(tmp_path / "runs")]
    with ray_head(cpus=1) as head, second_node(head, [], head.environment, gpus=1):
        done = subprocess.run(
            [*command, "--address", head.address],
            env={**head.environment, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr[-6000:]
    assert "preparing the teacher test_vit: no node of the cluster can do it" in done.stderr
    assert "gpus: torch sees 0 GPU(s), and Ray promised 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").rglob("teacher.*"))


def test_without_an_address_the_drivers_process_does_the_work(tiny_file: Write, tmp_path: Path) -> None:
    for address in (None, "local"):
        with tasks_on(load_experiment(tiny_file()), Workspace(tmp_path), address) as tasks:
            assert tasks is None


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_task_returns_reports_warns_and_raises_as_a_call_does(
    tiny_file: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = load_experiment(tiny_file()).data.model_dump_json()
    questions = NodeProbe(Workspace(tmp_path), None, data, {}, "none")
    tasks = Tasks(Cluster(1, 1, 0), NodeCheck(this_node(), questions, probe_node(questions)))
    told: list[float] = []

    def report(metrics: dict[str, float]) -> bool:
        told.append(metrics["epoch"])
        return len(told) < 2

    # Functions of this function, since the task's process does not find this module.
    def counting(report: Callable[[dict[str, float]], bool], most: int) -> int:
        for number in range(1, most + 1):
            if not report({"epoch": number}):
                logging.getLogger("heterokd.test").warning("after %d of %d", number, most)
                return number
        return most

    def refusing(report: object) -> None:
        raise CheckpointError("weights x: missing")

    def breaking(report: object) -> None:
        raise KeyError("no such key")

    assert tasks.run("counting", report, counting, 5) == 2
    assert told == [1, 2]
    assert "after 2 of 5" in caplog.text
    with pytest.raises(CheckpointError, match=r"^weights x: missing$"):
        tasks.run("opening", None, refusing)
    with pytest.raises(Exception, match="no such key"):
        tasks.run("breaking", None, breaking)


def test_weights_in_the_store_are_found_by_a_node_in_its_own_copy(
    tiny_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = open_workspace(f"file://{tmp_path}/store")
    fitted = prepare_teacher(load_experiment(tiny_file()), root)
    given = load_experiment(tiny_file(), [f"teacher.checkpoint={fitted.weights}"])
    assert needed_files(given, root) == {}
    assert needed_files(given, Workspace(root.path)) == {"teacher.checkpoint": fitted.weights}
    shutil.rmtree(root.path)  # the driver's copy, which a node does not have
    found, place = prepare_here(lambda metrics: True, given.model_dump_json(), root)
    assert fitted.weights is not None
    assert place == fitted.weights.relative_to(root.path).as_posix()
    assert found.card.weights == fitted.card.weights
    assert not root.path.exists()


def test_warnings_of_a_task_are_collected() -> None:
    with _collected() as warnings:
        logging.getLogger("heterokd.teachers").warning("teacher %s: weak", "vit")
        logging.getLogger("heterokd.teachers").info("not this")
        logging.getLogger("other").warning("nor this")
    assert warnings == [("heterokd.teachers", logging.WARNING, "teacher vit: weak")]


@pytest.mark.slow
def test_promotion_decides_the_same_by_students_that_were_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered graph, the baseline's weights, then a champion: each is packed, and evaluated from plain values."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    root, question = fabricated.root_with_store(tmp_path), fabricated.experiment()
    splits = load_dataset("digits", image_size=32, labels_per_class=20)
    folder = fabricated.study(root, question)
    for number, (method, images) in enumerate((("scratch", 30), ("kd", 100))):
        student = fabricated.fitted_student(splits, images)
        fabricated.trial(folder, question, number, method, student=student)
    fabricated.summary(fabricated.ranked(1), fabricated.ranked(0, "scratch", 0.2)).write(folder)
    sent: list[str] = []

    def evaluate(student: EvaluatedStudent, experiment: Any) -> ImageResults:
        here = evaluate_here(student, experiment)
        packed = student.packed()
        sent.append("graph" if packed.graph is not None else "weights")
        there = evaluate_on_node(lambda metrics: True, packed, experiment.model_dump_json())
        assert torch.equal(there.images, here.images)
        assert (there.score, there.labels.tolist()) == (here.score, here.labels.tolist())
        return there

    tried = promote(root, "tiny", dry_run=True, evaluate=evaluate)
    assert sent == ["weights", "weights"]
    first = promote(root, "tiny", evaluate=evaluate)
    assert sent[2:] == ["graph", "weights"]
    assert first.test_score == tried.test_score
    again = promote(root, "tiny", trial=0, dry_run=True, evaluate=evaluate)
    assert sent[4:] == ["weights", "graph"]
    assert again.champion == "1"


def test_a_graph_moves_to_a_device_with_its_constants(tmp_path: Path) -> None:
    """On the device `meta`, an operation with a tensor that was left on the CPU raises."""
    from torch.export.passes import move_to_device_pass

    from heterokd.networks.network import build_network, deployable

    network = build_network("test_vit", 10, {"img_size": 32, "patch_size": 8}).eval()
    program = torch.export.export(deployable(network), (torch.rand(2, 3, 32, 32),))
    moved = move_to_device_pass(program, "meta").module()
    assert moved(torch.rand(2, 3, 32, 32, device="meta")).shape == (2, 10)


def test_a_cluster_is_asked_for_before_a_promotion(tmp_path: Path) -> None:
    from heterokd import api

    with pytest.raises(ConfigError, match="--address nowhere: expected HOST:PORT or auto"):
        api.promote("tiny", tmp_path, address="nowhere")
