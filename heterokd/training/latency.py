"""Parameters and latency of a network."""

from __future__ import annotations

import json
from functools import partial

import torch
from filelock import FileLock
from torch import nn

from heterokd.config.settings import NetworkSettings
from heterokd.errors import NetworkError
from heterokd.networks.network import build_network, deployable
from heterokd.storage.files import read_json, write_text
from heterokd.storage.workspace import Workspace
from heterokd.training.precision import device_name
from heterokd.training.timing import THREADS, time_call


def parameters_m(settings: NetworkSettings, num_classes: int, image_size: int) -> float:
    """Millions of parameters of a network, which is not built for it where its code allows that."""
    try:
        with torch.device("meta"):
            network = build_network(settings.network, num_classes, settings.options, image_size=image_size)
    except NetworkError:  # some encoders compute with their weights while they are made
        network = build_network(settings.network, num_classes, settings.options, image_size=image_size)
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


def known_latency_ms(
    settings: NetworkSettings, num_classes: int, size: tuple[int, int], image_size: int, root: Workspace
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
