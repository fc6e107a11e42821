"""Find the number format and memory format with the fastest step on this device; measured once, stored in a file.

bf16 autocast and channels_last are faster for large convolutions and slower for tiny ones (ResNet18 at 224 pixels on a
CPU with bf16 units: 2.5 times faster; at 32 pixels: half as fast), so `precision: auto` measures. Candidates take
turns, so that other load disturbs all of them equally, and fp32 is replaced only by a format that is clearly faster in
two measurements.
"""

from __future__ import annotations

import json
import logging
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock

from heterokd.config.recipe import Recipe
from heterokd.storage.files import read_derived, write_text
from heterokd.storage.typed_json import parse

logger = logging.getLogger(__name__)

MARGIN = 0.9
"""Maximum time of another format as a share of fp32's: smaller gains are noise, and fp32 is the most reproducible."""

ROUNDS = 5
"""Timed steps of each candidate; the median of the ratios decides."""

MOST_SECONDS = 10.0
"""Time after which no further round begins: steps of many seconds are less noisy than short steps."""


@dataclass(frozen=True)
class Precision:
    """Number format of the forward pass and memory format of the maps."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the autocast context of a forward pass."""
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)


FP32 = Precision()

MeasureStep = Callable[[Precision], float]
"""Function that returns the seconds of a training step in a precision, after warm-up; candidates take turns."""


def resolve_precision(
    recipe: Recipe, device: torch.device | str, measure: MeasureStep, memory: Path | None
) -> Precision:
    """Return the precision of a recipe; `auto` is measured once per device and shape, and stored.

    Args:
        recipe: recipe with `training.precision` and `training.channels_last`.
        device: device of the training.
        measure: measures a step, see `time_step`.
        memory: JSON file of earlier measurements; None stores nothing.

    Raises:
        StudyError: the file is damaged.
    """
    forbid_tf32(device)
    settings = recipe.training
    dtypes: list[Literal["fp32", "bf16"]] = ["fp32", "bf16"] if settings.precision == "auto" else [settings.precision]
    formats = [False, True] if settings.channels_last == "auto" else [settings.channels_last]
    candidates = [Precision(dtype, channels_last) for dtype in dtypes for channels_last in formats]
    if len(candidates) == 1:
        return candidates[0]
    shape = [
        recipe.student.network,
        recipe.student.options,
        recipe.teacher.network,
        recipe.teacher.options,
        recipe.data.view_size,
        settings.batch_size // settings.accumulate,
        dtypes,
        formats,
        device_name(device),
        torch.get_num_threads(),
        torch.__version__,
    ]
    if recipe.teacher.image_size is not None:
        shape.append(recipe.teacher_size)
    key = json.dumps(shape, sort_keys=True, default=str)
    if memory is None:
        return _fastest(candidates, measure)
    memory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{memory}.lock"):
        known = _measured_before(memory)
        if key not in known:
            known[key] = _fastest(candidates, measure)
            write_text(memory, json.dumps({shape: asdict(precision) for shape, precision in known.items()}, indent=1))
    return known[key]


def _measured_before(memory: Path) -> dict[str, Precision]:
    """Read the precisions that were measured before; none if the file is missing or damaged."""
    try:
        return parse(dict[str, Precision], read_derived(memory))
    except ValueError as error:
        logger.warning("%s: is damaged (%s); precisions are measured again", memory, error)
        return {}


def _fastest(candidates: list[Precision], measure: MeasureStep) -> Precision:
    """Return the candidate with the smallest median ratio of its time to the first's, or the first if it is close."""
    first, *others = candidates
    try:
        ratios = _ratios(first, others, measure)
        fastest = min(others, key=lambda candidate: ratios[candidate])
        if ratios[fastest] > MARGIN:
            return first
        # A second measurement, because the first may have been disturbed by other load.
        return fastest if _ratios(first, [fastest], measure)[fastest] <= MARGIN else first
    except torch.OutOfMemoryError:
        return first  # the training needs less memory: it holds a single candidate


def _ratios(first: Precision, others: list[Precision], measure: MeasureStep) -> dict[Precision, float]:
    """Return the median over rounds of each candidate's time divided by the first's."""
    found: dict[Precision, list[float]] = {candidate: [] for candidate in others}
    began = time.perf_counter()
    for _ in range(ROUNDS):
        reference = measure(first)
        for candidate in others:
            found[candidate].append(measure(candidate) / reference)
        if time.perf_counter() - began > MOST_SECONDS:
            break
    return {candidate: statistics.median(ratios) for candidate, ratios in found.items()}


def time_step(step: Callable[[], object], device: torch.device | str) -> float:
    """Return the seconds until a call of `step` has finished on the device."""
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def forbid_tf32(device: torch.device | str) -> None:
    """Disable TF32 on a GPU: cuDNN's convolutions otherwise round fp32 inputs to 10 bits of mantissa."""
    if torch.device(device).type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def default_device() -> str:
    """Return the GPU if available, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: torch.device | str) -> str:
    """Return the product name of the GPU or the processor."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
