"""What runs are called and tagged with in MLflow, and which process they belong to."""

from __future__ import annotations

import getpass
import json
import os
import socket
import subprocess
import uuid
from collections.abc import Mapping
from functools import cache
from typing import Any

import psutil

from heterokd.config import Experiment, Recipe
from heterokd.root import StudyFolder, read_json, write_text

TEXT_LIMIT = 5000
"""MLflow takes 6000 characters a parameter and 8000 a tag."""

_TRAINING_PARAMS = ("epochs", "batch_size", "optimizer", "learning_rate", "weight_decay", "task_weight")


def study_id(folder: StudyFolder) -> str:
    """Names a study in a store that other machines may share; made once, kept in tracking.json."""
    file = folder.path / "tracking.json"
    known = read_json(file).get("study_id")
    if not known:
        known = uuid.uuid4().hex
        write_text(file, json.dumps({"study_id": known}))
    return str(known)


def trial_params(recipe: Recipe, sample: Mapping[str, Any]) -> dict[str, str]:
    """Few and short: MLflow shows every one of them as a column."""
    training = recipe.training.model_dump()
    chosen = [key.removeprefix("training.") for key in sample if key.startswith("training.")]
    params: dict[str, Any] = {
        "method": recipe.method,
        "student": recipe.student.network,
        "teacher": recipe.teacher.network,
        "seed": recipe.training.seed,
        "recipe": recipe.hash,
        **{f"{recipe.method}.{key}": value for key, value in recipe.params.items()},
        **{f"training.{key}": training[key] for key in dict.fromkeys((*_TRAINING_PARAMS, *chosen)) if key in training},
    }
    # Six digits: `0.12`, not the `0.12000000000000001` that a sampler may propose; the recipe keeps them all.
    shown = {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in params.items()}
    return {key: value[:TEXT_LIMIT] for key, value in shown.items()}


def common_tags(kind: str, study: str, study_id: str) -> dict[str, str]:
    """Tags of every run; MLflow's own client leaves its columns User, Source and Version empty otherwise."""
    tags = {
        "heterokd.kind": kind,
        "heterokd.study": study,
        "heterokd.study_id": study_id,
        "mlflow.user": _user(),
        "mlflow.source.name": "heterokd search",
        "mlflow.source.type": "LOCAL",
        **process_tags(),
    }
    commit = _git_commit()
    return {**tags, "mlflow.source.git.commit": commit} if commit else tags


def process_tags() -> dict[str, str]:
    """Who logs: when this process is gone, its runs are nobody's. The start tells it from a later one with its id."""
    started = psutil.Process().create_time()
    return {
        "heterokd.host": socket.gethostname(),
        "heterokd.pid": str(os.getpid()),
        "heterokd.started": f"{started:.0f}",
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())


@cache
def _git_commit() -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def study_description(experiment: Experiment) -> str:
    """Markdown for the study's page."""
    methods = ", ".join(experiment.methods)
    labels = experiment.data.labels_per_class
    few = f", {labels} labelled images a class" if labels else ""
    height, width = experiment.data.view_size
    size = f"{height}" if height == width else f"{height} x {width}"
    return (
        f"**{experiment.name}**: what does {' or '.join(experiment.student.networks)} learn best from "
        f"{experiment.teacher.network}?\n\n"
        f"- data: {experiment.data.dataset} ({experiment.data.task}) at {size} pixels{few}\n"
        f"- methods: {methods}\n"
        f"- {experiment.search.trials} trials of {experiment.training.epochs} epochs, "
        f"chosen by `{experiment.metric}`\n"
    )


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process that a run's tags name still exists on this machine."""
    try:
        process = psutil.Process(int(tags["heterokd.pid"]))
        # A minute of slack: setting the clock moves the start that the system reports.
        moved = float(process.create_time()) - float(tags["heterokd.started"])
        return abs(moved) < 60
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, KeyError, ValueError):
        return False
