"""How many trials run at a time, and with which resources, while nodes of a cluster come and go."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NotRequired, TypedDict

from heterokd.config.experiment import Experiment
from heterokd.execution.placement import Cluster, Node, places
from heterokd.execution.ray_settings import tune

logger = logging.getLogger(__name__)


NODE_ID = "ray.io/node-id"
"""Ray's label of a node."""


def other_nodes(avoid: Sequence[str]) -> dict[str, str]:
    """Return the label selector of all nodes but those with the given ids."""
    return {NODE_ID: f"!in({','.join(avoid)})"} if avoid else {}


class TrialConfig(TypedDict):
    """Tune's config of a trial.

    `number`: of the trial; `cluster`: resources of the trial; `avoid`: ids of nodes on which it does not run.
    """

    number: int
    cluster: Cluster
    avoid: NotRequired[list[str]]


def request(config: TrialConfig) -> tune.PlacementGroupFactory:
    """Return the resources that Ray Tune reserves for a trial."""
    avoid = config.get("avoid", [])
    selector = {"bundle_label_selector": [other_nodes(avoid)]} if avoid else {}
    return tune.PlacementGroupFactory([config["cluster"].trial], **selector)


class Parallelism:
    """The present plan of a search; trials that begin later follow it.

    Attributes:
        experiment: the experiment.
        cluster: the plan.
    """

    def __init__(self, experiment: Experiment, cluster: Cluster) -> None:
        self.cluster = cluster
        self.experiment = experiment

    def follow(self, nodes: Sequence[Node]) -> None:
        """Change the plan to what fits on these nodes.

        Resources of a trial stay, except that trials ask for GPUs once there are any, of which each then gets a whole
        one, since their memory is not known. `search.parallel` stays if it is set.

        Args:
            nodes: cores and GPUs of each node that there is, or that may be added.
        """
        if not nodes:
            return  # nodes have gone, and may come back
        search, before, now = self.experiment.search, self.cluster, self.cluster
        with_gpus = [node for node in nodes if node[1]]
        if with_gpus and not before.gpus and not self.experiment.training.is_shared:
            share = 1.0 if search.gpus_per_trial == "auto" else search.gpus_per_trial
            now = Cluster(1, min(max(1, int(share * cores / gpus)) for cores, gpus in with_gpus), share)
        if search.parallel is None:
            now = replace(now, parallel=max(1, min(places(now, nodes), search.trials)))
        elif now != before:
            now = replace(now, parallel=search.parallel)
        if now != before:
            self.cluster = now
            logger.info("%d trials at a time, with %g cores and %g GPUs each", now.parallel, now.cpus, now.gpus)
