"""Studies as a search leaves them, made without training: tiny students with random or hand-made weights."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock

from heterokd.config.experiment import Experiment
from heterokd.config.reading import dump_experiment
from heterokd.datasets.io.split import Splits
from heterokd.methods import BASELINE
from heterokd.networks.classifier import Network
from heterokd.networks.network import AnyNetwork, build_network
from heterokd.networks.weights import save_weights
from heterokd.outputs import Signal
from heterokd.storage.files import write_text
from heterokd.storage.sqlite_url import mlflow_sqlite_uri
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.teacher_card import TeacherCard
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.study.progress import StudyProgress
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.summary import StudySummary
from heterokd.tasks import TASKS
from heterokd.tracking.store import open_store
from heterokd.training.task_modules import SegmentationTask


def experiment(name: str = "tiny", **sections: Any) -> Experiment:
    content: dict[str, Any] = {
        "name": name,
        "data": {"dataset": "digits", "image_size": 32, "labels_per_class": 20},
        "teacher": {
            "network": "vit_tiny_patch16_224",
            "options": {"img_size": 32, "patch_size": 4, "depth": 6},
        },
        "student": {"network": "test_resnet"},
        "training": {"epochs": 3},
        "search": {"space": {"methods": ["scratch", "kd"]}, "trials": 4},
        "tracking": {"registered_model": "digits-student"},
    }
    return Experiment.model_validate({**content, **sections})


def scenes(name: str = "scenes", **sections: Any) -> Experiment:
    """The same question of segmentation: an attention network teaches a CNN to label digits pixel by pixel."""
    content = {
        "data": {"dataset": "digit_scenes", "image_size": 72, "crop": [64, 48], "train_images": 16},
        "teacher": {"network": "segformer-mit_b0", "options": {"decoder_segmentation_channels": 32}},
        "student": {"network": SCENE_STUDENT, "options": SCENE_OPTIONS},
        "search": {"space": {"methods": ["scratch", "pixel_kd", "heteroakd"]}, "trials": 4},
        "tracking": {"registered_model": "scenes-student"},
    }
    return experiment(name, **{**content, **sections})


SCENE_STUDENT, SCENE_OPTIONS = "segformer-test_resnet", {"decoder_segmentation_channels": 16}


def scene_student(splits: Splits, steps: int, seed: int = 0) -> AnyNetwork:
    """A tiny student after a few steps on val and test alike: more steps, a better one."""
    torch.manual_seed(seed)
    network = build_network(SCENE_STUDENT, splits.num_classes, SCENE_OPTIONS, image_size=72)
    task, index = SegmentationTask(splits.num_classes), np.arange(24)
    images = torch.from_numpy(splits.test.images.read(index)).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(splits.test.label_maps.read(index)).long()
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for step in range(steps):
        chosen = torch.arange(8) + 8 * (step % 3)
        loss = task(network(images[chosen]).logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def study(root: Workspace, question: Experiment) -> StudyFolder:
    folder = root.study(question.name)
    write_text(folder.experiment_file, dump_experiment(question))
    return folder


def trial(
    folder: StudyFolder,
    question: Experiment,
    number: int,
    method: str = "kd",
    *,
    status: str = "complete",
    epochs: int = 3,
    seed: int = 0,
    student: AnyNetwork | None = None,
    origin: str = "sampled",
    confirms: int | None = None,
) -> TrialFolder:
    """A trial's folder: `epochs` reports, and weights when it is complete and a student is given."""
    sample = {"method": method, "training.learning_rate": 0.05 + number / 100}
    made = folder.trial(number)
    made.start(question.recipe(sample, seed=seed), TrialSnapshot(origin=origin, confirms=confirms, sample=sample))
    for epoch in range(1, epochs + 1):
        report(made, epoch)
    if status == "complete" and student is not None:
        save_weights(student, made.weights)
    change(made, status=TrialStatus(status), student={"params_m": 0.37})
    return made


