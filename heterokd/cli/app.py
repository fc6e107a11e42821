"""The command line: `heterokd COMMAND`. Heavy imports stay inside the commands to keep `--help` fast.

Exit codes: 0 success, 1 a bug or a fault of the machine, 2 wrong input, 130 interrupted (all results are kept).
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated

import typer
from typer.main import get_command

from heterokd.cli import listing, models, planning, results, searching, training
from heterokd.cli.options import FULL
from heterokd.execution.signals import interrupt_on_sigterm
from heterokd.formatting import package_version

REFUSED = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of a path that the user gave; other errors of a disk are faults of the machine."""

app = typer.Typer(
    help="Search for the best way to distil a large vision model into a small model of another architecture.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show version and exit.")] = False) -> None:
    if version:
        print(package_version())
        raise typer.Exit


for command in (
    searching.search,
    searching.auto,
    planning.plan,
    planning.match,
    planning.doctor,
    training.distill,
    training.reproduce,
    training.teacher,
    training.cache,
    results.report,
    results.compare,
    results.ui,
    models.promote,
    models.rollback,
    models.export,
    listing.methods,
    listing.datasets,
):
    app.command()(command)  # the order of `heterokd --help`


@cache
def _command() -> Callable[..., object]:
    """Return the commands with their options, which Typer reads from the functions' signatures."""
    return get_command(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; print expected errors as a sentence on stderr.

    Args:
        arguments: without the program's name; default: the arguments of the process.
    """
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        with interrupt_on_sigterm():
            _command()(arguments, standalone_mode=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        from heterokd.errors import HeterokdError, UserError

        if isinstance(error, HeterokdError):
            lines, is_users = str(error).splitlines(), isinstance(error, UserError)
        elif isinstance(error, OSError) and error.filename is not None and error.errno in REFUSED:
            reason = f"cannot be used ({error.strerror}); check the path and its permissions"
            lines, is_users = [f"{os.fsdecode(error.filename)}: {reason}"], True
        elif isinstance(error, OSError) and error.errno in (*FULL, errno.EROFS, errno.EACCES):
            lines, is_users = str(error).splitlines(), False
        else:
            raise
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2 if is_users else 1)
