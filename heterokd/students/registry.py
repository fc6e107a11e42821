"""Log trained students in MLflow as models without pickle, and register their versions."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib.metadata import version as installed_version

import mlflow
import numpy as np
import torch
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from torch import Tensor, nn

from heterokd.config.recipe import Recipe
from heterokd.datasets.io.split import Splits
from heterokd.errors import NetworkError
from heterokd.methods import BASELINE
from heterokd.networks.network import AnyNetwork, deployable
from heterokd.networks.weights import weights_hash
from heterokd.storage.study_dir import TrialFolder
from heterokd.students.network_card import network_card
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.read_summary import read_summary
from heterokd.tasks import TASKS, TaskName
from heterokd.tracking.labels import estimate_tags, run_link, trial_params
from heterokd.tracking.pytorch_flavor import mlflow_pytorch
from heterokd.tracking.runs import StudyRuns
from heterokd.tracking.store import answering, current, first_line, pages, quiet, sent_once
from heterokd.training.student import open_student

logger = logging.getLogger(__name__)

CHALLENGER = "challenger"
LOWEST, HIGHEST = -0.5, 1.5
"""Bounds of the values in images that a registered student takes: resizing may leave [0, 1] a little."""
REFUSAL = "images: expected values in [0, 1] and no NaN; divide 8-bit values by 255"
EXPORT_ERRORS = (RuntimeError, AssertionError, TypeError, ValueError)
"""Exceptions of torch.export, and of saving its result, for a network that cannot be exported; MLflow raises others."""


def log_student(runs: StudyRuns, trial: TrialFolder, splits: Splits) -> str:
    """Log the trained student of a complete trial as a model without pickle, with weights, recipe and student.json.

    Returns:
        URI of the model, `models:/m-...`; the URI of an earlier model if the weights are the same.

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
        _delete_unfinished(runs, run_id)  # of a killed process
        card = network_card(network, splits, recipe.data.view_size)
        runs.client.log_text(run_id, json.dumps(card, indent=1), "weights/student.json")
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
    """Return the only image size that a student's graph takes, the size of its training views; None: any size."""
    return None if network.exports_any_size(view) else view


def taken_size(model_uri: str) -> tuple[int, int] | None:
    """Return the only image size that a student in MLflow's current store takes; None: any size."""
    signature = mlflow.models.get_model_info(model_uri).signature
    height, width = signature.inputs.inputs[0].shape[-2:]
    return None if -1 in (height, width) else (int(height), int(width))


def taken_words(size: tuple[int, int] | None) -> str:
    """Describe `taken_size`."""
    # The stride of the deepest map is at most 32.
    return "any height and width over 32 pixels" if size is None else f"{size[0]} x {size[1]} pixels"


def _log_graph(
    runs: StudyRuns, run_id: str, network: AnyNetwork, trial: TrialFolder, num_classes: int, digest: str
) -> str | Exception:
    """Log the graph, for images of any size if possible; return the model's URI, or the exception.

    An exception raised inside the run would mark it as failed.
    """
    view = trial.recipe.data.view_size
    failed: Exception | None = None
    for size in dict.fromkeys((graph_size(network, view), view)):
        if failed is not None:
            logger.warning(
                "%s: the graph of network %r takes only images of %d x %d pixels (torch.export with any size: %s)",
                trial.path,
                trial.recipe.student.network,
                *view,
                first_line(failed)[:200],
            )
        try:
            return _log_model(_checked(deployable(network)), trial, size, num_classes, digest)
        except EXPORT_ERRORS as error:
            failed = error
        _delete_unfinished(runs, run_id)
    assert failed is not None  # no size could be exported
    return failed