def change(made: TrialFolder, **changes: Any) -> None:
    """Change what trial.json says."""
    if "status" in changes:
        changes["status"] = TrialStatus(changes["status"])
    made.save(replace(made.snapshot, **changes))


def ranked(
    number: int = 1, method: str = "kd", mean: float | None = 0.3, half: float | None = None, **more: Any
) -> RankedConfig:
    """A configuration, on two fresh seeds unless `more` says otherwise."""
    content: dict[str, Any] = {
        "sample": {"method": method},
        "origin": "sampled",
        "search_value": mean,
        "values": (mean, mean),
        "seeds": (1000, 2000),
        "numbers": (number + 100, number + 200),
        "low": None if mean is None or half is None else mean - half,
        "high": None if mean is None or half is None else mean + half,
        "expected": mean,
        "confirmed": True,
        "student": "test_resnet",
    }
    return RankedConfig(number=number, method=method, mean=mean, **content | more)


def summary(*leaders: RankedConfig, **more: Any) -> StudySummary:
    """Of a study with these leaders, the first one the winner."""
    content: dict[str, Any] = {
        "name": "tiny",
        "metric": "val/top1",
        "maximise": True,
        "progress": StudyProgress(finished=True),
        "winner": leaders[0] if leaders else None,
        "scratch": next((one for one in leaders if one.method == BASELINE), None),
        "leaders": leaders,
    }
    return StudySummary(**content | more)


def card(network: str = "vit_tiny_patch16_224", **more: Any) -> TeacherCard:
    content = {"options": {}, "num_classes": 10, "image_size": 32, "weights": "5e1f", "metric": "val/top1"}
    return TeacherCard(network=network, **{**content, "val_score": 0.9, "source": "fitted"} | more)


def report(made: TrialFolder, epoch: int) -> None:
    score = f"val/{TASKS[made.recipe.task].score}"
    made.append({"train/loss": 1 / epoch, score: epoch / 10, "val/loss": 2.0 / epoch, "epoch": epoch})


def random_student(seed: int = 0, num_classes: int = 10, size: int = 32) -> Network:
    torch.manual_seed(seed)
    return build_network("test_resnet", num_classes, image_size=size).eval()


def fitted_student(splits: Splits, images: int, seed: int = 0) -> Network:
    """A random network with the least-squares classifier for some training images: more images, a better one."""
    network = random_student(seed, splits.num_classes, splits.image_size)
    pixels = splits.train.images.read(np.arange(images))
    with torch.inference_mode():
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        embedding = network(batch, Signal.EMBEDDING).embedding
        targets = F.one_hot(torch.from_numpy(splits.train.labels[:images]), splits.num_classes).float()
        gram = embedding.T @ embedding + 1e-4 * torch.eye(embedding.shape[1])
        classifier = network.body.get_classifier()
        classifier.weight.copy_(torch.linalg.solve(gram, embedding.T @ targets).T)
        classifier.bias.zero_()
    return network


@lru_cache(maxsize=1)
def _empty_store() -> bytes:
    """A new store takes seconds to make: the processes of pytest-xdist share one, which conftest.py removes."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if session is None:
        return _new_store()
    file = Path(tempfile.gettempdir()) / f"heterokd-empty-store-{session}.db"
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            file.write_bytes(_new_store())
        return file.read_bytes()


def _new_store() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        root = Workspace(Path(folder))
        # By its address: a test before this one may have left another store in the environment.
        open_store(root, mlflow_sqlite_uri(root.mlflow_database))
        copy = root.path / "copy.db"
        # With what is in the write-ahead log, which an open connection keeps from the file.
        with closing(sqlite3.connect(root.mlflow_database)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        return copy.read_bytes()


def root_with_store(folder: Path) -> Workspace:
    root = Workspace(folder / "runs")
    root.path.mkdir()
    root.mlflow_database.write_bytes(_empty_store())
    return root
