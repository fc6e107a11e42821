"""Build teacher caches in Ray actors, for `heterokd cache` and during the first trials of a search."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from heterokd.config.experiment import Experiment
from heterokd.config.recipe import Recipe
from heterokd.errors import CacheError, PairError
from heterokd.execution.placement import Cluster
from heterokd.execution.ray_settings import ray
from heterokd.execution.this_node import gpu_fault
from heterokd.outputs import Signal
from heterokd.storage.filesystem import RemoteDir
from heterokd.storage.workspace import Workspace
from heterokd.teachers.cache.build import check_space, missing
from heterokd.teachers.cache.key import CacheKey
from heterokd.teachers.cache.shards import cache_bytes, layout_of
from heterokd.teachers.cache_policy import (
    GIGABYTE,
    cache_key,
    is_served,
    is_small_enough,
    mended_cache,
    open_cache,
    searched_signals,
)
from heterokd.teachers.prepare import open_prepared
from heterokd.training.data import open_splits, training_splits
from heterokd.training.precision import default_device

POLL_SECONDS = 0.5

RESTARTS = 3
"""Maximum restarts of a builder whose process died."""

logger = logging.getLogger(__name__)

Work: TypeAlias = tuple[str, Path | None, Signal]
"""Recipe (as JSON), file of its teacher's weights, stored signals."""

RunningBuild: TypeAlias = "tuple[ray.actor.ActorHandle, ray.ObjectRef]"
"""A builder's handle and the answer of its `build`. An actor lives as long as its handle."""


@dataclass(frozen=True)
class CacheBuild:
    """A teacher cache to build.

    Attributes:
        recipe: a training whose views the cache holds.
        key: the cache's key.
        folder: the cache's folder.
        weights: file of the prepared teacher's weights; None: timm's published ones.
        signals: what the methods of the search read from it.
    """

    recipe: Recipe
    key: CacheKey
    folder: RemoteDir
    weights: Path | None = None
    signals: Signal = Signal.NONE

    @property
    def is_complete(self) -> bool:
        """Whether every shard exists."""
        return self.folder.exists("manifest.json")

    @property
    def missing(self) -> list[int]:
        """Numbers of the missing shards."""
        return missing(self.folder, self.key)

    @property
    def obstacle(self) -> str | None:
        """Reason it cannot be built, or None."""
        if self.is_complete:
            return None
        if not is_small_enough(self.recipe, self.key):
            return (
                f"cache.max_gb: a cache of {self.key.describe()} takes {cache_bytes(self.key) / GIGABYTE:.3g} GB, more "
                f"than {self.recipe.cache.max_gb:g}; raise it, or set cache.dtype: fp16, cache.top_k or fewer "
                "cache.views"
            )
        try:
            check_space(self.folder, self.key, len(self.missing))
        except CacheError as error:
            return str(error)
        return None


class Builder:
    """An actor that builds the shards that no other builder is working on.

    Args:
        work: recipes (as JSON) whose caches are built in this order, each with its teacher's weights and the stored
            signals.
        root: where caches lie.
        threads: number of torch's threads.
    """

    def __init__(self, work: Sequence[Work], root: Workspace, threads: int) -> None:
        torch.set_num_threads(threads)
        self.root = root.on_node()
        self.work = [
            (Recipe.model_validate_json(recipe), None if weights is None else self.root.fetched(weights, root), signals)
            for recipe, weights, signals in work
        ]

    def build(self) -> str | None:
        """Complete each cache together with the other builders; return error messages, or None."""
        fault = gpu_fault()
        if fault is not None:
            return fault.reason
        problems = [problem for each in self.work if (problem := self._complete(*each))]
        return "; ".join(problems) or None

    def _complete(self, recipe: Recipe, weights: Path | None, signals: Signal) -> str | None:
        splits = training_splits(open_splits(recipe.data), self.root, recipe.data.pixels_max_gb)
        live = open_prepared(recipe, weights, splits.num_classes, self.root)
        device = default_device()
        try:
            open_cache(recipe, splits, live, self.root, device, build=True, signals=signals)
        except CacheError as error:
            return str(error)
        return None


