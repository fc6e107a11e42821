"""The teacher's cache: how fast it is built and read, how large it is, and what opening it costs.

    python benchmarks/cache.py [--out results.json] [--pairs 32 224] [--images 256] [--records 20000] [--rounds 3]

Building is timed against the bare forward of the same teacher on views that are made already. Reading is timed in
batches of training, in random order, on a cache of many records, over the images a second that the student's training
step takes: how many trainings could read it at once. Cold means that the system forgot the files' pages before the
cache was opened, and counts the opening and the first pass with the checksums of all shards. Where the system then did
not read the disk (it may keep pages elsewhere), there is no cold figure. On a processor one thread works, as in a
trial, and its own time counts, not what others make it wait; opening and cold reading are timed by the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heterokd.config.training import TrainingSettings
from heterokd.datasets import load_dataset
from heterokd.datasets.io.loaders import TrainLoader
from heterokd.datasets.views.policy import POLICIES, ViewSpec
from heterokd.methods import METHODS
from heterokd.networks.network import build_network
from heterokd.outputs import Batch, Signal
from heterokd.storage.filesystem import open_folder
from heterokd.teachers.cache.build import build_shards, finish
from heterokd.teachers.cache.cached_teacher import CacheAccess, CachedTeacher, open_or_build
from heterokd.teachers.cache.compute import view_outputs
from heterokd.teachers.cache.key import CacheKey, CacheSettings, Dtype, make_key
from heterokd.teachers.cache.records import open_records
from heterokd.teachers.cache.shards import cache_bytes
from heterokd.training.distiller import Distiller
from heterokd.training.precision import FP32
from heterokd.training.step import Updates
from heterokd.training.task_modules import ClassificationTask
from heterokd.training.teacher import LiveTeacher

STORED = Signal.LOGITS | Signal.EMBEDDING
TOP_K = 10  # a class more where there are only ten


@dataclass(frozen=True)
class Pair:
    """A teacher and a student, and what their data are like."""

    teacher: str
    student: str
    size: int
    batch: int
    classes: int
    options: dict[str, Any] = field(default_factory=dict)


PAIRS = {
    "32": Pair(
        "vit_tiny_patch16_224",
        "test_resnet",
        size=32,
        batch=32,
        classes=10,
        options={"img_size": 32, "patch_size": 8, "depth": 6, "embed_dim": 96, "num_heads": 3},
    ),
    "224": Pair("swin_tiny_patch4_window7_224", "resnet18", size=224, batch=16, classes=100),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument(
        "--images", type=int, default=256, help="images of which the teacher builds a view, at 32 pixels"
    )
    parser.add_argument("--records", type=int, default=20000, help="records of the caches that are read")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"pairs": {}}
    for name in arguments.pairs:
        pair = PAIRS[name]
        # A view at 224 pixels is worth dozens at 32.
        images = arguments.images if pair.size == 32 else max(pair.batch, arguments.images // 16)
        figures = build(pair, images, arguments.rounds) | read(pair, arguments.records, arguments.rounds)
        results["pairs"][name] = figures
        print(f"{pair.teacher} -> {pair.student} at {pair.size}, batch {pair.batch}, {pair.classes} classes")
        for key, value in figures.items():
            print(f"  {key.replace('_', ' '):<44}{'-' if value is None else value:>12}")
    results["bytes_per_view"] = sizes()
    print(f"bytes a view (logits{'':<8}{'fp32':>8}{'fp16':>8}{'top-k':>8}   each embedding value: 4 or 2 more)")
    for classes, row in results["bytes_per_view"].items():
        print(f"  {classes:>6} classes{'':<12}{row['fp32']:>8}{row['fp16']:>8}{row['top_k'] or '-':>8}")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def build(pair: Pair, images: int, rounds: int) -> dict[str, float | None]:
    """Views a second of a build, of the bare forward, and seconds of opening with its audit."""
    splits = load_dataset("digits", image_size=pair.size, labels_per_class=-(-images // 10))
    policy, device = POLICIES["digits"], "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    network = build_network(pair.teacher, splits.num_classes, pair.options, image_size=pair.size)
    live = LiveTeacher(network.to(device))
    batch = next(TrainLoader(splits.train, ViewSpec(policy, views=1), pair.batch, device=device).epoch(0))
    live.outputs(batch, STORED)
    rates: dict[str, list[float]] = {"build": [], "forward": []}
    opened = []
    settings, clock = CacheSettings(STORED, "fp32"), clock_of(device)
    views, access = ViewSpec(policy, 0, 1), CacheAccess("complete", device)
    key = make_key(splits, views, network, CacheSettings(dtype=settings.dtype))
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = open_folder(Path(name)).at(key.id)
            started = clock()
            build_shards(folder, key, view_outputs(splits.train, views, live, device=device))
            finish(folder, key)
            rates["build"].append(key.records / (clock() - started))
            started = time.perf_counter()
            open_or_build(Path(name), splits, views, live, settings, access)
            opened.append(time.perf_counter() - started)
        repeats = -(-len(splits.train) // pair.batch)
        started = clock()
        for _ in range(repeats):
            live.outputs(batch, STORED)
        wait(device)
        rates["forward"].append(repeats * pair.batch / (clock() - started))
    ratio = statistics.median(a / b for a, b in zip(rates["build"], rates["forward"], strict=True))
    return {
        "build_views_per_second": round(statistics.median(rates["build"]), 1),
        "bare_forward_views_per_second": round(statistics.median(rates["forward"]), 1),
        "build_over_forward": round(ratio, 3),
        "open_and_audit_seconds": round(statistics.median(opened), 3),
    }


def read(pair: Pair, records: int, rounds: int) -> dict[str, float | None]:
    """Records a second in random batches, warm and cold, over the images a second of a training step."""
    views = 10
    spec = build_network(pair.teacher, pair.classes, pair.options, image_size=pair.size).spec
    key = stand_in_key(max(records // views, pair.batch), views, pair.classes, spec.embedding_dim)
    need = training_rate(pair, rounds)
    with tempfile.TemporaryDirectory() as name:
        folder = open_folder(Path(name)).at(key.id)
        build_shards(folder, key, stand_in(key))
        finish(folder, key)
        is_cold, before = forget(Path(name)), bytes_read()
        started = time.perf_counter()
        records = open_records(folder, key)
        opened = time.perf_counter() - started
        first = key.records / read_rate(CachedTeacher(records, spec), key, pair.batch, time.perf_counter)
        cold = key.records / (opened + first)
        # Nothing came from the disk: the system had the pages all the same.
        is_cold = is_cold and before is not None and (bytes_read() or 0) - before > cache_bytes(key) / 2
        teacher = CachedTeacher(open_records(folder, key), spec)
        read_rate(teacher, key, pair.batch)
        warm = statistics.median(read_rate(teacher, key, pair.batch) for _ in range(rounds))
        started = time.perf_counter()
        open_records(folder, key, verify="full")
        checked = time.perf_counter() - started
    return {
        "records": key.records,
        "megabytes": round(cache_bytes(key) / 1e6, 1),
        "training_needs_per_second": round(need, 1),
        "read_records_per_second": round(warm),
        "read_over_need": round(warm / need, 1),
        "cold_records_per_second": round(cold) if is_cold else None,
        "cold_over_need": round(cold / need, 1) if is_cold else None,
        "check_every_checksum_seconds": round(checked, 3),
    }


def sizes() -> dict[int, dict[str, int | None]]:
    """Bytes of a view's logits, files over records, by number of classes and form."""
    found: dict[int, dict[str, int | None]] = {}
    for classes in (10, 100, 1000):
        found[classes] = {
            "fp32": file_bytes(stand_in_key(1000, 10, classes, None, "fp32")),
            "fp16": file_bytes(stand_in_key(1000, 10, classes, None, "fp16")),
            "top_k": file_bytes(stand_in_key(1000, 10, classes, None, "fp16", TOP_K)) if classes > TOP_K else None,
        }
    return found