def _checked(module: nn.Module) -> nn.Module:
    """Make a network refuse images that are not in [0, 1], also in the graph that is exported from it.

    Otherwise a server would answer NaN with NaN, which is no JSON, and 8-bit values with nonsense.
    """

    def check(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        (images,) = arguments
        within = ((images >= LOWEST) & (images <= HIGHEST)).all()  # False for NaN
        # On the CPU: a failed assertion on a GPU would end its process.
        within = torch.ops.aten._to_copy.default(within, device=torch.device("cpu"))
        torch.ops.aten._assert_async.msg(within, REFUSAL)

    module.register_forward_pre_hook(check)
    return module


def _log_model(
    module: nn.Module, trial: TrialFolder, size: tuple[int, int] | None, num_classes: int, digest: str
) -> str:
    recipe = trial.recipe
    # Two images, because torch.export turns a batch size of 1 into a constant.
    images = np.random.default_rng(0).random((2, 3, *(size or recipe.data.view_size)), dtype=np.float32)
    logged = mlflow_pytorch.log_model(
        module,
        name="student",
        serialization_format="pt2",  # not pickle
        input_example=images,
        signature=_signature(recipe.task, size, num_classes),
        # Listed, because inferring them imports everything again in a new process; without the local part of a version
        # (`+cpu`), which package indexes do not have.
        pip_requirements=[f"{name}=={installed_version(name).split('+')[0]}" for name in ("torch", "numpy")],
        params=trial_params(recipe, trial.snapshot.sample),
        tags={"heterokd.weights": digest, "heterokd.method": recipe.method},
    )
    return str(logged.model_uri)


def _delete_unfinished(runs: StudyRuns, run_id: str) -> None:
    """Delete models whose logging failed: they would remain in the store as `pending`."""
    found = runs.client.search_logged_models([runs.experiment_id], filter_string=f"source_run_id = '{run_id}'")
    for model in found:
        if str(model.status) != "READY":
            runs.client.delete_logged_model(model.model_id)


def register(
    runs: StudyRuns, trial: TrialFolder, model_uri: str, splits: Splits, alias: str | None = CHALLENGER
) -> str:
    """Make a logged student a version of the experiment's registered model; return its number.

    An existing version of the model is reused. Its score is the estimate of its configuration in the study's summary,
    as in the page; the value of its training if the summary does not list it.

    Raises:
        TrackingError: the store does not answer.
    """
    name, recipe, metric = runs.experiment.registered_model, trial.recipe, runs.experiment.metric
    config = _config(runs, trial)
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
        **({} if config is None else estimate_tags(metric, config)),
    }
    run_id = runs.run_id(trial)
    # A registry in a file looks up models in the current store.
    with answering(runs.uri), quiet(), current(runs.uri):
        create_model(runs)
        versions = pages(
            lambda token: runs.client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
        )
        version = next((known for known in versions if known.source == model_uri), None)
        text = (
            f"{describe_student(recipe, splits)}: trial {trial.number} of study {runs.experiment.name}"
            f"{'' if config is None else f'; {metric} {config.estimate}'}. "
            f"Takes images of {taken_words(taken_size(model_uri))}.\n\n{version_links(runs, run_id)}"
        )
        if version is None:
            with sent_once():
                version = runs.client.create_model_version(
                    name,
                    model_uri,
                    run_id=run_id,
                    model_id=model_uri.removeprefix("models:/"),  # a server refuses the version without it
                    tags=tags,
                    description=text,
                )
        else:
            _refresh(runs, version, tags, text)
        if alias is not None:
            runs.client.set_registered_model_alias(name, alias, version.version)
    return str(version.version)


def _config(runs: StudyRuns, trial: TrialFolder) -> RankedConfig | None:
    """Return a trial's configuration in the study's summary; otherwise the trial alone, or None without a value."""
    summary = read_summary(runs.folder)
    listed = None if summary is None else summary.leader(trial.number)
    values = [report[runs.experiment.metric] for report in trial.metrics() if runs.experiment.metric in report]
    if listed is not None or not values:
        return listed
    seed, snapshot = trial.recipe.training.seed, trial.snapshot
    return RankedConfig(
        number=trial.number,
        method=trial.recipe.method,
        sample=dict(snapshot.sample),
        origin=snapshot.origin,
        search_value=values[-1],
        values=(values[-1],),
        seeds=(seed,),
        numbers=(trial.number,),
        mean=values[-1],
    )


