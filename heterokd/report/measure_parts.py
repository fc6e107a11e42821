"""Parts of measured.json and their pictures; each function fills its fields and returns captions by picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from heterokd.config.recipe import Recipe
from heterokd.config.search import SearchSettings
from heterokd.datasets.io.loaders import EvalLoader, open_split
from heterokd.errors import CheckpointError, CostError
from heterokd.methods import BASELINE
from heterokd.networks.student_costs import STUDENT_COSTS
from heterokd.outputs import Signal, TaskName, labels_at
from heterokd.report.figures.class_labels import numbered_classes
from heterokd.report.figures.matrices import draw_confusion, draw_iou, draw_match
from heterokd.report.figures.samples import draw_method, draw_samples
from heterokd.report.measured import Failure, Measured, MeasuredNetwork
from heterokd.report.study_networks import StudyNetworks, describe_trial
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.training.cka import MinibatchCKA
from heterokd.training.evaluation import image_results, inference, predict
from heterokd.training.meters import iou_per_class
from heterokd.training.paired_tests import ImageConfusions
from heterokd.training.precision import time_step
from heterokd.training.student import build_configured
from heterokd.training.student_costs import CostMeter, asked_costs
from heterokd.training.task_modules import Task, build_task
from heterokd.training.train import build_distiller

FAILURES = 12
"""Maximum number of wrong images on the page."""

THUMBNAIL, SMALL = 160, 64
"""Side in pixels of a wrong image on the page; up to `SMALL` pixels it is stored without loss, since the page enlarges
it."""

SAMPLES = 6
METHOD_SAMPLES = 4

CKA_IMAGES, CKA_BATCH = 512, 32
"""Images of val for CKA, and batch size."""

CKA_SIDE = 16
"""Side that larger maps are average-pooled to: in float64 they would take gigabytes."""

SLOW = 0.5
"""Seconds of a forward from which a network is not timed: a measurement takes dozens of forwards."""

Captions = Mapping[str, str]
Part = Callable[[StudyNetworks, Measured], Captions]


def measure_costs(
    study: StudyNetworks, made: Measured, root: Workspace, known: Mapping[str, MeasuredNetwork] | None = None
) -> Captions:
    """Measure the costs of teacher and student, unless they are known."""
    recipe, search = study.winner.recipe, study.experiment.search
    made.networks.update(measure_networks(recipe, search, study.num_classes, root) if known is None else known)
    return {}


def measure_networks(
    recipe: Recipe, search: SearchSettings, classes: int, root: Workspace
) -> dict[str, MeasuredNetwork]:
    """Measure the costs of `student` and `teacher` on this machine, or read them from the search's table.

    A slow network is not timed, and an optional cost is measured only where the search asks for it.
    """
    data, measured = recipe.data, dict[str, MeasuredNetwork]()
    meter, asked = CostMeter(root, classes, data.view_size, data.image_size, search), asked_costs(search)
    for name, settings in (("student", recipe.student), ("teacher", recipe.teacher)):
        network = build_configured(settings, classes, data.image_size).eval()
        with torch.inference_mode():
            is_slow = time_step(partial(network, torch.rand(1, 3, *data.view_size)), "cpu") >= SLOW
        costs: dict[str, float | None] = {}
        for key, cost in STUDENT_COSTS.items():
            if cost.is_optional and key not in asked:
                continue
            costs[key] = None
            if not (cost.is_timed and is_slow) or search.listed_costs(key):
                with suppress(CostError):
                    costs[key] = meter.cost(key, settings)
        measured[name] = MeasuredNetwork(settings.network, costs)
    return measured


def measure_similarity(study: StudyNetworks, made: Measured) -> Captions:
    """Compare the stages of teacher and winner by CKA.

    Raises:
        PairError: a network gives no stages.
    """
    live, student = study.teacher(study.winner), study.student(study.winner)
    teacher = live.network
    for network in (teacher, student):
        network.spec.at(4)
    cka = MinibatchCKA(len(student.spec.stages), len(teacher.spec.stages))
    seen = 0
    with torch.inference_mode():
        val = EvalLoader(study.splits.val, CKA_BATCH, device=study.device)
        for by_student, by_teacher in zip(val, live.plain(val, study.device), strict=True):
            pairs = ((student, by_student.images), (teacher, by_teacher.images))
            cka.add(*(list(map(_pooled, network(images, Signal.STAGES).stages)) for network, images in pairs))
            seen += len(by_student)
            if seen >= CKA_IMAGES:
                break
    made.similarity, made.compared = tuple(map(tuple, cka.matrix().tolist())), seen
    recipe, picture = study.winner.recipe, study.folder.pictures / "cka.png"
    draw_match(picture, made.similarity, recipe.teacher.network, recipe.student.network)
    winner = describe_trial(study.winner)
    return {"cka": f"Similarity of the stages of teacher and winner ({winner}) on val: CKA, 1 is the same."}


def _pooled(maps: Tensor) -> Tensor:
    """Average-pool maps [B, C, H, W] to at most `CKA_SIDE` pixels a side."""
    height, width = maps.shape[-2:]
    return F.adaptive_avg_pool2d(maps, (min(height, CKA_SIDE), min(width, CKA_SIDE)))


def measure_confusion(study: StudyNetworks, made: Measured) -> Captions:
    """Compute the confusion matrices of the winner and of the baseline on val."""
    logits, labels = _predicted(study, study.winner)
    made.confusion = _confusion(logits, labels, study.num_classes)
    made.failures = save_failures(study, logits, labels)
    caption = f"Confusion matrix of the winner ({describe_trial(study.winner)}) on val"
    if study.scratch is not None:
        made.scratch_confusion = _confusion(*_predicted(study, study.scratch), study.num_classes)
        caption += f", and the gain of each class over the student without a teacher ({describe_trial(study.scratch)})"
    picture = study.folder.pictures / "confusion.png"
    draw_confusion(picture, made.confusion, study.splits.class_names, made.scratch_confusion)
    return {"confusion": f"{caption}{numbered_classes(study.splits.class_names)}."}


def _predicted(study: StudyNetworks, trial: TrialFolder) -> tuple[Tensor, Tensor]:
    """Return a trial's logits [N, K] and the labels [N] on val, on the CPU."""
    loader = open_split(study.splits.val, study.num_classes, device=study.device)
    logits, labels = predict(study.student(trial), loader, study.device)
    return logits, labels.cpu()