def file_bytes(key: CacheKey) -> int:
    """Bytes of all files of a finished cache, for each record."""
    with tempfile.TemporaryDirectory() as name:
        folder = open_folder(Path(name)).at(key.id)
        build_shards(folder, key, stand_in(key))
        finish(folder, key)
        return round(sum(file.stat().st_size for file in Path(name).rglob("*") if file.is_file()) / key.records)


def stand_in_key(
    images: int,
    views: int,
    classes: int,
    embedding: int | None,
    dtype: Dtype = "fp32",
    top_k: int | None = None,
) -> CacheKey:
    """The key of a cache that no teacher made."""
    return CacheKey(
        data="0" * 64,
        split="train",
        images=images,
        size=(32, 32),
        policy="0" * 16,
        seed=0,
        views=views,
        teacher="0" * 64,
        network="stand-in",
        options="{}",
        input_size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        libraries=(),
        dtype=dtype,
        logits=(classes,),
        embedding=None if embedding is None else (embedding,),
        top_k=top_k,
    )


def stand_in(key: CacheKey) -> Callable[[NDArray[np.int64], NDArray[np.int64]], dict[str, Tensor]]:
    """Outputs that cost nothing, of the shapes of a key."""
    shapes = {"logits": key.logits, "embedding": key.embedding}
    made = {name: torch.randn(256, *shape) for name, shape in shapes.items() if shape is not None}
    return lambda index, view: {name: values[: len(index)] for name, values in made.items()}


