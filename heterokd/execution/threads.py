"""Run a function in a daemon thread: a call that hangs in the operating system cannot be cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_thread(function: Callable[[], T]) -> Future[T]:
    """Call a function in a daemon thread, which neither an interrupt nor the end of the process waits for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001  re-raised by `Future.result`
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
