"""What a whole training step takes, over the least that it could take: with a live teacher, and with a cached one.

    python benchmarks/step.py [--out results.json] [--pairs 224 32] [--methods kd hcd | --all] [--rounds 5]
                              [--batch 256] [--precision fp32 | bf16] [--channels-last]

A step is everything from a batch to new weights, as a training makes it: teacher, forward, losses, backward, clipping,
optimizer, schedule. The floor is the step of the student alone (method scratch); below a live teacher's step lies the
floor and the teacher's forward in the same precision. A cached teacher is read from its files, as in a search; methods
that need more than logits and embedding have none. In each round the four are run in turn, so that a ratio compares
neighbours; shown is the median of the rounds. On a processor its own time counts, not what others make it wait; on a
GPU a figure is that of ten steps in a row, between which nobody waits, as in a training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from heterokd.config.methods import methods_of
from heterokd.config.training import TrainingSettings
from heterokd.datasets import load_dataset
from heterokd.datasets.io.loaders import TrainLoader
from heterokd.datasets.views.policy import POLICIES, ViewSpec
from heterokd.errors import PairError
from heterokd.methods import METHODS
from heterokd.networks.network import build_network
from heterokd.outputs import Batch, Signal
from heterokd.teachers.cache.cached_teacher import CacheAccess, open_or_build
from heterokd.teachers.cache.key import CacheSettings
from heterokd.training.distiller import Distiller
from heterokd.training.precision import Precision, forbid_tf32
from heterokd.training.step import Updates
from heterokd.training.task_modules import ClassificationTask
from heterokd.training.teacher import LiveTeacher, Teacher

METHODS_SHOWN = ("scratch", "kd", "dkd", "dist", "nkd", "hcd", "rkd", "crd", "ofa", "fitnet", "fbt")
STORED = Signal.LOGITS | Signal.EMBEDDING
IN_A_ROW = 10
"""Steps of one figure on a GPU: a training does not wait for the device after each."""


@dataclass(frozen=True)
class Pair:
    """A teacher, a student, and the largest ratios that are wanted of them."""

    teacher: str
    student: str
    size: int
    batch: int
    cached_goal: float
    live_goal: float = 1.05
    options: dict[str, Any] = field(default_factory=dict)


PAIRS = {
    "224": Pair("swin_tiny_patch4_window7_224", "resnet18", size=224, batch=16, cached_goal=1.10),
    "32": Pair(
        "vit_tiny_patch16_224",
        "test_resnet",
        size=32,
        batch=32,
        cached_goal=1.25,
        options={"img_size": 32, "patch_size": 8, "depth": 6, "embed_dim": 96, "num_heads": 3},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS_SHOWN))
    parser.add_argument("--all", action="store_true", help="every method of classification")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--batch", type=int, help="images of a step, instead of the pair's own number")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--channels-last", action="store_true", help="memory format of the student's maps")
    arguments = parser.parse_args()
    methods = list(methods_of("classification")) if arguments.all else arguments.methods
    precision = Precision(arguments.precision, arguments.channels_last)
    pairs = {name: replace(PAIRS[name], batch=arguments.batch or PAIRS[name].batch) for name in arguments.pairs}
    results = {name: measure_pair(pair, methods, arguments.rounds, precision) for name, pair in pairs.items()}
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def measure_pair(pair: Pair, methods: list[str], rounds: int, precision: Precision) -> dict[str, Any]:
    """Times and ratios of every method on one pair."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    forbid_tf32(device)
    torch.manual_seed(0)
    # A whole number of images of each of the ten classes, at least a batch of them.
    splits = load_dataset("digits", image_size=pair.size, labels_per_class=-(-pair.batch // 10))
    policy = POLICIES["digits"]
    batch = next(TrainLoader(splits.train, ViewSpec(policy, views=1), pair.batch, device=device).epoch(0))
    network = build_network(pair.teacher, splits.num_classes, pair.options, image_size=pair.size)
    live = LiveTeacher(network.to(device))
    print(f"{pair.teacher} -> {pair.student} at {pair.size}, batch {pair.batch}, {device}, {precision}")
    print(f"  {'method':<14} {'floor':>9} {'teacher':>9} {'live':>9} {'ratio':>6} {'cached':>9} {'ratio':>6}")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as caches:
        cached = open_or_build(
            Path(caches),
            splits,
            ViewSpec(policy, 0, 1),
            live,
            CacheSettings(STORED, "fp16"),
            CacheAccess(device=device),
        )
        floor = updates_of("scratch", pair, live, precision, device)
        for method in methods:
            try:
                given = updates_of(method, pair, live, precision, device)
            except PairError as error:
                print(f"  {method:<14} does not exist for this pair: {error}")
                continue
            results[method] = measure(floor, given, {"live": live, "cached": cached}, batch, rounds)
            print(row(method, results[method], pair), flush=True)
    return {"pair": [pair.teacher, pair.student, pair.size, pair.batch], "device": str(device), "methods": results}


def updates_of(method: str, pair: Pair, teacher: LiveTeacher, precision: Precision, device: torch.device) -> Updates:
    """The training of a method."""
    torch.manual_seed(0)
    classes = teacher.spec.num_classes
    student = build_network(pair.student, classes, image_size=pair.size)
    distiller = Distiller(student, METHODS[method](None, student.spec, teacher.spec), ClassificationTask(classes))
    if precision.channels_last:
        student.to(memory_format=torch.channels_last)
    distiller.to(device).train()
    # A rate at which nothing becomes infinite, however often a step is repeated.
    settings = TrainingSettings(batch_size=pair.batch, learning_rate=1e-5, clip_grad=5.0)
    return Updates(distiller, distiller, teacher, settings, 1000, precision)


def measure(
    floor: Updates, given: Updates, teachers: dict[str, Teacher], batch: Batch, rounds: int
) -> dict[str, float | None]:
    """Milliseconds of each kind of step, and the medians of the ratios of neighbours."""
    needs = given.distiller.teacher_needs

    def with_teacher(kind: str) -> Callable[[], object]:
        def step() -> object:
            given.teacher = teachers[kind] if needs != Signal.NONE else None
            return given.apply(batch, 1)

        return step

    def teach() -> None:
        if needs != Signal.NONE:
            with given.precision.autocast(batch.images.device):
                teachers["live"].outputs(batch, needs)

    steps: dict[str, Callable[[], object]] = {
        "floor": lambda: floor.apply(batch, 1),
        "teacher": teach,
        "live": with_teacher("live"),
    }
    if needs in STORED:
        steps["cached"] = with_teacher("cached")

    def timed(step: Callable[[], object]) -> float:
        if not batch.images.is_cuda:
            started = time.process_time()
            step()
            return time.process_time() - started
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(IN_A_ROW):
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / IN_A_ROW

    for step in steps.values():
        step()
    times = [{kind: timed(step) for kind, step in steps.items()} for _ in range(rounds)]
    figures: dict[str, float | None] = {
        f"{kind}_ms": round(1e3 * statistics.median(one[kind] for one in times), 3) for kind in steps
    }
    figures["live_ratio"] = round(statistics.median(one["live"] / (one["floor"] + one["teacher"]) for one in times), 4)
    figures["cached_ratio"] = None
    if "cached" in steps:
        figures["cached_ratio"] = round(statistics.median(one["cached"] / one["floor"] for one in times), 4)
    return figures


def row(method: str, figures: dict[str, float | None], pair: Pair) -> str:
    """A line of the table; ratios above their goals are marked."""

    def ratio(name: str, goal: float) -> str:
        value = figures[name]
        return "     -" if value is None else f"{value:6.3f}{'!' if value > goal else ' '}"

    cached = figures.get("cached_ms")
    return (
        f"  {method:<14} {figures['floor_ms']:9.2f} {figures['teacher_ms']:9.2f} {figures['live_ms']:9.2f} "
        f"{ratio('live_ratio', pair.live_goal)} {'-' if cached is None else f'{cached:.2f}':>8} "
        f"{ratio('cached_ratio', pair.cached_goal)}"
    )


if __name__ == "__main__":
    main()
