"""Completing a cache in the sight of its user: what `heterokd cache EXPERIMENT` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.text import Text

from heterokd.cache import cache_bytes, list_caches, mend_cache
from heterokd.cluster import connected, plan_cluster
from heterokd.config import Experiment, load_experiment
from heterokd.distillation import check_experiment, check_files, prepare_teachers
from heterokd.errors import CacheError, ConfigError
from heterokd.filling import Filling, fill, plan_filling
from heterokd.formatting import format_duration, format_size
from heterokd.root import Root
from heterokd.terminal.speaking import Terminal

TENTHS = 10


def build(
    file: Path, overrides: Sequence[str], root: Root, address: str | None, terminal: Terminal
) -> list[dict[str, Any]]:
    """Complete the caches of an experiment's own seed, one a teacher, whose views its trials share.

    Args:
        file: of the experiment.
        overrides: `key=value` of it.
        root: where state lives.
        address: of a Ray cluster; None starts a local one.
        terminal: where progress is shown.

    Returns:
        Of each cache `id`, `description`, `folder`, `bytes`, `views` (records), `seconds`, and whether it was `built`
        now.

    Raises:
        UserError: the experiment is wrong, caches nothing, or its cache cannot be completed.
    """
    experiment = load_experiment(file, list(overrides))
    check_experiment(experiment)
    if not experiment.cache.enabled:
        raise ConfigError("cache.enabled: is false, so the teacher runs live; set it to true to build its cache")
    check_files(experiment)
    prepared = prepare_teachers(experiment, root, progress=terminal.teacher_epoch)
    planned = {
        network: plan_filling(experiment.following(network), root, teacher.weights, audited=False)
        for network, teacher in prepared.items()
    }
    if not any(planned.values()):
        raise ConfigError(
            f"search space: methods: none of {', '.join(experiment.methods)} reads only what a cache holds of the "
            "teacher; they run it live, and there is nothing to build"
        )
    return [
        _complete(experiment.following(network), filling, root, address, terminal)
        for network, filling in planned.items()
        if filling is not None
    ]


def _complete(
    experiment: Experiment, filling: Filling, root: Root, address: str | None, terminal: Terminal
) -> dict[str, Any]:
    """The cache of one teacher.

    Raises:
        CacheError: it cannot be completed.
    """
    for name in mend_cache(filling.folder):
        terminal.say(f"removed {filling.folder}/{name}: it was damaged, or belonged to what was")
    if filling.obstacle is not None:
        raise CacheError(filling.obstacle)
    built, started = not filling.is_complete, time.monotonic()
    if built:
        terminal.say(f"cache {filling.key.id}: {filling.key.describe()}")
        with connected(address), _Shown(filling, terminal) as progress:
            fill(filling, root, plan_cluster(experiment), progress)
    plan_filling(experiment, root, filling.weights)  # the audit
    (card,) = (card for card in list_caches(root.cache_folder) if card.id == filling.key.id)
    return {
        "id": card.id,
        "description": card.description,
        "folder": str(filling.folder),
        "bytes": card.bytes,
        "views": card.records,
        "seconds": round(time.monotonic() - started, 3),
        "built": built,
    }


def outcome(found: dict[str, Any]) -> list[str]:
    """What `build` says of one cache, in lines."""
    said = f"built in {format_duration(found['seconds'])}" if found["built"] else "is complete; nothing was built"
    return [f"cache {found['id']} {said}: {found['views']:,} views, {format_size(found['bytes'])}", found["folder"]]


class _Shown:
    """Progress of a build: one line that changes on a terminal, a line a tenth in a pipe."""

    def __init__(self, filling: Filling, terminal: Terminal) -> None:
        self.terminal, self.started, self.tenths = terminal, time.monotonic(), 0
        self.views, self.bytes = filling.key.records, cache_bytes(filling.key)
        self.before: int | None = None
        self.live = Live(console=terminal.console, refresh_per_second=2, transient=True)

    def __enter__(self) -> Callable[[int, int], None]:
        if self.terminal.is_live:
            self.live.start()
        return self.show

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def show(self, done: int, shards: int) -> None:
        """So many shards are there."""
        if self.before is None:
            self.before, self.started = done, time.monotonic()
        share, seconds = done / shards, max(time.monotonic() - self.started, 1e-9)
        rate = self.views * (done - self.before) / shards / seconds
        bytes_ = f"{format_size(self.bytes * share)} of {format_size(self.bytes)}"
        line = f"shard {done}/{shards}, {bytes_}, {rate:,.0f} views/s"
        if self.terminal.is_live:
            self.live.update(Text(line))
        elif int(share * TENTHS) > self.tenths:
            self.tenths = int(share * TENTHS)
            self.terminal.say(line)
