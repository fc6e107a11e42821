"""Costs of students, measured before training, and the students of an experiment that exceed a limit.

Costs that depend on the machine are timed in torch, once per architecture, image size and processor, and stored in
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
from heterokd.networks.combined_options import member_networks
from heterokd.networks.modules import TAPS
from heterokd.networks.network import deployable
from heterokd.networks.segmentation_names import is_segmentation
from heterokd.networks.splits import meta_body
from heterokd.networks.student_cost import StudentCost
from heterokd.networks.student_costs import STUDENT_COSTS
from heterokd.networks.timing import THREADS
from heterokd.storage.files import read_derived, write_text
from heterokd.storage.workspace import Workspace
from heterokd.training.precision import device_name
from heterokd.training.student import build_configured


@dataclass(frozen=True)
class Candidates:
    """The students of an experiment.

    Attributes:
        costs: costs by network: `params_m`, and every cost that has a limit or is an objective.
        left_out: networks that exceed a limit, with the reason.
    """

    costs: Mapping[str, Mapping[str, float]]
    left_out: Mapping[str, str]


def measure_students(experiment: Experiment, root: Workspace, num_classes: int) -> Candidates:
    """Measure every student of an experiment: its parameters, and each cost that has a limit or is an objective.

    Raises:
        NetworkError: a student cannot be built.
        ConfigError: every student exceeds a limit.
    """
    search, data = experiment.search, experiment.data
    limits = search.cost_limits
    # Timed costs come last, so that a network that is too large is not timed.
    names = sorted(dict.fromkeys(["params_m", *limits, *search.costs]), key=lambda name: STUDENT_COSTS[name].is_timed)
    costs: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for network in experiment.student.networks:
        settings, costs[network] = experiment.student.settings_of(network), {}
        for name in names:
            value = student_cost(name, settings, num_classes, data.view_size, data.image_size, root)
            costs[network][name] = value
            key, limit = limits.get(name, ("", value))
            if value > limit:
                figure = STUDENT_COSTS[name].figure(value)
                left_out[network] = f"{network}: {figure}, search.{key} allows {limit:g}"
                break
    if len(left_out) == len(experiment.student.networks):
        reasons = "; ".join(left_out.values())
        raise ConfigError(
            f"student.network: no student is within the limits ({reasons}); raise a limit, or name smaller students"
        )
    return Candidates(costs, left_out)


def student_cost(
    name: str, settings: NetworkSettings, num_classes: int, size: tuple[int, int], image_size: int, root: Workspace
) -> float:
    """Measure a cost of a network with random weights, on which it does not depend.

    Args:
        name: key of `STUDENT_COSTS`.
        settings: configuration of the network.
        num_classes: number of classes of the data set.
        size: height and width of an image, in pixels.
        image_size: size that the network is built for.
        root: workspace that stores timed costs in `students.json`.
    """
    cost = STUDENT_COSTS[name]()
    if not cost.is_timed:
        return _measured(cost, settings, num_classes, size, image_size)
    file = root.path / "students.json"
    build = [settings.network, sorted(settings.options.items()), num_classes, size, THREADS, torch.__version__]
    # Older files hold only latencies, without the name of the cost.
    named = [] if name == "latency_ms" else [name]
    key = json.dumps([device_name("cpu"), *build, *named], default=str)
    root.path.mkdir(parents=True, exist_ok=True)
    with FileLock(root.path / ".students.lock"):
        known = {cost: value for cost, value in read_derived(file).items() if isinstance(value, float)}
        if key not in known:
            known[key] = _measured(cost, settings, num_classes, size, image_size)
            write_text(file, json.dumps(known, indent=1))
    return known[key]


def parameters_m(settings: NetworkSettings, num_classes: int, image_size: int) -> float:
    """Return the number of parameters of a network, in millions; whether it runs on images is not checked."""
    cost, size = STUDENT_COSTS["params_m"](), (image_size, image_size)
    options = {key: value for key, value in settings.options.items() if key != TAPS}
    if not is_segmentation(settings.network) and not member_networks(settings.network, options):
        # A tenth of the time of building it with its parts. See `_measured` for the suppression.
        with suppress(Exception):
            return cost.measure(meta_body(settings.network, num_classes, options, image_size)[0], size)
    return _measured(cost, settings, num_classes, size, image_size)


def _measured(
    cost: StudentCost, settings: NetworkSettings, num_classes: int, size: tuple[int, int], image_size: int
) -> float:
    def measure() -> float:
        network = build_configured(settings, num_classes, image_size)
        return cost.measure(deployable(network.eval()), size)

    if not cost.is_timed:
        # Without memory for the weights; impossible for encoders that compute with their weights while they are built.
        with suppress(Exception), torch.device("meta"):
            return measure()
    return measure()
