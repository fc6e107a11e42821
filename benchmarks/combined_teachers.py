"""One teacher against five cross-fitted teachers and an ensemble: students without a teacher and by KD, over seeds.

    python benchmarks/combined_teachers.py [--seeds 5] [--out FILE]
    python benchmarks/combined_teachers.py --images FOLDER --network NETWORK --weights FILE [--size 64] ...

Without --images, digits: teachers are small networks trained from random weights, and students see 20 labels of each
class. With --images, a folder of images: the teacher is NETWORK with the weights of FILE, whose classifier is solved on
frozen features (`teacher.fit: head`) at --size pixels; the ensemble adds a small network that is trained from random
weights. Two more teachers are the same network at the student's 64 pixels, and fitted by default (`teacher.fit: auto`).
Everything runs in this process. Teachers, caches and trainings are kept in --root: an interrupted run goes on, and
--arms makes some of the rows.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.execution.run import RunContext, run_recipe
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.teachers.prepare import PreparedTeacher, prepare_teacher
from heterokd.training.precision import device_name

FOLDS = 5
SCRATCH, ONE = "no teacher", "one teacher"
QUIET = {"precision": "fp32", "channels_last": False}
VIT = {"network": "test_vit", "options": {"img_size": 32, "patch_size": 8}}


@dataclass(frozen=True)
class Arm:
    """A row of the table.

    Attributes:
        teacher: section `teacher` of its experiment.
        method: method of its students.
        views: cached views of each image.
    """

    teacher: dict[str, Any]
    method: str
    views: int


def arms_of(arguments: argparse.Namespace) -> dict[str, Arm]:
    """Return the arms by name."""
    fit = {"epochs": arguments.teacher_epochs, "warmup_epochs": 1, "batch_size": 64, **QUIET}
    more: dict[str, dict[str, Any]] = {}
    if arguments.images is None:
        one: dict[str, Any] = {**VIT, "training": fit}
        other: dict[str, Any] = {"network": "test_resnet", "training": fit}
        size: dict[str, Any] = {}
    else:
        start = {"network": arguments.network, "start_from": str(arguments.weights.resolve())}
        one = {**start, "fit": "head", "training": fit}
        other = {"network": "test_efficientnet", "training": fit}
        size = {"image_size": arguments.size}
        more = {"one teacher at 64 pixels": {**one, "image_size": 64}, "one fine-tuned teacher": {**start, **size}}
    teachers = {
        ONE: {**one, **size},
        f"{FOLDS} cross-fitted": {**one, **size, "cross_fit": FOLDS},
        "ensemble of 2": {"ensemble": [one, other], **size},
        **more,
    }
    views = arguments.views
    arms = {SCRATCH: Arm(teachers[ONE], "scratch", views)}
    arms |= {name: Arm(teacher, "kd", views) for name, teacher in teachers.items()}
    arms["one teacher, 1 view"] = Arm(teachers[ONE], "kd", 1)
    arms |= {f"one teacher, {method}": Arm(teachers[ONE], method, views) for method in arguments.methods}
    unknown = set(arguments.arms or ()) - set(arms)
    if unknown:
        raise SystemExit(f"no such arms: {', '.join(sorted(unknown))}; there are: {'; '.join(arms)}")
    return {name: arm for name, arm in arms.items() if arguments.arms is None or name in arguments.arms}


def experiment_of(arguments: argparse.Namespace, arm: Arm, folder: Path) -> Experiment:
    """Read the experiment of an arm."""
    data: dict[str, Any] = {"dataset": "digits", "image_size": 32, "labels_per_class": 20}
    if arguments.images is not None:
        data = {"dataset": "image_folder", "root": str(arguments.images.resolve()), "image_size": 64}
    methods = dict.fromkeys(["kd", *arguments.methods])
    content = {
        "name": "combined-teachers",
        "data": data,
        "teacher": arm.teacher,
        "student": {"network": arguments.student, "options": arguments.options},
        "training": {"epochs": arguments.epochs, "batch_size": 64, "learning_rate": arguments.learning_rate, **QUIET},
        "cache": {"views": arm.views},
        "search": {"space": {"methods": ["scratch", *methods], "overrides": {"kd.temperature": arguments.temperature}}},
    }
    file = folder / "combined.yaml"
    plain = json.loads(json.dumps(content))  # sections that arms share would become aliases
    file.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return load_experiment(file)


def student_score(experiment: Experiment, method: str, seed: int, prepared: PreparedTeacher, root: Workspace) -> float:
    """Train a student and return its score on val; a training of the same recipe is read instead."""
    recipe = experiment.recipe(experiment.published(method), seed=seed)
    folder = TrialFolder(root.path / "students" / recipe.hash)
    done = folder.path / "score.json"
    if not done.exists():
        folder.path.mkdir(parents=True, exist_ok=True)
        context = RunContext(root, prepared.weights, cache_use="built")
        trained = run_recipe(recipe, folder, context, lambda metrics: True)
        done.write_text(json.dumps(trained.metrics[experiment.metric]))
    return float(json.loads(done.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of images; default: digits")
    parser.add_argument("--network", help="network of the teacher of --images")
    parser.add_argument("--weights", type=Path, help="file of its weights")
    parser.add_argument("--size", type=int, default=64, help="pixels that the teacher of --images sees")
    parser.add_argument("--student", default="test_efficientnet")
    parser.add_argument("--options", type=json.loads, default={}, help="options of the student's network, as JSON")
    parser.add_argument("--methods", nargs="+", default=[], help="methods beside kd, with the one teacher")
    parser.add_argument("--arms", nargs="+", help="make these rows only")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--teacher-epochs", type=int, default=15)
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--root", type=Path, help="workspace; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    logging.getLogger("heterokd").setLevel(logging.ERROR)  # weak teachers are named
    figures: dict[str, dict[str, Any]] = {}
    print(f"{device_name('cpu')}, {torch.get_num_threads()} threads", flush=True)
    print("| students of | teacher on val | on train, as answered | sure of train | fit, s | student, s | students |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Workspace(arguments.root or Path(folder) / "runs")
        for arm, of_arm in arms_of(arguments).items():
            experiment = experiment_of(arguments, of_arm, Path(folder))
            began = time.process_time()
            prepared = prepare_teacher(experiment, root)
            fitted, began = time.process_time() - began, time.process_time()
            card, seeds = prepared.card, range(arguments.seeds)
            scores = [student_score(experiment, of_arm.method, seed, prepared, root) for seed in seeds]
            each = (time.process_time() - began) / arguments.seeds
            figures[arm] = {"scores": scores, "fit": fitted, "student": each, "teacher": card.content()}
            of_teacher = "| | | |"
            if arm != SCRATCH:
                of_teacher = f"| {card.val_score:.4f} | {card.train_score:.4f} | {card.train_confidence:.3f} |"
            print(f"| {arm} {of_teacher} {fitted:.0f} | {each:.1f} | {spread(scores)} |", flush=True)
    for arm, found in figures.items():
        for name in (SCRATCH, ONE):
            if arm not in (name, SCRATCH) and name in figures:
                pairs = zip(found["scores"], figures[name]["scores"], strict=True)
                difference = [mine - theirs for mine, theirs in pairs]
                print(f"{arm} - {name}: {spread(difference, signed=True)}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def spread(values: list[float], *, signed: bool = False) -> str:
    """Format mean and standard error."""
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{mean:{'+' if signed else ''}.4f} +- {error:.4f}"


if __name__ == "__main__":
    main()
