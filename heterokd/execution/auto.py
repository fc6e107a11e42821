"""Propose an experiment for a folder of images, as a YAML file with the reasons in its comments.

Each rule of thumb stands in one place below: the size of views follows the images, epochs and batches follow their
number, and the students are the largest of each family within the limits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from heterokd.config.costs import limit_settings
from heterokd.config.experiment import Experiment
from heterokd.config.networks import NetworkSettings
from heterokd.config.reading import load_experiment
from heterokd.datasets.io.inspect import FolderInspection
from heterokd.datasets.masks.inspect import MaskInspection
from heterokd.errors import ConfigError, HeterokdError, NetworkError, did_you_mean
from heterokd.execution.auto_file import Section, write_experiment
from heterokd.execution.auto_rules import ImageRules, rules_for
from heterokd.execution.prepare import prepare_teacher
from heterokd.networks.bodies import network_names, no_weights, published_classes
from heterokd.networks.network import predict_spec
from heterokd.networks.segmentation_names import is_segmentation, split_name
from heterokd.networks.student_costs import STUDENT_COSTS
from heterokd.storage.workspace import Workspace
from heterokd.teachers.prepare import PreparedTeacher
from heterokd.training.student_costs import CostMeter, parameters_m
from heterokd.training.train import Report

TEACHER_PARTS = 4
"""Without a limit, a student has at most this fraction (1 / 4) of the teacher's parameters."""

UPDATES = 4000
"""Approximate number of updates of a student's training, between `EPOCHS`."""
EPOCHS = (15, 80)
TEACHER_UPDATES, TEACHER_EPOCHS = 4000, (10, 60)

TOKENS = 8
"""Tokens along a side of small images, for an attention teacher without published weights."""

TRIALS_PER_METHOD = 3

PARAMETERS = "params_m"
COMMAND_LIMITS = (PARAMETERS, "latency_ms")
"""Limits that `heterokd auto` has options for."""
"""Cost that is limited by default."""


@dataclass(frozen=True)
class AutoRequest:
    """Request of the user.

    Attributes:
        images: folder that the experiment reads.
        teachers: names; of several, the best on val once they are fitted.
        students: names; empty: proposed here.
        limits: upper limits of a student's costs by the keys of `STUDENT_COSTS`; without a limit of parameters, a
            fraction of the teacher's.
        hours: time limit of the search; None: a number of trials.
        file: to write; None: in the workspace.
        checkpoint: weights of the teacher, see `teacher.checkpoint`; None: timm's, if they are available.
    """

    images: Path
    teachers: Sequence[str]
    students: Sequence[str] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    hours: float | None = None
    file: Path | None = None
    checkpoint: str | None = None


@dataclass(frozen=True)
class Proposal:
    """An experiment that is ready to run.

    Attributes:
        file: its YAML.
        experiment: content of the file.
        reasons: one sentence per choice.
        found: sentences on the images.
        content: sections of the file.
    """

    file: Path
    experiment: Experiment
    reasons: tuple[str, ...]
    found: tuple[str, ...] = ()
    content: Section = field(default_factory=dict)

    @property
    def sentences(self) -> tuple[str, ...]:
        """What was found, then the reasons."""
        return (*self.found, *self.reasons)

    def changed(self, sections: Mapping[str, Section], reasons: Sequence[str]) -> Proposal:
        """Write the file again with other keys in some sections, and the reasons."""
        merged = {key: {**cast(Section, self.content.get(key, {})), **section} for key, section in sections.items()}
        made = replace(self, content={**self.content, **merged}, reasons=(*self.reasons, *reasons))
        write_experiment(self.file, made.content, made.sentences)
        return replace(made, experiment=load_experiment(self.file))


