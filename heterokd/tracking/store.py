"""Open MLflow's tracking store: a SQLite file by default."""

from __future__ import annotations

import http.client
import logging
import os
import sqlite3
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.entities import PagedList
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from heterokd.errors import TrackingError, without_password
from heterokd.storage.machine_load import Load, machine_load, under_load
from heterokd.storage.sqlite_url import mlflow_sqlite_uri
from heterokd.storage.workspace import Workspace
from heterokd.tracking.relocate import relocate

T = TypeVar("T")

PROBE_SECONDS = 3.0
"""Timeout of a tracking server's health check, in seconds; longer on a busy machine."""


def open_store(root: Workspace, uri: str | None) -> str:
    """Open the tracking store, create it if needed, and return its URI; safe to call again and from several processes.

    The workspace's store is changed if the workspace was moved or copied, see `relocate`.

    Args:
        root: its `mlflow.db` is used if neither `uri` nor `MLFLOW_TRACKING_URI` names a store. (MLflow's default
            depends on the current folder, so it is never used.)
        uri: `sqlite:///FILE`, another database, or a tracking server (`http://...`).

    Raises:
        TrackingError: the store does not answer, is damaged, is of another MLflow version, or is a folder.
    """
    of_environment = None if uri else os.environ.get("MLFLOW_TRACKING_URI")
    key = "MLFLOW_TRACKING_URI" if of_environment else "tracking.uri"
    uri = uri or of_environment or mlflow_sqlite_uri(root.mlflow_database.resolve())
    scheme = uri.split(":", 1)[0].split("+", 1)[0]
    if scheme in ("http", "https"):
        uri = uri.rstrip("/")
        probe(uri, key)
        return uri
    if scheme == "sqlite":
        return _open_sqlite(uri, root, key)
    if scheme in ("postgresql", "mysql", "mssql"):
        with _usable(uri, key):
            make_url(uri).get_dialect().import_dbapi()  # before the lock, which creates the workspace
        _initialise(uri, root.path / "mlflow.lock", key)
        return uri
    if scheme == "databricks":
        check_access(uri, key)
        return uri
    raise TrackingError(
        f"{key}: {without_password(uri)} is not a database or a server (MLflow no longer keeps runs in plain "
        "folders); give sqlite:///FILE or http://HOST:PORT"
    )


def existing_store(root: Workspace, uri: str | None) -> str:
    """Open an existing store; return its URI, as `open_store` does.

    Args:
        root: its `mlflow.db` is used if neither `uri` nor `MLFLOW_TRACKING_URI` names a store.
        uri: the experiment's `tracking.uri`, or None.

    Raises:
        TrackingError: there is no store yet, or it cannot be used.
    """
    if uri is None and not os.environ.get("MLFLOW_TRACKING_URI") and not root.mlflow_database.is_file():
        raise TrackingError(
            f"{root.mlflow_database}: there is no MLflow store yet; `heterokd search EXPERIMENT` makes it, or name "
            "another folder (--root) or store (MLFLOW_TRACKING_URI)"
        )
    return open_store(root, uri)


def _open_sqlite(uri: str, root: Workspace, key: str) -> str:
    name = make_url(uri).database
    if not name or name == ":memory:":
        raise TrackingError(f"{key}: {uri} names no file; give sqlite:///FILE")
    database = Path(name).resolve()
    if database.is_dir() or not _may_be_sqlite(database):
        raise TrackingError(f"{key}: {database} is no SQLite database; give another file")
    uri = mlflow_sqlite_uri(database)
    lock = database.with_name(f"{database.name}.lock")
    _initialise(uri, lock, key, database)
    if database == root.mlflow_database.resolve():
        with FileLock(lock):
            relocate(root)
    return uri


def _may_be_sqlite(database: Path) -> bool:
    if not database.is_file():
        return True
    with database.open("rb") as file:
        return file.read(6) in (b"", b"SQLite")


