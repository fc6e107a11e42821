"""export_student(): write a student in a format, compare the file with it, and record the result in export.json."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock

from heterokd.config.recipe import Recipe
from heterokd.datasets.io.split import Splits
from heterokd.errors import ConfigError, ExportError, NetworkError, StudyError
from heterokd.networks.network import AnyNetwork, deployable
from heterokd.networks.onnx_graph import INPUT, OUTPUT
from heterokd.networks.silence import export_reason, silenced_exporters
from heterokd.networks.timing import Timing, time_call
from heterokd.storage.files import read_json, write_text
from heterokd.storage.typed_json import parse
from heterokd.students.export.accuracy import Accuracy, accuracy_on_val, calibration_images
from heterokd.students.export.find import Student
from heterokd.students.export.format import ExportFormat, ToWrite
from heterokd.students.export.formats import FORMATS, format_named
from heterokd.students.export.parity import Parity, Written, compare_with_student, parity_images
from heterokd.students.network_card import network_card
from heterokd.tasks import TASKS, task_of

RECORD = "export.json"
INT8 = "onnx_int8"
WRITING = ".heterokd-writing-"
"""Prefix of the folder in which files are verified before they appear in the output folder."""


@dataclass(frozen=True)
class Exported:
    """An exported student.

    Attributes:
        folder: folder of the files.
        format: name of the format.
        files: names of the files; the first holds the weights.
        size_mb: size of all files, in megabytes.
        parity: difference to the trained student.
        latency: latency of the exported file for one image.
        torch_latency: latency of the student in torch for one image, for comparison.
        image: height and width of that image, in pixels.
        opened_with: code that opens the files.
        accuracy: metric on val of the student and of the file, if the format is not exact; otherwise None.
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
    accuracy: Accuracy | None = None


