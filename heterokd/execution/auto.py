"""propose(): from what a folder holds to the experiment that would be run on it, in YAML, so that nothing is hidden.

Rules of thumb, each in one place below: the size of views follows the images, epochs and batches follow their number,
students are those of a short list that keep within the limits, the largest of each family.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from heterokd.config.experiment import Experiment
from heterokd.config.networks import NetworkSettings
from heterokd.config.reading import load_experiment
from heterokd.datasets.io.inspect import Look
from heterokd.errors import ConfigError, HeterokdError, NetworkError, did_you_mean
from heterokd.methods import ONE_OF_EACH_KIND
from heterokd.networks.bodies import network_names, no_weights, published_classes
from heterokd.networks.network import predict_spec
from heterokd.storage.files import write_text
from heterokd.storage.workspace import Workspace
from heterokd.teachers.prepare import PreparedTeacher, prepare_teacher
from heterokd.training.student_costs import parameters_m, student_cost
from heterokd.training.train import Report

FAMILIES = {
    "cnn": (
        "test_resnet",
        "mobilenetv3_small_050",
        "mobilenetv2_050",
        "mobilenetv3_small_100",
        "mobilenetv2_100",
        "efficientnet_lite0",
        "efficientnet_b0",
        "resnet10t",
        "resnet18",
        "resnet34",
        "resnet50",
    ),
    "attention": ("test_vit", "pvt_v2_b0", "deit_tiny_patch16_224", "pvt_v2_b1", "deit_small_patch16_224"),
    "mlp": ("resmlp_12_224", "mixer_s16_224", "mixer_s32_224"),
}
"""Students that are proposed, small to large: networks that papers distil into, and timm's smallest of each family."""

SIDES = (32, 48, 64, 96, 128, 160, 192, 224)
"""Sizes of views: the largest that the images fill in the median; smaller ones are enlarged to the first."""

TEACHER_PARTS = 4
"""Without a limit, a student has at most this part of the teacher's parameters."""

UPDATES = 4000
"""A student's training is about so many, between `EPOCHS`."""
EPOCHS = (15, 80)
TEACHER_UPDATES, TEACHER_EPOCHS = 4000, (10, 60)

TOKENS = 8
"""Tokens along a side that an attention teacher without published weights gets of small images."""


@dataclass(frozen=True)
class Limits:
    """What a student may be, and what the search may take.

    Attributes:
        max_params_m: millions of parameters; None: a part of the teacher's.
        max_latency_ms: of a forward at batch 1 on one core; None: no limit.
        hours: of the search; None: until its trials are done.
    """

    max_params_m: float | None = None
    max_latency_ms: float | None = None
    hours: float | None = None


@dataclass(frozen=True)
class Proposal:
    """An experiment that is ready to run.

    Attributes:
        file: its YAML.
        experiment: what the file says.
        said: why it says so, in sentences.
    """

    file: Path
    experiment: Experiment
    said: tuple[str, ...]


def propose(
    seen: Look,
    images: Path,
    teachers: Sequence[str],
    students: Sequence[str],
    limits: Limits,
    root: Workspace,
    file: Path | None = None,
    *,
    fitting: bool = True,
    progress: Report | None = None,
) -> Proposal:
    """Write the experiment for a folder of images.

    Args:
        seen: what is in it.
        images: the folder that the experiment reads.
        teachers: names; of several, the one that is best on val once it is fitted.
        students: names, taken as they are; proposed when left out.
        limits: of students and of the search.
        root: where fitted teachers are kept, and the file where none is named.
        file: to write.
        fitting: fit several teachers to choose one; the first is taken otherwise.
        progress: told the epochs of such fits.

    Raises:
        UserError: a name that does not exist, or limits that no student keeps.
    """
    known = network_names()
    for option, names in (("--teacher", teachers), ("--student", students)):
        for name in names:
            if name.partition(".")[0] not in {one.partition(".")[0] for one in known}:
                raise ConfigError(f"{option} {name}: timm has no such network; {did_you_mean(name, known)}")
    size = max([SIDES[0], *(side for side in SIDES if side <= seen.side)])
    classes = len(seen.classes)
    said = [f"views are {size} x {size} pixels"]
    sections = {name: _teacher(name, size, classes, len(_train(seen)), said) for name in teachers}
    chosen, choice = _students(sections[teachers[0]], students, limits, size, classes, root)
    said += choice
    content = _content(seen, images, size, limits, chosen)
    name = str(content["name"])
    target = (file or root.path / "auto" / f"{name}.yaml").resolve()
    best = teachers[0]
    if len(teachers) > 1 and fitting:
        fitted = {one: _fit(content, sections[one], target, root, progress) for one in teachers}
        best = max(fitted, key=lambda one: fitted[one].card.val_score)
        scores = ", ".join(f"{one} {prepared.card.val_score:.4f}" for one, prepared in fitted.items())
        said.append(f"teacher {best}, the best on val of {scores}")
    elif len(teachers) > 1:
        said.append(f"teacher {best}: the first of {len(teachers)}; without --dry-run they are fitted and compared")
    content["teacher"] = sections[best]
    _write(target, content, [*seen.sentences(), *said])
    return Proposal(target, load_experiment(target), tuple(said))


