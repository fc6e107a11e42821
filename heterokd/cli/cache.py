"""`heterokd cache`: list, verify and prune teacher caches; `cache_build` builds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from heterokd.cli.terminal.console import Terminal
from heterokd.config.quantities import PERIODS, parse_quantity
from heterokd.datasets.io.shared_pixels import unused_pixels
from heterokd.errors import CacheError, ConfigError
from heterokd.formatting import SIZES, format_duration, format_size
from heterokd.storage.workspace import Workspace
from heterokd.teachers.cache.maintenance import CacheCard, list_caches, prune_caches, verify_cache


@dataclass(frozen=True)
class CacheRequest:
    """Arguments of the command.

    Attributes:
        names: file of an experiment, or ids of caches.
        overrides: `key=value` texts for the experiment.
        address: of a Ray cluster.
        listing, verifying, pruning: the mode; without any, a cache is built.
        unused_for, max_size, everything: caches to prune in addition to the ids.
        dry_run: delete nothing.
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
        """Check that the options fit together.

        Raises:
            ConfigError: names the options to remove or to add.
        """
        modes = self.listing + self.verifying + self.pruning
        selected = bool(self.unused_for or self.max_size or self.everything)
        if modes > 1:
            raise ConfigError("--list, --verify, --prune: cannot be combined; give a single option")
        if (selected or self.dry_run) and not self.pruning:
            raise ConfigError("--unused-for, --max-size, --all, --dry-run: need --prune; add it")
        if self.everything and (self.names or self.unused_for or self.max_size):
            raise ConfigError("--all: deletes all caches; remove it to delete those that the other options select")
        if (self.overrides or self.address) and modes:
            raise ConfigError("--set, --address: are only for building a cache; remove them")
        if self.listing and self.names:
            raise ConfigError(f"--list: lists all caches and takes no name; remove {self.names[0]!r}")
        if not modes and len(self.names) > 1:
            raise ConfigError(f"heterokd cache: builds the cache of a single EXPERIMENT; remove {self.names[1]!r}")
        if not modes and not self.names:
            raise ConfigError("heterokd cache: give an EXPERIMENT to build its cache, or --list, --verify or --prune")
        if self.pruning and not (self.names or selected):
            raise ConfigError("--prune: names no caches; give ids, --unused-for 30d, --max-size 10GB or --all")


@dataclass(frozen=True)
class Answer:
    """Result of the command.

    Attributes:
        lines: text output.
        content: output of `--json`.
        problems: sentences; if there are any, the exit code is 2.
    """

    lines: Sequence[str]
    content: dict[str, object]
    problems: Sequence[str] = field(default_factory=tuple)


def run(asked: CacheRequest, root: Workspace, *, quiet: bool = False) -> Answer:
    """Run the command; with `quiet`, without progress.

    Raises:
        UserError: options that do not fit together, an unknown id, a wrong experiment, a cache that cannot be built.
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
            [f"{id_}  {'is damaged' if problems else 'is sound'}" for id_, problems in found.items()]
            or ["there are no caches"],
            {"caches": [{"id": id_, "problems": problems} for id_, problems in found.items()]},
            [sentence for problems in found.values() for sentence in problems],
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
    from heterokd.cli.cache_build import build_caches  # imports Ray, which the other modes do not need

    terminal = Terminal(quiet=quiet)
    built = build_caches(Path(asked.names[0]), asked.overrides, root, asked.address, terminal)
    rows = [asdict(each) for each in built]
    return Answer([line for each in built for line in each.lines()], rows[0] if len(rows) == 1 else {"caches": rows})


def table(cards: Sequence[CacheCard]) -> list[str]:
    """Format a list of caches as text."""
    lines = [
        f"{card.id}  {format_size(card.bytes):>9}  {_state(card):<8}  "
        f"used {_ago(card.last_used)} ago  {card.description}"
        for card in cards
    ]
    return [*lines, f"{len(cards)} cache(s), {format_size(sum(card.bytes for card in cards))}"]


def as_rows(cards: Sequence[CacheCard]) -> list[dict[str, object]]:
    """Format a list of caches as JSON."""
    return [{**asdict(card), "last_used": card.last_used.isoformat()} for card in cards]


def verify(root: Workspace, ids: Sequence[str]) -> dict[str, list[str]]:
    """Verify all checksums of the given caches, or of all caches; return problems by id.

    Raises:
        CacheError: unknown id.
    """
    known = [card.id for card in list_caches(root.cache_folder)]
    unknown = next((id_ for id_ in ids if id_ not in known), None)
    if unknown is not None:
        raise CacheError(f"{root.cache_folder}: there is no cache {unknown!r}; known: {', '.join(known) or 'none'}")
    return {id_: verify_cache(root.cache_folder.at(id_), root.caches) for id_ in ids or known}


def prune(root: Workspace, asked: CacheRequest) -> tuple[list[CacheCard], dict[Path, int]]:
    """Delete caches and unused decoded images; return those that were, or with `dry_run` would be, deleted.

    Raises:
        ConfigError: a period or a size is not valid.
        CacheError: an unknown id, a cache in use, or a cache that cannot be deleted.
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
