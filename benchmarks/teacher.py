"""What the default fit makes of a pretrained network on a folder of images, and how long it takes.

    python benchmarks/teacher.py IMAGES NETWORK WEIGHTS [--size 224] [--set KEY=VALUE ...] [--root FOLDER]

The experiment is the smallest that `heterokd teacher` reads: a student of 64 pixels, and a teacher that starts from
WEIGHTS (a file in any format that `teacher.start_from` reads) and sees the views at `--size` pixels. A line is printed
for the solved classifier (epoch 0) and each epoch of fine-tuning: seconds, processor seconds, epoch, score on val. An
interrupted fit goes on with the same `--root`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
import yaml

from heterokd.config.reading import load_experiment
from heterokd.storage.workspace import Workspace
from heterokd.teachers.prepare import prepare_teacher
from heterokd.training.precision import device_name

STUDENT = "mobilenetv3_small_050"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("network")
    parser.add_argument("weights", type=Path)
    parser.add_argument("--size", type=int, default=224, help="pixels that the teacher sees")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="KEY=VALUE of the experiment")
    parser.add_argument("--root", type=Path, help="workspace; default: a temporary folder")
    arguments = parser.parse_args()
    content = {
        "name": "teacher",
        "data": {"dataset": "image_folder", "root": str(arguments.images.resolve()), "image_size": 64},
        "teacher": {
            "network": arguments.network,
            "start_from": str(arguments.weights.resolve()),
            "image_size": arguments.size,
        },
        "student": {"network": STUDENT},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "teacher.yaml"
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        experiment = load_experiment(file, arguments.overrides)
        root = Workspace(arguments.root or Path(folder) / "runs")
        began = time.perf_counter()

        def report(metrics: dict[str, float]) -> bool:
            seconds = f"{time.perf_counter() - began:7.0f} s  {time.process_time():7.0f} s of processor time"
            print(f"{seconds}  epoch {metrics['epoch']:.0f}  {metrics['val/top1']:.4f}", flush=True)
            return True

        print(f"{device_name('cpu')}, {torch.get_num_threads()} threads", flush=True)
        card = prepare_teacher(experiment, root, report).card
        seconds, processor = time.perf_counter() - began, time.process_time()
    print(f"{card.metric} {card.val_score:.4f} on val after {seconds:.0f} s, {processor:.0f} s of processor time")
    print(f"{card.reason}; {card.calibration()}")


if __name__ == "__main__":
    main()
