"""Sync a study between the driver's disk and an object store.

Trials store their folders before they report: these are the truth. The study's database is SQLite and stays on the
driver's disk; a consistent copy is stored at most once a minute. A driver that starts on another machine takes the
copy; a driver that starts where the last driver ran takes the newer of the two. What is in neither is read from the
trials' folders (`study.storage`).
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from heterokd.storage.filesystem import RemoteDir
from heterokd.storage.sqlite_url import sqlite_file_uri
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.sync import FolderSync
from heterokd.storage.workspace import DATABASES, HEAVY, OF_TUNE, Workspace

logger = logging.getLogger(__name__)

UPLOAD_SECONDS = 60.0
"""Minimum interval of the uploads of the study's files, which grow with the study."""

RETRY_SECONDS = 5.0
"""Interval of the attempts while the store does not answer."""

FETCHERS = 8
"""Trials whose files are fetched at a time."""

Event = Literal["start", "report", "finish"]
"""What a trial did."""

Arrived = tuple[Event, TrialFolder]
"""An event whose files are on the driver's disk."""

_ROWS = (
    "SELECT (SELECT count(*) FROM trials) + (SELECT count(*) FROM trials WHERE state != 'RUNNING') "
    "+ (SELECT count(*) FROM trial_intermediate_values) + (SELECT count(*) FROM trial_user_attributes) "
    "+ (SELECT coalesce(sum(json_array_length(value_json)), 0) FROM study_user_attributes WHERE key = 'changes')"
)


def download_study(root: Workspace, folder: StudyFolder) -> None:
    """Fetch a study from the store before its search starts or resumes.

    Raises:
        OSError: the store does not answer.
    """
    if root.url is None:
        return
    root.fetch_study(folder.name)
    store = root.mirror(folder.path).store
    if store is None or not store.exists(folder.database.name):
        return
    copy = folder.path / f".{folder.database.name}.fetched"
    store.copy_to(folder.database.name, copy)
    if folder.database.exists() and row_count(folder.database) >= row_count(copy):
        copy.unlink()
        return
    for name in DATABASES[1:]:
        (folder.path / name).unlink(missing_ok=True)
    os.replace(copy, folder.database)


NOT_PUSHED = ("trials", *OF_TUNE, *DATABASES)
"""Files and folders of a study that others upload, or that are uploaded as a copy."""


def upload_study(root: Workspace, folder: StudyFolder) -> None:
    """Copy the driver's files of a study to the store, waiting for a store that does not answer.

    Args:
        root: where state lives.
        folder: the study's folder.

    Raises:
        OSError: it did not answer in time; everything is kept on this machine.
    """
    if root.url is None:
        return
    mirror = root.mirror(folder.path)
    assert mirror.store is not None
    _upload_database(folder, mirror.store)
    mirror.close(skip=NOT_PUSHED)


