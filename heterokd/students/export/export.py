"""export_student(): write, check, measure, and say what was found in export.json."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock

from heterokd.datasets.io.split import Splits
from heterokd.errors import ConfigError, ExportError, NetworkError
from heterokd.networks.network import AnyNetwork, deployable
from heterokd.networks.timing import Timing, time_call
from heterokd.networks.weights import weights_hash
from heterokd.storage.files import read_json, write_text
from heterokd.storage.typed_json import parse
from heterokd.students.export.find import Student
from heterokd.students.export.format import INPUT, OUTPUT, ExportFormat, ToWrite
from heterokd.students.export.formats import FORMATS, format_named
from heterokd.students.export.parity import Parity, Written, compare_with_student, parity_images
from heterokd.tasks import TASKS, task_of

RECORD = "export.json"
EXPORTERS = ("torch.export", "torch._export", "torch.onnx", "onnxscript", "onnx_ir")
"""Loggers of what writes graphs."""


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
    format: str
    files: tuple[str, ...]
    size_mb: float
    parity: Parity
    latency: Timing
    torch_latency: Timing
    image: tuple[int, int]
    opened_with: str


def export_student(
    student: Student, format_name: str, out: Path, formats: Mapping[str, type[ExportFormat]] = FORMATS
) -> Exported:
    """Write a student in one format; export.json beside the files says what they are and what was measured.

    Several formats of one student share a folder. Files appear when they are checked, whole or not at all.

    Args:
        student: what `find_student` gives.
        format_name: a name of `formats`.
        out: a folder, made if need be.
        formats: by name.

    Raises:
        NetworkError: the exporter cannot write this network down.
        ExportError: what it wrote disagrees with the trained student.
        ConfigError: there is no such format; the folder holds another student's export, or cannot be written.
    """
    kind = format_named(format_name, formats)()
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; give a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".export.lock"), tempfile.TemporaryDirectory(prefix=".writing-", dir=out) as partial_folder:
            known = parse(_Record, read_json(out / RECORD))
            if known.student and known.student.get("weights") != student.weights:
                raise ConfigError(f"--out {out}: holds the export of another student; give another folder")
            folder = Path(partial_folder)
            view, images = student.recipe.data.view_size, parity_images(student.splits.val)
            written, parity = _write(kind, student.network, view, student_card(student), folder, images)
            exported = _measure(student, format_name, written, parity, out, folder)
            record = _record(student, exported, written, folder, known)
            for name in exported.files:
                os.replace(folder / name, out / name)
            write_text(out / RECORD, json.dumps(asdict(record), indent=1))
    except PermissionError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror}); give another folder") from None
    return exported


def try_export(
    network: AnyNetwork,
    splits: Splits,
    view: tuple[int, int],
    format_name: str,
    formats: Mapping[str, type[ExportFormat]] = FORMATS,
) -> Parity:
    """Whether a student can be written and agrees with what was written; no file is kept.

    Args:
        network: the trained student, in evaluation mode.
        splits: its data set; val gives the images.
        view: height and width of its training views.
        format_name: a name of `formats`.
        formats: by name.

    Raises:
        NetworkError: the exporter cannot write this network down.
    """
    card, kind = network_card(network, splits, view), format_named(format_name, formats)()
    with tempfile.TemporaryDirectory(prefix="heterokd-export-") as folder:
        return _write(kind, network, view, card, Path(folder), parity_images(splits.val))[1]


@dataclass(frozen=True)
class _Record:
    """The content of export.json: whose student it is, and by its name what is known of each format."""

    student: dict[str, object] = field(default_factory=dict)
    formats: dict[str, object] = field(default_factory=dict)


def network_card(network: AnyNetwork, splits: Splits, view: tuple[int, int]) -> dict[str, object]:
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


def student_card(student: Student) -> dict[str, object]:
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
    kind: ExportFormat,
    network: AnyNetwork,
    view: tuple[int, int],
    card: dict[str, object],
    folder: Path,
    images: torch.Tensor,
) -> tuple[Written, Parity]:
    """Write, open and compare, for images of any size if that works, else of one; the last attempt, right or not."""
    failed: Exception | None = None
    compared: tuple[Written, Parity] | None = None
    for size in _sizes(kind, network, view):
        example = torch.rand(2, 3, *(size or view), generator=torch.Generator().manual_seed(0))
        with _silent():
            try:
                kind.write(ToWrite(network, example, size is None, card), folder)
            except OSError:
                raise  # a full disk is not the network's fault
            except Exception as error:  # noqa: BLE001 - exporters raise whatever they trip over
                failed = error
                continue
            written = Written(kind, size, kind.open(folder))
        compared = written, compare_with_student(network, written, images)
        # UPerNet's pools in ONNX: a graph for any size that is right for one alone.
        if compared[1].agrees:
            break
    if compared is not None:
        return compared
    reason = (str(failed).strip().splitlines() or [type(failed).__name__])[0][:200].rstrip(".")
    raise NetworkError(
        f"network {network.name!r}: cannot be written as {', '.join(kind.files)} ({reason}); "
        "export it with --format safetensors, which always works, or choose another student"
    ) from failed


def _sizes(kind: ExportFormat, network: AnyNetwork, view: tuple[int, int]) -> list[tuple[int, int] | None]:
    """Sizes of images to write for, in this order until one works; None: any."""
    task = task_of(network.spec)
    if not task.resizes and not kind.is_graph:
        return [None]
    size = task.example_size(view, network.spec.image_size)
    return [None, size] if network.exports_any_size(view) else [size]


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the exporters' remarks off the terminal; what they raise comes through."""
    loggers = [logging.getLogger(name) for name in EXPORTERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _measure(student: Student, format_name: str, written: Written, parity: Parity, out: Path, folder: Path) -> Exported:
    if not parity.agrees:
        raise ExportError(
            f"{out / written.kind.files[0]}: its logits differ from the student's by {parity.difference:.3g} on "
            f"images of val, {parity.tolerance:.3g} are allowed; it is not kept, use another --format"
        )
    spec = student.network.spec
    size = task_of(spec).example_size(student.recipe.data.view_size, spec.image_size)
    image = torch.rand(1, 3, *(written.size or size), generator=torch.Generator().manual_seed(0))
    return Exported(
        folder=out,
        format=format_name,
        files=written.kind.files,
        size_mb=sum((folder / name).stat().st_size for name in written.kind.files) / 1e6,
        parity=parity,
        latency=time_call(partial(written.opened.run, image)),
        torch_latency=time_call(partial(deployable(student.network), image)),
        image=(int(image.shape[-2]), int(image.shape[-1])),
        opened_with=written.opened.opened_with,
    )


def _record(student: Student, exported: Exported, written: Written, folder: Path, known: _Record) -> _Record:
    """The content of export.json: that of formats written before is kept."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in written.kind.files
    }
    height, width = written.size or ("height", "width")
    entry = {
        "files": files,
        "opened_with": written.opened.opened_with,
        "input": {
            "name": INPUT,
            "shape": ["batch", 3, height, width],
            "dtype": "float32",
            "colour": "RGB",
            "range": [0, 1],
            "normalisation_inside": written.opened.normalises,
            "resize": "bilinear, antialiased, to the shape above, before it is given",
        },
        "output": {
            "name": OUTPUT,
            "shape": ["batch", student.splits.num_classes, *TASKS[student.recipe.task].label_shape((height, width))],
            "meaning": "logits: softmax over the second axis gives probabilities of class_names",
        },
        "parity": {**asdict(exported.parity), "images": f"val of {student.recipe.data.dataset}"},
        "latency": {
            "runtime": written.kind.runtime,
            "image": list(exported.image),
            "batch": 1,
            **asdict(exported.latency),
        },
        "torch_latency": {"image": list(exported.image), "batch": 1, **asdict(exported.torch_latency)},
        "versions": {name: version(name) for name in written.kind.libraries},
    }
    parameters = sum(parameter.numel() for parameter in student.network.parameters())
    return _Record({**student_card(student), "params_m": parameters / 1e6}, {**known.formats, exported.format: entry})


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