def _confusion(logits: Tensor, labels: Tensor, classes: int) -> NDArray[np.int64]:
    counts = torch.bincount(labels * classes + logits.argmax(dim=1), minlength=classes**2)
    confusion: NDArray[np.int64] = counts.view(classes, classes).numpy()
    return confusion


def save_failures(study: StudyNetworks, logits: Tensor, labels: Tensor) -> tuple[Failure, ...]:
    """Save the wrong images of val with the most confidence, at most `FAILURES`, in the study's folder of pictures.

    Args:
        study: the study's networks and data.
        logits: [N, K] of the winner on val.
        labels: [N] class numbers.
    """
    probabilities = logits.double().softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    wrong = (predicted != labels).nonzero()[:, 0]
    chosen = wrong[confidence[wrong].argsort(descending=True, stable=True)][:FAILURES]
    for old in study.folder.pictures.glob("failure-*"):
        old.unlink()
    if not len(chosen):
        return ()
    study.folder.pictures.mkdir(parents=True, exist_ok=True)
    pixels, _, _ = study.images(chosen.numpy())
    found = []
    for place, index in enumerate(chosen.tolist()):
        image = Image.fromarray(pixels[place])
        is_small = max(image.size) <= SMALL
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        file = study.folder.pictures / f"failure-{place:02d}.{'png' if is_small else 'jpg'}"
        image.save(file)
        label, answer = int(labels[index]), int(predicted[index])
        found.append(
            Failure(file.name, index, label, answer, float(confidence[index]), float(probabilities[index, label]))
        )
    return tuple(found)


