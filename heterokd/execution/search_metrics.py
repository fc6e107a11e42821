"""Prometheus metrics of a search, which the exporters of Ray's nodes publish; docs/cluster.md lists them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from heterokd.execution.parallel import Parallelism
from heterokd.execution.prices import hourly_price
from heterokd.execution.ray_settings import metrics
from heterokd.study.summary import StudySummary

HOUR = 3600.0


class Gauge(Protocol):
    """A value with labels, as `ray.util.metrics.Gauge`."""

    def set(self, value: float, tags: dict[str, str]) -> None:
        """Replace the value."""


class SearchMetrics:
    """Metrics of a search; Ray puts `ray_` before their names.

    Args:
        plan: experiment and resources of a trial.
        gauge: makes a metric from its name, a description, and the names of its labels (`tag_keys`).
    """

    def __init__(self, plan: Parallelism, gauge: Callable[..., Gauge] = metrics.Gauge) -> None:
        self._plan, self._study = plan, plan.experiment.name
        self._failed: dict[str, int] = {}
        self._trials = gauge("heterokd_trials", "number of trials by status", tag_keys=("study", "status"))
        self._gpu_seconds = gauge(
            "heterokd_gpu_seconds",
            "seconds of trainings, times their GPUs if they have any",
            tag_keys=("study",),
        )
        self._spend = gauge("heterokd_spend", "cost of the trainings so far", tag_keys=("study", "currency"))
        self._failures = gauge(
            "heterokd_node_failures", "trials that failed and processes that died, by node", tag_keys=("study", "node")
        )

    def update(self, summary: StudySummary) -> None:
        """Set what the study's summary says."""
        progress, study = summary.progress, {"study": self._study}
        counts = {
            "running": progress.running,
            "complete": progress.complete,
            "pruned": progress.pruned,
            "paused": progress.paused,
            "failed": progress.failed,
            "confirmed": progress.confirmations_done,
        }
        for status, count in counts.items():
            self._trials.set(count, {**study, "status": status})
        hours = summary.spent.get("gpu_hours") or 0.0
        self._gpu_seconds.set(HOUR * hours, study)
        cluster = self._plan.cluster
        price = hourly_price(self._plan.experiment, cluster)
        if price is not None:
            # The study counts a trial's GPUs, or 1 without GPUs, and not its workers, which the price contains.
            currency = self._plan.experiment.cluster.currency
            self._spend.set(price * hours / (cluster.gpus or 1.0), {**study, "currency": currency})

    def add_failure(self, node: str) -> None:
        """Count a trial that failed, or a trial's process that died, on a node."""
        self._failed[node] = self._failed.get(node, 0) + 1
        self._failures.set(self._failed[node], {"study": self._study, "node": node})
