"""match(): compare the stages of teacher and student by CKA, and propose where methods that pair stages might start.

The student is trained on labels alone, as papers compare independently trained networks. Each method derives settings
from the similarity (`Method.initial_settings`). The proposals are starting points, not results
(benchmarks/match.py measures them); with `search.match_starts` a search tries them after the published settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from heterokd.config.experiment import Experiment
from heterokd.config.methods import methods_of
from heterokd.datasets.io.loaders import open_split
from heterokd.errors import ConfigError, NetworkError
from heterokd.execution.check import with_key
from heterokd.execution.distill import distill_once
from heterokd.execution.prepare import prepare_teacher
from heterokd.method import Method, Settings, StageSimilarity
from heterokd.methods import BASELINE, METHODS
from heterokd.networks.network import predict_spec
from heterokd.outputs import Signal
from heterokd.report.figures.matrices import draw_match
from heterokd.storage.files import read_derived, write_text
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.trial_status import TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.students.given_weights import with_given_weights
from heterokd.teachers.prepare import open_prepared
from heterokd.training.cka import MinibatchCKA
from heterokd.training.data import open_splits
from heterokd.training.precision import default_device
from heterokd.training.student import open_student
from heterokd.training.train import Metrics, Report

BATCH = 64
"""Images per batch: Gram matrices of this size are fast, and averaging over batches reduces their noise."""


@dataclass(frozen=True)
class Match:
    """Similarity of a pair's stages, and initial samples derived from it.

    Attributes:
        similarity: CKA, [student's stage, teacher's stage], shallow to deep.
        starts: samples to begin with.
        student_score: score on val of the student that was compared.
        picture: file of the heat map.
    """

    similarity: tuple[tuple[float, ...], ...]
    starts: tuple[Settings, ...]
    student_score: float
    picture: Path

    def to_yaml(self) -> str:
        """Format the starts as `overrides` of a search space that searches their values only."""
        options: dict[str, list[object]] = {}
        for start in self.starts:
            for key, value in start.items():
                if key != "method" and value not in options.setdefault(key, []):
                    options[key].append(value)
        return yaml.safe_dump({"overrides": {key: {"options": values} for key, values in options.items()}})


def match(
    experiment: Experiment,
    root: Workspace,
    *,
    on_epoch: Callable[[Metrics], bool] = lambda metrics: True,
    teacher_progress: Report | None = None,
) -> Match:
    """Compare the stages of an experiment's first teacher and first student on val; write match.json of its study.

    Args:
        experiment: data, teacher and student.
        root: workspace, where a student trained on labels alone is looked up; if there is none, it is trained.
        on_epoch: called with the metrics of each epoch of that training.
        teacher_progress: called with the metrics of each epoch of the teacher's fit.

    Raises:
        UserError: the input is wrong.
    """
    task = experiment.data.task
    if not any(METHODS[name].has_initial_settings for name in methods_of(task)):
        raise ConfigError(
            f"data.dataset: no method of {task} has settings that follow from the similarity of stages; "
            "name a data set of another task"
        )
    experiment = with_given_weights(experiment.for_teacher(experiment.teacher.networks[0]), root)
    _check_stages(experiment)
    trial = _student(experiment, root, on_epoch, teacher_progress)
    weights = prepare_teacher(experiment, root).weights
    splits = open_splits(experiment.data)
    device = torch.device(default_device())
    recipe = trial.recipe
    live = open_prepared(recipe, weights, splits.num_classes)
    teacher = live.network.to(device)
    student = open_student(recipe, trial.weights, splits.num_classes).to(device)
    cka = MinibatchCKA(len(student.spec.stages), len(teacher.spec.stages))
    with torch.inference_mode():
        val = open_split(splits.val, splits.num_classes, BATCH, device=device)
        for seen_by in zip(val, live.plain(val, device), strict=True):
            pairs = zip((student, teacher), seen_by, strict=True)
            cka.add(*(network(batch.images, Signal.STAGES).stages for network, batch in pairs))
    similarity = tuple(tuple(row) for row in cka.matrix().tolist())
    stages = StageSimilarity(similarity, student.spec.kind, teacher.spec.kind)
    starts = propose_starts(stages, {method: experiment.method_class(method) for method in experiment.methods})
    folder = root.study(experiment.name)
    picture = folder.pictures / "match.png"
    draw_match(picture, similarity, experiment.teacher.networks[0], recipe.student.network)
    caption = (
        f"Similarity of the stages of {experiment.teacher.networks[0]} (teacher) and {recipe.student.network} "
        "(trained on labels alone) on val: CKA, 1 is the same up to rotation and scale."
    )
    captions = read_derived(folder.pictures / "captions.json")
    write_text(folder.pictures / "captions.json", json.dumps({**captions, "match": caption}, indent=1))
    score = float(trial.snapshot.metrics.get(experiment.metric, 0.0))
    found = Match(similarity, starts, score, picture)
    content = {"similarity": similarity, "starts": starts, "student": recipe.student.network}
    write_text(folder.match_file, json.dumps(content, indent=1))
    return found


def _check_stages(experiment: Experiment) -> None:
    """Check before work begins that both networks give stages.

    Raises:
        NetworkError: names the network.
    """
    size = experiment.data.image_size
    both = {"teacher": experiment.teacher.settings_of(), "student": experiment.student.settings_of()}
    for section, settings in both.items():
        try:
            spec = predict_spec(settings.network, 2, settings.options, size)
            if not spec.stages:
                raise NetworkError(f"network {settings.network!r} gives no stages to compare; choose another network")
        except NetworkError as error:
            raise NetworkError(with_key(section, error)) from None


def propose_starts(similarity: StageSimilarity, methods: Mapping[str, type[Method]]) -> tuple[Settings, ...]:
    """Return initial samples of the methods that pair stages."""
    return tuple(
        {"method": method, **{f"{method}.{name}": value for name, value in settings.items()}}
        for method, kind in sorted(methods.items())
        for settings in kind.initial_settings(similarity)
    )


def _student(
    experiment: Experiment, root: Workspace, on_epoch: Callable[[Metrics], bool], teacher_progress: Report | None
) -> TrialFolder:
    """Find the first student trained on labels alone in the study, or train it as `heterokd distill` does."""
    for name in (experiment.name, f"{experiment.name}-distill"):
        for trial in root.study(name).trials():
            recipe = trial.recipe
            if recipe.method == BASELINE and trial.weights.exists() and _fits(experiment, trial):
                return trial
    return distill_once(experiment, BASELINE, root, on_epoch, teacher_progress).trial


def _fits(experiment: Experiment, trial: TrialFolder) -> bool:
    recipe = trial.recipe
    first = experiment.student.settings_of()
    return recipe.student == first and recipe.data == experiment.data and trial.status == TrialStatus.COMPLETE
