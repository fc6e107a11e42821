"""Log of a search: warnings, failures and their tracebacks, in the study's folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

from heterokd.errors import HeterokdError, SearchError
from heterokd.execution.failure_cause import Cause, cause_of, fault_sentence
from heterokd.execution.ray_messages import DeathSentences, ray_messages
from heterokd.storage.study_dir import StudyFolder

MAX_BYTES = 1_000_000
"""Maximum size of the log; older lines are kept in a second file of the same size."""

search_log = logging.getLogger("heterokd.search_log")
"""Logger of what only the file keeps: the ends of trials' processes, and tracebacks."""

LOGGED = ("heterokd", "ray")
"""Loggers whose records the file keeps, too."""


class _DroppingFile(RotatingFileHandler):
    """A handler that makes its folder, and drops what cannot be written: a full disk must not end a search."""

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the name of logging's method
        """Drop a record."""


@contextmanager
def logged_to(folder: StudyFolder, max_bytes: int = MAX_BYTES) -> Iterator[Path]:
    """Append to the log of a study's search, which exists from the first record on; yield its file.

    Ray's errors are kept in the file alone, since they contain tracebacks, unless the level of heterokd's logger is
    DEBUG, as with `--debug`. A process that died is a sentence on the terminal.
    """
    file = folder.log_file
    handler = _DroppingFile(file, maxBytes=max_bytes, backupCount=1, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in LOGGED]
    # Python prints the warnings of loggers without handlers, and would not do so with the file's handler.
    printed = [] if loggers[0].hasHandlers() or logging.lastResort is None else [logging.lastResort]
    of_file_alone = (search_log, logging.getLogger("ray"))
    of_ray = list(of_file_alone[1].handlers)
    before = search_log.level, [logger.propagate for logger in of_file_alone]
    search_log.setLevel(logging.INFO)
    for logger in of_file_alone:
        logger.propagate = False  # MLflow adds a handler to the root logger, which prints
    for terminal in of_ray:
        of_file_alone[1].removeHandler(terminal)
    sentences = DeathSentences(folder)
    ray_messages.addHandler(sentences)
    shown = [logging.StreamHandler()] if loggers[0].isEnabledFor(logging.DEBUG) else []
    search_log.addHandler(handler)
    for logger in of_file_alone:
        for terminal in shown:
            logger.addHandler(terminal)
    for logger in loggers:
        logger.addHandler(handler)
    for terminal in printed:
        loggers[0].addHandler(terminal)
    try:
        yield file
    finally:
        ray_messages.removeHandler(sentences)
        for terminal in printed:
            loggers[0].removeHandler(terminal)
        for logger in of_file_alone:
            for terminal in shown:
                logger.removeHandler(terminal)
        for logger in (search_log, *loggers):
            logger.removeHandler(handler)
        search_log.setLevel(before[0])
        for terminal in of_ray:
            of_file_alone[1].addHandler(terminal)
        for logger, propagated in zip(of_file_alone, before[1], strict=True):
            logger.propagate = propagated
        handler.close()


@contextmanager
def faults_explained(folder: StudyFolder) -> Iterator[None]:
    """Record how a study's search ends, and replace the exceptions of faults by a sentence.

    An error of the user, or an interruption, before the study has begun leaves nothing.

    Raises:
        SearchError: the machine or Ray failed.
    """
    try:
        yield
    except KeyboardInterrupt:
        if folder.experiment_file.exists():
            search_log.info("interrupted")
        raise
    except HeterokdError as error:
        if folder.experiment_file.exists():
            search_log.info("ended", exc_info=error)
        raise
    except Exception as error:
        search_log.exception("failed")
        cause = cause_of(error)
        if cause == Cause.TRIAL:
            error.add_note(f"This traceback is also in {folder.log_file}")
            raise
        raise SearchError(
            f"{folder.path}: {fault_sentence(error)}; all results are kept, details are in {folder.log_file}, and "
            "--resume continues the search"
        ) from error
