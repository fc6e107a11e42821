"""distill_once(): one training, kept and logged like a trial of a study."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from heterokd.config.experiment import Experiment
from heterokd.config.reading import dump_experiment
from heterokd.config.recipe import Recipe
from heterokd.config.settings import Sample
from heterokd.execution.check import check_experiment, check_files
from heterokd.execution.run import RunContext, run_recipe
from heterokd.storage.files import write_text
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.study.published import published_samples
from heterokd.teachers.prepare import PreparedTeacher, prepare_teacher
from heterokd.tracking.labels import dataset_inputs
from heterokd.tracking.runs import StudyRuns
from heterokd.tracking.store import open_store
from heterokd.tracking.tracker import Tracker, with_others
from heterokd.training.data import open_splits
from heterokd.training.precision import default_device
from heterokd.training.train import Metrics, Report, TrainResult

RESTARTS = 2
"""Of workers that share the training, after one has died; as often as a search has patience with a trial."""


def distill_once(
    experiment: Experiment,
    method: str,
    root: Workspace,
    on_epoch: Callable[[Metrics], bool],
    teacher_progress: Report | None = None,
) -> tuple[TrialFolder, bool]:
    """Train the published setting of a method; under `studies/<name>-distill`, which every such training shares.

    Args:
        experiment: data, teacher, student and training, of lists the first; its search space names the method alone.
        method: what to train.
        root: where state lives.
        on_epoch: told each epoch's metrics.
        teacher_progress: told each epoch of the teacher's fit.

    Returns:
        The trial's folder, and whether it was trained now (the same recipe is not trained twice).

    Raises:
        UserError: the input is wrong; nothing has been trained then.
    """
    experiment = experiment.for_teacher(experiment.teacher.networks[0])
    named = experiment.model_copy(update={"name": f"{experiment.name}-distill"})
    check_experiment(named)
    check_files(named)
    sample = published_samples(named, method)[0]
    recipe = named.recipe(sample)
    folder = root.fetch_study(named.name)
    uri = open_store(root, experiment.tracking.uri)
    runs = StudyRuns(named, folder, uri, root.artifacts, dataset_inputs(named.data, open_splits(named.data)))
    tracker = with_others(runs, named, folder)
    trial = trained_before(folder, recipe)
    if trial is not None and trial.status == TrialStatus.COMPLETE:
        tracker.sync(trial)
        return trial, False
    prepared = prepare_teacher(experiment, root, progress=teacher_progress)
    write_text(folder.experiment_file, dump_experiment(named))
    trial, is_new = train_once(recipe, sample, folder, root, tracker, prepared, on_epoch)
    tracker.finish({"winner": {"number": trial.number}})
    root.mirror(folder.path).close(skip=("trials",))
    return trial, is_new


def trained_before(folder: StudyFolder, recipe: Recipe) -> TrialFolder | None:
    """The trial of a recipe in a study's folder, begun or complete; None when there is none."""
    return next((trial for trial in folder.trials() if trial.recipe.hash == recipe.hash), None)


def train_once(
    recipe: Recipe,
    sample: Sample,
    folder: StudyFolder,
    root: Workspace,
    tracker: Tracker,
    prepared: PreparedTeacher,
    on_epoch: Callable[[Metrics], bool],
) -> tuple[TrialFolder, bool]:
    """Train a recipe in a study's folder, going on from a checkpoint that is there; a complete one is left alone.

    Args:
        recipe: what to train.
        sample: the values it was made of.
        folder: of the study.
        root: where state lives.
        tracker: shows the study, in MLflow and elsewhere.
        prepared: the teacher.
        on_epoch: told each epoch's metrics.

    Returns:
        The trial's folder, and whether it was trained now.
    """
    trial = trained_before(folder, recipe)
    if trial is not None and trial.status == TrialStatus.COMPLETE:
        tracker.sync(trial)
        return trial, False
    trial = trial or folder.trial(1 + max((one.number for one in folder.trials()), default=-1))
    mirror = root.mirror(trial.path)
    mirror.fetch()
    mirror.follow()
    snapshot = TrialSnapshot(origin="published", sample=dict(sample))
    trial.start(recipe, snapshot)

    def report(metrics: Metrics) -> bool:
        tracker.sync(trial)
        return on_epoch(metrics)

    device = default_device()
    context = RunContext(root, prepared.weights, device)
    run = _run_on_workers if recipe.training.is_shared else run_recipe
    trained = run(recipe, trial, context, report)
    trial.save(replace(snapshot, status=TrialStatus.COMPLETE, metrics=trained.metrics))
    mirror.close()
    tracker.sync(trial)
    return trial, True


def _run_on_workers(recipe: Recipe, trial: TrialFolder, context: RunContext, on_epoch: Report) -> TrainResult:
    """Train on the workers of a local Ray, or of the Ray that this process is connected to."""
    from heterokd.execution.placement import plan_workers  # Ray, which one process does without
    from heterokd.execution.ray_connection import connected
    from heterokd.execution.workers import OnWorkers

    with connected(None, shared=True):
        return OnWorkers(plan_workers(recipe.training), RESTARTS)(recipe, trial, context, on_epoch)