def read_rate(teacher: CachedTeacher, key: CacheKey, batch: int, clock: Callable[[], float] | None = None) -> float:
    """Records a second of one pass over all of them in random order."""
    order = np.random.default_rng(0).permutation(key.records)
    images = torch.empty(batch, 1)
    steps = [order[start : start + batch] for start in range(0, key.records - batch + 1, batch)]
    named = [torch.from_numpy(np.stack((step % key.images, step // key.images), axis=1)) for step in steps]
    images, labels = torch.empty(batch, 1), torch.zeros(batch)
    batches = [Batch(images, labels, shown[:, 0], shown=shown) for shown in named]
    clock = clock or clock_of("cpu")
    started = clock()
    for one in batches:
        teacher.outputs(one, STORED)
    return len(steps) * batch / (clock() - started)


def training_rate(pair: Pair, rounds: int) -> float:
    """Images a second of the plain student's whole step: the fastest round, the most that reading must keep up with."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    student = build_network(pair.student, pair.classes, {}, image_size=pair.size)
    method = METHODS["scratch"](None, student.spec, student.spec)
    distiller = Distiller(student, method, ClassificationTask(pair.classes)).to(device).train()
    settings = TrainingSettings(batch_size=pair.batch, learning_rate=1e-5, clip_grad=5.0)
    updates = Updates(distiller, distiller, None, settings, 1000, FP32)
    batch = Batch(
        torch.rand(pair.batch, 3, pair.size, pair.size, device=device),
        torch.arange(pair.batch, device=device) % pair.classes,
        torch.arange(pair.batch, device=device),
    )
    updates.apply(batch, 0)
    rates, clock = [], clock_of(device)
    for _ in range(rounds):
        wait(device)
        started = clock()
        for _ in range(3):
            updates.apply(batch, 1)
        wait(device)
        rates.append(3 * pair.batch / (clock() - started))
    return max(rates)


def forget(folder: Path) -> bool:
    """Ask the system to drop the pages of all files; whether it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in folder.rglob("*.arrow"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return True


def bytes_read() -> int | None:
    """What this process has read from disks so far; None where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def clock_of(device: torch.device | str) -> Callable[[], float]:
    """Seconds: of this process itself on a processor, where others may make it wait."""
    return time.perf_counter if torch.device(device).type == "cuda" else time.process_time


def wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
