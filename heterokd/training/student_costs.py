"""Costs of students, known before training, and which students of an experiment exceed a limit.

What depends on the machine is timed in torch, once per architecture, image size and processor, and remembered in
`ROOT/students.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from filelock import FileLock

from heterokd.config.experiment import Experiment
from heterokd.config.networks import NetworkSettings
from heterokd.errors import ConfigError
from heterokd.networks.network import deployable
from heterokd.networks.student_cost import StudentCost
from heterokd.networks.student_costs import STUDENT_COSTS
from heterokd.networks.timing import THREADS
from heterokd.storage.files import read_json, write_text
from heterokd.storage.typed_json import parse
from heterokd.storage.workspace import Workspace
from heterokd.training.precision import device_name
from heterokd.training.student import build_configured


@dataclass(frozen=True)
class Candidates:
    """The students of an experiment.

    Attributes:
        facts: by network, what is known of its costs: `params_m`, and what a limit or an objective asks for.
        left_out: networks that are over a limit, with the reason.
    """

    facts: Mapping[str, Mapping[str, float]]
    left_out: Mapping[str, str]


def weigh_students(experiment: Experiment, root: Workspace, num_classes: int) -> Candidates:
    """Measure every student of an experiment: its parameters, and each cost that is limited or an objective.

    Args:
        experiment: `search.objectives` and its limits say what counts.
        root: remembers what was timed.
        num_classes: of the data set.

    Raises:
        NetworkError: a student that cannot be built.
        ConfigError: no student is left.
    """
    search, data = experiment.search, experiment.data
    limits = search.cost_limits
    costs = dict.fromkeys(["params_m", *limits, *search.costs])
    facts: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for network in experiment.student.networks:
        settings, facts[network] = experiment.student.settings_of(network), {}
        # What is timed comes last: a network that is too large already is not timed.
        for name in sorted(costs, key=lambda name: STUDENT_COSTS[name].is_timed):
            value = student_cost(name, settings, num_classes, data.view_size, data.image_size, root)
            facts[network][name] = value
            key, limit = limits.get(name, ("", value))
            if value > limit:
                figure = STUDENT_COSTS[name].figure(value)
                left_out[network] = f"{network}: {figure}, search.{key} allows {limit:g}"
                break
    if len(left_out) == len(experiment.student.networks):
        reasons = "; ".join(left_out.values())
        raise ConfigError(f"student.network: no student is left ({reasons}); raise the limit, or name smaller ones")
    return Candidates(facts, left_out)


def student_cost(
    name: str, settings: NetworkSettings, num_classes: int, size: tuple[int, int], image_size: int, root: Workspace
) -> float:
    """Measure a cost of a network with random weights, which do not change it; what is timed is remembered.

    Args:
        name: of `STUDENT_COSTS`.
        settings: of the network.
        num_classes: of the data set.
        size: height and width of an image, in pixels.
        image_size: that the network is built for.
        root: where it is remembered.
    """
    cost = STUDENT_COSTS[name]()
    if not cost.is_timed:
        return _measured(cost, settings, num_classes, size, image_size)
    file = root.path / "students.json"
    what = [settings.network, sorted(settings.options.items()), num_classes, size, THREADS, torch.__version__]
    # Files of older versions hold latencies alone, without a name.
    what += [] if name == "latency_ms" else [name]
    key = json.dumps([device_name("cpu"), *what], default=str)
    root.path.mkdir(parents=True, exist_ok=True)
    with FileLock(root.path / ".students.lock"):
        known = parse(dict[str, float], read_json(file))
        if key not in known:
            known[key] = _measured(cost, settings, num_classes, size, image_size)
            write_text(file, json.dumps(known, indent=1))
    return known[key]


def parameters_m(settings: NetworkSettings, num_classes: int, image_size: int) -> float:
    """Millions of parameters of a network, which is not built for it where its code allows that."""
    return _measured(STUDENT_COSTS["params_m"](), settings, num_classes, (image_size, image_size), image_size)


def _measured(
    cost: StudentCost, settings: NetworkSettings, num_classes: int, size: tuple[int, int], image_size: int
) -> float:
    def measure() -> float:
        network = build_configured(settings, num_classes, image_size)
        return cost.measure(deployable(network.eval()), size)

    if not cost.is_timed:
        # Without memory; some encoders compute with their weights while they are made, and cannot be built so.
        with suppress(Exception), torch.device("meta"):
            return measure()
    return measure()
