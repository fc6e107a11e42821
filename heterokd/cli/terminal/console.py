"""Terminal: print lines and tables to a screen or a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console, RenderableType

from heterokd.formatting import epoch_score

PIPE_WIDTH = 140
"""Columns of output to a file or pipe."""


class Terminal:
    """Output of a command; with `quiet` (`--json`) it prints nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        width = None if sys.stdout.isatty() else PIPE_WIDTH
        self.console = Console(file=sys.stdout, quiet=quiet, highlight=False, width=width)
        self.is_live = self.console.is_terminal and not quiet

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
        if epoch <= 1 or epoch % 10 == 0:
            named = f"the teacher {network}".rstrip()
            what = f"epoch {epoch}" if epoch else "its classifier solved on frozen features"
            self.print_line(f"fitting {named}: {what}, {epoch_score(metrics)} on val")
        return True
