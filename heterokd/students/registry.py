"""Log trained students in MLflow as models without pickle, and register their versions."""

from __future__ import annotations

import json
import logging
from importlib.metadata import version as installed_version

import mlflow
import mlflow.pytorch
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from torch import nn

from heterokd.config.recipe import Recipe
from heterokd.datasets.io.split import Splits
from heterokd.errors import NetworkError
from heterokd.methods import BASELINE
from heterokd.networks.network import AnyNetwork, deployable
from heterokd.networks.weights import weights_hash
from heterokd.storage.study_dir import TrialFolder
from heterokd.tasks import TASKS, TaskName
from heterokd.tracking.labels import trial_params
from heterokd.tracking.runs import StudyRuns
from heterokd.tracking.store import answering, current, first_line, pages, quiet
from heterokd.training.student import open_student

logger = logging.getLogger(__name__)

CHALLENGER = "challenger"
EXPORT_ERRORS = (RuntimeError, AssertionError, TypeError, ValueError)
"""Raised by torch.export and its saving for a network that they cannot export; none is an exception of MLflow."""


def log_student(runs: StudyRuns, trial: TrialFolder, splits: Splits) -> str:
    """Log a trained student as a model without pickle, with its weights, recipe and student.json.

    Args:
        runs: of the study.
        trial: a complete trial, with its weights.
        splits: the data set it was trained on.

    Returns:
        The model's URI, `models:/m-...`; that of the model logged before if the weights are the same.

    Raises:
        TrackingError: the store does not answer.
        CheckpointError: the weights are missing or damaged.
        NetworkError: torch.export cannot export the network; weights, recipe and student.json are logged anyway.
    """
    recipe = trial.recipe
    network = open_student(recipe, trial.weights, splits.num_classes)
    digest = weights_hash(network)
    run_id = runs.run_id(trial)
    with answering(runs.uri), quiet(), current(runs.uri):
        known = runs.client.search_logged_models([runs.experiment_id], filter_string=f"source_run_id = '{run_id}'")
        for model in known:
            if str(model.status) == "READY" and model.tags.get("heterokd.weights") == digest:
                return str(model.model_uri)
        runs.client.log_text(run_id, _card(recipe, network, splits, digest), "weights/student.json")
        runs.client.log_artifact(run_id, str(trial.weights), "weights")
        runs.client.log_artifact(run_id, str(trial.path / "recipe.yaml"), "weights")
        with mlflow.start_run(run_id=run_id):
            logged = _log_graph(runs, run_id, network, trial, splits.num_classes, digest)
    if isinstance(logged, Exception):
        raise NetworkError(
            f"{trial.path}: torch.export cannot export network {recipe.student.network!r} "
            f"({first_line(logged)[:200]}); use its weights, {trial.weights}, or search with another student"
        ) from logged
    return logged


def graph_size(network: AnyNetwork, view: tuple[int, int]) -> tuple[int, int] | None:
    """The only image size that a student's graph takes, that of its training views; None if it takes any."""
    return None if network.exports_any_size(view) else view


def taken_size(model_uri: str) -> tuple[int, int] | None:
    """The only image size that a logged student takes by its signature; None if it takes any.

    It is looked up in MLflow's current store.
    """
    signature = mlflow.models.get_model_info(model_uri).signature
    height, width = signature.inputs.inputs[0].shape[-2:]
    return None if -1 in (height, width) else (int(height), int(width))


def taken_words(size: tuple[int, int] | None) -> str:
    """Describe `taken_size`."""
    if size is None:
        # The stride of the deepest map is 32 at most.
        return "any height and width over 32 pixels"
    return f"{size[0]} x {size[1]} pixels"


def _log_graph(
    runs: StudyRuns, run_id: str, network: AnyNetwork, trial: TrialFolder, num_classes: int, digest: str
) -> str | Exception:
    """Log the graph; the model's URI, or an exception, which would mark the whole run as failed if raised inside it."""
    recipe, size = trial.recipe, graph_size(network, trial.recipe.data.view_size)
    try:
        return _log_model(deployable(network), trial, size, num_classes, digest)
    except EXPORT_ERRORS as error:
        failed: Exception = error
    _drop_unfinished(runs, run_id)
    if size is not None:
        return failed
    height, width = recipe.data.view_size
    logger.warning(
        "%s: the graph of network %r takes images of %d x %d pixels alone (torch.export with any size: %s)",
        trial.path,
        recipe.student.network,
        height,
        width,
        first_line(failed)[:200],
    )
    try:
        return _log_model(deployable(network), trial, (height, width), num_classes, digest)
    except EXPORT_ERRORS as error:
        failed = error
    _drop_unfinished(runs, run_id)
    return failed


