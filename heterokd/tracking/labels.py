"""Names, tags, parameters and descriptions of MLflow runs."""

from __future__ import annotations

import getpass
import json
import os
import socket
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from functools import cache

import psutil
from mlflow.entities import Dataset, DatasetInput, InputTag

from heterokd.config.data import DataSettings
from heterokd.config.experiment import Experiment, methods_line
from heterokd.config.recipe import Recipe
from heterokd.datasets.io.split import REST, Splits
from heterokd.formatting import format_sample, format_score
from heterokd.methods import PLUS
from heterokd.storage.files import damaged, read_json, write_text
from heterokd.storage.machine_load import under_load
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import TrialSnapshot
from heterokd.study.gain import gain
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.summary import StudySummary

TEXT_LIMIT = 5000
"""Maximum length of a text; MLflow allows 6000 characters per parameter and 8000 per tag."""

GIT_SECONDS = 5.0
"""Timeout of git, whose repository may lie on a dead mount."""

_ORIGINS = {
    "published": "The published setting of **{}**",
    "warm": "A setting of **{}** that did well in another study",
    "sampled": "A setting of **{}** that the search proposed",
}

_TRAINING_PARAMS = ("epochs", "batch_size", "optimizer", "learning_rate", "weight_decay", "task_weight")


def study_id(folder: StudyFolder) -> str:
    """Return the id of a study, unique in a store that several machines share; kept in tracking.json.

    Raises:
        StudyError: the file is damaged: with a new id, the study would be logged a second time.
    """
    file = folder.path / "tracking.json"
    known = read_json(file).get("study_id")
    if isinstance(known, str) and known:
        return known
    if file.exists():
        raise damaged(file, "expected the key study_id with a text")
    created = uuid.uuid4().hex
    write_text(file, json.dumps({"study_id": created}))
    return created


def mlflow_key(name: str) -> str:
    """Return a name that MLflow accepts as a key; it refuses the plus of a combination."""
    return name.replace(PLUS, "-")


def trial_params(recipe: Recipe, sample: Mapping[str, object]) -> dict[str, str]:
    """Return the parameters of a trial's run: few and short, since MLflow shows each as a column."""
    training = recipe.training.model_dump()
    chosen = [key.removeprefix("training.") for key in sample if key.startswith("training.")]
    params: dict[str, object] = {
        "method": recipe.method,
        "student": recipe.student.network,
        "teacher": recipe.teacher.network,
        **({"teacher.cross_fit": recipe.teacher.cross_fit} if recipe.teacher.cross_fit else {}),
        "seed": recipe.training.seed,
        "recipe": recipe.hash,
        **{f"{mlflow_key(recipe.method)}.{key}": value for key, value in recipe.params.items()},
        **{f"training.{key}": training[key] for key in dict.fromkeys((*_TRAINING_PARAMS, *chosen)) if key in training},
    }
    # Six digits: `0.12`, not the `0.12000000000000001` that a sampler may propose; the recipe keeps them all.
    shown = {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in params.items()}
    return {key: value[:TEXT_LIMIT] for key, value in shown.items()}


