"""Searches on real images at the same compute: scratch, KD, random with ASHA, Optuna's TPE with its pruner, heterokd.

    python benchmarks/real.py --set data.root=FOLDER teacher.start_from=WEIGHTS [--root runs] [--trainings 10]
                              [--seeds 5] [--first 0] [--arms scratch kd asha tpe heterokd] [--out results.json]

The experiment is benchmarks/real.yaml. Each search has the compute of so many full trainings, one at a time, and the
space of the experiment; all seeds of a repetition are its number. Each gives one student, which is evaluated on test,
once. `asha` is what AutoGluon and Ray Tune do by default: random samples, stopped by asynchronous successive halving;
`tpe` is Optuna with its default sampler and pruner. `heterokd` is the Study of a search, with published settings and
repetitions on fresh seeds out of the same compute. Results are kept in --root: an interrupted run goes on with the
next search.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
import torch

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.config.recipe import Recipe
from heterokd.domains import Choice, Domain, Int, Scalar
from heterokd.execution.run import RunContext, run_recipe
from heterokd.networks.network import AnyNetwork
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.options import StudyOptions
from heterokd.study.seed_noise import noise_prior
from heterokd.study.storage import StudyFacts
from heterokd.study.study import Study
from heterokd.teachers.prepare import prepare_teacher
from heterokd.training.data import open_splits, recipe_loaders
from heterokd.training.evaluation import evaluate
from heterokd.training.task_modules import ClassificationTask

EXPERIMENT = Path(__file__).with_name("real.yaml")
FACTOR, FIRST_RUNG = 3, 3
"""Of ASHA: 1 of 3 trainings passes a rung; the first rung is after 3 epochs."""


@dataclass
class Trainings:
    """Trainings of a search, and the students of those that ended.

    Attributes:
        experiment: experiment of the search.
        context: where they run.
        folder: temporary files of a training.
        spent: epochs of all trainings, in full trainings.
        begun: number of trainings.
        students: score on val and network of each complete training, by number.
    """

    experiment: Experiment
    context: RunContext
    folder: Path
    spent: float = 0.0
    begun: int = 0
    students: dict[int, tuple[float, AnyNetwork]] = field(default_factory=dict)

    def run(
        self, number: int, recipe: Recipe, goes_on: Callable[[int, list[dict[str, float]]], bool]
    ) -> dict[str, float]:
        """Train a recipe; `goes_on` is asked after each epoch but the last, with the metrics of all epochs so far.

        Returns the metrics of the last epoch; a training that diverges is as bad as one that is stopped at once.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        curve: list[dict[str, float]] = []

        def on_epoch(metrics: Mapping[str, float]) -> bool:
            curve.append(dict(metrics))
            return len(curve) == recipe.training.epochs or goes_on(len(curve), curve)

        result = run_recipe(recipe, TrialFolder(self.folder), self.context, on_epoch)
        self.begun += 1
        self.spent += len(curve) / recipe.training.epochs
        if len(curve) == recipe.training.epochs:
            self.students[number] = curve[-1][self.experiment.metric], result.student
        return curve[-1]

    def best(self) -> int:
        """Return the number of the complete training with the best value on val."""
        return max(self.students, key=lambda number: self.students[number][0])


def single(trainings: Trainings, budget: float, seed: int, method: str) -> int:
    """Train one method with its published settings."""
    trainings.run(0, trainings.experiment.recipe(trainings.experiment.published(method, {})), lambda epoch, curve: True)
    return 0


def by_optuna(trainings: Trainings, budget: float, seed: int, is_random: bool) -> int:
    """Search with Optuna by ask and tell."""
    experiment = trainings.experiment
    sampler = optuna.samplers.RandomSampler(seed) if is_random else optuna.samplers.TPESampler(seed=seed)
    pruner = (
        optuna.pruners.SuccessiveHalvingPruner(min_resource=FIRST_RUNG, reduction_factor=FACTOR)
        if is_random
        else optuna.pruners.MedianPruner()
    )
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    while trainings.spent + 1 <= budget + 1e-9:
        trial = study.ask()
        sample = suggest(trial, experiment)

        def goes_on(epoch: int, curve: list[dict[str, float]], trial: optuna.Trial = trial) -> bool:
            trial.report(curve[-1][experiment.metric], epoch)
            return not trial.should_prune()

        metrics = trainings.run(trial.number, experiment.recipe(sample), goes_on)
        if trial.number in trainings.students:
            study.tell(trial, metrics[experiment.metric])
        else:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    return trainings.best()


def suggest(trial: optuna.Trial, experiment: Experiment) -> dict[str, Scalar]:
    """Ask for a method, and for what it and all methods have."""
    method = trial.suggest_categorical("method", experiment.methods)
    return {"method": method} | {key: _value(trial, key, domain) for key, domain in experiment.domains(method).items()}


