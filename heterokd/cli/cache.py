"""`heterokd cache`: build, list, verify and prune teacher caches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.text import Text

from heterokd.cli.terminal.console import Terminal
from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.datasets.io.shared_pixels import unused_pixels
from heterokd.errors import CacheError, ConfigError
from heterokd.execution.cache_builders import CacheBuild, fill, plan_cache_build
from heterokd.execution.check import check_experiment, check_files
from heterokd.execution.placement import plan_cluster
from heterokd.execution.ray_connection import connected
from heterokd.formatting import PERIODS, SIZES, format_duration, format_size, parse_quantity
from heterokd.storage.workspace import Workspace
from heterokd.teachers.cache.maintenance import CacheCard, list_caches, mend_cache, prune_caches, verify_cache
from heterokd.teachers.cache.shards import cache_bytes
from heterokd.teachers.prepare import prepare_teachers

TENTHS = 10


def build(
    file: Path, overrides: Sequence[str], root: Workspace, address: str | None, terminal: Terminal
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
        network: plan_cache_build(experiment.for_teacher(network), root, teacher.weights, audited=False)
        for network, teacher in prepared.items()
    }
    if not any(planned.values()):
        raise ConfigError(
            f"search space: methods: none of {', '.join(experiment.methods)} reads only what a cache holds of the "
            "teacher; they run it live, and there is nothing to build"
        )
    return [
        _complete(experiment.for_teacher(network), filling, root, address, terminal)
        for network, filling in planned.items()
        if filling is not None
    ]


def _complete(
    experiment: Experiment, filling: CacheBuild, root: Workspace, address: str | None, terminal: Terminal
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
    plan_cache_build(experiment, root, filling.weights)  # the audit
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

    def __init__(self, filling: CacheBuild, terminal: Terminal) -> None:
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


@dataclass(frozen=True)
class Asked:
    """What the command line says.

    Attributes:
        names: one experiment's file, or ids of caches.
        overrides: `key=value` of the experiment.
        address: of a Ray cluster.
        listing, verifying, pruning: which of the three; none of them builds.
        unused_for, max_size, everything: what is pruned beside the ids.
        dry_run: nothing is deleted.
    """

    names: Sequence[str] = ()
    overrides: Sequence[str] = ()
    address: str | None = None
    listing: bool = False
    verifying: bool = False
    pruning: bool = False
    unused_for: str | None = None
    max_size: str | None = None
    everything: bool = False
    dry_run: bool = False

    def check(self) -> None:
        """Refuse what does not go together.

        Raises:
            ConfigError: says what to leave out or to add.
        """
        modes = self.listing + self.verifying + self.pruning
        which = bool(self.names or self.unused_for or self.max_size or self.everything)
        if modes > 1:
            raise ConfigError("--list, --verify, --prune: give one of them")
        if (self.unused_for or self.max_size or self.everything or self.dry_run) and not self.pruning:
            raise ConfigError(
                "--unused-for, --max-size, --all, --dry-run: belong to --prune; add it, or leave them out"
            )
        if (self.overrides or self.address) and modes:
            raise ConfigError(
                "--set, --address: belong to building a cache; leave them out, or give an EXPERIMENT alone"
            )
        if self.listing and self.names:
            raise ConfigError(f"--list: shows every cache and takes no name; leave out {self.names[0]!r}")
        if not modes and len(self.names) != 1:
            raise ConfigError("heterokd cache: give one EXPERIMENT to build its cache, or --list, --verify or --prune")
        if self.pruning and not which:
            raise ConfigError("--prune: say what may go: ids, --unused-for 30d, --max-size 10GB or --all")


@dataclass(frozen=True)
class Answer:
    """What the command found or did.

    Attributes:
        lines: for people.
        content: for `--json`.
        problems: sentences; with any, the command ends in 2.
    """

    lines: Sequence[str]
    content: dict[str, Any]
    problems: Sequence[str] = field(default_factory=tuple)


def run(asked: Asked, root: Workspace, *, quiet: bool = False) -> Answer:
    """Do what is asked.

    Args:
        asked: what the command line says.
        root: where state lives.
        quiet: show no progress.

    Raises:
        UserError: options that do not go together, an unknown id, a wrong experiment, a cache that cannot be built.
    """
    asked.check()
    if asked.listing:
        cards = list_caches(root.cache_folder)
        pixels = unused_pixels(root.pixels, 0)
        return Answer(
            [*table(cards), *([_pixels_line("there are", pixels)] if pixels else [])],
            {
                "caches": as_rows(cards),
                "bytes": sum(card.bytes for card in cards),
                "decoded_images": {path.name: bytes_ for path, bytes_ in pixels.items()},
            },
        )
    if asked.verifying:
        found = verify(root, asked.names)
        return Answer(
            [f"{one}  {'is damaged' if told else 'is sound'}" for one, told in found.items()]
            or ["there are no caches"],
            {"caches": [{"id": one, "problems": told} for one, told in found.items()]},
            [sentence for told in found.values() for sentence in told],
        )
    if asked.pruning:
        cards, pixels = prune(root, asked)
        verb = "would delete" if asked.dry_run else "deleted"
        lines = [f"{verb} {card.id}  {format_size(card.bytes):>9}  {card.description}" for card in cards]
        freed = sum(card.bytes for card in cards)
        lines.append(f"{verb} {len(cards)} cache(s), {format_size(freed)}; caches in use are kept")
        if pixels:
            lines.append(_pixels_line(verb, pixels))
        names = {path.name: bytes_ for path, bytes_ in pixels.items()}
        content = {"deleted": as_rows(cards), "bytes": freed, "decoded_images": names, "dry_run": asked.dry_run}
        return Answer(lines, content)
    pass

    with Terminal("", quiet=quiet) as terminal:
        built = build(Path(asked.names[0]), asked.overrides, root, asked.address, terminal)
    content = built[0] if len(built) == 1 else {"caches": built}
    return Answer([line for one in built for line in outcome(one)], content)


def table(cards: Sequence[CacheCard]) -> list[str]:
    """Caches in lines, the last used first."""
    lines = [
        f"{card.id}  {format_size(card.bytes):>9}  {_state(card):<8}  "
        f"used {_ago(card.last_used)} ago  {card.description}"
        for card in cards
    ]
    return [*lines, f"{len(cards)} cache(s), {format_size(sum(card.bytes for card in cards))}"]


def as_rows(cards: Sequence[CacheCard]) -> list[dict[str, Any]]:
    """Caches as JSON takes them."""
    return [{**asdict(card), "last_used": card.last_used.isoformat()} for card in cards]


def verify(root: Workspace, ids: Sequence[str]) -> dict[str, list[str]]:
    """What is wrong with some caches, or with all: sentences by id; every checksum is checked.

    Raises:
        CacheError: there is no cache of a given id.
    """
    known = [card.id for card in list_caches(root.cache_folder)]
    unknown = next((one for one in ids if one not in known), None)
    if unknown is not None:
        raise CacheError(f"{root.cache_folder}: there is no cache {unknown!r}; known: {', '.join(known) or 'none'}")
    return {one: verify_cache(root.cache_folder.at(one), root.caches) for one in ids or known}


def prune(root: Workspace, asked: Asked) -> tuple[list[CacheCard], dict[Path, int]]:
    """Delete caches, see `prune_caches`, and decoded images by age alone; what was deleted, or would be.

    Raises:
        ConfigError: a period or a size that is none.
        CacheError: an unknown id, a cache in use, or one that cannot be deleted.
    """
    most = 0 if asked.everything else None
    seconds = None if asked.unused_for is None else parse_quantity("--unused-for", asked.unused_for, PERIODS, "30d")
    if asked.max_size is not None and not asked.everything:
        most = int(parse_quantity("--max-size", asked.max_size, SIZES, "10GB"))
    cards = prune_caches(
        root.cache_folder,
        unused_for=None if seconds is None else timedelta(seconds=seconds),
        max_bytes=most,
        ids=asked.names,
        dry_run=asked.dry_run,
    )
    age = 0.0 if asked.everything else seconds
    pixels = {} if age is None else unused_pixels(root.pixels, age)
    for path in () if asked.dry_run else pixels:
        path.unlink(missing_ok=True)
    return cards, pixels


def _pixels_line(verb: str, pixels: Mapping[Path, int]) -> str:
    return f"{verb} {len(pixels)} file(s) of decoded images, {format_size(sum(pixels.values()))}"


def _state(card: CacheCard) -> str:
    return "in use" if card.in_use else "complete" if card.complete else "partial"


def _ago(moment: datetime) -> str:
    return format_duration(max((datetime.now(UTC) - moment).total_seconds(), 0))
