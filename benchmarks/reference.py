"""A search as Ray's documentation writes it: what `search.py` compares heterokd with.

    python benchmarks/reference.py EXPERIMENT SAMPLES TEACHER FOLDER [--epochs 40]

Ray Tune's `Tuner` with `OptunaSearch`; a driver function for each trial that builds a `TorchTrainer` of one worker;
data in memory behind torch's `DataLoader`; the teacher at every step; the stock `MLflowLoggerCallback`
(https://docs.ray.io/en/latest/train/user-guides/hyperparameter-optimization.html). Networks and losses are heterokd's,
so that both train the same thing. Trials come from a list, as Optuna's `points_to_evaluate`. FOLDER/times.json says
where the time went.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

# As in a search of heterokd: Ray stays on this machine and reports to nobody.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import torch
from optuna import Trial
from ray import train, tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.train.torch import TorchTrainer, prepare_data_loader, prepare_model
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search.optuna import OptunaSearch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.config.recipe import Recipe
from heterokd.datasets.io.split import Split
from heterokd.outputs import Batch
from heterokd.storage.sqlite_url import mlflow_sqlite_uri
from heterokd.training.data import open_splits
from heterokd.training.teacher import open_teacher
from heterokd.training.train import build_distiller

DRIVER_CPUS = 0.01
"""Of a trial's function, which only waits for its trainer; its worker gets the rest of the core."""

LAST_REPORT = 1.0
"""Seconds that a hastened trainer's last report may take to reach Tune. One that arrives together with the end of the
trial's function blocks the trial for ever (Ray 2.60); with Ray's own waits the trainer's end takes longer than this."""


class Views(Dataset[tuple[Tensor, int, int]]):
    """Images in memory, each transformed when it is read: the digits' policy in torchvision's words."""

    def __init__(self, split: Split, *, augment: bool) -> None:
        self.images = torch.from_numpy(split.images.read(torch.arange(len(split)).numpy())).permute(0, 3, 1, 2)
        self.labels = split.labels
        scale = v2.ToDtype(torch.float32, scale=True)
        moves = v2.RandomAffine(10.0, translate=(0.06, 0.06), scale=(0.9, 1.1), shear=3.0)
        self.transform = v2.Compose([moves, scale]) if augment else scale

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.transform(self.images[index]), int(self.labels[index]), index


def train_loop(settings: dict[str, Any]) -> None:
    """What the worker runs: one student from its first to its last epoch."""
    times: dict[str, float] = {"worker_began": time.time(), "steps": 0.0, "evaluation": 0.0, "reports": 0.0}
    recipe = Recipe.model_validate_json(settings["recipe"])
    training, splits = recipe.training, open_splits(recipe.data)
    torch.manual_seed(training.seed)
    teacher = open_teacher(recipe.teacher, splits.num_classes, recipe.data.image_size, Path(settings["teacher"]))
    loader = DataLoader(Views(splits.train, augment=True), training.batch_size, shuffle=True, drop_last=True)
    loader = prepare_data_loader(loader)
    val_loader = prepare_data_loader(DataLoader(Views(splits.val, augment=False), 256))
    distiller = prepare_model(build_distiller(recipe, teacher, splits.num_classes))
    optimizer = torch.optim.SGD(
        distiller.parameters(), training.learning_rate, training.momentum, weight_decay=training.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.epochs)
    times["loop_began"] = time.time()
    for epoch in range(training.epochs):
        started = time.perf_counter()
        distiller.train()
        total = 0.0
        for images, labels, index in loader:
            batch = Batch(images=images, labels=labels, index=index)
            given = teacher.outputs(batch, distiller.teacher_needs)
            loss, _ = distiller(batch, given, epoch / training.epochs)
            optimizer.zero_grad()
            loss.backward()
            if training.clip_grad is not None:
                torch.nn.utils.clip_grad_norm_(distiller.parameters(), training.clip_grad)
            optimizer.step()
            total += loss.item()
        scheduler.step()
        trained = time.perf_counter()
        metrics = {"epoch": epoch + 1, "train/loss": total / len(loader), **evaluate(distiller, val_loader)}
        evaluated = time.perf_counter()
        train.report(metrics)
        times["steps"] += trained - started
        times["evaluation"] += evaluated - trained
        times["reports"] += time.perf_counter() - evaluated
    times |= {"worker_ended": time.time(), "val/top1": metrics["val/top1"]}
    Path(settings["times"]).write_text(json.dumps(times))