def _initialise(uri: str, lock: Path, key: str, database: Path | None = None) -> None:
    """Create the tables under a lock: two processes at once would break a new database permanently."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with _usable(uri, key), FileLock(lock), quiet():
        MlflowClient(uri).search_experiments(max_results=1)
        if database is not None:
            with closing(sqlite3.connect(database)) as connection:
                # A property of the file, set once; readers such as the UI then do not block the writer.
                connection.execute("PRAGMA journal_mode=WAL")


@contextmanager
def _usable(uri: str, key: str) -> Iterator[None]:
    """Raise errors of a database as a `TrackingError` that names its key."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error, ImportError) as error:
        raise TrackingError(
            f"{key}: {without_password(uri)} cannot be used ({first_line(error)}); give another store, or, if "
            f"an older MLflow wrote it, run `mlflow db upgrade {without_password(uri)}`"
        ) from None


def probe(uri: str, key: str = "tracking.uri", load: Load = machine_load) -> None:
    """Check that a tracking server answers.

    Args:
        uri: of the server.
        key: key or environment variable that names it, for errors.
        load: load of this machine, on which the server may run.

    Raises:
        TrackingError: it does not answer within `PROBE_SECONDS`, more on a busy machine.
    """
    try:
        parts = urlsplit(uri)
        host = parts.netloc.rpartition("@")[2]
        address, timeout = f"{parts.scheme}://{host}{parts.path}/health", under_load(PROBE_SECONDS, load)
        with urllib.request.urlopen(address, timeout=timeout):
            return
    except urllib.error.HTTPError as error:
        # The server requires a password or has no such page, but it answers.
        error.close()
        if error.code < 500:
            return
        reason: object = error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
    raise TrackingError(
        f"{key}: the MLflow server at {without_password(uri)} does not answer ({reason}); start it, "
        "or leave tracking.uri and MLFLOW_TRACKING_URI out to log to a file"
    )


def check_access(uri: str, key: str = "tracking.uri") -> None:
    """Check that a tracking server accepts the credentials.

    Args:
        uri: of the server.
        key: key or environment variable that names it, for errors.

    Raises:
        TrackingError: it refuses, or does not answer.
    """
    try:
        # A single request, not retries for minutes.
        timeout = f"{under_load(PROBE_SECONDS):.0f}"
        limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": timeout}
        with _environment(**limits), quiet():
            MlflowClient(uri).search_experiments(max_results=1)
    except MlflowException as error:
        raise TrackingError(
            f"{key}: the MLflow server at {without_password(uri)} refused ({first_line(error)}); if it requires "
            "a login, set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        ) from None


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables within this block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def sent_once() -> Iterator[None]:
    """Send the requests within this block once.

    MLflow repeats a request whose answer is lost, which would create twice what the server did create. Whoever creates
    something reads the state again after an error instead.
    """
    with _environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0"):
        yield


def first_line(error: BaseException) -> str:
    """Return the first line of an exception, without the passwords that MLflow's messages repeat."""
    lines = without_password(str(error)).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence MLflow, alembic and torch.export except for errors; in the main thread, since filters are global."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic", "torch.export", "torch._export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def answering(uri: str) -> Iterator[None]:
    """Raise exceptions of the store as a `TrackingError`.

    Raises:
        TrackingError: the store does not answer or refuses.
    """
    try:
        if uri.startswith("http"):
            probe(uri)
        yield
    except (MlflowException, SQLAlchemyError) as error:
        raise TrackingError(
            f"tracking.uri: MLflow at {without_password(uri)} refused ({first_line(error)}); check the store, try again"
        ) from error


@contextmanager
def current(uri: str) -> Iterator[None]:
    """Make `uri` the store of MLflow's module-level functions within this block.

    MLflow also writes `MLFLOW_TRACKING_URI`, which would later be read as the user's choice.
    """
    with _environment(MLFLOW_TRACKING_URI=uri):
        mlflow.set_tracking_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # unsets it, which its annotation leaves out


def pages(search: Callable[[str | None], PagedList[T]]) -> Iterator[T]:
    """Iterate over all results of a paged MLflow search; `search` takes the page token."""
    token: str | None = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return
