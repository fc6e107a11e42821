"""Promote on a cluster: evaluations on the test split run in tasks with a trial's resources."""

from __future__ import annotations

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_study_experiment
from heterokd.execution.node_task import Tasks, tasks_on
from heterokd.execution.ray_connection import check_address
from heterokd.storage.workspace import Workspace
from heterokd.students.promotion.decision import Decision
from heterokd.students.promotion.evaluation import (
    Evaluate,
    EvaluatedStudent,
    PackedStudent,
    evaluate_here,
    evaluate_packed,
)
from heterokd.students.promotion.promote import promote
from heterokd.training.paired_tests import ImageResults
from heterokd.training.precision import default_device
from heterokd.training.train import Report


# One parameter for each option of the command line.
def promote_on(
    address: str,
    root: Workspace,
    study: str,
    *,
    dry_run: bool = False,
    alias: str = "champion",
    trial: int | None = None,
    unfinished: bool = False,
) -> Decision:
    """Promote as `heterokd.students.promotion.promote.promote` does, by the same gates.

    The nodes need the data set, and neither MLflow nor the workspace's students: the driver sends these.

    Args:
        address: address of a Ray cluster.
        root: workspace.
        study: name of a study with a winner.
        dry_run: see `promote`, as for the others.
        alias: alias for the version.
        trial: trial to promote instead of the winner.
        unfinished: also judge a study that is not finished.

    Raises:
        UserError: see `promote`; or no cluster answers.
        SearchError: processes of the evaluation died too often, or no node can evaluate.
    """
    check_address(address)
    experiment = load_study_experiment(root.existing_study(study).experiment_file)
    with tasks_on(experiment, root, address) as tasks:
        evaluate = evaluate_here if tasks is None else _in_tasks(tasks)
        return promote(root, study, dry_run=dry_run, alias=alias, trial=trial, unfinished=unfinished, evaluate=evaluate)


def _in_tasks(tasks: Tasks) -> Evaluate:
    def evaluate(student: EvaluatedStudent, experiment: Experiment) -> ImageResults:
        what = f"evaluating {student.uri or f'trial {student.trial.number if student.trial else 0}'} on test"
        return tasks.run(what, None, evaluate_on_node, student.packed(), experiment.model_dump_json())

    return evaluate


def evaluate_on_node(report: Report, student: PackedStudent, experiment: str) -> ImageResults:
    """Evaluate a student on this node, see `evaluate_packed`; `report` is not called."""
    return evaluate_packed(student, Experiment.model_validate_json(experiment), default_device())
