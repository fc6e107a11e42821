"""Terminal: print lines and tables to a screen or a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console, RenderableType

from heterokd.formatting import epoch_score

PIPE_WIDTH = 140
"""Columns of output to a file or pipe."""


class Terminal:
    """Output of a command, to be used as a context manager.

    Args:
        metric: that selects students.
        quiet: print nothing (`--json`).
    """

    def __init__(self, metric: str, *, quiet: bool = False) -> None:
        self.metric = metric
        width = None if sys.stdout.isatty() else PIPE_WIDTH
        self.console = Console(file=sys.stdout, quiet=quiet, highlight=False, width=width)
        self.is_live = self.console.is_terminal and not quiet

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to release."""

    def print_line(self, text: str) -> None:
        """Print a line without wrapping, so that paths and commands can be copied."""
        self.console.print(text, markup=False, soft_wrap=True)

    def print_sentence(self, text: str) -> None:
        """Print a sentence; on a screen it is wrapped."""
        self.console.print(text, markup=False, soft_wrap=not self.console.is_terminal)

    def print_table(self, table: RenderableType) -> None:
        """Print a table."""
        self.console.print(table)

    def teacher_epoch(self, metrics: Mapping[str, float], network: str = "") -> bool:
        """Print progress of fitting a teacher; return True, which continues the fit."""
        epoch = int(metrics["epoch"])
        if epoch == 1 or epoch % 10 == 0:
            named = f"the teacher {network}".rstrip()
            self.print_line(f"fitting {named}: epoch {epoch}, {epoch_score(metrics)} on val")
        return True
