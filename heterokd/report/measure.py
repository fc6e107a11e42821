"""Measure a finished study's winner on val once, and draw its pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from heterokd.config.experiment import Experiment
from heterokd.datasets.io.unlabelled import training_images
from heterokd.report.measure_parts import PARTS, Part, measure_costs, measure_method, measure_similarity
from heterokd.report.measured import Measured, MeasuredNetwork
from heterokd.report.study_networks import StudyNetworks, Weights
from heterokd.storage.files import read_derived, write_text
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.read_summary import read_summary
from heterokd.study.summary import StudySummary
from heterokd.training.data import open_splits
from heterokd.training.precision import default_device


def draw_pictures(
    folder: StudyFolder,
    experiment: Experiment,
    root: Workspace,
    weights: Weights,
    networks: Mapping[str, MeasuredNetwork] | None = None,
) -> list[Path]:
    """Measure a study's winner on val (measured.json) and draw the pictures of the study.

    Without a winner nothing is measured.

    Args:
        folder: folder of the study.
        experiment: experiment of the study.
        root: workspace.
        weights: weights of the prepared teachers by network.
        networks: costs of teacher and student that are known; None: they are measured.

    Returns:
        The files: `confusion.png` in classification; `samples.png` and `iou.png` in segmentation; in both `cka.png`,
        and `{method}.png` of each method with a figure whose best trial has its checkpoint. If a part fails, it is
        left out, and measured.json holds the reason.
    """
    summary = read_summary(folder)
    if summary is None or summary.winner is None:
        return []
    winner = folder.trial(summary.winner.number)
    scratch = None if summary.scratch is None else folder.trial(summary.scratch.number)
    if scratch is not None and (scratch.number == winner.number or not scratch.weights.exists()):
        scratch = None
    device = torch.device(default_device())
    study = StudyNetworks(folder, experiment, open_splits(experiment.data), weights, winner, scratch, device)
    made = Measured(
        winner=winner.number,
        scratch=None if scratch is None else scratch.number,
        images=len(study.splits.val),
        training_images=training_images(study.splits),
        classes=tuple(map(str, study.splits.class_names)),
    )
    captions: dict[str, str] = {}
    parts: dict[str, Part] = {"networks": partial(measure_costs, root=root, known=networks), **_parts(study, summary)}
    for name, part in parts.items():
        try:
            captions.update(part(study, made))
        except Exception as error:  # noqa: BLE001  the other parts are of use, and the page says what is missing
            made.missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    made.write(folder)
    known = read_derived(folder.pictures / "captions.json")
    write_text(folder.pictures / "captions.json", json.dumps({**known, **captions}, indent=1))
    return [folder.pictures / f"{name}.png" for name in captions]


def _parts(study: StudyNetworks, summary: StudySummary) -> dict[str, Part]:
    """Return the parts after the costs by name, in the order in which they are measured."""
    name, task_part = PARTS[study.experiment.data.task]
    parts: dict[str, Part] = {name: task_part}
    for leader in summary.leaders:
        trial, method = study.folder.trial(leader.number), leader.method
        has_figure = study.experiment.method_class(method).has_figure and trial.checkpoint.exists()
        if has_figure and method not in parts:
            parts[method] = partial(measure_method, trial=trial)
    return {**parts, "cka": measure_similarity}
