"""A search in Python: `python examples/quickstart.py [ROOT]`, from the folder of the repository.

It runs the quickstart with a small budget, and applies the best student to an image.
"""

import sys
from pathlib import Path

import torch

from heterokd import load_experiment, load_student, search

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "quickstart.yaml"
SMALL = ["name=example", "search.trials=4", "search.space.methods=[scratch, kd]", "training.epochs=4"]
SMALL += ["search.confirm_leaders=1", "search.confirm_seeds=1", "teacher.training.epochs=10", "teacher.min_score=0"]


def main(root: str = "runs") -> None:
    """Search, then use the best student."""
    found = search(load_experiment(EXPERIMENT, SMALL), root, resume=True)
    print(f"the best student: trial {found.best_trial.number}, page {found.report}")
    student = load_student("studies/example", root)
    logits = student(torch.rand(1, 3, 32, 32))  # images in [0, 1]
    print(f"predicted class: {int(logits.argmax())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
