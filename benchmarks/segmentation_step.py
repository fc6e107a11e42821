"""What each segmentation method's step costs over that of pixel-wise distillation: time and memory, as ratios.

    python benchmarks/segmentation_step.py [--out results.json] [--pairs 256 64] [--methods heteroakd] [--rounds 5]

A step is forward, task loss, the method's terms, backward and the optimizer's update, after any warm-up, with the
teacher's outputs given. Steps of pixel KD and of the method are run in turn, and the ratio is that of their medians;
`pixel_kd` itself measures the noise: its true ratio is 1. Time is the processor's on a CPU, where other programs shall
not count. Memory is what autograd keeps between forward and backward (saved tensors); on a GPU also the most that a
step adds at once to what it finds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from steps import saved_bytes
from torch import Tensor

from heterokd.errors import PairError
from heterokd.methods import METHODS
from heterokd.networks.network import build_network
from heterokd.outputs import IGNORE, Batch, Outputs, OutputSpec
from heterokd.training.distiller import Distiller
from heterokd.training.optim import build_optimizer
from heterokd.training.task_modules import SegmentationTask

BASELINE = "pixel_kd"
SEGMENTERS = [name for name, method in METHODS.items() if "segmentation" in method.tasks]
PROGRESS = 0.9
"""Where in the training the step is: after the warm-up of every method."""

PAIRS: dict[str, dict[str, Any]] = {
    "256": {"student": "deeplabv3-resnet18", "teacher": "deeplabv3-mit_b4", "size": 256, "batch": 4, "classes": 19},
    "64": {"student": "fpn-test_resnet", "teacher": "segformer-mit_b0", "size": 64, "batch": 8, "classes": 11},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--methods", nargs="+", choices=SEGMENTERS, default=SEGMENTERS)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind")
    arguments = parser.parse_args()
    results = {pair: measure_pair(PAIRS[pair], arguments.methods, arguments.rounds) for pair in arguments.pairs}
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def measure_pair(pair: dict[str, Any], methods: list[str], rounds: int) -> dict[str, Any]:
    """Ratios of every method on one pair."""
    torch.manual_seed(0)
    size, classes = pair["size"], pair["classes"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = build_network(pair["teacher"], classes, image_size=size).eval().to(device)
    labels = torch.randint(classes, (pair["batch"], size // 16, size // 16))
    labels = labels.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
    labels[:, :4] = IGNORE
    batch = Batch(torch.rand(pair["batch"], 3, size, size), labels, torch.arange(pair["batch"])).to(device)
    with torch.no_grad():
        given = teacher(batch.images, teacher.spec.serves)
    spec = teacher.spec
    del teacher
    print(f"{pair['teacher']} -> {pair['student']} at {size}, batch {len(batch)}, {device}")
    results = {}
    for method in methods:
        try:
            baseline, distilled = (build_step(pair, name, spec, given, batch) for name in (BASELINE, method))
        except PairError as error:
            print(f"  {method:<10} does not exist for this pair: {error}")
            continue
        results[method] = measure(baseline, distilled, rounds)
        print(
            f"  {method:<10} " + "   ".join(f"{key} {value:.3f}" for key, value in results[method].items()), flush=True
        )
    return results


Step = tuple[Callable[[], Tensor], torch.optim.Optimizer]


def build_step(pair: dict[str, Any], name: str, teacher: OutputSpec, given: Outputs, batch: Batch) -> Step:
    """The loss of one step of a fresh student, and its optimizer."""
    torch.manual_seed(0)
    student = build_network(pair["student"], pair["classes"], image_size=pair["size"])
    method = METHODS[name](None, student.spec, teacher)
    distiller = Distiller(student, method, SegmentationTask(pair["classes"])).to(batch.images.device).train()
    needed = given.only(method.teacher_needs, "teacher")
    return lambda: distiller(batch, needed, PROGRESS)[0], build_optimizer(distiller, "sgd", 1e-4, 0.0, 0.9)


def measure(baseline: Step, distilled: Step, rounds: int) -> dict[str, float]:
    """Time and memory of a method's step over the baseline's."""
    both = {"baseline": baseline, "distilled": distilled}
    times: dict[str, list[float]] = {name: [] for name in both}
    peaks = dict.fromkeys(both, 0)
    for number in range(rounds + 1):
        for name, step in both.items():
            seconds, peak = run(step)
            if number:  # the first one warms up
                times[name].append(seconds)
                peaks[name] = max(peaks[name], peak)
    saved = {name: saved_bytes(step[0]) for name, step in both.items()}
    measured = {
        "time": statistics.median(times["distilled"]) / statistics.median(times["baseline"]),
        "saved": saved["distilled"] / saved["baseline"],
    }
    if peaks["baseline"]:
        measured["peak"] = peaks["distilled"] / peaks["baseline"]
    return {key: round(value, 4) for key, value in measured.items()}


def run(step: Step) -> tuple[float, int]:
    """Seconds of one step, and on a GPU the bytes that it holds at once beyond what was there before."""
    loss, optimizer = step
    optimizer.zero_grad(set_to_none=True)
    is_cuda = torch.cuda.is_available()
    before = 0
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    clock = time.perf_counter if is_cuda else time.process_time
    started = clock()
    loss().backward()
    optimizer.step()
    if is_cuda:
        torch.cuda.synchronize()
    seconds = clock() - started
    return seconds, torch.cuda.max_memory_allocated() - before if is_cuda else 0


if __name__ == "__main__":
    main()
