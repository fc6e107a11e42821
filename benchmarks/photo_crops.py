"""Images per second of training crops from JPEG files, next to torchvision's RandomResizedCrop on the same files.

    python benchmarks/photo_crops.py [--out results.json] [--sizes 500x375 4000x3000] [--crop 224] [--rounds 5]

One core: one torch thread, and the process is pinned. heterokd (`data.crops: photo`) decodes, crops, resizes, flips and
makes float tensors [B, 3, S, S]; torchvision opens the files with Pillow, as `ImageFolder` does, and applies
RandomResizedCrop, a flip, `PILToTensor` and a scaling to [0, 1]. Rounds are run in turn; the ratio is heterokd's time
per image over torchvision's, the median over rounds. The aim is 1.05 or less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from heterokd.datasets.image_folder import ImageFolder
from heterokd.datasets.io.loaders import TrainLoader
from heterokd.datasets.io.options import DataOptions
from heterokd.datasets.views.policy import POLICIES, ViewSpec

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--sizes", nargs="+", default=["500x375", "4000x3000"])
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    results = {}
    for size in arguments.sizes:
        width, height = map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as name:
            results[size] = measure(Path(name), (width, height), arguments.crop, arguments.rounds)
        print(f"{size}: " + ", ".join(f"{key} {value:.3g}" for key, value in results[size].items()))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def measure(root: Path, size: tuple[int, int], crop: int, rounds: int) -> dict[str, float]:
    """Milliseconds per image of both, and their ratio."""
    write_photos(root, size)
    splits = ImageFolder().load_with(root, crop, 0, DataOptions(crops="photo"))
    loader = TrainLoader(splits.train, ViewSpec(POLICIES["crop"]), BATCH)
    files = [splits.train.images.files.path(place) for place in range(len(splits.train))]
    transform = v2.Compose(
        [v2.RandomResizedCrop(crop), v2.RandomHorizontalFlip(), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    )
    count = len(loader) * BATCH

    def ours(epoch: int) -> None:
        for _ in loader.epoch(epoch):
            pass

    def theirs(epoch: int) -> None:
        for start in range(0, count, BATCH):
            torch.stack([transform(Image.open(path).convert("RGB")) for path in files[start : start + BATCH]])

    times: dict[str, list[float]] = {"heterokd": [], "torchvision": []}
    for epoch in range(rounds + 1):  # the first is not counted
        for name, run in (("heterokd", ours), ("torchvision", theirs)):
            began = time.perf_counter()
            run(epoch)
            if epoch:
                times[name].append(1000 * (time.perf_counter() - began) / count)
    ratios = [a / b for a, b in zip(times["heterokd"], times["torchvision"], strict=True)]
    return {f"{name}_ms": statistics.median(values) for name, values in times.items()} | {
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def write_photos(root: Path, size: tuple[int, int]) -> None:
    """JPEGs of two classes with the detail of photographs: noise of several scales."""
    rng = np.random.default_rng(0)
    per_class = 40 if size[0] < 1000 else 10
    for number in range(2 * per_class):
        pixels = np.zeros((size[1], size[0], 3))
        for cell, weight in ((4, 20), (16, 40), (64, 60)):
            rough = rng.normal(0, weight, (size[1] // cell + 1, size[0] // cell + 1, 3))
            pixels += np.repeat(np.repeat(rough, cell, 0), cell, 1)[: size[1], : size[0]]
        path = root / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(path, quality=90)


if __name__ == "__main__":
    main()
