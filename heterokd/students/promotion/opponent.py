"""Evaluate the challenger's opponent on the test split: the champion, or the study's baseline."""

from __future__ import annotations

import mlflow
import torch
from mlflow.entities.model_registry import ModelVersion

from heterokd.datasets.io.split import Splits
from heterokd.errors import CheckpointError, PromotionError
from heterokd.methods import BASELINE
from heterokd.students.promotion.challenger import load_version, model_uri
from heterokd.students.promotion.evaluation import Evaluate, EvaluatedStudent
from heterokd.study.read_summary import read_summary
from heterokd.tasks import TASKS
from heterokd.tracking.runs import StudyRuns
from heterokd.training.paired_tests import ImageResults
from heterokd.training.student import open_student


# One parameter for each thing that the champion is compared with, and how.
def champion_results(
    runs: StudyRuns,
    alias: str,
    champion: ModelVersion,
    splits: Splits,
    challenger: ImageResults,
    evaluate: Evaluate,
) -> ImageResults:
    """Evaluate the champion on the test images, at its input size if its task's networks resize every image.

    Raises:
        PromotionError: the champion is of another task, data set or split, so the two cannot be compared.
    """
    data, name = runs.experiment.data, runs.experiment.registered_model
    who = f"the {alias} of {name!r} (version {champion.version})"
    other_model = "give this experiment another tracking.registered_model"
    signature = mlflow.models.get_model_info(f"models:/{name}/{champion.version}").signature
    if signature is None:
        raise PromotionError(f"{who} has no signature, so it is not from heterokd; remove the alias")
    size, logits = int(signature.inputs.inputs[0].shape[-1]), signature.outputs.inputs[0].shape
    task = next(task for task in TASKS.values() if len(task.logits_shape(1, (1, 1))) == len(logits) - 1)
    if task.name != data.task:
        raise PromotionError(f"{who} is for {task.name}, this study for {data.task}; {other_model}")
    if int(logits[1]) != splits.num_classes:
        raise PromotionError(f"{who} has {logits[1]} classes, {data.dataset} has {splits.num_classes}; {other_model}")
    if champion.tags.get("dataset", data.dataset) != data.dataset:
        raise PromotionError(
            f"{who} is for data set {champion.tags['dataset']!r}, this study for {data.dataset!r}; {other_model}"
        )
    if champion.tags.get("data_seed", str(data.seed)) != str(data.seed):
        raise PromotionError(
            f"{who} was trained on another split (data.seed {champion.tags['data_seed']}, here {data.seed}) and "
            "may have seen these test images; use the same data.seed, or another tracking.registered_model"
        )
    seen = data
    if task.resizes and size != data.image_size:
        seen = data.model_copy(update={"image_size": size})
    version = str(champion.version)
    model = load_version(runs.experiment, version, splits)
    found = evaluate(EvaluatedStudent(model, seen, model_uri(runs.experiment, version)), runs.experiment)
    if not torch.equal(found.labels, challenger.labels):
        raise PromotionError(
            f"{who} cannot be compared: its test split at {size} pixels has other labels; {other_model}"
        )
    return found


def baseline_results(runs: StudyRuns, splits: Splits, evaluate: Evaluate) -> tuple[int, ImageResults] | None:
    """Evaluate the study's best scratch trial on the test images; return its number and results, or None without it.

    Raises:
        CheckpointError: its weights are missing.
    """
    summary = read_summary(runs.folder)
    if summary is None or summary.scratch is None:
        return None
    trial = runs.folder.trial(summary.scratch.number)
    if not trial.weights.exists():
        raise CheckpointError(
            f"{trial.weights}: the weights of the {BASELINE} baseline are missing; restore them, or run "
            "`heterokd search` again"
        )
    student = open_student(trial.recipe, trial.weights, splits.num_classes)
    tested = EvaluatedStudent(student, runs.experiment.data, None, trial)
    return trial.number, evaluate(tested, runs.experiment)