def propose(
    seen: FolderInspection | MaskInspection,
    request: AutoRequest,
    root: Workspace,
    *,
    fit: bool = True,
    progress: Report | None = None,
) -> Proposal:
    """Write the experiment for a folder of images.

    Args:
        seen: content of the folder.
        request: networks and limits.
        root: workspace, which keeps fitted teachers.
        fit: fit several teachers and take the best; otherwise the first is taken.
        progress: called with the metrics of each epoch of such a fit.

    Raises:
        UserError: an unknown network, a checkpoint for several, or limits that no student keeps.
    """
    if request.checkpoint is not None and len(request.teachers) > 1:
        raise ConfigError(f"--checkpoint {request.checkpoint}: belongs to one network; give --teacher once")
    data = rules_for(seen, request.images)
    _check_names(request, is_scene=data.is_scene)
    teachers, reasons = {}, [f"views are {data.size} x {data.size} pixels"]
    for name in request.teachers:
        teachers[name], reason = _teacher(
            name, data, request.checkpoint, no_weights(name) if request.checkpoint is None else None
        )
        reasons.append(reason)
    first = request.teachers[0]
    students = list(_students(request, teachers[first], data, root))
    reasons += [reason for _, reason in students]
    content = _content(seen, request, data, [name for name, _ in students])
    target = (request.file or root.path / "auto" / f"{content['name']}.yaml").resolve()
    best = first
    if len(teachers) > 1 and fit:
        cards = {name: _fit({**content, "teacher": teachers[name]}, target, root, progress).card for name in teachers}
        best = max(cards, key=lambda name: cards[name].val_score)
        scores = ", ".join(f"{name} {card.val_score:.4f}" for name, card in cards.items())
        reasons.append(f"teacher {best}, the best on val of {scores}")
    elif len(teachers) > 1:
        reasons.append(f"teacher {best}: the first of {len(teachers)}; without --dry-run they are fitted and compared")
    content["teacher"] = teachers[best]
    write_experiment(target, content, [*seen.sentences(), *reasons])
    return Proposal(target, load_experiment(target), tuple(reasons), tuple(seen.sentences()), content)


def _check_names(request: AutoRequest, *, is_scene: bool) -> None:
    known = network_names()
    plain = {name.partition(".")[0] for name in known}
    for option, names in (("--teacher", request.teachers), ("--student", request.students)):
        for name in names:
            if is_segmentation(name) != is_scene:
                content = "images with label maps" if is_scene else "folders of classes"
                example = "segformer-mit_b0" if is_scene else "resnet18"
                raise ConfigError(
                    f"{option} {name}: {request.images} holds {content}; name a network such as {example}"
                )
            if is_scene:
                split_name(name)  # raises for unknown architectures and encoders
            elif name.partition(".")[0] not in plain:
                raise ConfigError(f"{option} {name}: timm has no such network; {did_you_mean(name, known)}")


def _content(
    seen: FolderInspection | MaskInspection, request: AutoRequest, data: ImageRules, students: Sequence[str]
) -> Section:
    length: Section = {"trials": TRIALS_PER_METHOD * len(data.methods)}
    if request.hours is not None:
        length = {"budget": {"hours": round(request.hours, 4)}}
    return {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", seen.folder.resolve().name).strip(".-_")[:64] or "images",
        "data": {**data.section, "image_size": data.size},
        "teacher": {},
        "student": {"network": students[0] if len(students) == 1 else list(students)},
        "training": {
            "epochs": _clamp(round(UPDATES * data.batch / data.train_images), *EPOCHS),
            "batch_size": data.batch,
            **data.training,
            "clip_grad": 5.0,
        },
        "search": {
            "space": {
                "methods": list(data.methods),
                "shared": {
                    "training.learning_rate": {
                        "low": data.learning_rate[0],
                        "high": data.learning_rate[1],
                        "log": True,
                    },
                    "training.task_weight": {"options": [0.1, 0.5, 1.0]},
                },
            },
            "seed": 0,
            "warm_start_from": "auto",
            **length,
            **limit_settings(request.limits),
        },
        "promotion": limit_settings(request.limits),
    }


