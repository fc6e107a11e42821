"""Pixels that are decoded from files, one array per file."""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Decoded images of a split are kept if they fit in this many bytes, and in this share of the machine's memory: then two
# trials on a machine, each with train and val, hold at most an eighth of it.
MEMORY_BUDGET = 2**30
MEMORY_SHARE = 1 / 32
# PIL decodes without the interpreter's lock; more threads than this wait for the disk.
MAX_THREADS = 16


class DecodedFiles(ABC):
    """Pixels in files, one array per file; decoded by threads, and kept in memory if `kept`."""

    def __init__(self, count: int, shape: tuple[int, ...], *, kept: bool) -> None:
        self._shape = (count, *shape)
        self._pixels: NDArray[np.uint8] | None = None
        self._decoded = np.zeros(count, np.bool_)
        self._kept = kept

    @abstractmethod
    def decode(self, position: int) -> NDArray[np.uint8]:
        """Decode the file at a position.

        Raises:
            DataError: the file is damaged, missing or not an image.
        """

    def __len__(self) -> int:
        return self._shape[0]

    def __getstate__(self) -> dict[str, object]:
        """Pickle only the paths: another process decodes the files again."""
        return {**self.__dict__, "_pixels": None, "_decoded": np.zeros(len(self), np.bool_)}

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Read the pixels at `index` [B] into a new array [B, ...].

        Raises:
            DataError: a file is damaged, missing or not an image.
        """
        if not self._kept:
            return self._decode(index)
        if self._pixels is None:
            self._pixels = np.empty(self._shape, np.uint8)
        missing = np.unique(index[~self._decoded[index]])
        if len(missing):
            self._pixels[missing] = self._decode(missing)
            self._decoded[missing] = True
        chosen: NDArray[np.uint8] = self._pixels[index]
        return chosen

    def _decode(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        pixels = np.empty((len(index), *self._shape[1:]), np.uint8)

        def decode(row: int) -> None:
            pixels[row] = self.decode(index[row])

        with decoding_threads() as pool:
            for _ in pool.map(decode, range(len(index))):  # raises the exceptions of the threads
                pass
        return pixels


def decoding_threads() -> ThreadPoolExecutor:
    """Create a pool of threads for decoding: as many as this process may use cores.

    A trial sets torch's threads to its cores; without torch it is the cores that the system gives the process.
    """
    torch = sys.modules.get("torch")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(min(MAX_THREADS, cores if torch is None else torch.get_num_threads()))


def memory_budget() -> int:
    """Bytes that the decoded images of a split may take on this machine."""
    return min(MEMORY_BUDGET, int(machine_memory() * MEMORY_SHARE))


def machine_memory() -> int:
    """Bytes of memory of this machine, or of the container in which this process runs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container; "max" means no limit
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        memory = min(memory, int(text))
    return memory