def _value(trial: optuna.Trial, key: str, domain: Domain) -> Scalar:
    if isinstance(domain, Choice):
        value: Scalar = trial.suggest_categorical(key, domain.options)
        return value
    if isinstance(domain, Int):
        return trial.suggest_int(key, domain.low, domain.high, log=domain.log)
    return trial.suggest_float(key, domain.low, domain.high, log=domain.log)


def by_heterokd(trainings: Trainings, budget: float, seed: int) -> int:
    """Search with the Study, which is kept in memory."""
    experiment = trainings.experiment
    facts = StudyFacts(prior=noise_prior(len(open_splits(experiment.data).val), []))
    study = Study.open(experiment, StudyFolder(trainings.folder.parent), StudyOptions(facts, storage="memory"))
    while (assignment := study.next()) not in (None, "wait"):
        number, rungs = assignment.number, assignment.rungs
        metrics = trainings.run(
            number,
            assignment.recipe,
            lambda epoch, curve, number=number, rungs=rungs: (
                epoch not in rungs or study.report(number, epoch, curve[-1], curve)
            ),
        )
        study.finish(number, "complete" if number in trainings.students else "pruned", metrics)
    return study.leaders()[0].number


ARMS: dict[str, Callable[[Trainings, float, int], int]] = {
    "scratch": lambda trainings, budget, seed: single(trainings, budget, seed, "scratch"),
    "kd": lambda trainings, budget, seed: single(trainings, budget, seed, "kd"),
    "asha": lambda trainings, budget, seed: by_optuna(trainings, budget, seed, is_random=True),
    "tpe": lambda trainings, budget, seed: by_optuna(trainings, budget, seed, is_random=False),
    "heterokd": by_heterokd,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the experiment")
    parser.add_argument("--root", type=Path, default=Path("runs"))
    parser.add_argument("--trainings", type=float, default=10, help="compute of each search, in full trainings")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kept = given.root / "real.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for seed in range(given.first, given.first + given.seeds):
        for arm in given.arms:
            if not any((row["arm"], row["seed"], row["trainings"]) == (arm, seed, given.trainings) for row in rows):
                rows.append(searched(arm, seed, given))
                with kept.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(json.dumps(rows[-1]), flush=True)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1))
    print("\n".join(table([row for row in rows if row["trainings"] == given.trainings])))


def searched(arm: str, seed: int, given: argparse.Namespace) -> dict[str, object]:
    """Search once, and evaluate the student that comes of it on test."""
    overrides = ["training.precision=fp32", "training.channels_last=false", f"training.seed={seed}"]
    overrides += [f"search.seed={seed}", f"search.budget.trainings={given.trainings}", *given.set]
    experiment, root = load_experiment(EXPERIMENT, overrides), Workspace(given.root)
    context = RunContext(root, prepare_teacher(experiment, root).weights, cache_use="built")
    trainings = Trainings(experiment, context, given.root / "training")
    began = time.process_time()
    chosen = ARMS[arm](trainings, given.trainings, seed)
    seconds = time.process_time() - began
    val, network = trainings.students[chosen]
    splits = open_splits(experiment.data)
    recipe = experiment.recipe({"method": "scratch"})
    loader = recipe_loaders(recipe, replace(splits, val=splits.test)).val
    test = dict(evaluate(network, loader, ClassificationTask(splits.num_classes)))["top1"]
    return {
        **{"arm": arm, "seed": seed, "trainings": given.trainings, "test": test, "val": val, "chosen": chosen},
        **{"spent": trainings.spent, "begun": trainings.begun, "seconds": seconds},
    }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table: means on test, and gains over scratch of the same seeds with standard errors."""
    scratch = {row["seed"]: row["test"] for row in rows if row["arm"] == "scratch"}
    yield "| | seeds | test, mean | over scratch, standard error | val | trainings begun | processor time, s |"
    yield "|---|---|---|---|---|---|---|"
    for arm in ARMS:
        found = [row for row in rows if row["arm"] == arm]
        if found:
            gains = [row["test"] - scratch[row["seed"]] for row in found if row["seed"] in scratch]
            error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
            gain = f"{statistics.fmean(gains):+.4f}, {error:.4f}" if gains and arm != "scratch" else ""
            test, val, begun, seconds = (
                statistics.fmean(float(row[key]) for row in found) for key in ("test", "val", "begun", "seconds")
            )
            yield f"| {arm} | {len(found)} | {test:.4f} | {gain} | {val:.4f} | {begun:.1f} | {seconds:.0f} |"


if __name__ == "__main__":
    main()
