"""A store in a local folder that counts requests and bytes, and answers each request after a while."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from heterokd.storage.filesystem import RemoteDir


class CountedStore(fs.FileSystemHandler):  # type: ignore[misc]  # pyarrow has no types
    """Requests as pyarrow's S3 client sends them: two to read a file (its size, its content), one for all else.

    Attributes:
        requests: number of requests.
        read: bytes that were read.
        written: bytes that were written.
        seconds: of each request.
        is_away: whether requests fail.
    """

    def __init__(self, place: Path, seconds: float = 0.0) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self._local = fs.SubTreeFileSystem(str(place), fs.LocalFileSystem())
        self._lock = threading.Lock()
        self.seconds = seconds
        self.is_away = False
        self.requests = self.read = self.written = 0

    def folder(self, path: str) -> RemoteDir:
        """A folder of the store."""
        return RemoteDir(fs.PyFileSystem(self), path)

    def take(self) -> dict[str, int]:
        """Return requests and bytes since the last call."""
        with self._lock:
            found = {"requests": self.requests, "read": self.read, "written": self.written}
            self.requests = self.read = self.written = 0
        return found

    def _answer(self, requests: int = 1, read: int = 0, written: int = 0) -> None:
        with self._lock:
            self.requests += requests
            self.read += read
            self.written += written
        time.sleep(requests * self.seconds)
        if self.is_away:
            raise OSError("no answer")

    def get_type_name(self) -> str:
        return "counted"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> Any:
        self._answer(len(paths))
        return self._local.get_file_info(paths)

    def get_file_info_selector(self, selector: fs.FileSelector) -> Any:
        found = self._local.get_file_info(selector)
        self._answer(1 + len(found) // 1000)  # a page of a list has a thousand names
        return found

    def open_input_stream(self, path: str) -> Any:
        with self._local.open_input_stream(path) as source:
            content = source.read()
        self._answer(2, read=len(content))
        return pa.BufferReader(content)

    def open_input_file(self, path: str) -> Any:
        return self.open_input_stream(path)

    def open_output_stream(self, path: str, metadata: object) -> Any:
        return pa.PythonFile(_Upload(self, path), mode="w")

    def upload(self, path: str, content: bytes) -> None:
        """Store a file."""
        self._answer(written=len(content))
        parent = path.rpartition("/")[0]
        if parent:
            self._local.create_dir(parent)
        with self._local.open_output_stream(path) as target:
            target.write(content)

    def delete_file(self, path: str) -> None:
        self._answer()
        self._local.delete_file(path)

    def delete_dir(self, path: str) -> None:
        self._answer()
        self._local.delete_dir(path)

    def _unused(self, *_: object) -> None:
        """Answer requests that pyarrow's handler must have and the sync never makes."""
        raise NotImplementedError

    create_dir = delete_dir_contents = delete_root_dir_contents = move = copy_file = open_append_stream = _unused


class _Upload(io.BytesIO):
    """A file that is stored when it is closed."""

    def __init__(self, store: CountedStore, path: str) -> None:
        super().__init__()
        self._store, self._path = store, path

    def close(self) -> None:
        if not self.closed:
            self._store.upload(self._path, self.getvalue())
        super().close()
