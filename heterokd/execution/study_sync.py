"""Sync a study between the driver's disk and an object store.

The study's database is SQLite and stays on the driver's disk; a consistent copy is stored at each trial's start and
end. A driver that starts on another machine takes the copy; a driver that starts where the last driver ran takes the
newer of the two. Trials that are in neither are recovered from their folders.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from heterokd.execution.ray_settings import Trial, tune
from heterokd.storage.sqlite_url import sqlite_file_uri
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.workspace import DATABASES, HEAVY, OF_TUNE, Workspace

logger = logging.getLogger(__name__)

_ROWS = (
    "SELECT (SELECT count(*) FROM trials) + (SELECT count(*) FROM trials WHERE state != 'RUNNING') "
    "+ (SELECT count(*) FROM trial_intermediate_values) + (SELECT count(*) FROM trial_user_attributes)"
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


def upload_study(root: Workspace, folder: StudyFolder, *, patiently: bool = False) -> None:
    """Copy the driver's files of a study to the store.

    Args:
        root: where state lives.
        folder: the study's folder.
        patiently: retry while the store does not answer.

    Raises:
        OSError: it did not answer in time; everything is kept on this machine.
    """
    if root.url is None:
        return
    mirror = root.mirror(folder.path)
    if folder.database.exists() and mirror.store is not None:
        copy = folder.path / f".{folder.database.name}.copy"
        with closing(sqlite3.connect(folder.database)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        mirror.store.copy_from(copy, folder.database.name)
        copy.unlink()
    skip = ("trials", *OF_TUNE, *DATABASES)
    if patiently:
        mirror.close(skip=skip)
    else:
        mirror.push(skip=skip)


def row_count(database: Path) -> int:
    """Count the rows of a study's database: it only grows, so the larger count belongs to the newer copy."""
    try:
        with closing(sqlite3.connect(sqlite_file_uri(database), uri=True)) as connection:
            return int(connection.execute(_ROWS).fetchone()[0])
    except sqlite3.Error:
        return -1


class FromStore(tune.Callback):  # type: ignore[misc]  # Ray is not fully typed
    """On each event, fetch the trial's files and store the study's, before other callbacks run."""

    def __init__(self, root: Workspace, folder: StudyFolder) -> None:
        self.root, self.folder = root, folder

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, int], **_: object
    ) -> None:
        """Handle a trial that started, reached a rung, or finished."""
        if self.root.url is None:
            return
        mirror = self.root.mirror(self.folder.trial(int(result["number"])).path)
        mirror.patience = 0.0
        try:
            mirror.fetch(without=HEAVY)
            if result.get("finished") or not result["epoch"]:
                upload_study(self.root, self.folder)
        except OSError as error:
            logger.warning("%s does not answer (%s); the next event catches up", self.root, error)

    def __getstate__(self) -> dict[str, object]:
        return {}