@dataclass(frozen=True)
class _Record:
    """Content of export.json: the student, and an entry for each format by name, see `_entry`."""

    student: dict[str, object] = field(default_factory=dict)
    formats: dict[str, dict[str, object]] = field(default_factory=dict)

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the files of all formats, by name.

        Raises:
            ValueError: an entry is damaged.
        """
        files = [parse(dict[str, _File], entry.get("files", {})) for entry in self.formats.values()]
        return {name: file.sha256 for entry in files for name, file in entry.items()}


@dataclass(frozen=True)
class _File:
    """A file in export.json."""

    sha256: str


def export_student(
    student: Student,
    format_name: str,
    out: Path,
    formats: Mapping[str, type[ExportFormat]] = FORMATS,
    *,
    overwrite: bool = False,
) -> Exported:
    """Write a student in a format, and describe the files and measurements in export.json.

    Several formats of a student can share a folder. Files appear there only after they were verified.

    Args:
        student: student from `find_student`.
        format_name: key of `formats`.
        out: folder of the files; created if it is missing.
        formats: export formats by name.
        overwrite: also replace files that no export wrote, or that were changed since.

    Raises:
        NetworkError: the format cannot hold this network.
        ExportError: the exported file disagrees with the trained student.
        ConfigError: the format is unknown; the folder holds another student's export or, without `overwrite`, files of
            another origin; or it cannot be written.
    """
    kind = format_named(format_name, formats)()
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; give a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".export.lock"), _partial_folder(out) as folder:
            known = _read_record(out)
            if not overwrite:
                _refuse_foreign(out, known, kind.files)
            if known.student and known.student.get("weights") != student.weights:
                raise ConfigError(f"--out {out}: holds the export of another student; give another folder")
            view, card = student.recipe.data.view_size, _student_card(student)
            written, parity = _write(kind, student.network, student.splits, view, card, folder)
            if kind.is_exact and not parity.agrees:
                raise ExportError(
                    f"{out / kind.files[0]}: its logits differ from the student's by {parity.difference:.3g} on "
                    f"images of val, {parity.tolerance:.3g} is allowed; it was deleted, use another --format"
                )
            exported = _measure(student, format_name, written, parity, folder, out)
            entry = _entry(student, exported, written, folder)
            if not overwrite:
                _refuse_foreign(out, known, kind.files)  # the export has taken a while
            for name in kind.files:
                os.replace(folder / name, out / name)
            parameters = sum(parameter.numel() for parameter in student.network.parameters())
            card = {**_student_card(student), "params_m": parameters / 1e6}
            record = _Record(card, {**known.formats, format_name: entry})
            write_text(out / RECORD, json.dumps(asdict(record), indent=1))
    except (PermissionError, IsADirectoryError) as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror}); give another folder") from None
    return exported


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder inside `out`, whose lock is held; remove it afterwards, and those of killed exports."""
    for left in out.glob(f"{WRITING}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=WRITING, dir=out) as folder:
        yield Path(folder)


def _read_record(out: Path) -> _Record:
    """Read export.json; empty if it is missing, damaged or not written by an export."""
    try:
        record = parse(_Record, read_json(out / RECORD))
        return record if record.hashes else _Record()
    except (StudyError, ValueError):
        return _Record()


def _refuse_foreign(out: Path, known: _Record, files: Sequence[str]) -> None:
    """Refuse to replace files that no export wrote, or that were changed since.

    Raises:
        ConfigError: there are such files.
    """
    foreign = [name for name in files if _is_foreign(out / name, known.hashes.get(name))]
    if not known.student and os.path.lexists(out / RECORD):
        foreign.append(RECORD)
    if foreign:
        raise ConfigError(
            f"--out {out}: {foreign[0]} was not written by an export, or was changed since; give another folder, or "
            "--overwrite to replace it"
        )


def _is_foreign(file: Path, sha256: str | None) -> bool:
    return os.path.lexists(file) and not (file.is_file() and _sha256(file) == sha256)


def try_export(
    network: AnyNetwork,
    splits: Splits,
    view: tuple[int, int],
    format_name: str,
    formats: Mapping[str, type[ExportFormat]] = FORMATS,
) -> Parity:
    """Export a student to a temporary folder and return the difference between the file and the student.

    Args:
        network: the trained student, in evaluation mode.
        splits: its data set; the images are of val.
        view: height and width of its training views, in pixels.
        format_name: key of `formats`.
        formats: export formats by name.

    Raises:
        NetworkError: the format cannot hold this network.
    """
    card, kind = network_card(network, splits, view), format_named(format_name, formats)()
    with tempfile.TemporaryDirectory(prefix="heterokd-export-") as folder:
        return _write(kind, network, splits, view, card, Path(folder))[1]


def try_int8(network: AnyNetwork, splits: Splits, recipe: Recipe) -> Accuracy:
    """Export a student to ONNX in 8 bits, to a temporary folder, and return the metric on val of both.

    Args:
        network: the trained student, in evaluation mode, on the CPU.
        splits: its data set.
        recipe: recipe of its training.

    Raises:
        NetworkError: the network cannot be exported or quantized.
    """
    view = recipe.data.view_size
    with tempfile.TemporaryDirectory(prefix="heterokd-export-") as folder:
        card = network_card(network, splits, view)
        written, _ = _write(format_named(INT8)(), network, splits, view, card, Path(folder))
        return accuracy_on_val(network, written, recipe, splits)


def _student_card(student: Student) -> dict[str, object]:
    """Return `network_card` and the origin of the student."""
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


def _write(  # the parts of a student, of which only `export_student` has a `Student`
    kind: ExportFormat,
    network: AnyNetwork,
    splits: Splits,
    view: tuple[int, int],
    card: dict[str, object],
    folder: Path,
) -> tuple[Written, Parity]:
    """Write, open and compare: for images of any size if that works, else of one size; return the last attempt."""
    failed: Exception = RuntimeError("no size was tried")
    compared: tuple[Written, Parity] | None = None
    images = parity_images(splits.val)
    for size in _sizes(kind, network, view):
        example = torch.rand(2, 3, *(size or view), generator=torch.Generator().manual_seed(0))
        calibration = calibration_images(splits.train, kind.calibration_images, size or view)
        with silenced_exporters():
            try:
                kind.write(ToWrite(network, example, size is None, card, calibration), folder)
            except OSError:
                raise  # such as a full disk: not a limitation of the format
            except Exception as error:  # noqa: BLE001  exporters raise exceptions of many kinds
                failed = error
                continue
            written = Written(kind, size, kind.open(folder))
        compared = written, compare_with_student(network, written, images)
        # A graph of UPerNet's pooling for any size can be written to ONNX, but is right for a single size.
        if compared[1].agrees or not kind.is_exact:
            break
    if compared is not None:
        return compared
    raise NetworkError(
        f"network {network.name!r}: cannot be written as {', '.join(kind.files)} ({export_reason(failed)}); "
        "use --format safetensors, which holds every network, or choose another student"
    ) from failed


def _sizes(kind: ExportFormat, network: AnyNetwork, view: tuple[int, int]) -> list[tuple[int, int] | None]:
    """Return the image sizes to write for, in the order of attempts; None: any size."""
    task = task_of(network.spec)
    if not task.resizes and not kind.is_graph:
        return [None]
    size = task.example_size(view, network.spec.image_size)
    return [None, size] if network.exports_any_size(view) else [size]


def _measure(student: Student, format_name: str, written: Written, parity: Parity, folder: Path, out: Path) -> Exported:
    spec = student.network.spec
    size = written.size or task_of(spec).example_size(student.recipe.data.view_size, spec.image_size)
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    return Exported(
        folder=out,
        format=format_name,
        files=written.kind.files,
        size_mb=sum((folder / name).stat().st_size for name in written.kind.files) / 1e6,
        parity=parity,
        latency=time_call(partial(written.opened.run, image)),
        torch_latency=time_call(partial(deployable(student.network), image)),
        image=size,
        opened_with=written.opened.opened_with,
        accuracy=None
        if written.kind.is_exact
        else accuracy_on_val(student.network, written, student.recipe, student.splits),
    )


def _entry(student: Student, exported: Exported, written: Written, folder: Path) -> dict[str, object]:
    """Return the entry of a format in export.json."""
    height, width = written.size or ("height", "width")
    conditions = {"image": list(exported.image), "batch": 1}
    return {
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
            for name in written.kind.files
        },
        "opened_with": written.opened.opened_with,
        "input": {
            "name": INPUT,
            "shape": ["batch", 3, height, width],
            "dtype": "float32",
            "colour": "RGB",
            "range": [0, 1],
            "normalisation_inside": written.opened.normalises,
            "resize": "bilinear with antialiasing, to the shape above, before the call",
        },
        "output": {
            "name": OUTPUT,
            "shape": ["batch", student.splits.num_classes, *TASKS[student.recipe.task].label_shape((height, width))],
            "meaning": "logits: softmax over the second axis gives probabilities of class_names",
        },
        "parity": {**asdict(exported.parity), "images": f"val of {student.recipe.data.dataset}"},
        **({} if exported.accuracy is None else {"accuracy": asdict(exported.accuracy)}),
        "latency": {"runtime": written.kind.runtime, **conditions, **asdict(exported.latency)},
        "torch_latency": {**conditions, **asdict(exported.torch_latency)},
        "versions": {name: version(name) for name in written.kind.libraries},
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
