"""Parameters and latency of an experiment's students, and which exceed a limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from heterokd.config.experiment import Experiment
from heterokd.errors import ConfigError
from heterokd.storage.workspace import Workspace
from heterokd.training.latency import known_latency_ms, parameters_m


@dataclass(frozen=True)
class Candidates:
    """The students of an experiment.

    Attributes:
        facts: by network, `params_m` and (where it was asked for) `latency_ms`.
        left_out: networks that are over a limit, with the reason.
    """

    facts: Mapping[str, Mapping[str, float]]
    left_out: Mapping[str, str]


def weigh_students(experiment: Experiment, root: Workspace, num_classes: int) -> Candidates:
    """Parameters of every student of an experiment and, where it counts, latency; who is over a limit.

    Args:
        experiment: `search.objectives`, `search.max_params_m` and `search.max_latency_ms` say what counts.
        root: remembers latencies.
        num_classes: of the data set.

    Raises:
        NetworkError: a student that cannot be built.
        ConfigError: no student is left.
    """
    search = experiment.search
    size = experiment.data.view_size
    facts: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for network in experiment.student.networks:
        settings = experiment.student.one(network)
        params_m = parameters_m(settings, num_classes, experiment.data.image_size)
        facts[network] = {"params_m": params_m}
        if search.max_params_m is not None and params_m > search.max_params_m:
            left_out[network] = (
                f"{network} has {params_m:.3g} million parameters, search.max_params_m allows {search.max_params_m:g}"
            )
            continue
        if search.max_latency_ms is None and "latency_ms" not in search.costs:
            continue
        latency = known_latency_ms(settings, num_classes, size, experiment.data.image_size, root)
        facts[network]["latency_ms"] = latency
        if search.max_latency_ms is not None and latency > search.max_latency_ms:
            left_out[network] = (
                f"{network} takes {latency:.3g} ms an image, search.max_latency_ms allows {search.max_latency_ms:g}"
            )
    if len(left_out) == len(experiment.student.networks):
        reasons = "; ".join(left_out.values())
        raise ConfigError(f"student.network: no student is left ({reasons}); raise the limit, or name smaller ones")
    return Candidates(facts, left_out)
