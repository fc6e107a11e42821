"""How costs grow with images, views, classes, trials and workers: the exponent of each, fitted on log-log axes.

    python benchmarks/scale.py [--out results.json] [--trials 2000] [--steps 4] [--images 1000]

An exponent of 1 is a cost in proportion, 0 one that does not grow, -1 work that workers share evenly. The cache is
built of outputs that cost nothing, so that what grows is its own work and not the teacher's forward; the study is asked
and told by an objective that does nothing. A worker's share is timed alone on the machine. Each time is the fastest of
three, that of the study the median of the last trials.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache import read_rate, stand_in, stand_in_key

from heterokd.config.reading import load_experiment
from heterokd.datasets.io.images import ArrayImages
from heterokd.datasets.io.loaders import TrainLoader, Worker
from heterokd.datasets.io.split import Split
from heterokd.datasets.views.policy import POLICIES, ViewSpec
from heterokd.networks.network import predict_spec
from heterokd.storage.filesystem import open_folder
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.study import Study
from heterokd.teachers.cache.build import build_shards, finish
from heterokd.teachers.cache.cached_teacher import CachedTeacher
from heterokd.teachers.cache.key import CacheKey
from heterokd.teachers.cache.records import open_records
from heterokd.teachers.cache.shards import cache_bytes, layout_of

EXPERIMENT = Path(__file__).resolve().parents[1] / "experiments" / "quickstart.yaml"
ROUNDS = 3
WINDOW = 15
"""Trials over which the study's time at a number of trials is taken."""
VIEWS, CLASSES, EMBEDDING, BATCH = 10, 100, 384, 32


