"""Prepare teachers and verify caches: in this process, on the workers of a sharded fit, or in tasks on a cluster."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import heterokd.teachers.prepare as teachers
from heterokd.config.experiment import Experiment
from heterokd.config.given_files import GivenFile, with_files
from heterokd.storage.workspace import Workspace
from heterokd.teachers.fit_into import SAVES, TEMPORARY, fit_into
from heterokd.teachers.prepare import PreparedTeacher, TeacherReport, ready_teacher
from heterokd.training.train import Report

if TYPE_CHECKING:
    # These import Ray, which a fit in this process does not need.
    from heterokd.execution.cache_builders import CacheBuild
    from heterokd.execution.fit_on_workers import FitOnWorkers
    from heterokd.execution.node_task import Tasks


def prepare_teachers(
    experiment: Experiment, root: Workspace, progress: TeacherReport | None = None, tasks: Tasks | None = None
) -> dict[str, PreparedTeacher]:
    """Fit or verify every teacher of an experiment; by network, in the experiment's order.

    Args:
        experiment: experiment with the `teacher` section.
        root: workspace.
        progress: called with the metrics of each epoch of a fit and the teacher's network; False ends the fit.
        tasks: see `heterokd.execution.node_task.tasks_on`.

    Raises:
        UserError: see `heterokd.teachers.prepare.prepare_teacher`.
        SearchError: processes of the fit died too often, or no node can fit.
    """
    found: dict[str, PreparedTeacher] = {}
    for network in experiment.teacher.networks:
        found |= _prepared(experiment.for_teacher(network), root, progress, tasks)
    return found


def prepare_teacher(
    experiment: Experiment, root: Workspace, progress: Report | None = None, tasks: Tasks | None = None
) -> PreparedTeacher:
    """Fit or verify the (first) teacher of an experiment, see `prepare_teachers`."""
    first = experiment.for_teacher(experiment.teacher.networks[0])
    report = None if progress is None else lambda metrics, network: progress(metrics)
    (prepared,) = _prepared(first, root, report, tasks).values()
    return prepared


def _prepared(
    experiment: Experiment, root: Workspace, progress: TeacherReport | None, tasks: Tasks | None
) -> dict[str, PreparedTeacher]:
    """Prepare the only teacher of an experiment; by network.

    A sharded fit is led by this process, since its workers hold the resources; a task only fits in a single process.
    """
    if experiment.teacher.training.is_shared and not ready_teacher(experiment, root)[0]:
        return teachers.prepare_teachers(experiment, root, progress, _on_workers(experiment, tasks))
    if tasks is None:
        return teachers.prepare_teachers(experiment, root, progress)
    (network,) = experiment.teacher.networks
    report = None if progress is None else lambda metrics: progress(metrics, network)
    where = root if root.url else root.on_node()
    what = f"preparing the teacher {network}"
    prepared, relative = tasks.run(what, report, prepare_here, experiment.model_dump_json(), where)
    prepared = replace(prepared, settings=experiment.teacher.settings_of())
    if relative is not None:
        weights = root.path / relative
        root.mirror(weights.parent).fetch(without=TEMPORARY)
        prepared = replace(prepared, weights=weights)
    return {network: prepared}


def prepare_here(report: Report, experiment: str, root: Workspace) -> tuple[PreparedTeacher, str | None]:
    """Prepare a teacher on this node.

    Args:
        report: see `prepare_teachers`.
        experiment: as JSON.
        root: the driver's workspace.

    Returns:
        The teacher, and the path of its weights in the workspace; None if they are not there.
    """
    from heterokd.execution.ray_connection import is_preempted

    here = root.on_node()

    def local(given: GivenFile) -> Path:
        return here.fetched(given.file, root)

    asked = with_files(Experiment.model_validate_json(experiment), local)
    fit = partial(fit_into, save_now=is_preempted, saves=SAVES)
    prepared = teachers.prepare_teacher(asked, here, report, fit)
    weights = prepared.weights
    inside = weights is not None and weights.is_relative_to(here.path)
    return prepared, weights.relative_to(here.path).as_posix() if weights is not None and inside else None


def _on_workers(experiment: Experiment, tasks: Tasks | None) -> FitOnWorkers:
    from heterokd.execution.fit_on_workers import FitOnWorkers

    if tasks is None:
        return FitOnWorkers()
    from heterokd.execution.placement import node_resources

    return FitOnWorkers(node_resources(experiment), tasks.check, tasks.may_grow)


def verified_cache(
    experiment: Experiment, root: Workspace, weights: Path | None, tasks: Tasks | None = None
) -> CacheBuild | None:
    """Return the cache of the (first) teacher as `plan_cache_build` does; its shards are verified.

    Raises:
        CacheError: the existing cache disagrees with the teacher.
        SearchError: see `prepare_teachers`.
    """
    from heterokd.execution.cache_builders import plan_cache_build

    if tasks is None or not experiment.cache.enabled:
        return plan_cache_build(experiment, root, weights)
    what = f"verifying the cache of {experiment.teacher.networks[0]}"
    where, file = root if root.url else root.on_node(), None if weights is None else weights.resolve()
    build = tasks.run(what, None, verify_here, experiment.model_dump_json(), where, file)
    if build is None:
        return None
    return replace(build, folder=root.cache_folder.at(build.key.id), weights=weights)


def verify_here(report: Report, experiment: str, root: Workspace, weights: Path | None) -> CacheBuild | None:
    """Verify a teacher's cache on this node, see `verified_cache`."""
    from heterokd.execution.cache_builders import plan_cache_build

    here = root.on_node()
    file = None if weights is None else here.fetched(weights, root)
    return plan_cache_build(Experiment.model_validate_json(experiment), here, file)
