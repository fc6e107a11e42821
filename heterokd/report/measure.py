"""draw_pictures(): a finished study's networks are opened, run over val once, measured and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from heterokd.config.experiment import Experiment
from heterokd.datasets.io.loaders import EvalLoader, open_split
from heterokd.datasets.io.split import Split, Splits
from heterokd.errors import CheckpointError
from heterokd.networks.student_costs import STUDENT_COSTS
from heterokd.outputs import Signal
from heterokd.report.figures.matrices import draw_confusion, draw_iou, draw_match
from heterokd.report.figures.samples import draw_method, draw_samples
from heterokd.report.measured import Measured
from heterokd.storage.files import read_json, write_text
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.summary import StudySummary, read_summary
from heterokd.teachers.prepare import open_prepared
from heterokd.training.cka import MinibatchCKA
from heterokd.training.data import open_splits
from heterokd.training.evaluation import deciding, image_results, predict
from heterokd.training.precision import default_device, time_step
from heterokd.training.student import build_configured, open_student
from heterokd.training.student_costs import student_cost
from heterokd.training.task_modules import SegmentationTask, build_task, iou_per_class
from heterokd.training.teacher import LiveTeacher
from heterokd.training.train import build_distiller

Weights = Mapping[str, Path | None]
"""By network, the file of a prepared teacher's weights; None: timm's published ones."""

SAMPLES = 6
METHOD_SAMPLES = 4

CKA_IMAGES, CKA_BATCH = 512, 32
CKA_SIDE = 16
"""Images of val that stages are compared on, how many at a time, and the side that larger maps are averaged down to."""

SLOW = 0.5
"""Seconds of one forward from which a network is not timed: a figure takes dozens of them."""


def draw_pictures(folder: StudyFolder, experiment: Experiment, root: Workspace, weights: Weights) -> list[Path]:
    """Measure a study's best student on val (measured.json) and draw it into the study's `pictures/`.

    Args:
        folder: of a study whose summary names a winner; without one nothing is measured.
        experiment: its question.
        root: where state lives.
        weights: by network, the prepared teachers'; None: the published ones.

    Returns:
        The files: `confusion.png` in classification; `samples.png` and `iou.png` in segmentation; `cka.png`, and
        `{method}.png` of each method that has a figure and whose best trial left its checkpoint, in both. A part that
        fails is left out: measured.json says why.
    """
    summary = read_summary(folder)
    if summary is None or summary.winner is None:
        return []
    splits = open_splits(experiment.data)
    device = torch.device(default_device())
    winner = folder.trial(summary.winner.number)
    scratch = None if summary.scratch is None else folder.trial(summary.scratch.number)
    if scratch is not None and (scratch.number == winner.number or not scratch.weights.exists()):
        scratch = None
    made = Measured(
        winner=winner.number,
        scratch=None if scratch is None else scratch.number,
        images=len(splits.val),
        classes=tuple(map(str, splits.class_names)),
    )
    captions: dict[str, str] = {}

    def attempt(part: str, action: Callable[[], Mapping[str, str]]) -> None:
        try:
            captions.update(action())
        except Exception as error:  # noqa: BLE001  the page says what is missing, the other parts are worth having
            made.missing[part] = f"{type(error).__name__}: {error}".splitlines()[0]

    attempt("networks", lambda: _weigh(made, experiment, root, winner, splits.num_classes))
    if experiment.data.task == "classification":
        attempt("confusion", lambda: _confusion(made, folder, splits, winner, scratch, device))
    else:
        task = build_task("segmentation", splits.num_classes, window=experiment.data.window)
        assert isinstance(task, SegmentationTask)
        attempt("iou", lambda: _segmentation(made, folder, splits, task, weights, winner, scratch, device))
    for method, number in _first_with_figure(experiment, summary).items():
        if (trial := folder.trial(number)).checkpoint.exists():
            attempt(method, partial(_method_figure, folder, splits, weights, trial, device))
    attempt("cka", lambda: _cka(made, folder, splits, weights, winner, device))
    made.write(folder)
    known = read_json(folder.pictures / "captions.json")
    write_text(folder.pictures / "captions.json", json.dumps({**known, **captions}, indent=1))
    return [folder.pictures / f"{name}.png" for name in captions]


def _first_with_figure(experiment: Experiment, summary: StudySummary) -> dict[str, int]:
    """Number of the best trial of each method that has a figure."""
    found: dict[str, int] = {}
    for leader in summary.leaders:
        if experiment.method_class(leader.method).has_figure:
            found.setdefault(leader.method, leader.number)
    return found


def _weigh(
    made: Measured, experiment: Experiment, root: Workspace, winner: TrialFolder, classes: int
) -> dict[str, str]:
    """Costs of teacher and student; none that is timed of a network that is slow."""
    data, recipe = experiment.data, winner.recipe
    for name, settings in (("student", recipe.student), ("teacher", recipe.teacher)):
        network = build_configured(settings, classes, data.image_size).eval()
        is_slow = time_step(partial(_forward, network, torch.rand(1, 3, *data.view_size)), "cpu") >= SLOW
        made.networks[name] = {"network": settings.network}
        for cost, kind in STUDENT_COSTS.items():
            known = None
            if not (kind.is_timed and is_slow):
                known = student_cost(cost, settings, classes, data.view_size, data.image_size, root)
            made.networks[name][cost] = known
    return {}


def _forward(network: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        network(images)


def _teacher(trial: TrialFolder, weights: Weights, classes: int) -> LiveTeacher:
    settings = trial.recipe.teacher
    file = weights.get(settings.network)
    if file is None and not settings.pretrained and settings.checkpoint is None:
        raise CheckpointError("the teacher's weights are not here; `heterokd teacher EXPERIMENT` fits it")
    return open_prepared(trial.recipe, file, classes)


def _cka(
    made: Measured, folder: StudyFolder, splits: Splits, weights: Weights, winner: TrialFolder, device: torch.device
) -> dict[str, str]:
    """How alike the stages of teacher and winner are."""
    teacher = _teacher(winner, weights, splits.num_classes).network.to(device)
    student = open_student(winner.recipe, winner.weights, splits.num_classes).to(device)
    alike = MinibatchCKA(len(student.spec.stages), len(teacher.spec.stages))
    seen = 0
    with torch.inference_mode():
        for batch in EvalLoader(splits.val, CKA_BATCH, device=device):
            images = batch.images.to(device)
            alike.add(*([_small(one) for one in net(images, Signal.STAGES).stages] for net in (student, teacher)))
            seen += len(batch)
            if seen >= CKA_IMAGES:
                break
    made.similarity, made.compared = tuple(map(tuple, alike.matrix().tolist())), seen
    names = (winner.recipe.teacher.network, winner.recipe.student.network)
    draw_match(folder.pictures / "cka.png", made.similarity, *names)
    return {
        "cka": f"How alike the stages of teacher and best student ({_named(winner)}) are on val: CKA, 1 is the same."
    }


def _small(maps: Tensor) -> Tensor:
    """Maps [B, C, H, W] of at most `CKA_SIDE` a side: larger ones would take gigabytes in float64."""
    height, width = maps.shape[-2:]
    return F.adaptive_avg_pool2d(maps, (min(height, CKA_SIDE), min(width, CKA_SIDE)))


def _confusion(
    made: Measured,
    folder: StudyFolder,
    splits: Splits,
    winner: TrialFolder,
    scratch: TrialFolder | None,
    device: torch.device,
) -> dict[str, str]:
    loader = open_split(splits.val, splits.num_classes, device=device)
    found = []
    for trial in (winner, scratch):
        if trial is not None:
            logits, labels = predict(
                open_student(trial.recipe, trial.weights, splits.num_classes).to(device), loader, device
            )
            places = labels.cpu() * splits.num_classes + logits.argmax(dim=1).cpu()
            counts = torch.bincount(places, minlength=splits.num_classes**2)
            found.append(counts.view(splits.num_classes, splits.num_classes).numpy())
    made.confusion, made.scratch_confusion = found[0], found[1] if scratch is not None else None
    draw_confusion(folder.pictures / "confusion.png", found[0], splits.class_names, *found[1:])
    caption = f"What the best student ({_named(winner)}) takes each class of val for"
    if scratch is not None:
        caption += f", and how much more of each class it finds than the student without a teacher ({_named(scratch)})"
    return {"confusion": f"{caption}."}


def _segmentation(
    made: Measured,
    folder: StudyFolder,
    splits: Splits,
    task: SegmentationTask,
    weights: Weights,
    winner: TrialFolder,
    scratch: TrialFolder | None,
    device: torch.device,
) -> dict[str, str]:
    loader = open_split(splits.val, splits.num_classes, device=device)
    method, teacher = winner.recipe.method, _teacher(winner, weights, splits.num_classes)
    student = open_student(winner.recipe, winner.weights, splits.num_classes).to(device)
    networks: dict[str, nn.Module] = {"teacher": teacher.network.to(device), method: student}
    if scratch is not None:
        networks["scratch"] = open_student(scratch.recipe, scratch.weights, splits.num_classes).to(device)
    counts = {name: image_results(network, loader, task, device).images for name, network in networks.items()}
    iou = {name: iou_per_class(count.sum(dim=0)).numpy() for name, count in counts.items()}
    made.iou = iou
    draw_iou(folder.pictures / "iou.png", iou, splits.class_names)
    index = _spread(counts[method])
    images, labels = _read(splits.val, index)
    followed = _decisions(networks["teacher"], images, task, device)
    own = _decisions(student, images, task, device)
    pixels = splits.val.images.read(index)
    draw_samples(folder.pictures / "samples.png", pixels, labels.numpy(), followed, own, splits.class_names)
    beside = " and the student without a teacher" if scratch is not None else ""
    return {
        "iou": f"Intersection over union of each class on val: the best student ({_named(winner)}), its teacher"
        f"{beside}; the class that distillation helps most first.",
        "samples": f"Images of val, from the one the best student ({_named(winner)}) labels worst to the one it labels "
        "best, at even steps between.",
    }


def _method_figure(
    folder: StudyFolder, splits: Splits, weights: Weights, trial: TrialFolder, device: torch.device
) -> dict[str, str]:
    """What the method of a trial shows of some images, as its last checkpoint has it: the student alone is kept."""
    name, teacher = trial.recipe.method, _teacher(trial, weights, splits.num_classes)
    distiller = build_distiller(trial.recipe, teacher, splits.num_classes)
    try:
        content = torch.load(trial.checkpoint, map_location="cpu", weights_only=True)
        distiller.load_state_dict(content["distiller"])
        epoch = int(content["epoch"])
    except Exception as error:  # noqa: BLE001  torch raises many kinds for a damaged file
        kind = type(error).__name__
        raise CheckpointError(f"{trial.checkpoint}: is damaged ({kind}); remove it to do without its picture") from None
    method = distiller.to(device).eval().method
    index = np.unique(np.linspace(0, len(splits.val) - 1, METHOD_SAMPLES).round().astype(np.int64))
    images, labels = _read(splits.val, index)
    with torch.inference_mode():
        outputs = distiller.student(images.to(device), method.student_needs)
        followed = teacher.network.to(device)(images.to(device), method.teacher_needs)
        shown = method.figure(outputs, followed, labels.to(device))
    if shown is None:
        return {}
    draw_method(folder.pictures / f"{name}.png", splits.val.images.read(index), shown.panels)
    return {
        name: f"{type(method).__name__} on images of val after {epoch} of {trial.recipe.training.epochs} epochs of "
        f"trial {trial.number}, {shown.caption}."
    }


def _spread(counts: Tensor) -> NDArray[np.int64]:
    """`SAMPLES` images at even steps from the least to the most accurate one; counts [N, K, K] of each image."""
    accuracy = counts.diagonal(dim1=1, dim2=2).sum(dim=1) / counts.sum(dim=(1, 2)).clamp(min=1)
    order = torch.argsort(accuracy, stable=True).numpy()
    places = np.unique(np.linspace(0, len(order) - 1, SAMPLES).round().astype(np.int64))
    chosen: NDArray[np.int64] = order[places]
    return chosen


def _read(split: Split, index: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W] in [0, 1] and their labels, [B] or [B, H, W]."""
    images = torch.from_numpy(split.images.read(index)).permute(0, 3, 1, 2).float() / 255
    labels = split.labels[index] if split.label_maps is None else split.label_maps.read(index)
    return images, torch.from_numpy(labels).long()


def _decisions(network: nn.Module, images: Tensor, task: SegmentationTask, device: torch.device) -> NDArray[np.int64]:
    """Class numbers [B, H, W], one image at a time: a score for every class and pixel takes much memory."""
    with deciding(network) as decide:
        maps = [task.decide(decide, one[None].to(device)).argmax(dim=1).cpu() for one in images]
    decided: NDArray[np.int64] = torch.cat(maps).numpy()
    return decided


def _named(trial: TrialFolder) -> str:
    return f"{trial.recipe.student.network} by {trial.recipe.method}, trial {trial.number}"
