"""Processor time of the quickstart's trainings, evaluated after every epoch and after those that decisions need.

    python benchmarks/evaluated.py --root runs [--rounds 3] [--methods kd scratch ofa]

Both in one process, in turn, so that other work on the machine disturbs them alike; the least of each is compared.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from heterokd.config.reading import load_experiment
from heterokd.execution.run import RunContext, run_recipe
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.pruner import evaluated_epochs
from heterokd.teachers.prepare import prepare_teacher

EXPERIMENT = Path(__file__).resolve().parents[1] / "experiments" / "quickstart.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("runs"), help="workspace; its teacher is fitted if missing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["kd", "scratch", "ofa"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    experiment, root = load_experiment(EXPERIMENT), Workspace(arguments.root)
    weights = prepare_teacher(experiment, root).weights
    asked = {"every": None, "auto": evaluated_epochs(experiment, experiment.training.epochs)}
    for method in arguments.methods:
        recipe = experiment.recipe({"method": method}, seed=1)
        seconds: dict[str, list[float]] = {name: [] for name in asked}
        values: dict[str, float] = {}
        for _ in range(arguments.rounds):
            for name, epochs in asked.items():
                began = time.process_time()
                with tempfile.TemporaryDirectory() as folder:
                    context = RunContext(root, weights, evaluated_epochs=epochs)
                    trained = run_recipe(recipe, TrialFolder(Path(folder) / "0"), context, lambda metrics: True)
                seconds[name].append(time.process_time() - began)
                values[name] = trained.metrics["val/top1"]
        assert values["every"] == values["auto"], "another result"
        every, auto = min(seconds["every"]), min(seconds["auto"])
        print(f"{method}: {auto:.1f} of {every:.1f} processor seconds, {auto / every:.2f}")


if __name__ == "__main__":
    main()
