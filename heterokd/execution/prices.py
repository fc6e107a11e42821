"""Price of a trial's resources."""

from __future__ import annotations

from heterokd.config.experiment import Experiment
from heterokd.execution.placement import Cluster


def hourly_price(experiment: Experiment, cluster: Cluster) -> float | None:
    """Return the price of an hour of a trial's resources, in `cluster.currency`; None without prices.

    `search.budget.price` is that of a GPU hour, or of a trial's hour without GPUs. Without it, a trial that has GPUs
    costs their share of the nodes of `cluster.nodes` whose GPUs are given, and any other trial an equal share of all
    nodes.
    """
    devices = (cluster.gpus or 1.0) * cluster.workers[0]
    if experiment.search.budget.price is not None:
        return experiment.search.budget.price * devices
    nodes = experiment.cluster.nodes.values()
    if not any(node.price_per_hour for node in nodes):
        return None
    gpus = sum(node.count * (node.gpus or 0) for node in nodes)
    if cluster.gpus and gpus:
        return devices * sum(node.count * node.price_per_hour for node in nodes if node.gpus) / gpus
    return sum(node.count * node.price_per_hour for node in nodes) / cluster.parallel