def _log_model(
    module: nn.Module, trial: TrialFolder, size: tuple[int, int] | None, num_classes: int, digest: str
) -> str:
    recipe = trial.recipe
    # Two images, because torch.export makes a batch size of 1 a constant.
    images = np.random.default_rng(0).random((2, 3, *(size or recipe.data.view_size)), dtype=np.float32)
    logged = mlflow.pytorch.log_model(
        module,
        name="student",
        serialization_format="pt2",  # not pickle
        input_example=images,
        signature=_signature(recipe.task, size, num_classes),
        # Given, because inferring them imports everything again in a new process.
        # Without the local part (`+cpu`), which the package index does not know.
        pip_requirements=[f"{name}=={installed_version(name).split('+')[0]}" for name in ("torch", "numpy")],
        params=trial_params(recipe, trial.snapshot.sample),
        tags={"heterokd.weights": digest, "heterokd.method": recipe.method},
    )
    return str(logged.model_uri)


def _drop_unfinished(runs: StudyRuns, run_id: str) -> None:
    """Delete models whose logging failed, which would stay in the store as `pending`."""
    found = runs.client.search_logged_models([runs.experiment_id], filter_string=f"source_run_id = '{run_id}'")
    for model in found:
        if str(model.status) != "READY":
            runs.client.delete_logged_model(model.model_id)


def register(
    runs: StudyRuns, trial: TrialFolder, model_uri: str, splits: Splits, alias: str | None = CHALLENGER
) -> str:
    """Make a logged student a version of the experiment's registered model.

    Args:
        runs: of the study.
        trial: that trained the student.
        model_uri: what `log_student` returned.
        splits: the data set it was trained on.
        alias: given to the version.

    Returns:
        The version; an existing version of this model is reused.

    Raises:
        TrackingError: the store does not answer.
    """
    name, recipe, metric = runs.experiment.registered_model, trial.recipe, runs.experiment.metric
    values = [report[metric] for report in trial.metrics() if metric in report]
    tags = {
        "method": recipe.method,
        "task": recipe.task,
        "dataset": recipe.data.dataset,
        "data_seed": str(recipe.data.seed),
        "data": splits.fingerprint,
        "study": runs.experiment.name,
        "study_id": runs.study_id,
        "trial": str(trial.number),
        "recipe": recipe.hash,
    }
    if values:
        tags[metric] = f"{values[-1]:.4f}"
    run_id = runs.run_id(trial)
    # A registry in a file looks models up in the current store.
    with answering(runs.uri), quiet(), current(runs.uri):
        try:
            runs.client.create_registered_model(
                name,
                tags={"dataset": recipe.data.dataset},
                description=f"Students for {recipe.data.dataset}. `champion` is in use, `challenger` is the latest "
                "winner of a study, `previous` was champion before.",
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = pages(
            lambda token: runs.client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
        )
        version = next((known for known in versions if known.source == model_uri), None)
        if version is None:
            found = f"; {metric} {values[-1]:.4f}" if values else ""
            version = runs.client.create_model_version(
                name,
                model_uri,
                run_id=run_id,
                model_id=model_uri.removeprefix("models:/"),  # a server refuses the version without it
                tags=tags,
                description=f"{describe_student(recipe, splits)}: trial {trial.number} of study "
                f"{runs.experiment.name}{found}. Takes images of {taken_words(taken_size(model_uri))}.",
            )
        if alias is not None:
            runs.client.set_registered_model_alias(name, alias, version.version)
    return str(version.version)


def describe_student(recipe: Recipe, splits: Splits) -> str:
    """Describe a student in a line."""
    how = f"distilled from {recipe.teacher.network} by {recipe.method}"
    if recipe.method == BASELINE:
        how = "trained without a teacher"
    height, width = recipe.data.view_size
    size = f"{height} pixels" if height == width else f"{height} x {width} pixels"
    what = f"{recipe.task} of {recipe.data.dataset} ({splits.num_classes} classes, {size})"
    return f"{recipe.student.network} for {what}, {how}"


def _card(recipe: Recipe, network: AnyNetwork, splits: Splits, digest: str) -> str:
    """Write student.json, with all that is needed to build the network."""
    card = {
        "task": recipe.task,
        "network": recipe.student.network,
        "options": recipe.student.options,
        "num_classes": splits.num_classes,
        "class_names": list(splits.class_names),
        "image_size": recipe.data.image_size,
        "mean": network.mean.flatten().tolist(),
        "std": network.std.flatten().tolist(),
        "weights": digest,
    }
    return json.dumps(card, indent=1)


def _signature(task: TaskName, size: tuple[int, int] | None, num_classes: int) -> ModelSignature:
    """Images of a size, or of any (None), to logits of the task's shape."""
    height, width = size or (-1, -1)
    images: tuple[int, ...] = (-1, 3, height, width)
    logits = (-1, *TASKS[task].logits_shape(num_classes, (height, width)))
    # Without names: with them pyfunc would make a dictionary of an array, which a torch model does not take.
    given, got = TensorSpec(np.dtype("float32"), images), TensorSpec(np.dtype("float32"), logits)
    return ModelSignature(Schema([given]), Schema([got]))
