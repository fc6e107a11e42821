"""Terminal: says lines, on a screen or into a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console, RenderableType

from heterokd.formatting import epoch_score

PIPE_WIDTH = 140
"""Columns where nobody says how many there are: a log file."""


class Terminal:
    """Says what a command does. Use as a context manager.

    Args:
        metric: what is searched for.
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
        """Nothing is held."""

    def say(self, text: str) -> None:
        """One line, as long as it is: a path or a command can be copied."""
        self.console.print(text, markup=False, soft_wrap=True)

    def tell(self, text: str) -> None:
        """A sentence: on a screen, broken between words."""
        self.console.print(text, markup=False, soft_wrap=not self.console.is_terminal)

    def show(self, table: RenderableType) -> None:
        """A table."""
        self.console.print(table)

    def teacher_epoch(self, metrics: Mapping[str, float], network: str = "") -> bool:
        """Progress of the fit of the teacher, or of this one of several; never asks it to stop."""
        epoch = int(metrics["epoch"])
        if epoch == 1 or epoch % 10 == 0:
            named = f"the teacher {network}".rstrip()
            self.say(f"fitting {named}: epoch {epoch}, {epoch_score(metrics)} on val")
        return True
