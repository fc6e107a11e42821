"""Memory that does not suffice is named as such."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from heterokd.execution.oom_kills import oom_kills
from heterokd.execution.out_of_memory import is_out_of_memory


def raised(cause: Exception) -> Exception:
    """An error raised in place of another one."""
    try:
        try:
            raise cause
        except Exception:  # noqa: BLE001  of any type
            raise ValueError("training.batch_size: lower it") from None
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried 1 byte"
        ),
        RuntimeError("CUDA error: out of memory"),
        OSError(12, "Cannot allocate memory"),
        raised(torch.OutOfMemoryError("CUDA out of memory")),
    ],
)
def test_errors_of_memory(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shapes differ"), raised(KeyError("a"))])
def test_other_errors(error):
    assert not is_out_of_memory(error)


def test_a_real_allocation_that_fails_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_kills_of_the_kernel_are_counted(tmp_path: Path):
    events, unreadable = tmp_path / "memory.events", tmp_path / "vmstat"
    events.write_text("low 0\noom 3\noom_kill 2\n", encoding="utf-8")
    assert oom_kills((events, unreadable)) == 2
    unreadable.write_text("oom_kill 5\nempty\n", encoding="utf-8")
    assert oom_kills((events, unreadable)) == 2
    assert oom_kills(()) == 0
    assert oom_kills() >= 0
