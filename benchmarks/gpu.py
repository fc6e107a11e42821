"""What only a GPU can tell: throughput of precisions and of torch.compile, memory beside its estimate, shared GPUs.

    python benchmarks/gpu.py [--out results.json] [--parts precision memory sharing] [--size 224] [--batch 256]

`precision`: images a second of ResNet18's training step from a Swin-T teacher, by number format, memory format and
torch.compile, over fp32. `memory`: what one training takes of the GPU (as the driver sees it), under the estimate that
decides how many trials share one. `sharing`: epochs a second of several processes that train the quickstart's student
on one GPU at once, over those of one.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from heterokd.config.experiment import Experiment
from heterokd.config.recipe import Recipe
from heterokd.datasets import load_dataset
from heterokd.datasets.io.split import Splits
from heterokd.networks.network import build_network
from heterokd.storage.workspace import Workspace
from heterokd.training.data import recipe_loaders
from heterokd.training.memory import estimate_memory
from heterokd.training.precision import Precision, forbid_tf32
from heterokd.training.setup import measured_precision
from heterokd.training.step import Updates, compile_student
from heterokd.training.teacher import LiveTeacher
from heterokd.training.train import TrainOptions, build_distiller, train

TEACHER, STUDENT = "swin_tiny_patch4_window7_224", "resnet18"
MEMORY_METHODS = ("scratch", "kd", "dist", "hcd", "crd", "ofa", "fitnet", "fbt", "review_kd")
SHARED_BY = (1, 2, 4, 8)
STEPS = 20
WARM_UP = 5


def main() -> None:
    if not torch.cuda.is_available():
        print("there is no GPU here: nothing to measure", file=sys.stderr)
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parts = {"precision": precisions, "memory": memories, "sharing": sharing}
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--size", type=int, default=224, help="height and width of a view")
    parser.add_argument("--batch", type=int, default=256, help="images of a step")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    forbid_tf32("cuda")
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}")
    results = {name: parts[name](arguments.size, arguments.batch) for name in arguments.parts}
    if arguments.out:
        arguments.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), **results}, indent=1))


def recipe_of(method: str, size: int, batch: int, **training: Any) -> Recipe:
    """A training of the large pair on embedded images."""
    settings = {"epochs": 1, "batch_size": batch, "learning_rate": 1e-4, "clip_grad": 5.0, **training}
    experiment = Experiment.model_validate(
        {
            "name": "gpu",
            "data": {"dataset": "digits", "image_size": size},
            "teacher": {"network": TEACHER},
            "student": {"network": STUDENT},
            "training": settings,
            "cache": {"enabled": False},
        }
    )
    return experiment.recipe(experiment.published(method))


def open_pair(recipe: Recipe) -> tuple[Splits, LiveTeacher]:
    """Data and an untrained teacher: neither time nor memory depends on weights."""
    splits = load_dataset("digits", image_size=recipe.data.image_size)
    network = build_network(recipe.teacher.network, splits.num_classes, {}, image_size=recipe.data.image_size)
    return splits, LiveTeacher(network.to("cuda"))


def precisions(size: int, batch: int) -> dict[str, Any]:
    """Images a second of one training step (KD with a live teacher), and of the student's part of it."""
    recipe = recipe_of("kd", size, batch)
    splits, teacher = open_pair(recipe)
    loaders = recipe_loaders(recipe, splits, "cuda")
    images = next(iter(loaders.train.epoch(0)))
    candidates = [(Precision(dtype, last), False) for dtype in ("fp32", "bf16") for last in (False, True)]
    rows: dict[str, Any] = {}
    for precision, compiled in [*candidates, (Precision("bf16", True), True)]:
        for method in ("scratch", "kd"):
            recipe = recipe_of(method, size, batch)
            distiller = build_distiller(recipe, teacher, splits.num_classes).to("cuda").train()
            if precision.channels_last:
                distiller.student.to(memory_format=torch.channels_last)
            updates = Updates(distiller, distiller, teacher, recipe.training, 1000, precision)
            if compiled:
                compile_student(distiller.student, torch.device("cuda"))
            times = [seconds(lambda: updates.apply(images, 1)) for _ in range(WARM_UP + STEPS)]  # noqa: B023
            name = f"{precision.dtype}{', channels last' * precision.channels_last}{', compiled' * compiled}"
            rows.setdefault(name, {})[method] = round(len(images) / statistics.median(times[WARM_UP:]), 1)
    with tempfile.TemporaryDirectory() as root:
        chosen = measured_precision(recipe_of("kd", size, batch), teacher, loaders, "cuda", Workspace(Path(root)))
    fastest = rows["fp32"]
    print(f"{TEACHER} -> {STUDENT} at {size}, batch {batch}: images a second (over fp32)")
    for name, row in rows.items():
        shown = "   ".join(f"{method} {rate:8.0f} ({rate / fastest[method]:.2f})" for method, rate in row.items())
        print(f"  {name:<32}{shown}", flush=True)
    print(f"  precision: auto chooses {chosen}")
    return {"images_per_second": rows, "auto": str(chosen)}


