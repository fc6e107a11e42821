"""Terminal: print lines, tables and the progress of a fit to a screen or a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.cells import set_cell_size
from rich.console import Console, RenderableType

from heterokd.formatting import epoch_score, format_duration

PIPE_WIDTH = 140
"""Columns of output to a file or pipe."""

QUIET_SECONDS = 3.0
"""Least time between two lines of progress in a file or pipe."""
SLOW_SECONDS = 30.0
"""Time after which an epoch of a fit is a line there, whatever its number; otherwise every tenth epoch is."""

BAR = 24
"""Columns of a bar of progress."""


class Terminal:
    """Output of a command; with `quiet` (`--json`) it prints nothing.

    Args:
        quiet: print nothing.
        fit_epochs: epochs of a whole fit of a teacher, for its bar; 0 if they are unknown.
        seconds: clock.
        file: where to print; None: standard output.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        fit_epochs: int = 0,
        seconds: Callable[[], float] = time.monotonic,
        file: TextIO | None = None,
    ) -> None:
        file = file or sys.stdout
        width = None if file.isatty() else PIPE_WIDTH
        self.console = Console(file=file, quiet=quiet, highlight=False, width=width)
        self.is_live = self.console.is_terminal and not quiet
        self.fit_epochs, self.seconds = fit_epochs, seconds
        self._has_status = False
        self._fit_began = self._fit_shown = float("-inf")

    def print_line(self, text: str) -> None:
        """Print a line without wrapping, so that paths and commands can be copied."""
        self.clear_status()
        self.console.print(text, markup=False, soft_wrap=True)

    def print_sentence(self, text: str) -> None:
        """Print a sentence; on a screen it is wrapped."""
        self.clear_status()
        self.console.print(text, markup=False, soft_wrap=not self.console.is_terminal)

    def print_table(self, table: RenderableType) -> None:
        """Print a table."""
        self.clear_status()
        self.console.print(table)

    def show_status(self, text: str) -> None:
        """Show a line on a screen until the next output, in place of the last one; nothing elsewhere."""
        if self.is_live:
            shown = set_cell_size(text, min(len(text), self.console.width - 1)).rstrip()
            self.console.file.write(f"\r\x1b[2K{shown}")
            self.console.file.flush()
            self._has_status = True

    def clear_status(self) -> None:
        """Remove the line of `show_status`."""
        if self._has_status:
            self.console.file.write("\r\x1b[2K")
            self._has_status = False

    def teacher_epoch(self, metrics: Mapping[str, float], network: str = "") -> bool:
        """Show progress of fitting a teacher: a bar on a screen, elsewhere a line now and then.

        Returns True, which continues the fit.
        """
        epoch, now = int(metrics["epoch"]), self.seconds()
        named = f"fitting the teacher {network}".rstrip()
        if epoch <= 1:
            self._fit_began, self._fit_shown = now, float("-inf")
        is_last = 0 < epoch == self.fit_epochs
        if self.is_live and epoch > 1 and not is_last:
            self.show_status(f"{named} {self._bar(epoch, now)}{epoch_score(metrics)} on val")
        elif epoch <= 1 or is_last or now - self._fit_shown >= (SLOW_SECONDS if epoch % 10 else QUIET_SECONDS):
            what = f"epoch {epoch}" if epoch else "its classifier solved on frozen features"
            self.print_line(f"{named}: {what}, {epoch_score(metrics)} on val")
            self._fit_shown = now
        return True

    def _bar(self, epoch: int, now: float) -> str:
        """Return a bar with the time left; the fit may stop earlier at a plateau."""
        if epoch > self.fit_epochs:
            return f"epoch {epoch}, "
        full = round(BAR * epoch / self.fit_epochs)
        left = (now - self._fit_began) / (epoch - 1) * (self.fit_epochs - epoch)
        time_left = f", at most {format_duration(left)} left" if left >= 1 else ""
        return f"{'█' * full}{'░' * (BAR - full)} {epoch}/{self.fit_epochs}{time_left}, "
