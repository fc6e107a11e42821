"""What a step that two workers share costs over the same step written by hand around torch's DDP.

    python benchmarks/ddp.py [--out results.json] [--pairs 224 32] [--workers 2] [--rounds 15] [--steps 5] [--ray]

`torchrun` starts the workers (gloo on a processor, NCCL on GPUs). Each holds two trainings of the same student by KD
from the same live teacher on the same part of every batch: heterokd's (`Updates` around a data-parallel `Distiller`,
as `train` runs it) and twenty lines of plain PyTorch. They take turns, a few steps each in every round, and all workers
wait for each other before and after; shown is the median over the rounds of the ratio. Both have the same weights after
their first step, or there are no figures. With `--ray` the workers are Ray Train's, as in a trial, and not torchrun's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from step import PAIRS, Pair
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from heterokd import distributed as group
from heterokd.config.training import TrainingSettings
from heterokd.datasets import load_dataset
from heterokd.datasets.io.loaders import TrainLoader, Worker
from heterokd.datasets.views.policy import POLICIES, ViewSpec
from heterokd.execution.placement import plan_workers
from heterokd.execution.ray_connection import connected
from heterokd.methods import METHODS
from heterokd.networks.network import build_network
from heterokd.outputs import Batch
from heterokd.training.distiller import Distiller
from heterokd.training.precision import FP32, forbid_tf32
from heterokd.training.step import Updates
from heterokd.training.task_modules import ClassificationTask
from heterokd.training.teacher import LiveTeacher

GOAL = 1.05
TEMPERATURE, RATE = 4.0, 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each training")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    parser.add_argument("--ray", action="store_true", help="in Ray Train's workers")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # what torchrun starts: where to write
    arguments = parser.parse_args()
    if arguments.worker:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        figures = measure_all(arguments.pairs, arguments.rounds, arguments.steps)
        if dist.get_rank() == 0:
            arguments.worker.write_text(json.dumps(figures))
        dist.destroy_process_group()
        return
    figures = (in_ray if arguments.ray else in_torchrun)(arguments)
    print(f"{arguments.workers} workers of {'Ray Train' if arguments.ray else 'torchrun'}")
    print(f"  {'pair':<46} {'plain DDP':>10} {'heterokd':>10} {'ratio':>7}   (goal: at most {GOAL})")
    for one in figures.values():
        print(f"  {one['pair']:<46} {one['plain_ms']:8.1f}ms {one['own_ms']:8.1f}ms {one['ratio']:7.3f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1))


def in_torchrun(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of workers that torchrun starts."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(arguments.workers), __file__, "--worker", str(written)]
        command += ["--rounds", str(arguments.rounds), "--steps", str(arguments.steps), "--pairs", *arguments.pairs]
        subprocess.run(command, check=True)
        found: dict[str, Any] = json.loads(written.read_text())
        return found


def in_ray(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of Ray Train's workers."""
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    with connected(None, shared=True), tempfile.TemporaryDirectory() as folder:
        place = plan_workers(TrainingSettings(workers=arguments.workers))
        resources = {"CPU": place.cpus} | ({"GPU": place.gpus} if place.gpus else {})
        trainer = TorchTrainer(
            lambda: measure_all(arguments.pairs, arguments.rounds, arguments.steps),
            torch_config=TorchConfig(backend="nccl" if place.gpus >= 1 else "gloo"),
            scaling_config=train.ScalingConfig(
                num_workers=arguments.workers, use_gpu=place.gpus > 0, resources_per_worker=resources
            ),
            run_config=train.RunConfig(name="ddp", storage_path=folder),
        )
        found: dict[str, Any] = trainer.fit().return_value
        return found


def measure_all(pairs: list[str], rounds: int, steps: int) -> dict[str, Any]:
    """The figures of every pair; each worker calls this."""
    if torch.cuda.is_available():
        torch.cuda.set_device(group.rank() % torch.cuda.device_count())
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        torch.set_num_threads(1)
        device = torch.device("cpu")
    forbid_tf32(device)
    return {name: measure(PAIRS[name], rounds, steps, device) for name in pairs}


