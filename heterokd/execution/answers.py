"""Start a `WorkerChannel`, and answer the questions that rank 0 of a training, or a task, asks through it."""

from __future__ import annotations

from collections.abc import Callable

from heterokd.execution.ray_settings import only_on, ray
from heterokd.execution.this_node import this_node
from heterokd.execution.worker_channel import WorkerChannel
from heterokd.training.train import Report

POLL_SECONDS = 0.25
"""Interval at which the end of the training is checked."""


def open_channel() -> ray.actor.ActorHandle:
    """Start a `WorkerChannel` on this node, since it is of no use without this process."""
    return ray.remote(WorkerChannel).options(num_cpus=0, scheduling_strategy=only_on(this_node())).remote()


def answer_questions(channel: ray.actor.ActorHandle, on_epoch: Report, has_ended: Callable[[], bool]) -> None:
    """Answer questions until the training has ended."""
    question = channel.next.remote()
    while not has_ended():
        done, _ = ray.wait([question], timeout=POLL_SECONDS)
        if done:
            ray.get(channel.answer.remote(on_epoch(ray.get(question))))
            question = channel.next.remote()