def _upload_database(folder: StudyFolder, store: RemoteDir) -> None:
    if not folder.database.exists():
        return
    copy = folder.path / f".{folder.database.name}.copy"
    with closing(sqlite3.connect(folder.database)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    store.copy_from(copy, folder.database.name)
    copy.unlink()


def row_count(database: Path) -> int:
    """Count the rows of a study's database: it only grows, so the larger count belongs to the newer copy."""
    try:
        with closing(sqlite3.connect(sqlite_file_uri(database), uri=True)) as connection:
            return int(connection.execute(_ROWS).fetchone()[0])
    except sqlite3.Error:
        return -1


class TrialEvents(Protocol):
    """Events of trials, from Ray Tune's loop to those who read the trials' files on the driver's disk."""

    def put(self, event: Event, trial: TrialFolder) -> None:
        """Add an event."""

    def take(self) -> list[Arrived]:
        """Return the events whose files are on the driver's disk, in the order of each trial; without waiting."""

    def close(self) -> None:
        """Wait for the files of all events, which `take` then returns, and end the threads."""


class LocalEvents:
    """Events of trials that write to the driver's disk, or to one that it mounts."""

    def __init__(self) -> None:
        self._arrived: list[Arrived] = []

    def put(self, event: Event, trial: TrialFolder) -> None:
        """See `TrialEvents`."""
        self._arrived.append((event, trial))

    def take(self) -> list[Arrived]:
        """See `TrialEvents`."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def close(self) -> None:
        """See `TrialEvents`."""


def trial_events(root: Workspace, folder: StudyFolder) -> TrialEvents:
    """Return the events of a study's trials, by whether the workspace is a store."""
    store = root.mirror(folder.path).store
    return LocalEvents() if store is None else StoreEvents(folder, store)


class StoreEvents:
    """Events of trials that write to a store: threads fetch their files, and upload the study's.

    An event costs the requests of its trial's few files, however many trials there are, and Ray Tune's loop waits for
    none of them. If the store does not answer, events wait until it does.

    Args:
        folder: the study's folder on the driver's disk.
        store: the study's folder in the store.
        interval: minimum seconds between two uploads of the study's files.
        retry: seconds between two attempts while the store does not answer.
    """

    def __init__(
        self, folder: StudyFolder, store: RemoteDir, *, interval: float = UPLOAD_SECONDS, retry: float = RETRY_SECONDS
    ) -> None:
        self._folder, self._store, self._retry = folder, store, retry
        self._own = FolderSync(folder.path, store, patience=0.0)
        self._changed = threading.Condition()
        self._waiting: dict[int, list[Arrived]] = {}
        self._fetching: set[int] = set()
        self._arrived: list[Arrived] = []
        self._is_closing = self._is_silent = self._has_news = False
        works: list[Callable[[], None]] = [self._fetch_trials] * FETCHERS
        works.append(lambda: self._upload_at_times(interval))
        self._threads = [threading.Thread(target=work, name="store", daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def put(self, event: Event, trial: TrialFolder) -> None:
        """See `TrialEvents`."""
        with self._changed:
            self._waiting.setdefault(trial.number, []).append((event, trial))
            self._has_news = True
            self._changed.notify_all()

    def take(self) -> list[Arrived]:
        """See `TrialEvents`."""
        with self._changed:
            arrived, self._arrived = self._arrived, []
        return arrived

    def close(self) -> None:
        """See `TrialEvents`. The study's files are uploaded once more."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _next_trial(self) -> int | None:
        """Return a trial whose files are fetched next, or None at the end."""
        with self._changed:
            while True:
                number = next((number for number in self._waiting if number not in self._fetching), None)
                if number is not None:
                    self._fetching.add(number)
                    return number
                if self._is_closing and not self._waiting:
                    return None
                self._changed.wait()

    def _fetch_trials(self) -> None:
        while (number := self._next_trial()) is not None:
            with self._changed:
                events = self._waiting[number]
                known = len(events)
            is_fetched = self._answers(partial(self._fetch, number))
            with self._changed:
                if is_fetched or self._is_closing:
                    self._arrived += events[:known]
                    del events[:known]
                    if not events:
                        del self._waiting[number]
                else:
                    self._changed.wait_for(lambda: self._is_closing, self._retry)
                self._fetching.discard(number)
                self._changed.notify_all()

    def _fetch(self, number: int) -> None:
        trial = self._folder.trial(number)
        name = trial.path.relative_to(self._folder.path).as_posix()
        FolderSync(trial.path, self._store.at(name), patience=0.0).fetch(without=HEAVY)

    def _upload_at_times(self, interval: float) -> None:
        is_last = False
        while not is_last:
            with self._changed:
                self._changed.wait_for(lambda: self._has_news or self._is_closing)
                self._has_news, is_last = False, self._is_closing
            if not self._answers(self._upload):
                self._has_news = True
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing, interval)

    def _upload(self) -> None:
        _upload_database(self._folder, self._store)
        self._own.close(skip=NOT_PUSHED)

    def _answers(self, request: Callable[[], None]) -> bool:
        """Whether a request to the store succeeds; otherwise a warning is logged, once until one succeeds again."""
        try:
            request()
        except Exception as error:  # noqa: BLE001  it would end the thread, and the search would wait for its events
            if not self._is_silent:
                logger.warning("%s does not answer (%s); it is tried again", self._store, error)
            self._is_silent = True
            return False
        self._is_silent = False
        return True
