"""Which number format and memory format makes a step fastest on this device: measured once, remembered in a file.

bf16 autocast and channels_last pay off for large convolutions and lose on tiny ones (ResNet18 at 224 pixels on a CPU
with bf16 units: 2.5 times faster; at 32 pixels: half as fast), so `precision: auto` measures. Candidates take turns, so
that what disturbs one disturbs all, and fp32 is left only for what is clearly faster, twice.
"""

from __future__ import annotations

import json
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

MARGIN = 0.9
"""Another format must take at most this share of fp32's time: closer calls are noise, and fp32 reproduces best."""

ROUNDS = 5
"""Steps of each candidate; the median of as many ratios decides."""


@dataclass(frozen=True)
class Precision:
    """Number format of the forward pass and memory format of the maps."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context of a forward pass."""
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)


FP32 = Precision()

MeasureStep = Callable[[Precision], float]
"""Seconds of one training step in a precision, warmed up; asked again and again, the candidates in turn."""


def resolve_precision(
    recipe: Recipe, device: torch.device | str, measure: MeasureStep, memory: Path | None
) -> Precision:
    """The precision that a recipe asks for; `auto` parts are measured once per device and shape, then remembered.

    Args:
        recipe: `training.precision` and `training.channels_last`; explicit values are obeyed.
        device: where the training runs.
        measure: seconds of one step, see `time_step`.
        memory: JSON file of earlier measurements; None forgets.
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
    key = json.dumps(shape, sort_keys=True, default=str)
    if memory is None:
        return _fastest(candidates, measure)
    memory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{memory}.lock"):
        known = json.loads(memory.read_text()) if memory.exists() else {}
        if key in known:
            return Precision(**known[key])
        chosen = _fastest(candidates, measure)
        scratch = memory.with_suffix(".new")
        scratch.write_text(json.dumps({**known, key: asdict(chosen)}, indent=1))
        scratch.replace(memory)
    return chosen


def _fastest(candidates: list[Precision], measure: MeasureStep) -> Precision:
    """The candidate with the least median of its time over that of the first, which wins close calls."""
    first, *others = candidates
    try:
        ratios = _ratios(first, others, measure)
        fastest = min(others, key=lambda candidate: ratios[candidate])
        if ratios[fastest] > MARGIN:
            return first
        # A second look: a disturbed first one must not cost the whole training.
        return fastest if _ratios(first, [fastest], measure)[fastest] <= MARGIN else first
    except torch.OutOfMemoryError:
        return first  # the training itself has one candidate in memory, and says what to do if that is too much


def _ratios(first: Precision, others: list[Precision], measure: MeasureStep) -> dict[Precision, float]:
    """Medians over rounds, in each of which every candidate is measured once, of time over that of the first."""
    found: dict[Precision, list[float]] = {candidate: [] for candidate in others}
    for _ in range(ROUNDS):
        reference = measure(first)
        for candidate in others:
            found[candidate].append(measure(candidate) / reference)
    return {candidate: statistics.median(ratios) for candidate, ratios in found.items()}


def time_step(step: Callable[[], object], device: torch.device | str) -> float:
    """Seconds of one run of `step`, until the device is done with it."""
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def forbid_tf32(device: torch.device | str) -> None:
    """Let fp32 mean fp32 on a GPU: cuDNN's convolutions otherwise round their inputs to 10 bits without asking."""
    if torch.device(device).type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def default_device() -> str:
    """The GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: torch.device | str) -> str:
    """The device in words: a GPU's product name, or the processor's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
