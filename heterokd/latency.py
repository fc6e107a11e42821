"""What a student costs whoever uses it: parameters and time, known before it is trained.

Latency is measured in torch, once per architecture, image size and processor, and remembered in `ROOT/students.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from filelock import FileLock
from torch import nn

from heterokd.config import Experiment, NetworkSettings
from heterokd.errors import ConfigError, NetworkError
from heterokd.networks import build_network, deployable
from heterokd.precision import device_name
from heterokd.root import Root, read_json, write_text
from heterokd.timing import THREADS, time_call


@dataclass(frozen=True)
class Candidates:
    """The students of an experiment.

    Attributes:
        facts: by network, `params_m` and (where it was asked for) `latency_ms`.
        left_out: networks that are over a limit, with the reason.
    """

    facts: Mapping[str, Mapping[str, float]]
    left_out: Mapping[str, str]


def weigh_students(experiment: Experiment, root: Root, num_classes: int) -> Candidates:
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


def parameters_m(settings: NetworkSettings, num_classes: int, image_size: int) -> float:
    """Millions of parameters of a network, which is not built for it where its code allows that."""
    try:
        with torch.device("meta"):
            network = build_network(settings.network, num_classes, settings.options, image_size=image_size)
    except NetworkError:  # some encoders compute with their weights while they are made
        network = build_network(settings.network, num_classes, settings.options, image_size=image_size)
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


def known_latency_ms(
    settings: NetworkSettings, num_classes: int, size: tuple[int, int], image_size: int, root: Root
) -> float:
    """The latency of a network with random weights (they do not change it): measured here once, then remembered.

    Args:
        settings: of the network.
        num_classes: of the data set.
        size: height and width of an image, in pixels.
        image_size: that the network is built for.
        root: where it is remembered.
    """
    file = root.path / "students.json"
    what = [settings.network, sorted(settings.options.items()), num_classes, size, THREADS, torch.__version__]
    key = json.dumps([device_name("cpu"), *what], default=str)
    root.path.mkdir(parents=True, exist_ok=True)
    with FileLock(root.path / ".students.lock"):
        known = read_json(file)
        if key not in known:
            network = build_network(settings.network, num_classes, settings.options, image_size=image_size)
            known[key] = latency_ms(deployable(network.eval()), size)
            write_text(file, json.dumps(known, indent=1))
    return float(known[key])


def latency_ms(model: nn.Module, size: tuple[int, int]) -> float:
    """Median time of a forward of one image, in milliseconds, on the CPU with `timing.THREADS` threads.

    Args:
        model: takes images [B, 3, H, W].
        size: height and width of the image, in pixels.
    """
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    return time_call(partial(model, image)).median_ms
