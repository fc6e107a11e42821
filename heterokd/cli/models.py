"""Commands that promote, roll back and export students."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from heterokd.cli.options import AsJson, RootFolder, StudyName, print_json
from heterokd.errors import ConfigError
from heterokd.students.export.formats import FORMATS, format_named


# One parameter for each option of the command line.
def promote(
    study: StudyName,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the decision without changing anything.")] = False,
    alias: Annotated[str, typer.Option(help="Alias of the model in production.")] = "champion",
    trial: Annotated[
        int | None, typer.Option(min=0, help="Judge this trial, this once, instead of the winner.")
    ] = None,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Also judge a study that is not finished.")] = False,
    address: Annotated[str | None, typer.Option(help="Ray cluster to evaluate on; default: this process.")] = None,
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Promote a study's winner if it passes every gate.

    Compares it with the champion on the test split, which no other command reads.
    """
    from heterokd import api

    decision = api.promote(
        study, root, dry_run=dry_run, alias=alias, trial=trial, unfinished=unfinished, address=address
    )
    if as_json:
        print(decision.to_json())
        return
    from rich.console import Console
    from rich.table import Table

    print(decision.subject)
    table = Table(box=None, pad_edge=False)
    for title in ("gate", "required", "measured", "passed"):
        table.add_column(title)
    for row in decision.table():
        table.add_row(*(str(cell) for cell in row))
    Console(highlight=False).print(table)
    print(decision.reason)


def rollback(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name of the registered model.")],
    alias: Annotated[str, typer.Option(help="Alias of the model in production.")] = "champion",
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Undo the last promotion."""
    from heterokd.storage.workspace import open_workspace
    from heterokd.students.promotion.rollback import rollback as run

    done = run(open_workspace(root), model, alias=alias)
    print(done.to_json() if as_json else done.reason)


# One parameter for each option of the command line.
def export(
    student: Annotated[
        str, typer.Argument(metavar="MODEL_URI", help="models:/NAME@ALIAS, studies/NAME or a trial folder.")
    ],
    out: Annotated[Path, typer.Option(help="Output folder.")],
    format_name: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="With --format onnx: quantize to 8 bits, and measure val before and after.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Also replace files that no export wrote.")] = False,
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Export a student to a file that runs without heterokd.

    Verifies the file against the trained student on real images.
    """
    if int8 and format_name not in ("onnx", "onnx_int8"):
        raise ConfigError(f"--int8: only ONNX is quantized, not --format {format_name}; use --format onnx")
    format_name = "onnx_int8" if int8 else format_name
    format_named(format_name)  # before the imports, which take seconds
    from heterokd.storage.workspace import open_workspace
    from heterokd.students.export.export import export_student
    from heterokd.students.export.find import find_student

    with find_student(open_workspace(root), student) as found:
        written = export_student(found, format_name, out, overwrite=overwrite)
    if as_json:
        print_json({**asdict(written), "record": str(out / "export.json")})
        return
    height, width = written.image
    print(f"{'  '.join(str(out / name) for name in written.files)}  ({written.size_mb:.2f} MB)")
    difference = f"largest logit difference {written.parity.difference:.2g} at batch 1 and 5"
    if written.accuracy is None:
        print(f"parity   {difference} ({written.parity.tolerance:.2g} allowed)")
    else:
        of = written.accuracy
        gain = f"{of.metric} {of.file:.4f}, of the student {of.student:.4f} ({-of.drop:+.4f})"
        print(f"accuracy {gain}; {difference}")
    print(
        f"latency  median {written.latency.median_ms:.2f} ms, p95 {written.latency.p95_ms:.2f} ms for an image of "
        f"{height} x {width} on a single thread (the student in torch: {written.torch_latency.median_ms:.2f} ms)"
    )
    print(f"load     {written.opened_with}")
    print(f"record   {out / 'export.json'}")