def measure(pair: Pair, rounds: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of both kinds of step, and the median of the ratios of neighbours."""
    splits = load_dataset("digits", image_size=pair.size, labels_per_class=-(-pair.batch // 10))
    views, worker = ViewSpec(POLICIES["digits"]), Worker(group.rank(), group.size())
    loader = TrainLoader(splits.train, views, pair.batch, worker=worker, device=device)
    batch = next(loader.epoch(0)).to(device)
    torch.manual_seed(0)
    teacher = LiveTeacher(build_network(pair.teacher, splits.num_classes, pair.options, image_size=pair.size))
    teacher.network.to(device)
    own, own_student = own_step(pair, teacher, splits.num_classes, batch, loader.images(0), device)
    plain, plain_student = plain_step(pair, teacher, splits.num_classes, batch, device)
    own(), plain()
    for ours, theirs in zip(own_student.parameters(), plain_student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    turns: dict[str, list[float]] = {"plain": [], "own": []}
    for number in range(rounds + 1):
        for kind, step in (("plain", plain), ("own", own)):
            seconds = timed(step, steps, device)
            if number:  # the first round warms up
                turns[kind].append(seconds / steps)
    ratios = [mine / theirs for mine, theirs in zip(turns["own"], turns["plain"], strict=True)]
    return {
        "pair": f"{pair.teacher} -> {pair.student}, {pair.size} px, batch {pair.batch}",
        "plain_ms": round(1e3 * statistics.median(turns["plain"]), 2),
        "own_ms": round(1e3 * statistics.median(turns["own"]), 2),
        "ratio": round(statistics.median(ratios), 4),
    }


def timed(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Seconds of some steps of all workers together."""

    def together() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    together()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    together()
    return time.perf_counter() - started


def own_step(
    pair: Pair, teacher: LiveTeacher, num_classes: int, batch: Batch, images: int, device: torch.device
) -> tuple[Callable[[], object], nn.Module]:
    """A step as `heterokd.training` makes it, and its student."""
    torch.manual_seed(0)
    student = build_network(pair.student, num_classes, image_size=pair.size).to(device)
    kd = METHODS["kd"](METHODS["kd"].Params(temperature=TEMPERATURE), student.spec, teacher.spec)
    distiller = Distiller(student, kd, ClassificationTask(num_classes)).to(device).train()
    settings = TrainingSettings(
        batch_size=pair.batch, learning_rate=RATE, momentum=0.9, weight_decay=0.0, schedule="constant"
    )
    updates = Updates(distiller, group.data_parallel(distiller), teacher, settings, 1000, FP32)
    totals: dict[str, Tensor] = {}

    def step() -> None:
        losses = updates.apply(batch, 1, len(batch) * group.size() / images)
        for name, value in losses.items():
            totals[name] = totals.get(name, 0) + value

    return step, student


def plain_step(
    pair: Pair, teacher: LiveTeacher, num_classes: int, batch: Batch, device: torch.device
) -> tuple[Callable[[], object], nn.Module]:
    """The same step by hand: teacher, student, cross-entropy and KD, backward, SGD."""
    torch.manual_seed(0)
    student = build_network(pair.student, num_classes, image_size=pair.size).to(device).train()
    parallel = DistributedDataParallel(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=RATE, momentum=0.9, nesterov=True, fused=True)
    network = teacher.network

    def step() -> None:
        with torch.no_grad():
            target = F.softmax(network(batch.images).logits / TEMPERATURE, dim=1)
        logits = parallel(batch.images).logits
        kd = F.kl_div(F.log_softmax(logits / TEMPERATURE, dim=1), target, reduction="batchmean") * TEMPERATURE**2
        loss = F.cross_entropy(logits, batch.labels) + kd
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, student


if __name__ == "__main__":
    main()
