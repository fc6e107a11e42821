"""Folders on a local disk, a shared mount, s3:// or gs://.

Writes are atomic: a local file is written under a temporary name, synced to the disk and renamed; an object store shows
an object only after its upload is complete. Errors of the disk or the store are raised as OSError.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs
from pyarrow.lib import ArrowException

from heterokd.errors import ConfigError
from heterokd.storage.files import PARTIAL, replacing

ABANDONED_SECONDS = 24 * 3600.0
"""Age at which a partial file of another machine counts as abandoned, since its process cannot be checked."""

GS_RETRIES = timedelta(seconds=30)
"""Time in which requests to gs:// are repeated. Google's client repeats them for a quarter of an hour, also where there
are no credentials."""

COPY_BYTES = 8 * 1024**2
"""Bytes per read of a copy."""


@dataclass(frozen=True)
class StoredFile:
    """A file: its name relative to the folder, its size in bytes and its modification time in seconds since 1970."""

    name: str
    size: int
    modified: float


@dataclass(frozen=True)
class RemoteDir:
    """A folder that need not exist yet; names are relative to it and use `/`.

    Attributes:
        filesystem: pyarrow filesystem.
        path: path of the folder on it.
    """

    filesystem: fs.FileSystem
    path: str

    def __str__(self) -> str:
        return self.path if self.local else f"{self.filesystem.type_name}://{self.path}"

    @property
    def local(self) -> Path | None:
        """Local path of the folder; None in an object store."""
        return Path(self.path) if isinstance(self.filesystem, fs.LocalFileSystem) else None

    def at(self, name: str) -> RemoteDir:
        """Return a subfolder."""
        return RemoteDir(self.filesystem, f"{self.path}/{name}")

    def stat(self, name: str) -> StoredFile | None:
        """Return the size and modification time of a file; None if it does not exist."""
        found = self.filesystem.get_file_info(f"{self.path}/{name}")
        return _stored(found, name) if found.is_file else None

    def exists(self, name: str) -> bool:
        """Whether the file exists."""
        return self.stat(name) is not None

    def files(self) -> Iterator[StoredFile]:
        """Yield all files below the folder, sorted by name; none if it does not exist."""
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=True)
        for found in sorted(self.filesystem.get_file_info(selector), key=lambda entry: str(entry.path)):
            if found.is_file:
                yield _stored(found, found.path.removeprefix(f"{self.path}/"))

    def folders(self) -> list[str]:
        """Return the names of the direct subfolders, sorted."""
        if isinstance(self.filesystem, fs.GcsFileSystem):  # lists folders only where pyarrow has created them
            return sorted({file.name.partition("/")[0] for file in self.files() if "/" in file.name})
        selector = fs.FileSelector(self.path, allow_not_found=True)
        return sorted(found.base_name for found in self.filesystem.get_file_info(selector) if not found.is_file)

    def read(self, name: str) -> bytes:
        """Read a file.

        Raises:
            OSError: the file is missing or cannot be read.
        """
        with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
            return bytes(file.read())

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a file atomically, replacing an older version.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        if self.local is None:
            with self.filesystem.open_output_stream(f"{self.path}/{name}") as stream:
                stream.write(content)
            return
        with replacing(self.local / name) as partial, partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def copy_to(self, name: str, place: Path) -> None:
        """Download a file to a local path, in parts: it may be larger than memory.

        Raises:
            OSError: the file is missing, or cannot be read or written.
        """
        with self.filesystem.open_input_stream(f"{self.path}/{name}") as source, place.open("wb") as target:
            shutil.copyfileobj(source, target, COPY_BYTES)

    def copy_from(self, place: Path, name: str) -> None:
        """Upload a local file atomically, replacing an older version.

        Raises:
            OSError: the file cannot be read or written.
        """
        with place.open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            if self.local is not None or size <= COPY_BYTES:
                self.write(name, source.read())
                return
            with self.filesystem.open_output_stream(f"{self.path}/{name}") as target:
                shutil.copyfileobj(source, target, COPY_BYTES)

    def touch(self, name: str) -> None:
        """Set the modification time of a small file to now; do nothing in a read-only folder."""
        try:
            if self.local is not None and (self.local / name).exists():
                os.utime(self.local / name)
            else:
                self.write(name, b"")
        except PermissionError:
            return
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.ENOSPC, errno.EDQUOT):
                raise

    def delete(self, name: str) -> None:
        """Delete a file if it exists."""
        if self.exists(name):
            self.filesystem.delete_file(f"{self.path}/{name}")

    def delete_everything(self) -> None:
        """Delete the folder and its content if it exists."""
        if self.filesystem.get_file_info(self.path).type != fs.FileType.Directory:
            return
        if isinstance(self.filesystem, fs.GcsFileSystem):  # may have no object for the folder itself
            self.filesystem.delete_dir_contents(self.path)
        else:
            self.filesystem.delete_dir(self.path)

    def free_bytes(self) -> int | None:
        """Return the free bytes of the folder's disk; None in an object store."""
        if self.local is None:
            return None
        place = self.local
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def sweep(self) -> list[str]:
        """Delete partial files whose writer is dead; return their names."""
        swept = []
        for file in self.files() if self.local is not None else ():
            if file.name.endswith(PARTIAL) and _is_abandoned(file):
                self.delete(file.name)
                swept.append(file.name)
        return swept