def plan_cache_build(
    experiment: Experiment, root: Workspace, weights: Path | None, *, audited: bool = True
) -> CacheBuild | None:
    """Return the cache that an experiment's trials share before confirmation; None if no method reads a cache.

    Args:
        experiment: the experiment; of several teachers the first, see `Experiment.for_teacher`.
        root: caches lie under `caches/`.
        weights: the prepared teacher's weights.
        audited: verify the existing shards, also by running the teacher on a sample, and delete damaged ones.

    Raises:
        CacheError: the existing cache disagrees with the teacher.
    """
    if not experiment.cache.enabled:
        return None
    splits = open_splits(experiment.data)
    for method in experiment.methods:
        recipe = experiment.recipe(experiment.published(method))
        live = open_prepared(recipe, weights, splits.num_classes)
        try:
            served = is_served(recipe, splits, live)
        except PairError:
            continue  # left out of this pair's space
        if served:
            signals = searched_signals(experiment, splits, live)
            key = (mended_cache if audited else cache_key)(recipe, splits, live, root, signals)
            return CacheBuild(recipe, key, root.cache_folder.at(key.id), weights, signals)
    return None


def start_cache_builds(
    caches: Sequence[CacheBuild], root: Workspace, cluster: Cluster, builders: int
) -> list[RunningBuild]:
    """Start builders on the connected Ray.

    Args:
        caches: caches to build. Each builder starts with a different cache; all help with all.
        root: where caches lie, on every node.
        cluster: resources of a trial; a builder gets the same.
        builders: maximum number of builders; never more than there are missing shards.
    """
    # A builder that dies is started again, and continues with the missing shards.
    actor = ray.remote(Builder).options(
        num_cpus=cluster.cpus, num_gpus=cluster.gpus, max_restarts=RESTARTS, max_task_retries=RESTARTS
    )
    # Relative paths are resolved where the driver runs.
    where = root if root.url else root.on_node()
    work: list[Work] = [
        (cache.recipe.model_dump_json(), cache.weights.resolve() if cache.weights else None, cache.signals)
        for cache in caches
    ]
    count = min(builders, sum(len(cache.missing) for cache in caches) or 1)
    firsts = [number % len(work) for number in range(count)]
    handles = [actor.remote([*work[first:], *work[:first]], where, max(1, int(cluster.cpus))) for first in firsts]
    return [(handle, handle.build.remote()) for handle in handles]


def release(started: Sequence[RunningBuild]) -> list[RunningBuild]:
    """Release finished builders' resources; return the builders that are still running."""
    running = []
    for handle, answer in started:
        done, _ = ray.wait([answer], timeout=0)
        if not done:
            running.append((handle, answer))
            continue
        problem = _finish(handle, answer)
        if problem is not None:
            logger.warning(
                "the teacher's cache is not complete (%s): trials run the teacher for what is missing", problem
            )
    return running


def _finish(handle: ray.actor.ActorHandle, answer: ray.ObjectRef) -> str | None:
    """Release a finished builder; return its error message, or None."""
    ray.kill(handle)
    try:
        problem: str | None = ray.get(answer)
    except ray.exceptions.RayError as error:
        return f"a builder died ({type(error).__name__}); finished shards are kept, build again"
    return problem


def build_cache(
    cache: CacheBuild,
    root: Workspace,
    cluster: Cluster,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Build a cache on the connected Ray.

    Args:
        cache: cache to build.
        root: where caches lie.
        cluster: number of builders and the resources of each.
        progress: called with (finished shards, all shards).

    Raises:
        CacheError: it cannot be completed.
    """
    started = start_cache_builds([cache], root, cluster, cluster.parallel)
    shards, waiting = layout_of(cache.key).shards, [answer for _, answer in started]
    while waiting:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
        if progress is not None:
            progress(shards - (len(cache.missing) if waiting else 0), shards)
    problems = [problem for build in started if (problem := _finish(*build)) is not None]
    if problems and not cache.is_complete:
        raise CacheError(problems[0])