@dataclass
class Curve:
    """A cost at several sizes of one quantity."""

    quantity: str
    cost: str
    sizes: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def exponent(self) -> float:
        """Slope of the straight line through the logarithms."""
        return float(np.polyfit(np.log(self.sizes), np.log(self.values), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--trials", type=int, default=2000, help="the largest study")
    parser.add_argument("--steps", type=int, default=4, help="doublings of each size")
    parser.add_argument("--images", type=int, default=1000, help="the smallest data set")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    factors = [2**step for step in range(arguments.steps + 1)]
    curves = [*cache_curves(arguments.images, factors), *loader_curves(arguments.images, factors)]
    curves += study_curves([*(100 * factor for factor in factors if 100 * factor < arguments.trials), arguments.trials])
    print(f"{'quantity':<10}{'cost':<40}{'exponent':>9}   at")
    for curve in curves:
        shown = "  ".join(f"{size}: {value:.3g}" for size, value in zip(curve.sizes, curve.values, strict=True))
        print(f"{curve.quantity:<10}{curve.cost:<40}{curve.exponent:>9.2f}   {shown}", flush=True)
    if arguments.out:
        found = [{**vars(curve), "exponent": round(curve.exponent, 3)} for curve in curves]
        arguments.out.write_text(json.dumps(found, indent=1))


def cache_curves(images: int, factors: list[int]) -> list[Curve]:
    """Bytes, building and reading of the cache as images, views and classes grow; a builder's share as builders do."""
    grown: Mapping[str, Callable[[int], CacheKey]] = {
        "images": lambda factor: stand_in_key(images * factor, VIEWS, CLASSES, EMBEDDING),
        "views": lambda factor: stand_in_key(images, VIEWS * factor, CLASSES, EMBEDDING),
        "classes": lambda factor: stand_in_key(images, VIEWS, CLASSES * factor, EMBEDDING),
    }
    curves = []
    for quantity, make in grown.items():
        costs = {
            cost: Curve(quantity, f"cache: {cost}") for cost in ("bytes", "build, seconds", "read a batch, seconds")
        }
        for factor in factors:
            key = make(factor)
            size = {"images": key.images, "views": key.views, "classes": key.logits[0] if key.logits else 0}[quantity]
            for cost, value in cache_costs(key).items():
                costs[cost].sizes.append(size)
                costs[cost].values.append(value)
        curves += costs.values()
    many = replace(stand_in_key(images * factors[-1], VIEWS, CLASSES, EMBEDDING), shard_bytes=2**20)
    share = Curve("workers", "cache: a builder's share, seconds")
    for workers in factors:
        numbers = range(0, layout_of(many).shards, workers)
        share.sizes.append(workers)
        share.values.append(fastest(lambda numbers=numbers: build_once(many, numbers)))
    return [*curves, share]


def cache_costs(key: CacheKey) -> dict[str, float]:
    """What one cache costs."""
    spec = predict_spec("resnet18", key.logits[0] if key.logits else 1, {}, 32)
    with tempfile.TemporaryDirectory() as name:
        folder = open_folder(Path(name)).at(key.id)
        build_shards(folder, key, stand_in(key))
        finish(folder, key)
        stored = sum(file.stat().st_size for file in Path(name).rglob("*") if file.is_file())
        assert stored <= cache_bytes(key) + 2**16  # what a plan promises
        teacher = CachedTeacher(open_records(folder, key, verify="full"), spec)
        rate = max(read_rate(teacher, key, BATCH) for _ in range(ROUNDS))
    return {
        "bytes": stored,
        "build, seconds": fastest(lambda: build_once(key, range(layout_of(key).shards))),
        "read a batch, seconds": BATCH / rate,
    }


def build_once(key: CacheKey, numbers: range) -> float:
    """Seconds of building some shards from nothing."""
    compute = stand_in(key)
    with tempfile.TemporaryDirectory() as name:
        folder = open_folder(Path(name)).at(key.id)
        started = time.perf_counter()
        build_shards(folder, key, compute, numbers)
        return time.perf_counter() - started


def loader_curves(images: int, factors: list[int]) -> list[Curve]:
    """Seconds of an epoch of crops at 32 pixels as images and workers grow."""
    generator = np.random.default_rng(0)
    by_images = Curve("images", "loader: an epoch, seconds")
    by_workers = Curve("workers", "loader: a worker's epoch, seconds")

    def epoch(split: Split, workers: int) -> float:
        loader = TrainLoader(split, ViewSpec(POLICIES["crop"]), 64, num_classes=10, worker=Worker(world_size=workers))
        started = time.perf_counter()
        for _ in loader.epoch(0):
            pass
        return time.perf_counter() - started

    for factor in factors:
        pixels = generator.integers(0, 256, (images * factor, 32, 32, 3), np.uint8)
        split = Split(ArrayImages(pixels), np.arange(len(pixels)) % 10, "train")
        epoch(split, 1)
        by_images.sizes.append(len(split))
        by_images.values.append(fastest(lambda split=split: epoch(split, 1)))
    for workers in factors:
        by_workers.sizes.append(workers)
        by_workers.values.append(fastest(lambda workers=workers: epoch(split, workers)))
    return [by_images, by_workers]


def study_curves(sizes: list[int]) -> list[Curve]:
    """Seconds of the study's next suggestion, and of recording a trial's end, at several numbers of trials."""
    ask, tell = Curve("trials", "study: a suggestion, seconds"), Curve("trials", "study: recording a trial, seconds")
    experiment = load_experiment(EXPERIMENT, [f"search.trials={sizes[-1] + 1}", "search.confirm_leaders=0"])
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        study = Study.open(experiment, StudyFolder(Path(name)))
        asked: list[float] = []
        told: list[float] = []
        for done in range(1, sizes[-1] + 1):
            started = time.perf_counter()
            assignment: Any = study.next()
            between = time.perf_counter()
            metrics = {experiment.metric: float(generator.random())}
            goes_on = all(study.report(assignment.number, rung, metrics) for rung in assignment.rungs)
            study.finish(assignment.number, "complete" if goes_on else "pruned", metrics)
            asked.append(between - started)
            told.append(time.perf_counter() - between)
            if done in sizes:
                for curve, times in ((ask, asked), (tell, told)):
                    curve.sizes.append(done)
                    curve.values.append(statistics.median(times[-WINDOW:]))
    return [ask, tell]


def fastest(measure: Callable[[], float]) -> float:
    """The least disturbed of a few measurements."""
    return min(measure() for _ in range(ROUNDS))


if __name__ == "__main__":
    main()
