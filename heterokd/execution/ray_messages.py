"""Ray's messages about processes that died: in the log of a search, with a sentence on the terminal.

Ray's driver prints these messages itself, whatever `log_to_driver` says, and `ray.init` removes the handlers of Ray's
logger. Both are undone here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from heterokd.errors import HeterokdError
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import TrialStatus

ray_messages = logging.getLogger("ray.messages")
"""Logger of what Ray's processes report to the driver."""

DIED = re.compile(r"A worker died or was killed.*?Worker PID: (\d+)", re.DOTALL)
"""Ray's message about a process that ended while it worked."""

logger = logging.getLogger(__name__)


Printing = Callable[[Mapping[str, Any], bool], None]
"""Prints lines of Ray's processes, or of workers, to the driver's terminal."""


def logging_messages(printing: Printing) -> Printing:
    """Return a function for `ray._private.worker.print_to_stdstream` that logs the messages of Ray's processes.

    Args:
        printing: Ray's function, which prints the output of workers as before (`log_to_driver` of a caller's Ray).
    """

    def log(data: Mapping[str, Any], ignore_prefix: bool) -> None:
        if data.get("pid") != "raylet":
            printing(data, ignore_prefix)
            return
        for line in data["lines"]:
            ray_messages.warning("%s", line)

    return log


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Keep the handlers of Ray's logger, such as that of a log, over `ray.init`; not those that print for Ray."""
    ray_logger = logging.getLogger("ray")
    kept = [handler for handler in ray_logger.handlers if type(handler).__module__.partition(".")[0] != "ray"]
    try:
        yield
    finally:
        for handler in kept:
            ray_logger.addHandler(handler)  # nothing happens if it is still there


class DeathSentences(logging.Handler):
    """Logs a sentence for each process that died, except for trials, of which `TuneCallback` says more."""

    def __init__(self, folder: StudyFolder) -> None:
        """Explain the deaths of a study's processes."""
        super().__init__()
        self._folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        """Log the sentence if the record is about a process that died."""
        died = DIED.search(record.getMessage())
        if died is None or self._is_of_trial(int(died[1])):
            return
        logger.warning(
            "a process of the search (%s) died (killed, a crash, or out of memory); it is started again, details are "
            "in %s",
            died[1],
            self._folder.log_file,
        )

    def _is_of_trial(self, pid: int) -> bool:
        for trial in self._folder.trials():
            with suppress(HeterokdError, OSError):  # a damaged file is named by what needs it
                snapshot = trial.snapshot
                if snapshot.pid == pid and snapshot.status == TrialStatus.RUNNING:
                    return True
        return False
