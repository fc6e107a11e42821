"""FitOnWorkers: fit a teacher on several workers, as a sharded trial is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ray import train

from heterokd.config.recipe import Recipe
from heterokd.errors import ConfigError, SearchError
from heterokd.execution.failure_cause import Cause, cause_of, first_line_of
from heterokd.execution.node_faults import NodeFaults
from heterokd.execution.node_task import avoid_node, no_node
from heterokd.execution.placement import Node, plan_workers
from heterokd.execution.ray_connection import connected
from heterokd.execution.run import RunContext
from heterokd.execution.this_node import NodeCheck, NodeError
from heterokd.execution.workers import OnWorkers, Outcome, Work, train_on_workers
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.teachers.fit_into import SAVES, TEMPORARY, Fold, fit_into
from heterokd.training.train import Report

RESTARTS = 3
"""How often all workers are restarted after one has died."""


@dataclass(frozen=True)
class FitOnWorkers:
    """Fits a teacher on the workers of `teacher.training`, on the connected Ray or on a local Ray; see `fit_into`.

    Attributes:
        nodes: cores and GPUs of each node; None: those of the connected Ray.
        check: what a worker's node is compared with; None on a local Ray.
        may_grow: whether nodes may be added.
    """

    nodes: Sequence[Node] | None = None
    check: NodeCheck | None = None
    may_grow: bool = False

    def __call__(
        self, recipe: Recipe, folder: Path, workspace: Workspace, report: Report, *, fold: Fold | None = None
    ) -> None:
        """See `fit_into`.

        Raises:
            ConfigError: the workers do not fit into this Ray.
            SearchError: workers died too often, or no node can train.
        """
        start = recipe.teacher.start_from
        with connected(None, shared=True):
            try:
                place = plan_workers(recipe.training, nodes=self.nodes)
            except ConfigError as error:
                raise ConfigError(f"teacher.{error}") from None
            is_apart = workspace.url is not None
            work = Work(
                recipe=recipe.model_dump_json(),
                folder=folder if is_apart else folder.resolve(),
                workspace=workspace if is_apart else workspace.on_node(),
                is_apart=is_apart,
                weights=None if start is None else start.resolve(),
                threads=max(1, int(place.cpus)),
                check=self.check,
                run=partial(fit_rank, fold=fold),
                skip=(),
            )
            faults = NodeFaults()
            while True:
                try:
                    train_on_workers(work, OnWorkers(place, RESTARTS), faults.avoided, report)
                    break
                except NodeError as error:
                    if not avoid_node(faults, error.fault, place.needs, may_grow=self.may_grow):
                        raise SearchError(f"{_what(recipe)}: {no_node(error.fault)}") from None
                except train.TrainingFailedError as error:
                    if cause_of(error) == Cause.TRIAL:
                        raise  # an exception that heterokd did not expect
                    raise SearchError(
                        f"{_what(recipe)}: its workers died {RESTARTS + 1} times ({first_line_of(error)}); the last "
                        f"checkpoint is kept in {folder}, and the same command continues"
                    ) from error
        workspace.mirror(folder).fetch(without=TEMPORARY)


def _what(recipe: Recipe) -> str:
    return f"fitting the teacher {recipe.teacher.network}"


def fit_rank(
    recipe: Recipe, folder: TrialFolder, context: RunContext, on_epoch: Report, *, fold: Fold | None = None
) -> Outcome:
    """Fit a teacher on this rank of a sharded fit."""
    start = context.teacher_weights
    if start is not None:  # on another node it may be in another folder
        teacher, student = (each.model_copy(update={"start_from": start}) for each in (recipe.teacher, recipe.student))
        recipe = recipe.model_copy(update={"teacher": teacher, "student": student})
    fit_into(
        recipe,
        folder.path,
        context.workspace,
        on_epoch,
        fold=fold,
        device=context.device,
        save_now=context.save_now,
        saves=SAVES,
    )
    return Outcome({}, 0, stopped=False)
