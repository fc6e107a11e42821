"""Build the teacher caches of an experiment: `heterokd cache EXPERIMENT`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from heterokd.cli.terminal.console import Terminal
from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.errors import CacheError, ConfigError
from heterokd.execution.cache_builders import CacheBuild, build_cache, plan_cache_build
from heterokd.execution.check import check_experiment, check_files
from heterokd.execution.node_task import Tasks, tasks_on
from heterokd.execution.placement import plan_cluster
from heterokd.execution.prepare import prepare_teachers, verified_cache
from heterokd.execution.ray_connection import check_address, connected
from heterokd.formatting import format_duration, format_size
from heterokd.storage.workspace import Workspace
from heterokd.students.given_weights import with_given_weights
from heterokd.teachers.cache.maintenance import list_caches, repair_cache
from heterokd.teachers.cache.shards import cache_bytes


@dataclass(frozen=True)
class BuiltCache:
    """A complete cache.

    Attributes:
        bytes: size of its shards.
        views: number of records.
        seconds: duration of building, or checking.
        built: whether shards were missing.
    """

    id: str
    description: str
    folder: str
    bytes: int
    views: int
    seconds: float
    built: bool

    def lines(self) -> list[str]:
        """Format as text."""
        how = f"built in {format_duration(self.seconds)}" if self.built else "is complete; nothing was built"
        return [f"cache {self.id} {how}: {self.views:,} views, {format_size(self.bytes)}", self.folder]


def build_caches(
    file: Path, overrides: Sequence[str], root: Workspace, address: str | None, terminal: Terminal
) -> list[BuiltCache]:
    """Complete a cache for each teacher of an experiment, with the views of its first seed, which its trials share.

    Args:
        file: of the experiment.
        overrides: `key=value` texts for the experiment.
        root: workspace.
        address: of a Ray cluster; None starts a local Ray.
        terminal: shows progress.

    Raises:
        UserError: the experiment is wrong, uses no cache, or its cache cannot be completed.
    """
    experiment = with_given_weights(load_experiment(file, list(overrides)), root)
    check_experiment(experiment)
    if not experiment.cache.enabled:
        raise ConfigError("cache.enabled: is false; set it to true to build a cache")
    check_files(experiment, root)
    check_address(address)
    with tasks_on(experiment, root, address) as tasks:
        prepared = prepare_teachers(experiment, root, terminal.teacher_epoch, tasks)
        builds = {
            network: plan_cache_build(experiment.for_teacher(network), root, teacher.weights, audited=False)
            for network, teacher in prepared.items()
        }
        if not any(builds.values()):
            raise ConfigError(
                f"search space: methods: {', '.join(experiment.methods)} need the running teacher, not a cache; there "
                "is nothing to build"
            )
        return [
            _complete(experiment.for_teacher(network), build, root, address, terminal, tasks)
            for network, build in builds.items()
            if build is not None
        ]


def _complete(
    experiment: Experiment,
    build: CacheBuild,
    root: Workspace,
    address: str | None,
    terminal: Terminal,
    tasks: Tasks | None,
) -> BuiltCache:
    for name in repair_cache(build.folder, build.key):
        terminal.print_line(f"removed {build.folder}/{name}: it was damaged, or part of an earlier cache")
    if build.obstacle is not None:
        raise CacheError(build.obstacle)
    built, started = not build.is_complete, time.monotonic()
    if built:
        terminal.print_line(f"cache {build.key.id}: {build.key.describe()}")
        with connected(address), _progress(cache_bytes(build.key), terminal) as on_shard:
            build_cache(build, root, plan_cluster(experiment), on_shard)
    verified_cache(experiment, root, build.weights, tasks)
    (card,) = (card for card in list_caches(root.cache_folder) if card.id == build.key.id)
    seconds = round(time.monotonic() - started, 3)
    return BuiltCache(card.id, card.description, str(build.folder), card.bytes, card.records, seconds, built)


@contextmanager
def _progress(size: int, terminal: Terminal) -> Iterator[Callable[[int, int], None]]:
    """Show progress as a bar on a terminal, else as a line per tenth; yield a callback for completed shards."""
    columns = (TextColumn("cache"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal.console, transient=True, disable=not terminal.is_live) as bar:
        task, tenths = bar.add_task("cache", total=size), 0

        def on_shard(done: int, shards: int) -> None:
            nonlocal tenths
            bar.update(task, completed=size * done / shards)
            if not terminal.is_live and 10 * done // shards > tenths:
                tenths = 10 * done // shards
                terminal.print_line(
                    f"shard {done}/{shards}, {format_size(size * done / shards)} of {format_size(size)}"
                )

        yield on_shard
