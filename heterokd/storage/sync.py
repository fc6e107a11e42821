"""Synchronize local working copies with a store (s3://, gs://, a shared mount), file by file.

Trainings and searches work on local paths. Local changes are pushed, changes of other machines are fetched; neither
deletes files in the store, `remove` does. Each file has a single writer: the trial's process, or the study's driver.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from heterokd.storage.files import PARTIAL, replacing
from heterokd.storage.filesystem import RemoteDir, StoredFile
from heterokd.storage.machine_load import under_load

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 300.0
"""Longest wait for a store that does not answer, where no file may be lost: at the end of a trial;
longer on a busy machine."""
FOLLOW_SECONDS = 5.0
"""Interval of the pushes of a running trial's changed files."""
PARALLEL_FETCHES = 16
"""Files that are downloaded at a time: a small file takes the time of the requests, not of its bytes."""
LAST = ("trial.json", "teacher.json", "manifest.json")
"""Files that mark a folder as complete, copied after the other files."""

Result = TypeVar("Result")


class FolderSync:
    """Synchronizes a local folder with its counterpart in the store. Without a store, all methods do nothing.

    Args:
        local: local folder, which need not exist.
        store: folder in the store; None: there is only the local folder.
        patience: longest wait of `fetch` and `close` for a store that does not answer, in seconds.
    """

    def __init__(self, local: Path, store: RemoteDir | None, *, patience: float = PATIENCE_SECONDS) -> None:
        self.local, self.store, self.patience = local, store, patience
        self._known: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def fetch(self, *, without: Collection[str] = (), skip: Collection[str] = ()) -> None:
        """Download the files that are new or different in the store.

        Args:
            without: names of files to skip at any depth.
            skip: names of direct subfolders to skip.

        Raises:
            OSError: the store does not answer, or the local disk cannot be written.
        """
        if self.store is not None:
            store = self.store
            _retry(lambda: self._fetch(store, without, skip), self.patience, f"{store} does not answer")

    def replace(self) -> None:
        """Replace the local folder's content with that of the store.

        Raises:
            OSError: see `fetch`.
        """
        if self.store is None:
            return
        for path in self.local.rglob("*") if self.local.exists() else ():
            if path.is_file():
                path.unlink(missing_ok=True)
        self._known.clear()
        self.fetch()

    def push(self, *, skip: Collection[str] = ()) -> bool:
        """Upload local changes; return whether that succeeded. The next call retries what failed.

        Args:
            skip: names of direct files or subfolders to skip.
        """
        if self.store is None:
            return True
        try:
            self._push(self.store, skip)
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s); the files are kept locally and uploaded later", self.store, error
            )
            return False
        return True

    def fetch_file(self, name: str) -> None:
        """Download a file, which is not pushed afterwards.

        Raises:
            OSError: it is missing, the store does not answer, or the local disk cannot be written.
        """
        if self.store is not None:
            store = self.store
            _retry(lambda: self._fetch_file(store, name), self.patience, f"{store} does not answer")

    def remove(self, names: Collection[str]) -> None:
        """Delete files here and in the store; those that a store that does not answer keeps are of no use."""
        for name in names:
            (self.local / name).unlink(missing_ok=True)
            self._known.pop(name, None)
            if self.store is not None:
                try:
                    self.store.delete(name)
                except OSError as error:
                    logger.info("%s/%s is kept (%s)", self.store, name, error)

    def follow(self, every: float = FOLLOW_SECONDS, *, skip: Collection[str] = ()) -> None:
        """Start a thread that pushes changes every `every` seconds; `skip`: see `push`."""
        if self.store is not None:
            self._stopped.clear()
            self._thread = threading.Thread(target=self._follow, args=(every, skip), name="sync", daemon=True)
            self._thread.start()

    def pause(self, *, skip: Collection[str] = ()) -> bool:
        """Stop the thread and push once; return whether that succeeded. `skip`: see `push`."""
        self._end_thread()
        return self.push(skip=skip)

    def close(self, *, skip: Collection[str] = ()) -> None:
        """Stop the thread and push remaining changes, waiting for a store that does not answer.

        Raises:
            OSError: the store did not answer in time; the files are kept locally.
        """
        self._end_thread()
        if self.store is not None:
            store = self.store
            _retry(lambda: self._push(store, skip), self.patience, f"{store} cannot be written")

    def _end_thread(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _follow(self, every: float, skip: Collection[str]) -> None:
        while not self._stopped.wait(every):
            self.push(skip=skip)

    def _fetch_file(self, store: RemoteDir, name: str) -> None:
        with replacing(self.local / name) as partial:
            store.copy_to(name, partial)
        self._known[name] = _state(self.local / name) or (0, 0)

    def _fetch(self, store: RemoteDir, without: Collection[str], skip: Collection[str]) -> None:
        changed = []
        for file in store.files():
            first, _, rest = file.name.partition("/")
            if Path(file.name).name in without or file.name.endswith(PARTIAL) or (rest and first in skip):
                continue
            state = file.size, round(file.modified * 1e9)
            if _state(self.local / file.name) == state:
                self._known[file.name] = state
            else:
                changed.append(file)
        with ThreadPoolExecutor(PARALLEL_FETCHES, "fetch") as pool:
            for is_last in (False, True):
                part = [file for file in changed if (Path(file.name).name in LAST) is is_last]
                try:
                    list(pool.map(lambda file: self._fetch_changed(store, file), part))
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise

    def _fetch_changed(self, store: RemoteDir, file: StoredFile) -> None:
        place, written = self.local / file.name, round(file.modified * 1e9)
        with replacing(place) as partial:
            store.copy_to(file.name, partial)
            # The store's modification time: the next fetch recognizes an unchanged file by it.
            os.utime(partial, ns=(written, written))
        self._known[file.name] = _state(place) or (0, 0)

    def _push(self, store: RemoteDir, skip: Collection[str]) -> None:
        with self._lock:
            names = [path.relative_to(self.local).as_posix() for path in self._files(skip)]
            for name in sorted(names, key=lambda name: (Path(name).name in LAST, name)):
                path = self.local / name
                if path.name.startswith(".") or path.suffix in (".lock", PARTIAL):
                    continue
                state = _state(path)
                if state is None or self._known.get(name) == state:
                    continue
                store.copy_from(path, name)
                self._known[name] = state

    def _files(self, skip: Collection[str]) -> Iterator[Path]:
        """Yield the local files; what is skipped is not walked, since a study may have thousands of trials."""
        for path in self.local.iterdir() if self.local.exists() else ():
            if path.name not in skip:
                yield from filter(Path.is_file, path.rglob("*") if path.is_dir() else (path,))


def _state(path: Path) -> tuple[int, int] | None:
    """Size and modification time of a file, or None; a change is detected by them."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


def _retry(attempt: Callable[[], Result], patience: float, problem: str) -> Result:
    """Retry with exponential backoff while the store does not answer."""
    began, pause = time.monotonic(), 1.0
    while True:
        try:
            return attempt()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            if time.monotonic() - began + pause > under_load(patience):
                raise
            logger.warning("%s (%s); trying again", problem, error)
            time.sleep(pause)
            pause = min(2 * pause, 30.0)