def seconds(action: Any) -> float:
    """Seconds of an action, until the device is done."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def memories(size: int, batch: int) -> dict[str, Any]:
    """Of each method: the estimate, what a process of its own really takes, and their ratio."""
    rows = {}
    print(f"{TEACHER} -> {STUDENT} at {size}, batch {batch}: GiB of the GPU")
    for method in MEMORY_METHODS:
        recipe = recipe_of(method, size, batch, precision="fp32")
        splits = load_dataset("digits", image_size=size)
        estimate = estimate_memory(recipe, splits, torch.cuda.get_device_properties(0).total_memory)
        free, _ = torch.cuda.mem_get_info()
        taken = in_a_process(_train_and_measure, method, size, batch, free)
        rows[method] = {"estimate": estimate, "taken": taken, "ratio": round(estimate / taken, 3)}
        shown = f"estimate {estimate / 2**30:6.2f}   taken {taken / 2**30:6.2f}   ratio {estimate / taken:.2f}"
        print(f"  {method:<12} {shown}", flush=True)
    return rows


def in_a_process(function: Any, *arguments: Any) -> Any:
    """What a function returns that has a process, and so the GPU's context, of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _train_and_measure(method: str, size: int, batch: int, free_before: int) -> int:
    """Train an epoch; the bytes of the GPU that the driver has given away since `free_before`.

    They hold this process's context, kernels and handles, and what torch has reserved, of which it gives nothing back.
    """
    recipe = recipe_of(method, size, batch, precision="fp32")
    splits, teacher = open_pair(recipe)
    train(recipe, teacher, recipe_loaders(recipe, splits, "cuda"), lambda metrics: True, TrainOptions(device="cuda"))
    torch.cuda.synchronize()
    free_after, _ = torch.cuda.mem_get_info()
    return free_before - free_after


def sharing(size: int, batch: int) -> dict[str, Any]:
    """Epochs a second of processes that train at once."""
    rows: dict[str, float] = {}
    print("the quickstart's student (test_resnet at 32, batch 32), HCD, live teacher: epochs a second on one GPU")
    context = multiprocessing.get_context("spawn")
    for count in SHARED_BY:
        with context.Pool(count) as pool, context.Manager() as manager:
            barrier = manager.Barrier(count)
            rates = pool.starmap(_epochs_a_second, [(barrier, 30)] * count)
        rows[str(count)] = round(sum(rates), 2)
        print(f"  {count} at once: {rows[str(count)]:7.2f} ({rows[str(count)] / rows['1']:.2f})", flush=True)
    return rows


def _epochs_a_second(barrier: Any, epochs: int) -> float:
    torch.set_num_threads(2)
    options = {"img_size": 32, "patch_size": 8, "depth": 6, "embed_dim": 96, "num_heads": 3}
    experiment = Experiment.model_validate(
        {
            "name": "gpu",
            "data": {"dataset": "digits", "image_size": 32},
            "teacher": {"network": "vit_tiny_patch16_224", "options": options},
            "student": {"network": "test_resnet"},
            "training": {"epochs": epochs, "batch_size": 32, "clip_grad": 5.0},
            "cache": {"enabled": False},
        }
    )
    recipe = experiment.recipe(experiment.published("hcd"))
    splits = load_dataset("digits", image_size=32)
    teacher = LiveTeacher(build_network("vit_tiny_patch16_224", splits.num_classes, options, image_size=32).to("cuda"))
    loaders = recipe_loaders(recipe, splits, "cuda")
    started: list[float] = []

    def report(metrics: dict[str, float]) -> bool:
        if not started:  # the first epoch warms up
            barrier.wait()
            started.append(time.perf_counter())
        return True

    train(recipe, teacher, loaders, report, TrainOptions(device="cuda"))
    return (epochs - 1) / (time.perf_counter() - started[0])


if __name__ == "__main__":
    main()
