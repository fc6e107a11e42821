"""A search from a program: `python examples/quickstart.py [ROOT]`, from the repository's folder.

It asks the quickstart's question with a small budget, and shows the student that it found to one image.
"""

import sys
from pathlib import Path

import torch

from heterokd import load_experiment, load_student, search

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "quickstart.yaml"
SMALL = ["name=example", "search.trials=4", "search.space.methods=[scratch, kd]", "training.epochs=4"]
SMALL += ["search.confirm_leaders=1", "search.confirm_seeds=1", "teacher.training.epochs=10", "teacher.min_score=0"]


def main(root: str = "runs") -> None:
    """Search, then use what was found."""
    found = search(load_experiment(EXPERIMENT, SMALL), root, resume=True)
    print(f"the best student: trial {found.best_trial.number}, page {found.report}")
    student = load_student("studies/example", root)
    logits = student(torch.rand(1, 3, 32, 32))  # images in [0, 1]
    print(f"its guess: {int(logits.argmax())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
