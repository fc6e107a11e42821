"""Artifact locations of a workspace that was moved or copied.

MLflow records absolute paths. When a workspace is opened at another place than its store records, the records are
changed to the present place: otherwise artifacts would be searched, and written, at the old place.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from heterokd.errors import StudyError, TrackingError
from heterokd.storage.files import read_json
from heterokd.storage.machine_load import under_load
from heterokd.storage.workspace import Workspace

RECORDS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables and columns of MLflow's store that hold locations of artifacts."""

LOCK_SECONDS = 60
"""Timeout for another process's lock on the database; longer on a busy machine."""

logger = logging.getLogger(__name__)


def local_path(location: str | None) -> Path | None:
    """Return the path of an artifact location; None if it is not on this machine."""
    if not location:
        return None
    parts = urlsplit(location)
    if parts.scheme == "file" and not parts.netloc:
        return Path(unquote(parts.path))
    return Path(location) if location.startswith("/") else None


def relocate(root: Workspace) -> list[str]:
    """Change the artifact locations in the workspace's store to the present place, if it was moved or copied.

    A recorded folder counts as this workspace's earlier place if its runs, models or studies are in this workspace:
    workspaces that share the store keep their folders.

    Returns:
        The earlier locations; empty if nothing was changed.

    Raises:
        TrackingError: the store is damaged, or cannot be changed.
    """
    here = root.artifacts.resolve()
    # The caller holds the store's lock.
    timeout = under_load(LOCK_SECONDS)
    with closing(sqlite3.connect(root.mlflow_database, timeout=timeout, isolation_level=None)) as store:
        try:
            earlier = [old for old in _other_locations(store, here) if _was_here(store, old, root)]
        except sqlite3.Error as error:
            raise TrackingError(
                f"{root.mlflow_database}: is damaged ({error}); restore it from a backup, or move it away, and "
                "`heterokd search EXPERIMENT --resume` logs the study again"
            ) from None
        place = None
        try:
            for place in earlier:
                _update(store, place, here)
            _keep_default_inside(store, here)
        except sqlite3.Error as error:
            raise TrackingError(
                f"{root.mlflow_database}: records artifacts in {place}, but the workspace is in {root.path.resolve()}, "
                f"and the record cannot be changed ({error}); make the file writable, or move the workspace back"
            ) from None
    return earlier


def _other_locations(store: sqlite3.Connection, here: Path) -> list[str]:
    """Return the artifact folders of experiments that are called as a workspace's and are not `here`."""
    rows = store.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
    found = ((location, local_path(location)) for (location,) in rows)
    return [location for location, path in found if path is not None and path != here and path.name == here.name]


def _was_here(store: sqlite3.Connection, old: str, root: Workspace) -> bool:
    """Whether the folders of an artifact location's runs, models or studies are in the workspace."""
    inside = "experiment_id IN (SELECT experiment_id FROM experiments WHERE artifact_location = ?)"
    runs = [row[0] for row in store.execute(f"SELECT run_uuid FROM runs WHERE {inside}", (old,))]
    models = [row[0] for row in store.execute(f"SELECT model_id FROM logged_models WHERE {inside}", (old,))]
    folders = [root.artifacts / run for run in runs] + [root.artifacts / "models" / model for model in models]
    if not folders or any(folder.is_dir() for folder in folders):
        return True
    tagged = (
        "SELECT DISTINCT value FROM tags WHERE key = 'heterokd.study_id' AND run_uuid IN "
        f"(SELECT run_uuid FROM runs WHERE {inside})"
    )
    return not set(_study_ids(root)).isdisjoint(row[0] for row in store.execute(tagged, (old,)))


def _study_ids(root: Workspace) -> Iterator[str]:
    for file in root.path.glob("studies/*/tracking.json"):
        try:
            yield str(read_json(file).get("study_id"))
        except StudyError:
            continue


def _update(store: sqlite3.Connection, old: str, here: Path) -> None:
    """Replace a location, and all locations below it, in a single transaction."""
    new, counts = here.as_uri(), {}
    store.execute("BEGIN IMMEDIATE")
    try:
        for table, column in RECORDS:
            changed = store.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
            )
            counts[f"{table}.{column}"] = changed.rowcount
        store.execute("COMMIT")
    except sqlite3.Error:
        store.execute("ROLLBACK")
        raise
    logger.warning(
        "the workspace was moved or copied: MLflow's artifact locations were changed from %s to %s (%s)",
        local_path(old),
        here,
        json.dumps(counts),
    )
    before = local_path(old)
    left = [] if before is None else _only_there(store, before, here)
    if left:
        logger.warning(
            "%d artifact folders are only in %s, for example %s; copy them to %s", len(left), before, left[0], here
        )


def _only_there(store: sqlite3.Connection, before: Path, here: Path) -> list[str]:
    """Return the artifact folders of runs and models that exist at the earlier place only."""
    names = [row[0] for row in store.execute("SELECT run_uuid FROM runs")]
    names += [f"models/{row[0]}" for row in store.execute("SELECT model_id FROM logged_models")]
    return [name for name in names if (before / name).is_dir() and not (here / name).is_dir()]


def _keep_default_inside(store: sqlite3.Connection, here: Path) -> None:
    """Move the unused experiment `Default`, for which MLflow records a folder in the working directory, to `here`."""
    unused = "experiment_id = 0 AND NOT EXISTS (SELECT 1 FROM runs WHERE runs.experiment_id = 0)"
    new = f"{here.as_uri()}/0"
    found = store.execute(f"SELECT artifact_location FROM experiments WHERE {unused}").fetchone()
    if found is not None and found[0] != new:
        store.execute(f"UPDATE experiments SET artifact_location = ? WHERE {unused}", (new,))


def check_location(location: str | None, artifacts: Path, study: Path, study_id: str) -> None:
    """Refuse an MLflow experiment that would write a moved or copied study's artifacts to its earlier place.

    This happens with a store outside of the workspace, whose records are not changed.

    Args:
        location: the experiment's artifact location.
        artifacts: artifact folder of the workspace.
        study: the study's folder.
        study_id: the study's id.

    Raises:
        TrackingError: the location does not exist any more, or belongs to the study's original.
    """
    recorded = local_path(location)
    if recorded is None or recorded == artifacts.resolve() or recorded.name != artifacts.name:
        return
    original = recorded.parent / "studies" / study.name
    is_copy = (
        original.is_dir()
        and not original.samefile(study)
        and read_json(original / "tracking.json").get("study_id") == study_id
    )
    if is_copy or not recorded.parent.is_dir():
        raise TrackingError(
            f"tracking.experiment: MLflow records the artifacts of this study in {recorded}, but the study is in "
            f"{study.resolve()} now; move it back, or choose another tracking.experiment"
        )