def _content(seen: Look, images: Path, size: int, limits: Limits, students: Sequence[str]) -> dict[str, Any]:
    count = len(_train(seen))
    batch = 32 if count < 2_000 else 64 if count < 20_000 else 128
    search: dict[str, Any] = {
        "space": {
            "methods": list(ONE_OF_EACH_KIND),
            "shared": {
                "training.learning_rate": {"low": 0.005, "high": 0.5, "log": True},
                "training.task_weight": {"options": [0.1, 0.5, 1.0]},
            },
        },
        "seed": 0,
    }
    search |= (
        {"trials": 3 * len(ONE_OF_EACH_KIND)} if limits.hours is None else {"budget": {"hours": round(limits.hours, 4)}}
    )
    gates = {"max_params_m": limits.max_params_m, "max_latency_ms": limits.max_latency_ms}
    gates = {key: value for key, value in gates.items() if value is not None}
    search |= gates
    return {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", seen.folder.resolve().name).strip(".-_")[:64] or "images",
        "data": {"dataset": "image_folder", "root": str(images), "image_size": size},
        "teacher": {},
        "student": {"network": students[0] if len(students) == 1 else list(students)},
        "training": {
            "epochs": _between(round(UPDATES * batch / count), *EPOCHS),
            "batch_size": batch,
            "optimizer": "sgd",
            "learning_rate": 0.05,
            "clip_grad": 5.0,
        },
        "search": search,
        "promotion": gates,
    }


def _train(seen: Look) -> list[object]:
    """Files that will be trained on: those of train, or three in five where splits are made."""
    if seen.splits:
        return [file for file in seen.kept if file.split == "train"]
    return list(seen.kept[: max(1, 3 * len(seen.kept) // 5)])


def _teacher(name: str, size: int, classes: int, count: int, said: list[str]) -> dict[str, Any]:
    """The section of a teacher: timm's weights where they can be had, and a fit on all training images."""
    batch = 32 if count < 2_000 else 64
    epochs = _between(round(TEACHER_UPDATES * batch / count), *TEACHER_EPOCHS)
    section: dict[str, Any] = {"network": name}
    predict_spec(name, classes, None, size)  # what cannot be built at all is the user's to know
    reason = no_weights(name)
    if reason is not None:
        said.append(f"{name}: timm's weights cannot be had here ({reason}); it learns your images from nothing")
        section |= _tokens(name, size, classes)
    elif published_classes(name) == classes:
        said.append(f"{name}: has timm's weights, which know as many classes as yours; it is used as it is")
        section["pretrained"] = True
    else:
        epochs = max(TEACHER_EPOCHS[0], epochs // 3)
        said.append(f"{name}: begins with timm's weights and is fitted to your images")
        section["pretrained"] = True
    warmup = min(5.0, epochs // 5)
    return {**section, "training": {"epochs": epochs, "batch_size": batch, "warmup_epochs": warmup}}


def _tokens(name: str, size: int, classes: int) -> dict[str, Any]:
    """Smaller patches for a network that would cut small images into few of them; where it takes the option."""
    options = {"img_size": size, "patch_size": max(2, size // TOKENS)}
    try:
        spec = predict_spec(name, classes, None, size)
        if spec.stages[0].kind != "attention" or spec.side(1) >= TOKENS:
            return {}
        predict_spec(name, classes, options, size)
    except (NetworkError, TypeError):
        return {}
    return {"options": options}


def _students(
    teacher: dict[str, Any], named: Sequence[str], limits: Limits, size: int, classes: int, root: Workspace
) -> tuple[list[str], list[str]]:
    """Names, and why."""
    most = limits.max_params_m
    if most is None:
        settings = NetworkSettings(network=teacher["network"], options=teacher.get("options", {}))
        most = parameters_m(settings, classes, size) / TEACHER_PARTS
    found, said = [], []
    for candidates in ((name,) for name in named) if named else (reversed(names) for names in FAMILIES.values()):
        for name in candidates:
            millions = parameters_m(NetworkSettings(network=name), classes, size)
            if millions > most and (not named or limits.max_params_m is not None):
                if named:
                    raise ConfigError(
                        f"--student {name}: has {millions:.2f} M parameters, --max-params-m allows {most:g}"
                    )
                continue
            speed = ""
            if limits.max_latency_ms is not None:
                # Remembered, so that the search weighs it the same.
                latency = student_cost("latency_ms", NetworkSettings(network=name), classes, (size, size), size, root)
                speed = f", {latency:.2f} ms"
                if latency > limits.max_latency_ms:
                    if named:
                        allowed = f"--max-latency-ms allows {limits.max_latency_ms:g}"
                        raise ConfigError(f"--student {name}: takes {latency:.2f} ms for an image here, {allowed}")
                    continue
            found.append(name)
            said.append(f"student {name}: {millions:.2f} M parameters{speed}")
            break
    if not found:
        limit = "" if limits.max_latency_ms is None else f" and --max-latency-ms {limits.max_latency_ms:g}"
        raise ConfigError(
            f"--max-params-m {most:g}{limit}: none of the students that are proposed keeps to that; name one "
            "(--student), or raise the limits"
        )
    return found, said


def _fit(
    content: dict[str, Any], teacher: dict[str, Any], target: Path, root: Workspace, progress: Report | None
) -> PreparedTeacher:
    _write(target, {**content, "teacher": teacher}, [])
    try:
        return prepare_teacher(load_experiment(target), root, progress=progress)
    except HeterokdError:
        target.unlink(missing_ok=True)
        raise


def _write(target: Path, content: dict[str, Any], said: Sequence[str]) -> None:
    lines = ["Written by `heterokd auto`; it is run by `heterokd search` on this file.", *said]
    head = "".join(f"# {line}\n" for line in lines)
    filled = {key: value for key, value in content.items() if value != {}}
    write_text(target, head + yaml.safe_dump(filled, sort_keys=False, allow_unicode=True, width=110))


def _between(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))
