"""Where the first of several workers asks whether to go on. Apart from `workers`: its process loads no torch."""

from __future__ import annotations

import asyncio

Metrics = dict[str, float]


class WorkerChannel:
    """Where the first worker asks, and the process that began the training answers."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[tuple[Metrics, asyncio.Future[bool]]] = asyncio.Queue()
        self.waiting: asyncio.Future[bool] | None = None

    async def ask(self, metrics: Metrics) -> bool:
        """Whether to go on after an epoch with these metrics."""
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        await self.asked.put((metrics, answer))
        return await answer

    async def next(self) -> Metrics:
        """The next question."""
        metrics, self.waiting = await self.asked.get()
        return metrics

    async def answer(self, go_on: bool) -> None:
        """Answer the question that `next` gave."""
        assert self.waiting is not None  # `next` comes first
        self.waiting.set_result(go_on)