def measure_iou(study: StudyNetworks, made: Measured) -> Captions:
    """Measure the IoU of each class on val, and draw the predictions of teacher and winner on some images."""
    loader = open_split(study.splits.val, study.num_classes, device=study.device)
    data, method = study.experiment.data, study.winner.recipe.method
    task = build_task(data.task, study.num_classes, inference=data.inference)
    live, student = study.teacher(study.winner), study.student(study.winner)
    teacher = live.network
    networks: dict[str, nn.Module] = {"teacher": teacher, method: student}
    if study.scratch is not None:
        networks[BASELINE] = study.student(study.scratch)
    loaders = dict.fromkeys(networks, loader) | {"teacher": live.plain(loader, study.device)}
    results = {name: image_results(network, loaders[name], task, study.device) for name, network in networks.items()}
    counts = {name: result.images for name, result in results.items()}
    of_winner = results[method]
    assert isinstance(of_winner, ImageConfusions)  # of segmentation
    made.iou_intervals = of_winner.class_intervals()
    made.iou = {name: iou_per_class(count.sum(dim=0)).numpy() for name, count in counts.items()}
    pictures, names = study.folder.pictures, study.splits.class_names
    draw_iou(pictures / "iou.png", made.iou, names)
    index = _spread(counts[method])
    pixels, images, labels = study.images(index)
    (seen,) = EvalLoader(loaders["teacher"].split.chosen(index), len(index))
    by_student = _predictions(student, images, task, study.device)
    by_teacher = labels_at(
        torch.from_numpy(_predictions(teacher, seen.images, task, study.device)), labels.shape[-2:]
    ).numpy()
    draw_samples(pictures / "samples.png", pixels, labels.numpy(), by_teacher, by_student, names)
    winner = describe_trial(study.winner)
    others = " and the student without a teacher" if study.scratch is not None else ""
    return {
        "iou": f"Intersection over union of each class on val: the winner ({winner}), its teacher{others}; the class "
        f"with the largest gain from distillation is first{numbered_classes(names)}.",
        "samples": f"Images of val at even steps from the lowest to the highest accuracy of the winner ({winner})"
        f"{numbered_classes(names)}.",
    }


def _spread(counts: Tensor) -> NDArray[np.int64]:
    """Choose `SAMPLES` images at even steps of pixel accuracy; `counts` are their confusion matrices [N, K, K]."""
    accuracy = counts.diagonal(dim1=1, dim2=2).sum(dim=1) / counts.sum(dim=(1, 2)).clamp(min=1)
    order = torch.argsort(accuracy, stable=True).numpy()
    places = np.unique(np.linspace(0, len(order) - 1, SAMPLES).round().astype(np.int64))
    chosen: NDArray[np.int64] = order[places]
    return chosen


def _predictions(network: nn.Module, images: Tensor, task: Task, device: torch.device) -> NDArray[np.int64]:
    """Predict class numbers [B, H, W] image by image: scores of every class and pixel take much memory."""
    with inference(network) as logits_of:
        maps = [task.logits(logits_of, image[None].to(device)).argmax(dim=1).cpu() for image in images]
    predicted: NDArray[np.int64] = torch.cat(maps).numpy()
    return predicted


PARTS: dict[TaskName, tuple[str, Part]] = {
    "classification": ("confusion", measure_confusion),
    "segmentation": ("iou", measure_iou),
}
"""Part of measured.json by task."""


def measure_method(study: StudyNetworks, made: Measured, trial: TrialFolder) -> Captions:
    """Draw what a trial's method computes for some images, with the projectors in the trial's last checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    name, teacher = trial.recipe.method, study.teacher(trial)
    distiller = build_distiller(trial.recipe, teacher, study.num_classes)
    try:
        content = torch.load(trial.checkpoint, map_location="cpu", weights_only=True)
        distiller.load_state_dict(content["distiller"])
        epoch = int(content["epoch"])
    except Exception as error:  # noqa: BLE001  torch raises many kinds for a damaged file
        kind = type(error).__name__
        raise CheckpointError(f"{trial.checkpoint}: is damaged ({kind}); remove it to omit its picture") from None
    method = distiller.to(study.device).eval().method
    index = np.unique(np.linspace(0, len(study.splits.val) - 1, METHOD_SAMPLES).round().astype(np.int64))
    pixels, images, labels = study.images(index)
    images = images.to(study.device)
    with torch.inference_mode():
        student_outputs = distiller.student(images, method.student_needs)
        val = teacher.plain(EvalLoader(study.splits.val, len(index)), study.device).split
        (seen,) = EvalLoader(val.chosen(index), len(index), device=study.device)
        teacher_outputs = teacher.network(seen.images, method.teacher_needs)
        figure = method.figure(student_outputs, teacher_outputs, labels.to(study.device))
    if figure is None:
        return {}
    draw_method(study.folder.pictures / f"{name}.png", pixels, figure.panels)
    where = f"on images of val after {epoch} of {trial.recipe.training.epochs} epochs of trial {trial.number}"
    return {name: f"{type(method).__name__} {where}, {figure.caption}."}
