"""Copy MLflow's PostgreSQL database, with its runs and registered models, to a folder or bucket, and back.

    python deploy/mlflow_backup.py dump    s3://BUCKET/heterokd/backups [--every HOURS] [--keep 30]
    python deploy/mlflow_backup.py restore s3://BUCKET/heterokd/backups [--file NAME] [--if-empty] [--wait SECONDS]

The database's URI is read from MLFLOW_BACKEND_STORE_URI. `pg_dump` and `pg_restore` must not be older than the server.
Artifacts (models, pictures) are in the bucket already. A dump is a single consistent snapshot, also while the server
works; a restore is a single transaction, and refuses a database that holds tables.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from pyarrow import fs
from sqlalchemy.engine import URL, make_url

PREFIX, SUFFIX = "mlflow-", ".dump"
RETRY_SECONDS = 60


class BackupError(Exception):
    """What went wrong, as a sentence for the user."""


def database(environment: Mapping[str, str]) -> URL:
    """Return the address of MLflow's database.

    Raises:
        BackupError: if it is not set, or is no PostgreSQL database.
    """
    uri = environment.get("MLFLOW_BACKEND_STORE_URI", "")
    if not uri.startswith("postgresql"):
        raise BackupError(
            "MLFLOW_BACKEND_STORE_URI is no address of a PostgreSQL database; set it to the MLflow server's"
        )
    return make_url(uri)


def run(program: str, *arguments: str, url: URL) -> str:
    """Run a program of PostgreSQL on a database and return what it prints; the password is in no command line.

    Raises:
        BackupError: if it fails, with its message.
    """
    where = {"PGHOST": url.host, "PGPORT": url.port, "PGUSER": url.username, "PGPASSWORD": url.password}
    environment = {**os.environ, **{name: str(value) for name, value in where.items() if value is not None}}
    try:
        command = [program, *arguments, f"--dbname={url.database}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise BackupError(f"{program} is not installed: install postgresql-client") from error
    if done.returncode:
        raise BackupError(f"{program} failed: {done.stderr.strip()}")
    return done.stdout


def listed(folder: str) -> tuple[fs.FileSystem, str, list[str]]:
    """Return a folder's file system, its path there, and the names of its backups, oldest first."""
    filesystem, path = fs.FileSystem.from_uri(folder if "://" in folder else Path(folder).absolute().as_uri())
    found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    names = sorted(info.base_name for info in found if info.base_name.startswith(PREFIX))
    return filesystem, path, [name for name in names if name.endswith(SUFFIX)]


def dump(url: URL, folder: str, keep: int, now: datetime) -> str:
    """Write a backup, remove all but the newest `keep`, and return the backup's name."""
    filesystem, path, names = listed(folder)
    name = f"{PREFIX}{now:%Y%m%dT%H%M%SZ}{SUFFIX}"
    with tempfile.TemporaryDirectory() as scratch:
        local = str(Path(scratch) / name)
        run("pg_dump", "--format=custom", "--no-owner", "--no-privileges", f"--file={local}", url=url)
        filesystem.create_dir(path)
        # A file of this name is always whole: an object appears at its end, and a local file is renamed.
        fs.copy_files(
            local, f"{path}/.{name}", source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem
        )
        filesystem.move(f"{path}/.{name}", f"{path}/{name}")
    for old in [*names, name][:-keep]:
        filesystem.delete_file(f"{path}/{old}")
    return name


def tables(url: URL, wait: float) -> int:
    """Count the tables of a database that may still be starting.

    Raises:
        BackupError: if it does not answer within `wait` seconds.
    """
    query = "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'"
    until = time.monotonic() + wait
    while True:
        try:
            return int(run("psql", "--no-psqlrc", "--tuples-only", "--no-align", f"--command={query}", url=url))
        except BackupError:
            if time.monotonic() > until:
                raise
            time.sleep(1)


def restore(url: URL, folder: str, name: str | None) -> str:
    """Fill an empty database from a backup, the newest if none is named, and return its name.

    Raises:
        BackupError: if there is no such backup, or it cannot be read.
    """
    filesystem, path, names = listed(folder)
    if name not in names and (name or not names):
        raise BackupError(
            f"{folder} holds no backup{f' {name}' if name else ''}; it holds {', '.join(names) or 'none'}"
        )
    name = name or names[-1]
    with tempfile.TemporaryDirectory() as scratch:
        local = str(Path(scratch) / name)
        fs.copy_files(
            f"{path}/{name}", local, source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem()
        )
        run("pg_restore", "--exit-on-error", "--single-transaction", "--no-owner", "--no-privileges", local, url=url)
    return name


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Back up and restore MLflow's PostgreSQL database.")
    commands = parser.add_subparsers(dest="command", required=True)
    dumping = commands.add_parser("dump", help="write a backup")
    dumping.add_argument("--every", type=float, help="hours between two backups; without it, a single backup")
    dumping.add_argument("--keep", type=int, default=30, help="older backups are removed (default 30)")
    restoring = commands.add_parser("restore", help="fill an empty database")
    restoring.add_argument("--file", help="name of a backup; the newest if not given")
    restoring.add_argument("--if-empty", action="store_true", help="do nothing if there are tables, or no backup")
    restoring.add_argument("--wait", type=float, default=0.0, help="seconds in which the database may start")
    for command in (dumping, restoring):
        command.add_argument("folder", help="s3://, gs:// or a path")
    given = parser.parse_args(arguments)
    if given.command == "dump" and given.keep < 1:
        parser.error("--keep must be at least 1")
    return given


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    given = parsed(arguments)
    try:
        url = database(os.environ)
        if given.command == "restore":
            filled = tables(url, given.wait)
            if filled and not given.if_empty:
                raise BackupError(f"the database {url.database} holds {filled} tables; restore into an empty database")
            if given.if_empty and (filled or not listed(given.folder)[2]):
                print(
                    "nothing restored: " + (f"the database holds {filled} tables" if filled else "there is no backup")
                )
                return 0
            print(f"restored {restore(url, given.folder, given.file)}")
            return 0
        while True:
            try:
                print(f"wrote {given.folder}/{dump(url, given.folder, given.keep, datetime.now(UTC))}", flush=True)
                pause = given.every * 3600 if given.every else 0.0
            except (BackupError, OSError) as error:
                if given.every is None:
                    raise
                print(f"mlflow_backup.py: {error}; next attempt in {RETRY_SECONDS} s", file=sys.stderr, flush=True)
                pause = RETRY_SECONDS
            if given.every is None:
                return 0
            time.sleep(pause)
    except (BackupError, OSError) as error:
        print(f"mlflow_backup.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