def common_tags(kind: str, study: str, study_id: str) -> dict[str, str]:
    """Return the tags of every run, including those of MLflow's columns User, Source and Version."""
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
    """Return host, process id and start time of this process, by which the runs of a dead driver are found."""
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
        done = subprocess.run(command, capture_output=True, text=True, timeout=under_load(GIT_SECONDS), check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def run_link(text: str, experiment_id: str, run_id: str, file: str = "") -> str:
    """Return a Markdown link to a run's page or to one of its artifacts.

    The address is relative, so that it holds on every server that shows the store.
    """
    return f"[{text}](#/experiments/{experiment_id}/runs/{run_id}{f'/artifacts/{file}' if file else ''})"


def study_description(experiment: Experiment, result: str = "", links: Sequence[str] = ()) -> str:
    """Return the Markdown description of a study.

    Links and result come first, since MLflow folds all but the first line and cuts this at the window's width.
    """
    labels = experiment.data.labels_per_class
    few = f", {labels} labelled images per class" if labels else ""
    others = experiment.data.unlabelled
    if others is not None:
        few += ", the other training images without labels" if others == REST else f", and {others} without labels"
    height, width = experiment.data.view_size
    size = f"{height}" if height == width else f"{height} x {width}"
    first = f"{' | '.join(filter(None, [*links, result]))}\n\n" if result or links else ""
    return (
        f"{first}**{experiment.name}**: what does {' or '.join(experiment.student.networks)} learn best from "
        f"{' or '.join(experiment.teacher.networks)}?\n\n"
        f"- data: {experiment.data.dataset} ({experiment.data.task}) at {size} pixels{few}\n"
        f"- methods: {methods_line(experiment)}\n"
        f"- {experiment.search.trials} trials of {experiment.training.epochs} epochs, "
        f"chosen by `{experiment.metric}`\n"
    )


def study_params(experiment: Experiment) -> dict[str, str]:
    """Return the parameters of a study's run; no trial has these keys, so charts of trials leave the study out."""
    search = experiment.search
    params = {
        "search.objectives": ", ".join(search.objectives) or experiment.metric,
        "search.methods": methods_line(experiment),
        "search.students": ", ".join(experiment.student.networks),
        "search.extent": search.extent,
        "search.epochs": str(experiment.training.epochs),
    }
    return {key: value[:TEXT_LIMIT] for key, value in params.items()}


def study_result(summary: StudySummary) -> str:
    """Return the Markdown sentence about a study's winner; empty without a winner."""
    winner, scratch = summary.winner, summary.scratch
    if winner is None:
        return ""
    text = f"**{winner.method}** won with trial {winner.number}: {summary.metric} {winner.estimate}"
    if scratch is not None and scratch.number != winner.number:
        text += f"; without a teacher (scratch): {summary.metric} {scratch.estimate}"
        found = gain(winner, scratch, maximise=summary.maximise)
        text += "" if found is None else f"; gain over scratch {found.verdict}"
    return f"{text}."


def estimate_metrics(kind: str, metric: str, config: RankedConfig) -> dict[str, float]:
    """Return a configuration's mean and interval as metrics: `best/val/top1`, `best_low/val/top1`, `best_high/...`."""
    found = {f"{kind}/{metric}": config.mean, f"{kind}_low/{metric}": config.low, f"{kind}_high/{metric}": config.high}
    return {key: value for key, value in found.items() if value is not None}


def estimate_tags(metric: str, config: RankedConfig) -> dict[str, str]:
    """Return a configuration's mean, interval and trainings as tags of a registered version."""
    found = {metric: format_score(config.mean), "interval": config.interval, "seeds": config.evidence}
    return {key: value for key, value in found.items() if value}


def trial_description(recipe: Recipe, snapshot: TrialSnapshot) -> str:
    """Return the Markdown description of a trial's run: the origin of its setting, and its values."""
    origin = _ORIGINS.get(snapshot.origin, "A setting of **{}**")
    if snapshot.confirms is not None:
        origin = f"Trial {snapshot.confirms} of **{{}}** again, on seed {recipe.training.seed}"
    values = format_sample(snapshot.sample)
    setting = f"{origin.format(recipe.method)}: {values}" if values else origin.format(recipe.method)
    return f"{setting}. {recipe.teacher.network} teaches {recipe.student.network}."


def dataset_inputs(data: DataSettings, splits: Splits) -> tuple[DatasetInput, ...]:
    """Return the train and val splits for MLflow's column Dataset; no trial sees test."""
    inputs = []
    for split, context in ((splits.train, "training"), (splits.val, "validation")):
        profile = {"images": len(split), "classes": splits.num_classes, "image_size": splits.image_size}
        if splits.unlabelled is not None and split is splits.train:
            profile["unlabelled"] = len(splits.unlabelled)
        dataset = Dataset(
            name=f"{data.dataset}-{split.name}",
            digest=splits.fingerprint[:16],
            source_type="local",
            source=json.dumps({"uri": str(data.root or data.dataset), "fingerprint": splits.fingerprint}),
            profile=json.dumps(profile),
        )
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
    return tuple(inputs)


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process that logged a run still exists on this machine."""
    try:
        process = psutil.Process(int(tags["heterokd.pid"]))
        # A minute of slack: setting the clock moves the start that the system reports.
        moved = float(process.create_time()) - float(tags["heterokd.started"])
        return abs(moved) < 60
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, KeyError, ValueError):
        return False