def _refresh(runs: StudyRuns, version: ModelVersion, tags: Mapping[str, str], text: str) -> None:
    """Replace what an earlier search wrote to a version; the model card of a judged version stays as it is."""
    client, name, number = runs.client, runs.experiment.registered_model, str(version.version)
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(name, number, key, value)
    is_judged = any(key.split(".")[0] == "decision" for key in version.tags)
    if not is_judged and version.description != text:
        client.update_model_version(name, number, text)


def version_links(runs: StudyRuns, run_id: str, *files: tuple[str, str]) -> str:
    """Return Markdown links of a version: its training and its study's run and page.

    Args:
        runs: runs of the study.
        run_id: id of the trial's run.
        files: artifacts of the trial's run to link, each with its name.

    Raises:
        TrackingError: the store does not answer.
    """
    experiment, study = runs.experiment_id, runs.study_run_id
    links = [run_link("training", experiment, run_id), run_link("study", experiment, study)]
    links.append(run_link("the study's page", experiment, study, runs.folder.report.name))
    return " | ".join([*links, *(run_link(text, experiment, run_id, file) for text, file in files)])


def create_model(runs: StudyRuns) -> None:
    """Create the experiment's registered model unless it exists.

    Raises:
        MlflowException: the store does not answer.
    """
    dataset = runs.experiment.data.dataset
    try:
        runs.client.create_registered_model(
            runs.experiment.registered_model,
            tags={"dataset": dataset},
            description=f"Students for {dataset}. `champion` is in use, `challenger` is the latest "
            "winner of a study, `previous` was champion before.",
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def remove_pending(runs: StudyRuns) -> int:
    """Delete this study's models whose logging a killed process did not finish; return their number.

    The caller makes sure that no other process logs a model of the study.

    Raises:
        TrackingError: the store does not answer.
    """
    removed = 0
    with answering(runs.uri):
        experiment = runs.client.get_experiment_by_name(runs.experiment.experiment_name)
        models = [] if experiment is None else _models(runs, experiment.experiment_id)
        for model in models:
            if str(model.status) == "READY" or not model.source_run_id:
                continue
            tags = runs.client.get_run(model.source_run_id).data.tags
            if tags.get("heterokd.study_id") == runs.study_id:
                runs.client.delete_logged_model(model.model_id)
                removed += 1
    return removed


def _models(runs: StudyRuns, experiment_id: str) -> list[LoggedModel]:
    found = pages(lambda token: runs.client.search_logged_models([experiment_id], max_results=100, page_token=token))
    return list(found)


def describe_student(recipe: Recipe, splits: Splits) -> str:
    """Describe a student in a line."""
    how = f"distilled from {recipe.teacher.network} by {recipe.method}"
    if recipe.method == BASELINE:
        how = "trained without a teacher"
    height, width = recipe.data.view_size
    size = f"{height} pixels" if height == width else f"{height} x {width} pixels"
    what = f"{recipe.task} of {recipe.data.dataset} ({splits.num_classes} classes, {size})"
    return f"{recipe.student.network} for {what}, {how}"


def _signature(task: TaskName, size: tuple[int, int] | None, num_classes: int) -> ModelSignature:
    """Return the signature of a graph that takes images of a size, or of any size (None)."""
    height, width = size or (-1, -1)
    shapes = ((-1, 3, height, width), (-1, *TASKS[task].logits_shape(num_classes, (height, width))))
    # Without names: with names pyfunc would pass an array as a dictionary, which a torch model does not take.
    images, logits = (Schema([TensorSpec(np.dtype("float32"), shape)]) for shape in shapes)
    return ModelSignature(images, logits)
