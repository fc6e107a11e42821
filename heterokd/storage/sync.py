"""Working copies: a local folder whose truth lies in a store (s3://, gs://, a shared mount), file by file.

Code that trains and searches works on local paths. What it changed is pushed, what others changed is fetched; neither
ever deletes in the store. Each file has one writer at a time: a trial's files its process, a study's its driver.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from heterokd.storage.files import PARTIAL, replacing
from heterokd.storage.filesystem import RemoteDir

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 300.0
"""How long a store that does not answer is asked again where nothing may be lost: at the end of a trial."""
FOLLOW_SECONDS = 5.0
"""How often the files of a running trial are looked through for changes."""
LAST = ("trial.json", "teacher.json", "manifest.json")
"""Files that say that others are there: pushed after them."""

Answer = TypeVar("Answer")


class FolderSync:
    """One local folder and its place in the store. Without a store, every call does nothing.

    Args:
        local: the folder, which need not exist yet.
        store: its place; None where the local folder is the truth itself.
        patience: seconds for which a store that does not answer is asked again by `fetch` and `close`.
    """

    def __init__(self, local: Path, store: RemoteDir | None, *, patience: float = PATIENCE_SECONDS) -> None:
        self.local, self.store, self.patience = local, store, patience
        self._known: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def fetch(self, *, without: Collection[str] = (), skip: Collection[str] = ()) -> None:
        """Bring here what is new or different in the store.

        Args:
            without: names of files to leave out, wherever they lie.
            skip: names of folders directly below to leave out.

        Raises:
            OSError: the store does not answer, or this disk cannot be written.
        """
        if self.store is not None:
            store = self.store
            _patiently(lambda: self._fetch(store, without, skip), self.patience, f"{store} does not answer")

    def replace(self) -> None:
        """Make the local folder what the store has, and nothing else: of what lay here, nothing counts.

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
        """Copy what has changed here to the store; whether that worked (what did not, the next call does).

        Args:
            skip: names of files or folders directly below to leave out.
        """
        if self.store is None:
            return True
        try:
            self._push(self.store, skip)
        except OSError as error:
            logger.warning("%s does not take files (%s); they are kept here and sent later", self.store, error)
            return False
        return True

    def follow(self, every: float = FOLLOW_SECONDS) -> None:
        """From now on, push changes in a thread, which looks for them `every` few seconds."""
        if self.store is not None:
            self._ended.clear()
            self._thread = threading.Thread(target=self._follow, args=(every,), name="mirror", daemon=True)
            self._thread.start()

    def close(self, *, skip: Collection[str] = ()) -> None:
        """Push what is left; a store that does not answer is waited for.

        Raises:
            OSError: it did not answer in time; the files are kept here.
        """
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.store is not None:
            store = self.store
            _patiently(lambda: self._push(store, skip), self.patience, f"{store} does not take files")

    def _follow(self, every: float) -> None:
        while not self._ended.wait(every):
            self.push()

    def _fetch(self, store: RemoteDir, without: Collection[str], skip: Collection[str]) -> None:
        for file in store.files():
            first, _, rest = file.name.partition("/")
            if Path(file.name).name in without or file.name.endswith(PARTIAL) or (rest and first in skip):
                continue
            place = self.local / file.name
            written = round(file.modified * 1e9)
            if _state(place) == (file.size, written):
                self._known[file.name] = (file.size, written)
                continue
            with replacing(place) as partial:
                store.copy_to(file.name, partial)
                # The store's time, by which an unchanged file is known the next time.
                os.utime(partial, ns=(written, written))
            self._known[file.name] = _state(place) or (0, 0)

    def _push(self, store: RemoteDir, skip: Collection[str]) -> None:
        with self._lock:
            names = [path.relative_to(self.local).as_posix() for path in self.local.rglob("*") if path.is_file()]
            for name in sorted(names, key=lambda name: (Path(name).name in LAST, name)):
                path = self.local / name
                if path.name.startswith(".") or path.suffix in (".lock", PARTIAL) or name.split("/")[0] in skip:
                    continue
                state = _state(path)
                if state is None or self._known.get(name) == state:
                    continue
                store.copy_from(path, name)
                self._known[name] = state


def _state(path: Path) -> tuple[int, int] | None:
    """Size and time of a file, by which a change is seen."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


def _patiently(attempt: Callable[[], Answer], patience: float, told: str) -> Answer:
    """Try again, at growing intervals, what a store refuses for the moment."""
    began, pause = time.monotonic(), 1.0
    while True:
        try:
            return attempt()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            if time.monotonic() - began + pause > patience:
                raise
            logger.warning("%s (%s); trying again", told, error)
            time.sleep(pause)
            pause = min(2 * pause, 30.0)
