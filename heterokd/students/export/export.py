"""export_student(): write, check, measure, and say what was found in export.json."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from heterokd.datasets.io.split import Splits
from heterokd.errors import ConfigError, ExportError
from heterokd.networks.network import AnyNetwork, deployable
from heterokd.networks.weights import weights_hash
from heterokd.storage.files import read_json, write_text
from heterokd.students.export.find import Student
from heterokd.students.export.formats import FORMATS, INPUT, OUTPUT, FormatName, Written
from heterokd.students.export.parity import Parity, compare_with_student, parity_images
from heterokd.tasks import TASKS, task_of
from heterokd.training.timing import Timing, time_call

RECORD = "export.json"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        format: of the files.
        files: their names, the one that holds the weights first.
        size_mb: of all of them, in megabytes.
        parity: with the trained student.
        latency: of one image, by the file.
        torch_latency: of one image, by the student in torch, for comparison.
        image: height and width of that image, in pixels.
        opened_with: how a user opens it.
    """

    folder: Path
    format: FormatName
    files: tuple[str, ...]
    size_mb: float
    parity: Parity
    latency: Timing
    torch_latency: Timing
    image: tuple[int, int]
    opened_with: str


def export_student(student: Student, format_name: FormatName, out: Path) -> Exported:
    """Write a student in one format; export.json beside the files says what they are and what was measured.

    Several formats of one student share a folder. Files appear when they are checked, whole or not at all.

    Args:
        student: what `find_student` gives.
        format_name: one of `FORMATS`.
        out: a folder, made if need be.

    Raises:
        NetworkError: the exporter cannot write this network down.
        ExportError: what it wrote disagrees with the trained student.
        ConfigError: the folder holds another student's export, or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; give a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".export.lock"), tempfile.TemporaryDirectory(prefix=".writing-", dir=out) as partial_folder:
            known = read_json(out / RECORD)
            if known and known.get("student", {}).get("weights") != student.weights:
                raise ConfigError(f"--out {out}: holds the export of another student; give another folder")
            folder = Path(partial_folder)
            view, images = student.recipe.data.view_size, parity_images(student.splits.val)
            written, parity = _write(student.network, view, student_card(student), folder, format_name, images)
            exported = _measure(student, format_name, written, parity, out, folder)
            record = _record(student, exported, written, folder, known)
            for name in exported.files:
                os.replace(folder / name, out / name)
            write_text(out / RECORD, json.dumps(record, indent=1))
    except PermissionError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror}); give another folder") from None
    return exported


def try_export(network: AnyNetwork, splits: Splits, view: tuple[int, int], format_name: FormatName) -> Parity:
    """Whether a student can be written and agrees with what was written; no file is kept.

    Args:
        network: the trained student, in evaluation mode.
        splits: its data set; val gives the images.
        view: height and width of its training views.
        format_name: one of `FORMATS`.

    Raises:
        NetworkError: the exporter cannot write this network down.
    """
    card = network_card(network, splits, view)
    with tempfile.TemporaryDirectory(prefix="heterokd-export-") as folder:
        return _write(network, view, card, Path(folder), format_name, parity_images(splits.val))[1]


def network_card(network: AnyNetwork, splits: Splits, view: tuple[int, int]) -> dict[str, Any]:
    """What is needed to build a network again and to read its logits."""
    return {
        "task": task_of(network.spec).name,
        "network": network.name,
        "options": network.options,
        "num_classes": splits.num_classes,
        "class_names": list(splits.class_names),
        "image_size": splits.image_size,
        "view": list(view),
        "mean": network.mean.flatten().tolist(),
        "std": network.std.flatten().tolist(),
        "weights": weights_hash(network),
    }


def student_card(student: Student) -> dict[str, Any]:
    """`network_card`, and where the student comes from."""
    recipe = student.recipe
    return {
        **network_card(student.network, student.splits, recipe.data.view_size),
        "source": student.source,
        "version": student.version,
        "study": recipe.name,
        "method": recipe.method,
        "teacher": recipe.teacher.network,
        "recipe": recipe.hash,
        "dataset": recipe.data.dataset,
        "data": student.splits.fingerprint,
    }


def _write(
    network: AnyNetwork,
    view: tuple[int, int],
    card: dict[str, Any],
    folder: Path,
    format_name: FormatName,
    images: torch.Tensor,
) -> tuple[Written, Parity]:
    """Write and compare; a graph for any size that is right for one alone (UPerNet's pools in ONNX) is made for it."""
    written = FORMATS[format_name](network, view, card, folder, False)
    parity = compare_with_student(network, written, images)
    if parity.agrees or written.size is not None or format_name == "safetensors":
        return written, parity
    written = FORMATS[format_name](network, view, card, folder, True)
    return written, compare_with_student(network, written, images)


def _measure(
    student: Student, format_name: FormatName, written: Written, parity: Parity, out: Path, folder: Path
) -> Exported:
    if not parity.agrees:
        raise ExportError(
            f"{out / written.files[0]}: its logits differ from the trained student's by {parity.difference:.3g} on "
            f"images of val, {parity.tolerance:.3g} are allowed; it is not kept, use another --format"
        )
    spec = student.network.spec
    size = task_of(spec).example_size(student.recipe.data.view_size, spec.image_size)
    image = torch.rand(1, 3, *(written.size or size), generator=torch.Generator().manual_seed(0))
    return Exported(
        folder=out,
        format=format_name,
        files=written.files,
        size_mb=sum((folder / name).stat().st_size for name in written.files) / 1e6,
        parity=parity,
        latency=time_call(partial(written.run, image)),
        torch_latency=time_call(partial(deployable(student.network), image)),
        image=(int(image.shape[-2]), int(image.shape[-1])),
        opened_with=written.opened_with,
    )


def _record(
    student: Student, exported: Exported, written: Written, folder: Path, known: dict[str, Any]
) -> dict[str, Any]:
    """The content of export.json: that of formats written before is kept."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in written.files
    }
    height, width = written.size or ("height", "width")
    entry = {
        "files": files,
        "opened_with": written.opened_with,
        "input": {
            "name": INPUT,
            "shape": ["batch", 3, height, width],
            "dtype": "float32",
            "colour": "RGB",
            "range": [0, 1],
            "normalisation_inside": written.normalised_inside,
            "resize": "bilinear, antialiased, to the shape above, before it is given",
        },
        "output": {
            "name": OUTPUT,
            "shape": ["batch", student.splits.num_classes, *TASKS[student.recipe.task].label_shape((height, width))],
            "meaning": "logits: softmax over the second axis gives probabilities of class_names",
        },
        "parity": {**asdict(exported.parity), "images": f"val of {student.recipe.data.dataset}"},
        "latency": {"runtime": written.runtime, "image": list(exported.image), "batch": 1, **asdict(exported.latency)},
        "torch_latency": {"image": list(exported.image), "batch": 1, **asdict(exported.torch_latency)},
        "versions": dict(written.versions),
    }
    formats = {**known.get("formats", {}), exported.format: entry}
    parameters = sum(parameter.numel() for parameter in student.network.parameters())
    return {"student": {**student_card(student), "params_m": parameters / 1e6}, "formats": formats}


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
