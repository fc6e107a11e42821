"""Train single recipes, kept and logged like the trials of a study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from heterokd.config.experiment import Experiment
from heterokd.config.reading import dump_experiment
from heterokd.config.recipe import Recipe
from heterokd.config.settings import Sample
from heterokd.execution.check import check_experiment, check_files
from heterokd.execution.prepare import prepare_teacher
from heterokd.execution.ray_temp_dir import ray_temp_dir
from heterokd.execution.run import RunContext, run_recipe
from heterokd.storage.files import write_text
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.students.given_weights import with_given_weights
from heterokd.study.published import published_samples
from heterokd.teachers.prepare import PreparedTeacher
from heterokd.tracking.runs import open_runs
from heterokd.tracking.tracker import Tracker, with_others
from heterokd.training.precision import default_device
from heterokd.training.train import Metrics, Report, TrainResult


@dataclass(frozen=True)
class DistillResult:
    """Result of one training.

    Attributes:
        trial: its folder: recipe.yaml, metrics.jsonl, student.safetensors.
        metrics: metrics of the last epoch, on val.
        trained: whether it was trained now; the same recipe is not trained twice.
    """

    trial: TrialFolder
    metrics: Mapping[str, float]
    trained: bool


RESTARTS = 2
"""Restarts of all workers after one has died, as in a search."""


def distill_once(
    experiment: Experiment,
    method: str,
    root: Workspace,
    on_epoch: Report,
    teacher_progress: Report | None = None,
) -> DistillResult:
    """Train the published setting of a method, as a trial of the study `<name>-distill`.

    Args:
        experiment: data, teacher, student and training; of lists of networks the first is used.
        method: method to train with.
        root: where state lives.
        on_epoch: called with each epoch's metrics; False stops the training.
        teacher_progress: called with the metrics of each epoch of the teacher's fit.

    Raises:
        UserError: the input is wrong; nothing has been trained then.
    """
    experiment = with_given_weights(experiment.for_teacher(experiment.teacher.networks[0]), root)
    named = experiment.model_copy(update={"name": f"{experiment.name}-distill"})
    check_experiment(named)
    check_files(named, root)
    if named.training.is_shared:
        ray_temp_dir()  # raises before work if a local Ray cannot start
    sample = published_samples(named, method)[0]
    recipe = named.recipe(sample)
    folder = root.fetch_study(named.name)
    runs = open_runs(named, folder, root)
    tracker = with_others(runs, named, folder)
    trial = trained_before(folder, recipe)
    if trial is not None and trial.status == TrialStatus.COMPLETE:
        tracker.sync(trial)
        return DistillResult(trial, trial.snapshot.metrics, trained=False)
    prepared = prepare_teacher(experiment, root, progress=teacher_progress)
    write_text(folder.experiment_file, dump_experiment(named))
    result = StudyTrainer(root, folder, tracker, prepared).train(recipe, sample, on_epoch)
    runs.link(result.trial)
    tracker.finish(None)
    root.mirror(folder.path).close(skip=("trials",))
    return result


def trained_before(folder: StudyFolder, recipe: Recipe) -> TrialFolder | None:
    """Return the trial of a recipe in a study's folder, begun or complete, or None."""
    return next((trial for trial in folder.trials() if trial.recipe.hash == recipe.hash), None)


@dataclass(frozen=True)
class StudyTrainer:
    """Trains single recipes in a study's folder.

    Attributes:
        workspace: where state lives.
        folder: the study's folder.
        tracker: MLflow and other trackers.
        teacher: the prepared teacher.
    """

    workspace: Workspace
    folder: StudyFolder
    tracker: Tracker
    teacher: PreparedTeacher

    def train(self, recipe: Recipe, sample: Sample, on_epoch: Report) -> DistillResult:
        """Train a recipe, from its checkpoint if it has any; a complete training is not repeated.

        Args:
            recipe: training to run.
            sample: sample that the recipe was made from.
            on_epoch: called with each epoch's metrics; False stops the training.
        """
        trial = trained_before(self.folder, recipe)
        if trial is not None and trial.status == TrialStatus.COMPLETE:
            self.tracker.sync(trial)
            return DistillResult(trial, trial.snapshot.metrics, trained=False)
        trial = trial or self.folder.trial(1 + max((known.number for known in self.folder.trials()), default=-1))
        mirror = self.workspace.mirror(trial.path)
        mirror.fetch()
        mirror.follow()
        snapshot = TrialSnapshot(origin="published", sample=dict(sample))
        trial.start(recipe, snapshot)

        def report(metrics: Metrics) -> bool:
            self.tracker.sync(trial)
            return on_epoch(metrics)

        context = RunContext(self.workspace, self.teacher.weights, default_device())
        run = _run_on_workers if recipe.training.is_shared else run_recipe
        trained = run(recipe, trial, context, report)
        trial.save(replace(snapshot, status=TrialStatus.COMPLETE, metrics=trained.metrics))
        mirror.close()
        self.tracker.sync(trial)
        return DistillResult(trial, trained.metrics, trained=True)


def _run_on_workers(recipe: Recipe, trial: TrialFolder, context: RunContext, on_epoch: Report) -> TrainResult:
    """Train on the workers of a local Ray, or of the Ray that this process is connected to."""
    # These import Ray, which a training in this process does not need.
    from heterokd.execution.placement import plan_workers
    from heterokd.execution.ray_connection import connected
    from heterokd.execution.workers import OnWorkers

    with connected(None, shared=True):
        return OnWorkers(plan_workers(recipe.training), RESTARTS)(recipe, trial, context, on_epoch)
