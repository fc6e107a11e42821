"""What distillation adds in segmentation on a stranger's set, from Transformer to CNN and from CNN to Transformer.

    python benchmarks/icon_scenes.py ICONS SET --side 64 --train 800 --val 100 --test 200
    python benchmarks/icon_distillation.py SET --root RUNS [--seeds 5] [--seconds 280]

Scratch, pixel KD, CWD and HeteroAKD at their published settings; the teacher learns from all training scenes, students
from 160. Trainings are kept in RUNS/icon_distillation.json and not repeated: the command ends after --seconds, and goes
on when it is run again. Mean IoU is of the test split; differences to scratch are paired by seed, p-values are
Holm-corrected. The 15 classes of icons are merged to face, flag and other.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from segmentation import table, test_miou

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.storage.workspace import Workspace
from heterokd.teachers.prepare import prepare_teacher

METHODS = ("scratch", "pixel_kd", "cwd", "heteroakd")
FIRST_SEED = 9001
KEPT = ("background", "face", "flag")
TRANSFORMER = ("segformer-pvt_v2_b0", {"depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 5]})
PAIRS = {
    "Transformer to CNN": (
        (TRANSFORMER[0], {**TRANSFORMER[1], "embed_dims": [32, 64, 128, 160], "decoder_segmentation_channels": 64}),
        ("deeplabv3plus-test_resnet", {"decoder_channels": 32}),
    ),
    "CNN to Transformer": (
        ("deeplabv3plus-resnet10t", {"decoder_channels": 64}),
        (TRANSFORMER[0], {**TRANSFORMER[1], "embed_dims": [16, 32, 64, 80], "decoder_segmentation_channels": 32}),
    ),
}
"""Name and options of teacher and student."""


def experiment(name: str, images: Path, root: Path, epochs: int) -> Experiment:
    """Write and read the experiment of a pair."""
    (teacher, of_teacher), (student, of_student) = PAIRS[name]
    classes = (images / "classes.txt").read_text().split()
    masks = {"classes": classes, "merge": {"other": [each for each in classes if each not in KEPT]}}
    shared = {"batch_size": 8, "optimizer": "adamw", "weight_decay": 0.01, "clip_grad": 5.0, "schedule": "poly"}
    fitted = {"epochs": 14, "learning_rate": 0.003, "warmup_epochs": 1, "label_smoothing": 0.0}
    content = {
        "name": name.lower().replace(" ", "-"),
        "data": {"dataset": "mask_folder", "root": str(images), "image_size": 64, "train_images": 160, "masks": masks},
        "teacher": {"network": teacher, "options": of_teacher, "training": {**shared, **fitted}},
        "student": {"network": student, "options": of_student},
        "training": {**shared, "epochs": epochs, "learning_rate": 0.003, "warmup_epochs": 1},
        "search": {"space": {"methods": list(METHODS)}},
    }
    file = root / f"{content['name']}.yaml"
    file.write_text(yaml.safe_dump(content))
    return load_experiment(file)


def main() -> None:
    """Train what is missing, and print the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=280.0)
    parser.add_argument("--epochs", type=int, default=20, help="of students; other numbers need another --root")
    parser.add_argument("--pair", choices=tuple(PAIRS), action="append", help="default: both")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.root.mkdir(parents=True, exist_ok=True)
    file = asked.root / "icon_distillation.json"
    known: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    started = time.monotonic()
    root = Workspace(asked.root.resolve())
    pairs = asked.pair or tuple(PAIRS)
    experiments = {name: experiment(name, asked.images, asked.root, asked.epochs) for name in pairs}
    for seed in range(FIRST_SEED, FIRST_SEED + asked.seeds):
        for name, of_pair in experiments.items():
            for method in METHODS:
                recipe = of_pair.recipe(of_pair.published(method), seed=seed)
                values = known.setdefault(f"{name}: {method}", {})
                if str(seed) in values or time.monotonic() - started > asked.seconds:
                    continue
                teacher = prepare_teacher(of_pair, root)
                known.setdefault(name, {})["teacher on val"] = teacher.card.val_score
                values[str(seed)] = test_miou(recipe, root, teacher.weights)
                file.write_text(json.dumps(known, indent=1))
                print(f"{name}: {method}, seed {seed}: {values[str(seed)]:.4f}", flush=True)
    for name in pairs:
        show(name, known)


def show(name: str, known: dict[str, dict[str, float]]) -> None:
    """Print the rows of a pair, of the seeds that all methods have."""
    seeds = sorted(set.intersection(*(set(known[f"{name}: {method}"]) for method in METHODS)))
    print(f"{name}: teacher {known.get(name, {}).get('teacher on val', 0.0):.4f} on val, {len(seeds)} seeds")
    if len(seeds) < 2:
        return
    measured = {
        "scratch, searched" if method == "scratch" else method: [known[f"{name}: {method}"][seed] for seed in seeds]
        for method in METHODS
    }
    rows: list[dict[str, Any]] = table(measured)
    for row in rows:
        print(
            f"| {row['setting'].removesuffix(', searched')} | {row['mean']:.4f} +- {row['standard_error']:.4f} | "
            f"{row['gain']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f}) | {row['p_holm']:.3f} | {row['verdict']} |"
        )


if __name__ == "__main__":
    main()
