"""Folders that may be local, a shared mount, s3:// or gs://, with the few operations that the caches need.

A file appears as a whole or not at all: a local one is written beside its place, forced to the disk and renamed; an
object store shows an object only once it was written to its end. An OSError says what the disk or the store says.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs
from pyarrow.lib import ArrowException

from heterokd.errors import ConfigError
from heterokd.storage.files import PARTIAL, replacing

ABANDONED_SECONDS = 24 * 3600.0
"""A partial file of another machine, whose process cannot be asked for, is abandoned when it is this old."""

COPY_BYTES = 8 * 1024**2
"""What is copied at a time."""


@dataclass(frozen=True)
class StoredFile:
    """A file of a folder: its name below the folder, its bytes, and when it was written (seconds since 1970)."""

    name: str
    size: int
    modified: float


@dataclass(frozen=True)
class RemoteDir:
    """A folder that need not exist yet; names are relative to it and use `/`.

    Attributes:
        filesystem: pyarrow's.
        path: the folder's path on it.
    """

    filesystem: fs.FileSystem
    path: str

    def __str__(self) -> str:
        return self.path if self.local else f"{self.filesystem.type_name}://{self.path}"

    @property
    def local(self) -> Path | None:
        """The folder as a path of this machine; None in an object store."""
        return Path(self.path) if isinstance(self.filesystem, fs.LocalFileSystem) else None

    def at(self, name: str) -> RemoteDir:
        """A folder below this one."""
        return RemoteDir(self.filesystem, f"{self.path}/{name}")

    def stat(self, name: str) -> StoredFile | None:
        """Size and time of a file; None when there is none."""
        found = self.filesystem.get_file_info(f"{self.path}/{name}")
        return _stored(found, name) if found.is_file else None

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return self.stat(name) is not None

    def files(self) -> Iterator[StoredFile]:
        """Every file below the folder, by name; none when it does not exist."""
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=True)
        for found in sorted(self.filesystem.get_file_info(selector), key=lambda entry: str(entry.path)):
            if found.is_file:
                yield _stored(found, found.path.removeprefix(f"{self.path}/"))

    def folders(self) -> list[str]:
        """Names of the folders directly below, sorted."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        return sorted(found.base_name for found in self.filesystem.get_file_info(selector) if not found.is_file)

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            OSError: it is not there or cannot be read.
        """
        with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
            return bytes(file.read())

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a file as a whole or not at all; an older one is replaced.

        Raises:
            OSError: the disk is full, or the place cannot be written.
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
        """Copy a file to a path of this machine, in parts: it may be larger than memory.

        Raises:
            OSError: it is not there, or one of the two cannot be read or written.
        """
        with self.filesystem.open_input_stream(f"{self.path}/{name}") as source, place.open("wb") as target:
            shutil.copyfileobj(source, target, COPY_BYTES)

    def copy_from(self, place: Path, name: str) -> None:
        """Copy a file of this machine into the folder, as a whole or not at all; an older one is replaced.

        Raises:
            OSError: one of the two cannot be read or written.
        """
        with place.open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            if self.local is not None or size <= COPY_BYTES:
                self.write(name, source.read())
                return
            with self.filesystem.open_output_stream(f"{self.path}/{name}") as target:
                shutil.copyfileobj(source, target, COPY_BYTES)

    def touch(self, name: str) -> None:
        """Set a small file's time to now; a folder that may only be read is left as it is."""
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
        """Delete a file, if it is there."""
        if self.exists(name):
            self.filesystem.delete_file(f"{self.path}/{name}")

    def delete_everything(self) -> None:
        """Delete the folder with all that is in it, if it is there."""
        if self.filesystem.get_file_info(self.path).type == fs.FileType.Directory:
            self.filesystem.delete_dir(self.path)

    def free_bytes(self) -> int | None:
        """Free bytes where the folder is or would be; None in an object store."""
        if self.local is None:
            return None
        place = self.local
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def sweep(self) -> list[str]:
        """Delete partial files whose writer is dead; the names of those that went."""
        swept = []
        for file in self.files() if self.local is not None else ():
            if file.name.endswith(PARTIAL) and _is_abandoned(file):
                self.delete(file.name)
                swept.append(file.name)
        return swept


def open_folder(place: str | Path) -> RemoteDir:
    """A folder by path or URL: a path, file://, s3://bucket/..., gs://bucket/...

    Raises:
        ConfigError: another kind of URL, or one that the store's client refuses.
    """
    text = str(place)
    scheme = urlsplit(text).scheme
    if "://" not in text:
        return RemoteDir(fs.LocalFileSystem(), os.path.abspath(text))
    if scheme not in ("file", "s3", "gs", "gcs"):
        raise ConfigError(f"folder {text!r}: {scheme}:// is not known; give a path, s3://BUCKET/... or gs://BUCKET/...")
    try:
        filesystem, path = fs.FileSystem.from_uri(text)
    except (ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"folder {text!r}: {str(error).splitlines()[0]}; check the address") from None
    return RemoteDir(filesystem, path.rstrip("/"))


def _stored(found: fs.FileInfo, name: str) -> StoredFile:
    return StoredFile(name, int(found.size), (found.mtime_ns or 0) / 1e9)


def _is_abandoned(file: StoredFile) -> bool:
    # The owner's fields are counted from the right: the file's own name may hold dots.
    before, pid, _ = file.name.removesuffix(PARTIAL).rsplit(".", 2)
    if before.endswith(f".{socket.gethostname()}") and pid.isdigit():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return time.time() - file.modified > ABANDONED_SECONDS
