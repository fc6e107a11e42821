"""Stack of a process that ends by a signal of its own code, such as a segmentation fault.

Ray reports such an end like one by `kill -9`, which leaves no stack. A module without torch, which the driver imports.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CRASH_FILE = "crash.txt"
"""Name of the file in the trial's folder."""

HEAD = "Fatal Python error: "
"""What `faulthandler` writes before the name of the signal."""

STDERR = 2


@contextmanager
def crash_recorded(folder: Path) -> Iterator[None]:
    """Append the stack to `CRASH_FILE` in a folder if this process crashes; leave no file if it does not."""
    file = folder / CRASH_FILE
    try:
        output = file.open("ab")
    except OSError:  # a full or read-only disk: the training waits for it
        yield
        return
    with output:
        faulthandler.enable(output, all_threads=False)
        try:
            yield
        finally:
            faulthandler.enable(STDERR, all_threads=False)
            if not output.tell():
                file.unlink(missing_ok=True)


@dataclass
class Crashes:
    """Crashes of a trial's processes, from its file."""

    folder: Path
    seen: int = 0

    def skip(self) -> None:
        """Do not return what is there already."""
        self.seen = len(self._content())

    def new(self) -> str | None:
        """Return the name of the newest signal since the last call, or None."""
        content = self._content()
        new, self.seen = content[self.seen :], len(content)
        return next((line.removeprefix(HEAD) for line in reversed(new.splitlines()) if line.startswith(HEAD)), None)

    def _content(self) -> str:
        try:
            return (self.folder / CRASH_FILE).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
