"""The command line: `heterokd COMMAND`. Heavy imports stay inside the commands to keep `--help` fast.

Exit codes: 0 success, 1 a bug or a fault of the machine, 2 wrong input, 130 interrupted (all results are kept).
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated

import typer
from typer.core import TyperGroup
from typer.main import get_command

from heterokd.cli import data, listing, models, planning, results, searching, training
from heterokd.cli.collection import no_collection_at_exit, rare_collections
from heterokd.cli.options import FULL
from heterokd.execution.signals import interrupt_on_sigterm
from heterokd.formatting import package_version

REFUSED = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of a path that the user gave; other errors of a disk are faults of the machine."""

EXIT_CODES = "Exit codes: 0 success, 1 fault of the machine or bug, 2 wrong input, 130 interrupted (results are kept)."

TRAINING = ("search", "auto", "distill", "reproduce", "teacher", "match")
"""Commands that may train in this process, see `heterokd.cli.collection`."""

app = typer.Typer(
    help="Search for the best way to distil a large vision model into a small model of another architecture.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", "-V", help="Show version and exit.")] = False) -> None:
    if version:
        print(package_version())
        raise typer.Exit


for command in (
    searching.search,
    searching.auto,
    searching.init,
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
app.add_typer(data.commands, name="data")


@dataclass
class Shown:
    """What a command prints of an exception; the object of its context.

    Attributes:
        traceback: whether it prints the traceback, before the sentence.
    """

    traceback: bool = False


def _debug(context: typer.Context, value: bool) -> None:
    shown = context.find_object(Shown)
    if shown is not None:
        shown.traceback = value
    if value:
        # A search then prints what its log keeps, see `execution.search_log`.
        package = logging.getLogger("heterokd")
        context.call_on_close(partial(package.setLevel, package.level))
        package.setLevel(logging.DEBUG)


DebugOption = Annotated[
    bool,
    typer.Option(
        "--debug", "-v", callback=_debug, expose_value=False, help="Print tracebacks of errors, and a search's log."
    ),
]


@cache
def _group(commands: typer.Typer) -> Callable[..., object]:
    """Return the commands with their options, which Typer reads from the functions' signatures, and `--debug`."""
    only_debug = typer.Typer(add_completion=False)

    @only_debug.command()
    def _(debug: DebugOption = False) -> None: ...

    group = get_command(commands)
    assert isinstance(group, TyperGroup)  # of several commands Typer makes a group
    groups = [group, *(command for command in group.commands.values() if isinstance(command, TyperGroup))]
    for command in (command for each in groups for command in each.commands.values()):
        if not isinstance(command, TyperGroup):
            command.params.extend(get_command(only_debug).params)
            command.epilog = EXIT_CODES
            if command.name not in TRAINING and command.callback is not None:
                command.callback = rare_collections()(command.callback)
    return group


def main(arguments: Sequence[str] | None = None, commands: typer.Typer = app) -> None:
    """Run the command line; print expected errors as a sentence on stderr.

    Args:
        arguments: without the program's name; default: the arguments of the process.
        commands: at least two commands.
    """
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Torch's threads would wait in a busy loop; beside other work, an update then takes many times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    no_collection_at_exit()
    shown = Shown()
    try:
        with interrupt_on_sigterm():
            _group(commands)(arguments, standalone_mode=True, obj=shown)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        explained = _explained(error)
        if explained is None:
            raise
        if shown.traceback:
            traceback.print_exc()
        lines, code = explained
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(code)


def _explained(error: Exception) -> tuple[list[str], int] | None:
    """Return the sentences for an exception and the exit code; None for a bug, whose traceback is printed."""
    from heterokd.errors import HeterokdError, UserError

    if isinstance(error, HeterokdError):
        return str(error).splitlines(), 2 if isinstance(error, UserError) else 1
    if isinstance(error, OSError) and error.filename is not None and error.errno in REFUSED:
        reason = f"cannot be used ({error.strerror}); check the path and its permissions"
        return [f"{os.fsdecode(error.filename)}: {reason}"], 2
    if isinstance(error, OSError) and error.errno in (*FULL, errno.EROFS, errno.EACCES):
        return str(error).splitlines(), 1
    from heterokd.execution.failure_cause import Cause, cause_of, fault_sentence

    if cause_of(error) == Cause.TRIAL:
        return None
    return [f"{fault_sentence(error)}; run the command again, with --debug to see the traceback"], 1