def evaluate(distiller: Any, loader: DataLoader[Any]) -> dict[str, float]:
    """The student on the validation images."""
    distiller.eval()
    right, loss, images_seen = 0, 0.0, 0
    with torch.no_grad():
        for images, labels, _ in loader:
            logits = distiller.student(images).logits
            right += int((logits.argmax(1) == labels).sum())
            loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            images_seen += len(labels)
    return {"val/top1": right / images_seen, "val/loss": loss / images_seen}


def run_trial(config: dict[str, Any], experiment: Experiment, teacher: str, folder: Path) -> None:
    """A trial's driver function: a trainer of one worker, whose reports go to Tune."""
    began, number = time.time(), tune.get_context().get_trial_id()
    worker_times = folder / f"{number}.json"
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "recipe": experiment.recipe(config).model_dump_json(),
            "teacher": teacher,
            "times": str(worker_times),
        },
        scaling_config=train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1 - DRIVER_CPUS}),
        run_config=train.RunConfig(name=number, storage_path=str(folder / "train"), callbacks=[TuneReportCallback()]),
    )
    trainer.fit()
    if "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S" in os.environ:
        time.sleep(LAST_REPORT)
    times = {"began": began, **json.loads(worker_times.read_text()), "ended": time.time()}
    worker_times.write_text(json.dumps(times))


SPACE: dict[str, Experiment] = {}


def space(trial: Trial) -> None:
    """The experiment's domains, define-by-run; a function of the module because Tune pickles it."""
    from heterokd.domains import Choice

    experiment = SPACE["experiment"]
    method = trial.suggest_categorical("method", list(experiment.methods))
    for key, domain in (experiment.method_domains(method) | experiment.shared_domains()).items():
        if isinstance(domain, Choice):
            trial.suggest_categorical(key, list(domain.options))
        elif isinstance(domain.low, int) and isinstance(domain.high, int):
            trial.suggest_int(key, domain.low, domain.high, log=domain.log)
        else:
            trial.suggest_float(key, domain.low, domain.high, log=domain.log)


class TimedMLflow(MLflowLoggerCallback):
    """The stock callback with a clock: it works in Tune's own loop, so all trials wait for it."""

    seconds = 0.0

    def log_trial_start(self, trial: Any) -> None:
        """See `MLflowLoggerCallback`."""
        started = time.perf_counter()
        super().log_trial_start(trial)
        self.seconds += time.perf_counter() - started

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        """See `MLflowLoggerCallback`."""
        started = time.perf_counter()
        super().log_trial_result(iteration, trial, result)
        self.seconds += time.perf_counter() - started

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        """See `MLflowLoggerCallback`."""
        started = time.perf_counter()
        super().log_trial_end(trial, failed)
        self.seconds += time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("samples", type=Path, help="JSON: the samples to run, in order")
    parser.add_argument("teacher", type=Path, help="its weights")
    parser.add_argument("folder", type=Path, help="an empty folder for everything that is written")
    parser.add_argument("--epochs", type=int, help="of each trial; the experiment's own when left out")
    arguments = parser.parse_args()
    began = time.time()
    overrides = [f"training.epochs={arguments.epochs}"] if arguments.epochs else []
    experiment = SPACE["experiment"] = load_experiment(arguments.experiment, overrides)
    samples, folder = json.loads(arguments.samples.read_text()), arguments.folder.resolve()
    # Where those who clean up after a trainer ask whether it still runs: Ray's dashboard answers.
    ray.init(address="local", include_dashboard=True, logging_level="ERROR", log_to_driver=False)
    mlflow = TimedMLflow(tracking_uri=mlflow_sqlite_uri(folder / "mlflow.db"), experiment_name="reference")
    driver = tune.with_parameters(
        run_trial, experiment=experiment, teacher=str(arguments.teacher.resolve()), folder=folder
    )
    tuner = tune.Tuner(
        tune.with_resources(driver, {"cpu": DRIVER_CPUS}),
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(space=space, metric="val/top1", mode="max", points_to_evaluate=samples),
            num_samples=len(samples),
            max_concurrent_trials=os.cpu_count(),
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0, callbacks=[mlflow]),
    )
    ready = time.time()
    results = tuner.fit()
    ended = time.time()
    trials = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json")) if file.name != "times.json"]
    figures = {"began": began, "ready": ready, "ended": ended, "mlflow": mlflow.seconds, "trials": trials}
    (folder / "times.json").write_text(json.dumps({**figures, "errors": results.num_errors}))
    ray.shutdown()


if __name__ == "__main__":
    main()
