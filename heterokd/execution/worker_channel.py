"""WorkerChannel: Ray actor between rank 0 of a sharded training, or a task, and the process that started it.

A separate module, so that the actor's process does not import torch; `answers` starts it and answers.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from heterokd.execution.node_faults import NodeFault

Metrics = dict[str, float]


@dataclass(frozen=True)
class Raised:
    """An error that a worker raised.

    Attributes:
        kind: name of its class in `heterokd.errors`.
        sentence: its message.
        fault: the fault of the worker's node, of which the error is suspected.
    """

    kind: str
    sentence: str
    fault: NodeFault | None = None


class WorkerChannel:
    """Rank 0 asks after each epoch whether to continue; the process that started the training answers."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[tuple[Metrics, asyncio.Future[bool]]] = asyncio.Queue()
        self.waiting: asyncio.Future[bool] | None = None
        self.error: Raised | None = None
        self.begun = False

    async def begin(self) -> None:
        """Record that a process at the other end has begun."""
        self.begun = True

    async def has_begun(self) -> bool:
        """Whether a process at the other end has begun."""
        return self.begun

    async def ask(self, metrics: Metrics) -> bool:
        """Send an epoch's metrics; return whether to continue."""
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        await self.asked.put((metrics, answer))
        return await answer

    async def next(self) -> Metrics:
        """Wait for the next epoch's metrics."""
        metrics, self.waiting = await self.asked.get()
        return metrics

    async def answer(self, go_on: bool) -> None:
        """Answer the question that `next` returned."""
        assert self.waiting is not None  # `next` comes first
        self.waiting.set_result(go_on)

    async def leave(self, raised: Raised) -> None:
        """Keep the first error of a worker."""
        self.error = self.error or raised

    async def raised(self) -> Raised | None:
        """Return the error of a worker, or None."""
        return self.error