def _teacher(name: str, data: ImageRules, checkpoint: str | None, missing: str | None) -> tuple[Section, str]:
    """Return the section of a teacher and its reason: given weights, or timm's if none are missing, and a fit."""
    batch = min(data.batch, data.batches[1])
    epochs = _clamp(round(TEACHER_UPDATES * batch / data.train_images), *TEACHER_EPOCHS)
    section: Section = {"network": name}
    predict_spec(name, data.classes, None, data.size)  # raises for a network that cannot be built
    if checkpoint is not None:
        reason = f"{name}: has the weights of {checkpoint}; if they are of other classes, it is fitted from them"
        section["checkpoint"] = checkpoint
    elif missing is not None:
        reason = f"{name}: timm's weights are not available here ({missing}); it is trained from random weights"
        section |= _patches(name, data)
    elif published_classes(name) == data.classes:
        reason = f"{name}: timm's weights have as many classes as your images; it is used without a fit"
        section["pretrained"] = True
    else:
        reason = f"{name}: starts from timm's weights and is fitted to your images"
        section["pretrained"] = True
    sees_whole_images = missing is None and not data.is_scene
    native = predict_spec(name, data.classes).image_size if sees_whole_images else 0
    if native > data.size:
        section["image_size"] = native
        reason += f"; it sees the views at {native} x {native} pixels, the size of its weights"
    warmup = min(5.0, epochs // 5)
    return {**section, "training": {"epochs": epochs, "batch_size": batch, "warmup_epochs": warmup}}, reason


def _patches(name: str, data: ImageRules) -> Section:
    """Return options for smaller patches, if the network has patches and would cut small images into few of them."""
    options = {"img_size": data.size, "patch_size": max(2, data.size // TOKENS)}
    try:
        spec = predict_spec(name, data.classes, None, data.size)
        if not spec.stages or spec.stages[0].kind != "attention" or spec.side(1) >= TOKENS:
            return {}
        predict_spec(name, data.classes, options, data.size)
    except (NetworkError, TypeError):
        return {}
    return {"options": options}


def _students(request: AutoRequest, teacher: Section, data: ImageRules, root: Workspace) -> Iterator[tuple[str, str]]:
    """Yield students with a reason: the requested students, or the largest of each family within the limits.

    Raises:
        ConfigError: a requested student exceeds a limit, or every proposed student does.
    """
    for name in request.students:
        excess, figures = _excess(name, request.limits, data, root)
        if excess:
            raise ConfigError(f"--student {name}: {excess}")
        yield name, f"student {name}: {figures}"
    if request.students:
        return
    limits = dict(request.limits)
    if PARAMETERS not in limits:
        settings = NetworkSettings.model_validate(
            {"network": teacher["network"], "options": teacher.get("options", {})}
        )
        limits[PARAMETERS] = parameters_m(settings, data.classes, data.size) / TEACHER_PARTS
    found = False
    for names in data.families.values():
        for name in reversed(names):
            excess, figures = _excess(name, limits, data, root)
            if not excess:
                found = True
                yield name, f"student {name}: {figures}"
                break
    if not found and PARAMETERS not in request.limits:
        # No proposal has the default share of the teacher's parameters: the smallest one with fewer than the teacher.
        teacher_m, proposed = limits[PARAMETERS] * TEACHER_PARTS, [names[0] for names in data.families.values()]
        figure_of = {name: _excess(name, {**limits, PARAMETERS: teacher_m}, data, root) for name in proposed}
        size_of = {
            name: parameters_m(NetworkSettings(network=name), data.classes, data.size)
            for name, (excess, _) in figure_of.items()
            if not excess
        }
        if size_of:
            name = min(size_of, key=lambda name: size_of[name])
            figures = figure_of[name][1]
            yield name, f"student {name}: {figures}, the smallest proposal; the teacher has {teacher_m:.3g}"
            return
    if not found:
        options = " and ".join(f"{_option(key)} {limit:g}" for key, limit in limits.items())
        raise ConfigError(f"{options}: no proposed student is within the limits; name one (--student), or raise them")


def _excess(name: str, limits: Mapping[str, float], data: ImageRules, root: Workspace) -> tuple[str, str]:
    """Return the limit that a student exceeds (empty: none), and its parameters and limited costs."""
    settings, size, figures = NetworkSettings(network=name), (data.size, data.size), []
    # What is timed comes last: a network that is too large is not timed. The workspace remembers times for the search.
    for key in sorted({PARAMETERS, *limits}, key=lambda key: (STUDENT_COSTS[key].is_timed, key)):
        if key == PARAMETERS:
            value = parameters_m(settings, data.classes, data.size)
        else:
            value = CostMeter(root, data.classes, size, data.size).cost(key, settings)
        figures.append(STUDENT_COSTS[key].figure(value))
        if value > limits.get(key, math.inf):
            return f"{figures[-1]}, {_option(key)} allows {limits[key]:g}", ""
    predict_spec(name, data.classes, None, data.size)  # raises for a network that does not run on these images
    return "", ", ".join(figures)


def _option(key: str) -> str:
    """Name the command's option of a limit, or, of a limit that only Python sets, its key."""
    return f"--max-{key.replace('_', '-')}" if key in COMMAND_LIMITS else f"limits[{key!r}]"


def _fit(content: Section, target: Path, root: Workspace, progress: Report | None) -> PreparedTeacher:
    write_experiment(target, content, [])
    try:
        return prepare_teacher(load_experiment(target), root, progress=progress)
    except HeterokdError:
        target.unlink(missing_ok=True)
        raise


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))
