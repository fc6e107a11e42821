"""Draw the figures of a finished study in this process, or in a task on a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from heterokd.config.experiment import Experiment
from heterokd.execution.node_task import Tasks
from heterokd.report.measure import draw_pictures
from heterokd.report.measure_parts import measure_networks
from heterokd.report.measured import MeasuredNetwork
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.workspace import DATABASES, HEAVY, OF_TUNE, Workspace
from heterokd.study.read_summary import read_summary
from heterokd.training.data import open_splits
from heterokd.training.train import Report

Weights = Mapping[str, Path | None]


def draw_study(
    folder: StudyFolder, experiment: Experiment, root: Workspace, weights: Weights, tasks: Tasks | None
) -> None:
    """Measure a study's winner on val and draw its figures, see `draw_pictures`.

    Costs of the networks are measured here in any case, as those of the students were before the search.

    Args:
        folder: folder of the study; with a store, the store has its files, too.
        experiment: experiment of the study.
        root: workspace.
        weights: weights of the prepared teachers, by network.
        tasks: see `heterokd.execution.node_task.tasks_on`.
    """
    if tasks is None:
        draw_pictures(folder, experiment, root, weights)
        return
    summary = read_summary(folder)
    if summary is None or summary.winner is None:
        return
    networks: dict[str, MeasuredNetwork] | None = None
    with suppress(Exception):  # the task then measures them, and says why it cannot
        recipe = folder.trial(summary.winner.number).recipe
        networks = measure_networks(recipe, experiment.search, open_splits(experiment.data).num_classes, root)
    where, files = root if root.url else root.on_node(), _resolved(weights)
    what = f"drawing the figures of {folder.name}"
    tasks.run(what, None, draw_here, experiment.model_dump_json(), where, files, networks)
    root.mirror(folder.pictures).fetch()
    root.mirror(folder.path).fetch_file(folder.measured_file.name)


def _resolved(weights: Weights) -> dict[str, Path | None]:
    return {network: None if file is None else file.resolve() for network, file in weights.items()}


def draw_here(
    report: Report, experiment: str, root: Workspace, weights: Weights, networks: Mapping[str, MeasuredNetwork] | None
) -> None:
    """Draw a study's figures on this node.

    Args:
        report: not called.
        experiment: as JSON.
        root: the driver's workspace.
        weights: weights of the prepared teachers, by network, on the driver's node.
        networks: costs of the networks, as the driver measured them.
    """
    here, asked = root.on_node(), Experiment.model_validate_json(experiment)
    folder = here.study(asked.name)
    here.mirror(folder.path).fetch(without=(*HEAVY, *DATABASES), skip=OF_TUNE)
    here.fetch_leaders(folder)
    summary = read_summary(folder)
    for leader in () if summary is None else summary.leaders:
        here.mirror(folder.trial(leader.number).path).fetch()  # also its checkpoint, which has the method's projectors
    files = {network: None if file is None else here.fetched(file, root) for network, file in weights.items()}
    draw_pictures(folder, asked, here, files, networks)
    here.mirror(folder.pictures).close()
    store = here.mirror(folder.path).store
    if store is not None:
        store.copy_from(folder.measured_file, folder.measured_file.name)
