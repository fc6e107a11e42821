"""What each method adds to the student's own step when the teacher's outputs are given: time and memory, as ratios.

    python benchmarks/steps.py [--out results.json] [--pairs 224 32] [--methods kd hcd] [--rounds 5]
                               [--batch 256] [--precision fp32 | bf16] [--channels-last]

A step is forward, task loss, the method's terms, backward and the optimizer's update. Plain steps and the method's are
run in turn, and the ratio is that of the fastest of each, the least disturbed ones. `scratch` measures the noise: its
true ratio is 1. On a processor its own time counts, not what others make it wait. Memory is what autograd keeps
between forward and backward (saved tensors); on a GPU also the peak of what is allocated, the networks included.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from heterokd.cli.catalogue import STEP_COSTS
from heterokd.config.methods import methods_of
from heterokd.errors import PairError
from heterokd.methods import METHODS
from heterokd.networks.classifier import Network
from heterokd.networks.network import build_network
from heterokd.outputs import Batch, Outputs, Signal
from heterokd.training.distiller import Distiller
from heterokd.training.optim import build_optimizer
from heterokd.training.precision import Precision, forbid_tf32
from heterokd.training.task_modules import ClassificationTask

IN_A_ROW = 10
"""Steps of one figure on a GPU: a training does not wait for the device after each."""

PAIRS: dict[str, dict[str, Any]] = {
    "224": {
        "student": ("resnet18", {}),
        "teacher": ("swin_tiny_patch4_window7_224", {}),
        "size": 224,
        "batch": 16,
        "classes": 100,
    },
    "32": {
        "student": ("test_resnet", {}),
        "teacher": (
            "vit_tiny_patch16_224",
            {"img_size": 32, "patch_size": 8, "depth": 6, "embed_dim": 96, "num_heads": 3},
        ),
        "size": 32,
        "batch": 64,
        "classes": 10,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(methods_of("classification")))
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--keep", action="store_true", help="write the figures that the catalogue shows")
    parser.add_argument("--batch", type=int, help="images of a step, instead of the pair's own number")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--channels-last", action="store_true", help="memory format of the student's maps")
    arguments = parser.parse_args()
    precision = Precision(arguments.precision, arguments.channels_last)
    own = {} if arguments.batch is None else {"batch": arguments.batch}
    results = {
        pair: measure_pair(PAIRS[pair] | own, arguments.methods, arguments.rounds, precision)
        for pair in arguments.pairs
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))
    if arguments.keep:
        # Methods that were not measured now keep their figures.
        pairs = yaml.safe_load(STEP_COSTS.read_text(encoding="utf-8"))["pairs"]
        for pair, found in results.items():
            pairs.setdefault(pair, {}).update(found)
        STEP_COSTS.write_text("# Written by `python benchmarks/steps.py --keep`.\n" + yaml.safe_dump({"pairs": pairs}))


def measure_pair(pair: dict[str, Any], methods: list[str], rounds: int, precision: Precision) -> dict[str, Any]:
    """Ratios of every method on one pair."""
    torch.manual_seed(0)
    size, classes = pair["size"], pair["classes"]
    network, options = pair["teacher"]
    teacher = build_network(network, classes, options, image_size=size).eval().requires_grad_(requires_grad=False)
    batch = Batch(
        images=torch.rand(pair["batch"], 3, size, size),
        labels=torch.randint(classes, (pair["batch"],)),
        index=torch.arange(pair["batch"]),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    forbid_tf32(device)
    teacher, batch = teacher.to(device), batch.to(device)
    print(f"{pair['teacher'][0]} -> {pair['student'][0]} at {size}, batch {len(batch)}, {device}, {precision}")
    results = {}
    for method in methods:
        student = build_network(pair["student"][0], classes, pair["student"][1], image_size=size)
        try:
            loss = METHODS[method](None, student.spec, teacher.spec)
        except PairError as error:
            print(f"  {method:<14} does not exist for this pair: {error}")
            continue
        given = Outputs()
        if loss.teacher_needs != Signal.NONE:
            with torch.no_grad(), precision.autocast(device):
                given = teacher(batch.images, loss.teacher_needs)
        if precision.channels_last:
            student.to(memory_format=torch.channels_last)
        distiller = Distiller(student, loss, ClassificationTask(classes)).to(device)
        results[method] = measure(student, distiller, batch, given, rounds, precision)
        print(
            f"  {method:<14} " + "   ".join(f"{kind} {ratio:.3f}" for kind, ratio in results[method].items()),
            flush=True,
        )
    return results


def measure(
    student: Network, distiller: Distiller, batch: Batch, given: Outputs, rounds: int, precision: Precision
) -> dict[str, float]:
    """Time and saved tensors of a method's step over the plain student's."""
    optimizer = build_optimizer(distiller, "sgd", 1e-4, 0.0, 0.9)

    def plain() -> Tensor:
        with precision.autocast(batch.images.device):
            return distiller.task(student(batch.images).logits, batch.labels)

    def distilled() -> Tensor:
        with precision.autocast(batch.images.device):
            total, _ = distiller(batch, given, 0.5)
        return total

    def step(loss: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    def timed(loss: Any) -> float:
        if not batch.images.is_cuda:
            started = time.process_time()
            step(loss)
            return time.process_time() - started
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(IN_A_ROW):
            step(loss)
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / IN_A_ROW

    distiller.train()
    # The first one gives every weight its momentum, which fused SGD wants of all or none.
    for loss in (distilled, plain):
        step(loss)
    times: dict[str, list[float]] = {"plain": [], "distilled": []}
    for _ in range(rounds):
        times["plain"].append(timed(plain))
        times["distilled"].append(timed(distilled))
    found = {
        "time": round(min(times["distilled"]) / min(times["plain"]), 4),
        "memory": round(saved_bytes(distilled) / saved_bytes(plain), 4),
    }
    if batch.images.is_cuda:
        peaks = {}
        for kind, loss in (("plain", plain), ("distilled", distilled)):
            torch.cuda.reset_peak_memory_stats()
            step(loss)
            peaks[kind] = torch.cuda.max_memory_allocated()
        found["peak"] = round(peaks["distilled"] / peaks["plain"], 4)
    return found


def saved_bytes(loss: Any) -> int:
    """Bytes that autograd keeps between forward and backward; each storage counts once."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        # A detached alias: its memory stays taken, and no node keeps itself alive through its own output.
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss()
    return sum(storages.values())


if __name__ == "__main__":
    main()
