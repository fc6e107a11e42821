"""How fast the loader makes views, over how fast a student's training step takes them: at 1 or more it keeps up.

    python benchmarks/loader.py [--out results.json] [--sizes 32 224] [--policies ofa crop] [--rounds 3]

Views of each policy are made of images in memory (on a GPU: resident there), of JPEG files that are decoded anew for
every round, and of the same files once they lie decoded in a shared, mapped file. A step is the plain student's:
forward, cross-entropy, backward, update. Rounds of loader and step are run in turn, and the ratio is that of the
fastest of each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from heterokd.datasets.io.image_files import FileImages, LabelledFiles
from heterokd.datasets.io.images import ArrayImages, Images
from heterokd.datasets.io.loaders import TrainLoader
from heterokd.datasets.io.shared_pixels import shared_pixels
from heterokd.datasets.io.split import Split
from heterokd.datasets.views.policy import POLICIES, ViewSpec
from heterokd.networks.network import build_network
from heterokd.outputs import Batch
from heterokd.training.optim import build_optimizer
from heterokd.training.task_modules import ClassificationTask

CASES: dict[str, dict[str, Any]] = {
    "32": {"student": "test_resnet", "batch": 64, "images": 512, "classes": 10, "steps": 5},
    "224": {"student": "resnet18", "batch": 16, "images": 64, "classes": 100, "steps": 1},
}
NAMES = [name for name in POLICIES if name != "scenes"]
# A photograph as data sets of folders have them: width and height in pixels.
PHOTOGRAPH = (400, 300)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--sizes", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--policies", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each kind")
    arguments = parser.parse_args()
    results = {size: measure_size(int(size), arguments.policies, arguments.rounds) for size in arguments.sizes}
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def measure_size(size: int, policies: list[str], rounds: int) -> dict[str, Any]:
    """Images per second of the step and of every loader, and the ratio of the two."""
    case = CASES[str(size)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step = training_step(case, size, device)
    print(f"{case['student']} at {size}, batch {case['batch']}, {device}, {torch.get_num_threads()} threads")
    print(f"  {'policy':<10}{'source':<9}{'loader':>10}{'step':>10}   images/s    ratio")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for source, open_images in sources(Path(name), case, size):
            for policy in policies:
                rates: dict[str, list[float]] = {"loader": [], "step": []}
                loader = open_loader(case, open_images(), policy, device)
                batch = list(loader.epoch(0))[-1]  # decodes, maps and fills what stays
                step(batch)
                for number in range(1, rounds + 1):
                    if source == "folder":
                        loader = open_loader(case, open_images(), policy, device)
                    rates["loader"].append(loader_rate(loader, number))
                    rates["step"].append(step_rate(step, batch, case["steps"]))
                fastest = {kind: max(values) for kind, values in rates.items()}
                ratio = fastest["loader"] / fastest["step"]
                results.setdefault(source, {})[policy] = {
                    "loader_images_per_second": round(fastest["loader"], 1),
                    "step_images_per_second": round(fastest["step"], 1),
                    "ratio": round(ratio, 3),
                }
                print(
                    f"  {policy:<10}{source:<9}{fastest['loader']:>10.0f}{fastest['step']:>10.0f}{ratio:>20.2f}",
                    flush=True,
                )
    return results


def sources(folder: Path, case: dict[str, Any], size: int) -> Iterator[tuple[str, Callable[[], Images]]]:
    """A function that opens each kind of source."""
    generator = np.random.default_rng(0)
    count = case["images"]
    pixels = generator.integers(0, 256, (count, size, size, 3), np.uint8)
    yield "memory", lambda: ArrayImages(pixels)
    names = [f"{number}.jpg" for number in range(count)]
    for name in names:
        rough = Image.fromarray(generator.integers(0, 256, (12, 16, 3), np.uint8))
        rough.resize(PHOTOGRAPH, Image.Resampling.BICUBIC).save(folder / name, quality=90)
    files = LabelledFiles(folder, np.array(names, np.bytes_), np.zeros(count, np.int64))
    yield "folder", lambda: FileImages(files, size)
    yield "mapped", lambda: shared_pixels(folder / "caches", FileImages(files, size), str(size), "train")


def open_loader(case: dict[str, Any], images: Images, policy: str, device: str) -> TrainLoader:
    """Views of some images."""
    split = Split(images, np.arange(len(images)) % case["classes"], "train")
    return TrainLoader(split, ViewSpec(POLICIES[policy]), case["batch"], num_classes=case["classes"], device=device)


def training_step(case: dict[str, Any], size: int, device: str) -> Callable[[Batch], None]:
    """A step of the plain student."""
    torch.manual_seed(0)
    student = build_network(case["student"], case["classes"], {}, image_size=size).to(device).train()
    optimizer = build_optimizer(student, "sgd", 1e-4, 0.0, 0.9)
    task = ClassificationTask(case["classes"])

    def step(batch: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = task(student(batch.images).logits, batch.labels)
        loss.backward()
        optimizer.step()

    return step


def loader_rate(loader: TrainLoader, epoch: int) -> float:
    """Images per second of one epoch of views."""
    started, images = time.perf_counter(), 0
    for batch in loader.epoch(epoch):
        images += len(batch)
    wait(batch)
    return images / (time.perf_counter() - started)


def step_rate(step: Callable[[Batch], None], batch: Batch, steps: int) -> float:
    """Images per second of some training steps on one batch."""
    started = time.perf_counter()
    for _ in range(steps):
        step(batch)
    wait(batch)
    return steps * len(batch) / (time.perf_counter() - started)


def wait(batch: Batch) -> None:
    if batch.images.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
