"""Run Python's cyclic garbage collector less often while libraries are imported, and not at the end of a process.

Importing torch, timm, Ray and MLflow makes a million objects that stay. With Python's thresholds the collector looks
through them again and again, for a sixth of the processor time of the imports, and at the end for two seconds more.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

RARE = (100_000, 50, 100)
"""Thresholds of `gc.set_threshold`. Not for trainings, where a cycle of a few objects may hold a large tensor."""


@contextmanager
def rare_collections() -> Iterator[None]:
    """Collect rarely in this context, or in a function that it decorates; then as before."""
    before = gc.get_threshold()
    gc.set_threshold(*RARE)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def no_collection_at_exit() -> None:
    """Exempt all objects from the collections at the end of this process, which free what the system frees anyway."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
