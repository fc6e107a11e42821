"""Commands that make shards of a folder, and an index of shards."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from heterokd.cli.options import AsJson, print_json

commands = typer.Typer(help="Upload a data set as shards, or index shards, for data.root.", no_args_is_help=True)

Url = Annotated[str, typer.Argument(metavar="URL", help="s3://BUCKET/..., gs://BUCKET/..., file:///FOLDER.")]


@commands.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the data set.")],
    url: Url,
    shard_mb: Annotated[int, typer.Option(min=1, help="Size of a shard, in megabytes.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Upload a folder as tars of 256 MB with an index, which data.root reads.

    Run again, it uploads what is missing or has changed.
    """
    from heterokd.cli.terminal.console import Terminal
    from heterokd.formatting import format_size
    from heterokd.storage.stored_data.push import push_data

    terminal = Terminal(quiet=as_json)
    done = push_data(folder, url, shard_mb * 10**6, say=terminal.print_line)
    if as_json:
        print_json(asdict(done))
        return
    labelled = f", {done.images} of them images with a class" if done.images else ""
    terminal.print_line(f"{done.files} files{labelled}, {format_size(done.bytes)} in {done.shards} shards")
    terminal.print_line(f"data.root: {done.url}")


@commands.command()
def index(url: Url, as_json: AsJson = False) -> None:
    """Write an index next to WebDataset tars, Parquet or Arrow files.

    Without it, each node reads every tar twice: for labels, then for images.
    """
    from heterokd.formatting import format_size
    from heterokd.storage.stored_data.open_data import write_index

    found = write_index(url)
    content = {"url": url, "kind": found.kind, "files": len(found.names), "bytes": found.bytes}
    if as_json:
        print_json(content)
        return
    classes = "" if found.labelled is None else f", {len(found.labelled.classes)} classes"
    print(f"{len(found.names)} images{classes}, {format_size(found.bytes)} in {len(found.shards)} shards")
