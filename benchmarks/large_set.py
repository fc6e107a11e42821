"""A simulated ImageNet through index, plan of the cache and an epoch of 1 %: seconds, memory, bytes.

    python benchmarks/large_set.py [--out results.json] [--classes 1000] [--images 1281] [--epoch-images 12556]

1.28 million names in 1,000 folders (and 50,000 for val) are hard links to a small JPEG per class, in $TMPDIR; they are
removed afterwards. Each part runs in a process of its own: `list` lists the files, as the first process does, and saves
the index; `index` opens them from the saved index, as every later process does, and counts the bytes of caches; `epoch`
trains KD on 1 % of the images for an epoch, as a worker does. Memory is the process's largest resident size; pages of
mapped files count, and the system can take them back. Aims: index below 3 s, memory of a worker below 1.5 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDE = (96, 72)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--images", type=int, default=1281, help="training images of a class")
    parser.add_argument("--epoch-images", type=int, default=12_556, help="images of the sample")
    parser.add_argument("--part", choices=sorted(PARTS), help="run a part in this process, in an existing folder")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments.folder, arguments.epoch_images)))
        return
    folder = Path(tempfile.mkdtemp(prefix="large_set"))
    results: dict[str, object] = {"images": arguments.classes * arguments.images}
    try:
        before = time.perf_counter()
        write_links(folder / "imagenet", arguments.classes, arguments.images)
        results["seconds to write the links"] = round(time.perf_counter() - before, 1)
        for part in PARTS:
            command = [sys.executable, __file__, "--part", part, "--folder", str(folder)]
            command += ["--epoch-images", str(arguments.epoch_images)]
            # The index is saved below the home folder.
            environment = {**os.environ, "HOME": str(folder), "OMP_NUM_THREADS": "1"}
            answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            results[part] = json.loads(answer.stdout.splitlines()[-1])
            print(part, json.dumps(results[part], indent=1), flush=True)
    finally:
        shutil.rmtree(folder)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def write_links(root: Path, classes: int, images: int) -> None:
    """Write a JPEG per class and split, and hard links to it; modification times are old, as of an unpacked archive."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for split, count in (("train", images), ("val", 50)):
        for number in range(classes):
            folder = root / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            first = folder / f"n{number:08d}_0.JPEG"
            Image.fromarray(generator.integers(0, 256, (*SIDE, 3), np.uint8)).save(first, quality=30)
            for image in range(1, count):
                os.link(first, folder / f"n{number:08d}_{image}.JPEG")
            os.utime(folder, (1e9, 1e9))
        os.utime(root / split, (1e9, 1e9))
    os.utime(root, (1e9, 1e9))


def listing(folder: Path, _: int) -> dict[str, float]:
    """Open the data set; the first process saves its index."""
    from heterokd.datasets.imagenet import ImageNet

    before = time.perf_counter()
    splits = ImageNet().load(folder / "imagenet", 224, 0)
    seconds = time.perf_counter() - before
    assert len(splits.train.labels) > len(splits.val.labels)
    return {"seconds": seconds, "GiB": memory()}


def index(folder: Path, _: int) -> dict[str, float]:
    """Open the data set from its index, and count the bytes of caches."""
    from dataclasses import replace

    from heterokd.datasets.imagenet import ImageNet
    from heterokd.teachers.cache.key import CacheKey
    from heterokd.teachers.cache.shards import cache_bytes, layout_of

    before = time.perf_counter()
    splits = ImageNet().load(folder / "imagenet", 224, 0)
    found = {"seconds": time.perf_counter() - before, "GiB": memory()}
    logits = CacheKey(
        data=splits.fingerprint, split="train", images=len(splits.train), size=(224, 224), policy="p", seed=0, views=50,
        teacher="t", network="vit_base_patch16_224", options="{}", input_size=224, mean=(0.5,) * 3, std=(0.5,) * 3,
        libraries=(), dtype="fp16", logits=(1000,), embedding=None, top_k=10,
    )  # fmt: skip
    before = time.perf_counter()
    sizes = {
        "GB of 50 views, 10 largest logits, fp16": cache_bytes(logits) / 1e9,
        "GB with the embedding of 768": cache_bytes(replace(logits, embedding=(768,))) / 1e9,
        "GB of all logits, fp16": cache_bytes(replace(logits, top_k=None)) / 1e9,
        "shards": layout_of(logits).shards,
    }
    return {**found, **sizes, "seconds of the sizes": time.perf_counter() - before}


def epoch(folder: Path, images: int) -> dict[str, float]:
    """Train a student with KD on a sample for an epoch, from decoded pixels in a file."""
    from dataclasses import replace

    from heterokd.config.experiment import Experiment
    from heterokd.datasets.imagenet import ImageNet
    from heterokd.datasets.io.loaders import Loaders, open_split
    from heterokd.datasets.io.shared_pixels import share_splits
    from heterokd.datasets.views.random import permutation
    from heterokd.training.data import recipe_loaders
    from heterokd.training.student import build_configured
    from heterokd.training.teacher import LiveTeacher
    from heterokd.training.train import train

    asked = Experiment.model_validate(
        {
            "name": "large",
            "data": {"dataset": "imagenet", "root": str(folder / "imagenet"), "image_size": 32},
            "teacher": {"network": "test_vit", "options": {"img_size": 32, "patch_size": 8}},
            "student": {"network": "test_resnet"},
            "training": {"epochs": 1, "batch_size": 256, "precision": "fp32", "channels_last": False},
            "search": {"space": {"methods": ["kd"]}},
        }
    )
    recipe = asked.recipe({"method": "kd"})
    before = time.perf_counter()
    whole = ImageNet().load(folder / "imagenet", 32, 0)
    opened = time.perf_counter() - before
    # 1 % of val as well, and none of test.
    val = whole.val.chosen(permutation(len(whole.val), 0, "sample")[: images // 50])
    sample = whole.with_train_images(images)
    before = time.perf_counter()
    splits = share_splits(folder / "pixels", replace(sample, val=val), 50e9)
    decoded = time.perf_counter() - before
    loaders = recipe_loaders(recipe, splits)
    teacher = LiveTeacher(build_configured(recipe.teacher, whole.num_classes, 32))
    before = time.perf_counter()
    loaders = Loaders(loaders.train, open_split(splits.val, whole.num_classes), whole.num_classes)
    done = train(recipe, teacher, loaders, lambda metrics: True)
    return {
        "seconds to open": opened,
        "seconds to decode": decoded,
        "seconds of the epoch": time.perf_counter() - before,
        "images": len(splits.train),
        "images per second": done.metrics["time/images_per_second"],
        "GiB": memory(),
    }


def memory() -> float:
    """Largest resident size of this process, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


PARTS = {"list": listing, "index": index, "epoch": epoch}


if __name__ == "__main__":
    main()
