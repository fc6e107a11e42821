"""match(): which stages of teacher and student see alike, and where methods that pair stages might start.

The student is the one trained on labels alone: as papers compare networks, each by itself. What is proposed:

    fbt    front stage k and back stage j: the front's stage k is most like the back's stage j - 1, which it replaces
    hcd    the student's stages that are like any of the teacher's
    ofa    exits from the first stage on that is like the teacher's last one, which decides

"Like" is `ENOUGH` of the most alike stage. These are places to start from, not results (benchmarks/match.py tells what
they are worth); `search.match_starts` has a search try them after the published settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from heterokd.config.experiment import Experiment
from heterokd.datasets.io.loaders import open_split
from heterokd.domains import Scalar
from heterokd.errors import ConfigError
from heterokd.execution.distill import distill_once
from heterokd.networks.network import build_network
from heterokd.networks.weights import load_weights
from heterokd.outputs import Kind, Signal
from heterokd.report.figures.matrices import draw_match
from heterokd.storage.files import read_json, write_text
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.teachers.prepare import open_prepared, prepare_teacher
from heterokd.training.cka import MinibatchCKA
from heterokd.training.data import open_splits
from heterokd.training.train import Metrics, Report

BATCH = 64
"""Images of a batch: Gram matrices of so many are quick, and more batches average their noise away."""

ENOUGH = 0.5
"""Share of the largest similarity from which a stage counts as like."""

LAYOUTS = 2
"""FBT layouts that are proposed."""


@dataclass(frozen=True)
class Match:
    """What a pair's stages have in common.

    Attributes:
        similarity: CKA, [student's stage, teacher's stage], shallow to deep.
        starts: by method, values to begin with: a sample's keys.
        student_score: of the student that was compared, on val.
        picture: the heat map.
    """

    similarity: tuple[tuple[float, ...], ...]
    starts: tuple[dict[str, Scalar], ...]
    student_score: float
    picture: Path

    def to_yaml(self) -> str:
        """The starts as `overrides` of a search space: their values alone are searched."""
        options: dict[str, list[Scalar]] = {}
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
    """Compare the stages of an experiment's first teacher and first student on val; match.json of its study keeps it.

    Args:
        experiment: data, teacher and student.
        root: where state lies; the student that labels alone trained is looked for there, and trained where it is not.
        on_epoch: told the epochs of that training.
        teacher_progress: told the epochs of the teacher's fit.

    Raises:
        UserError: the input is wrong.
    """
    if experiment.data.task != "classification":
        raise ConfigError(
            "data.dataset: stages are matched in classification, whose methods pair them; name such a set"
        )
    experiment = experiment.following(experiment.teacher.networks[0])
    trial = _student(experiment, root, on_epoch, teacher_progress)
    weights = prepare_teacher(experiment, root).weights
    splits = open_splits(experiment.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = trial.recipe
    teacher = open_prepared(recipe, weights, splits.num_classes).network.to(device)
    student = build_network(
        recipe.student.network, splits.num_classes, recipe.student.options, image_size=recipe.data.image_size
    )
    load_weights(student, trial.weights)
    student.eval().to(device)
    alike = MinibatchCKA(len(student.spec.stages), len(teacher.spec.stages))
    with torch.inference_mode():
        for batch in open_split(splits.val, splits.num_classes, BATCH, device=device):
            alike.add(*(network(batch.images, Signal.STAGES).stages for network in (student, teacher)))
    similarity = tuple(tuple(row) for row in alike.matrix().tolist())
    starts = propose_starts(similarity, student.spec.kind, teacher.spec.kind, experiment.methods)
    folder = root.study(experiment.name)
    picture = folder.pictures / "match.png"
    draw_match(picture, similarity, experiment.teacher.networks[0], recipe.student.network)
    caption = (
        f"How alike the stages of {experiment.teacher.networks[0]} (teacher) and {recipe.student.network} (trained on "
        "labels alone) are on val: CKA, 1 is the same up to rotation and scale."
    )
    captions = read_json(folder.pictures / "captions.json")
    write_text(folder.pictures / "captions.json", json.dumps({**captions, "match": caption}, indent=1))
    score = float(trial.status["metrics"].get(experiment.metric, 0.0))
    found = Match(similarity, starts, score, picture)
    content = {"similarity": similarity, "starts": starts, "student": recipe.student.network}
    write_text(folder.match_file, json.dumps(content, indent=1))
    return found


def propose_starts(
    similarity: Sequence[Sequence[float]], student_kind: Kind, teacher_kind: Kind, methods: Sequence[str]
) -> tuple[dict[str, Scalar], ...]:
    """Values to begin with, of those of `methods` that pair stages; see above.

    Args:
        similarity: [student's stage, teacher's stage].
        student_kind: what the student's last stage is made of.
        teacher_kind: likewise; with the student's it says whose stages are FBT's front.
        methods: that are searched.
    """
    starts: list[dict[str, Scalar]] = []
    stages = range(len(similarity))
    best = [max(row) for row in similarity]
    if "fbt" in methods:
        is_teacher_front = teacher_kind == "cnn" and student_kind != "cnn"
        # (k, j) of front stage k and back stage j - 1; deeper fronts first where several are equally alike.
        pairs = {
            (front + 1, back + 2): similarity[back][front] if is_teacher_front else similarity[front][back]
            for front in stages
            for back in range(len(similarity[0]))
        }
        ordered = sorted(pairs, key=lambda layout: (-pairs[layout], -layout[0], layout[1]))
        starts += [{"method": "fbt", "fbt.front_stage": k, "fbt.back_stage": j} for k, j in ordered[:LAYOUTS]]
    if "hcd" in methods:
        like = "".join(str(stage + 1) for stage in stages if best[stage] >= ENOUGH * max(best))
        starts.append({"method": "hcd", "hcd.stages": like})
    if "ofa" in methods:
        deciding = [row[-1] for row in similarity]
        first = next((stage for stage in stages if deciding[stage] >= ENOUGH * max(deciding)), len(similarity) - 1)
        starts.append({"method": "ofa", "ofa.stages": "".join(str(stage + 1) for stage in stages[first:])})
    return tuple(starts)


def _student(
    experiment: Experiment, root: Workspace, on_epoch: Callable[[Metrics], bool], teacher_progress: Report | None
) -> TrialFolder:
    """The first student trained on labels alone: a study's, or one that is trained now and kept as `heterokd distill`
    keeps it."""
    for name in (experiment.name, f"{experiment.name}-distill"):
        for trial in root.study(name).trials():
            recipe = trial.recipe
            if recipe.method == "scratch" and trial.weights.exists() and _fits(experiment, trial):
                return trial
    trial, _ = distill_once(experiment, "scratch", root, on_epoch, teacher_progress)
    return trial


def _fits(experiment: Experiment, trial: TrialFolder) -> bool:
    recipe = trial.recipe
    first = experiment.student.one()
    return recipe.student == first and recipe.data == experiment.data and trial.status.get("state") == "complete"