def open_folder(place: RemoteDir | str | Path) -> RemoteDir:
    """Open a folder by its path or URL: file://, s3://bucket/..., gs://bucket/...; return an open folder unchanged.

    Raises:
        ConfigError: an unsupported URL, or a URL that the store's client refuses.
    """
    if isinstance(place, RemoteDir):
        return place
    text = str(place)
    scheme = urlsplit(text).scheme
    if "://" not in text:
        return RemoteDir(fs.LocalFileSystem(), os.path.abspath(text))
    if scheme not in ("file", "s3", "gs", "gcs"):
        raise ConfigError(
            f"folder {text!r}: {scheme}:// is not supported; give a path, s3://BUCKET/... or gs://BUCKET/..."
        )
    if scheme != "file" and not urlsplit(text).netloc:
        raise ConfigError(f"folder {text!r}: names no bucket; give {scheme}://BUCKET/...")
    try:
        filesystem, path = _google(text) if scheme in ("gs", "gcs") else fs.FileSystem.from_uri(text)
    except (ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"folder {text!r}: {str(error).splitlines()[0]}; check the address") from None
    return RemoteDir(filesystem, path.rstrip("/"))


def _google(url: str) -> tuple[fs.FileSystem, str]:
    """Open gs://; STORAGE_EMULATOR_HOST is the address of an emulator, as for Google's own clients."""
    parts = urlsplit(url)
    if parts.query:  # settings of the client
        store, path = fs.FileSystem.from_uri(url)
        return store, path
    path = f"{parts.netloc}{parts.path}"
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    if not emulator:
        return fs.GcsFileSystem(retry_time_limit=GS_RETRIES), path
    scheme, _, host = emulator.rpartition("://")
    store = fs.GcsFileSystem(
        anonymous=True, scheme=scheme or "http", endpoint_override=host, retry_time_limit=GS_RETRIES
    )
    return store, path


def _stored(found: fs.FileInfo, name: str) -> StoredFile:
    return StoredFile(name, int(found.size), (found.mtime_ns or 0) / 1e9)


def _is_abandoned(file: StoredFile) -> bool:
    # Host and pid are split off from the right, since the file's name may contain dots.
    before, pid, _ = file.name.removesuffix(PARTIAL).rsplit(".", 2)
    if before.endswith(f".{socket.gethostname()}") and pid.isdigit():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return time.time() - file.modified > ABANDONED_SECONDS
