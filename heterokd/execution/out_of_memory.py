"""Whether an exception says that memory did not suffice."""

from __future__ import annotations

import torch

MESSAGES = ("out of memory", "cannot allocate memory", "can't allocate memory", "failed to allocate memory")
"""Parts of messages of torch, its allocators and operating systems, in lower case."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception, or an exception that led to it, says that memory did not suffice."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(found, (RuntimeError, OSError)) and any(part in str(found).lower() for part in MESSAGES):
            return True
        found = found.__cause__ or found.__context__
    return False
