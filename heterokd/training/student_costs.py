"""Costs of students, measured before training, and the students of an experiment that exceed a limit.

Costs that depend on the machine are timed once per architecture, image size, processor and runtime, and stored in
`ROOT/students.json`, or are read from the experiment's table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version

import torch
from filelock import FileLock

from heterokd.config.costs import COSTS, LATENCY, STUDENT, CostSettings, table_faults
from heterokd.config.experiment import Experiment
from heterokd.config.networks import NetworkSettings
from heterokd.config.search import SearchSettings
from heterokd.errors import ConfigError, CostError
from heterokd.networks.combined_options import member_networks
from heterokd.networks.modules import TAPS
from heterokd.networks.network import deployable
from heterokd.networks.onnx_graph import runtime_fault
from heterokd.networks.segmentation_names import is_segmentation
from heterokd.networks.splits import meta_body
from heterokd.networks.student_cost import Runtime, StudentCost
from heterokd.networks.student_costs import STUDENT_COSTS
from heterokd.storage.files import read_derived, write_text
from heterokd.storage.workspace import Workspace
from heterokd.training.precision import device_name
from heterokd.training.student import build_configured


@dataclass(frozen=True)
class Candidates:
    """The students of an experiment.

    Attributes:
        costs: costs by network: `params_m`, and every cost that has a limit or is an objective.
        left_out: networks that exceed a limit, or whose cost cannot be measured, with the reason.
    """

    costs: Mapping[str, Mapping[str, float]]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class CostMeter:
    """Measures costs of networks with random weights, on which they do not depend, or reads them from a table.

    Attributes:
        root: workspace that stores timed costs in `students.json`.
        num_classes: number of classes of the data set.
        size: height and width of an image, in pixels.
        image_size: size that networks are built for.
        settings: what is timed, and the table.
    """

    root: Workspace
    num_classes: int
    size: tuple[int, int]
    image_size: int
    settings: CostSettings = field(default_factory=CostSettings)

    def cost(self, name: str, settings: NetworkSettings) -> float:
        """Return a cost, key of `STUDENT_COSTS`, of a network.

        Raises:
            NetworkError: the network cannot be built.
            CostError: the cost cannot be measured for it, or the table does not have it.
        """
        if listed := self.settings.listed_costs(name):
            if settings.network not in listed:
                raise CostError(f"{COSTS}.{STUDENT}{name} has no value for it")
            return listed[settings.network]
        cost = STUDENT_COSTS[name](self.settings.runtime)
        if not cost.is_timed:
            return _measured(cost, settings, self.num_classes, self.size, self.image_size)
        runtime, file = cost.timed_in, self.root.path / "students.json"
        if fault := runtime_fault(runtime):
            raise CostError(f"it cannot be timed here: {LATENCY}.{fault[0]} {fault[1]}")
        build = [settings.network, sorted(settings.options.items()), self.num_classes, self.size]
        # Older files hold only latencies in torch, without the name of the cost.
        named = [] if name == "latency_ms" and runtime.name == "torch" else [name, *_onnx_versions(runtime)]
        conditions = [device_name(runtime.device), *build, runtime.threads, torch.__version__, *named]
        key = json.dumps(conditions, default=str)
        self.root.path.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root.path / ".students.lock"):
            known = {cost: value for cost, value in read_derived(file).items() if isinstance(value, float)}
            if key not in known:
                known[key] = _measured(cost, settings, self.num_classes, self.size, self.image_size)
                write_text(file, json.dumps(known, indent=1))
        return known[key]


def measure_students(experiment: Experiment, root: Workspace, num_classes: int) -> Candidates:
    """Measure every student of an experiment: its parameters, and each cost that has a limit or is an objective.

    Raises:
        NetworkError: a student cannot be built.
        ConfigError: every student is left out, the table lacks a student, or this machine cannot time students.
    """
    search, data = experiment.search, experiment.data
    limits = search.cost_limits
    for key, text in (*table_faults(search, experiment.student.networks), *_runtime_faults(search)):
        raise ConfigError(f"{key}: {text}")
    meter = CostMeter(root, num_classes, data.view_size, data.image_size, search)
    costs: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for network in experiment.student.networks:
        settings, costs[network] = experiment.student.settings_of(network), {}
        for name in asked_costs(search):
            try:
                value = meter.cost(name, settings)
            except CostError as error:
                left_out[network] = f"{network}: its {STUDENT_COSTS[name].name} is unknown, since {error}"
                break
            costs[network][name] = value
            key, limit = limits.get(name, ("", value))
            if value > limit:
                figure = STUDENT_COSTS[name].figure(value)
                left_out[network] = f"{network}: {figure}, search.{key} allows {limit:g}"
                break
    if len(left_out) == len(experiment.student.networks):
        reasons = "; ".join(left_out.values())
        raise ConfigError(
            f"student.network: no student is within the limits ({reasons}); raise a limit, or name other students"
        )
    return Candidates(costs, left_out)


def asked_costs(search: SearchSettings) -> list[str]:
    """Return `params_m` and the costs with a limit or among the objectives; timed costs last, optional ones at the end.

    So a network that is too large is not timed.
    """
    names = dict.fromkeys(["params_m", *search.cost_limits, *search.cost_objectives])
    return sorted(names, key=lambda name: (STUDENT_COSTS[name].is_timed, STUDENT_COSTS[name].is_optional))


def _runtime_faults(search: SearchSettings) -> Iterator[tuple[str, str]]:
    """Yield key and sentence of what this machine lacks to time the costs that are asked for."""
    costs = [STUDENT_COSTS[name](search.runtime) for name in asked_costs(search) if not search.listed_costs(name)]
    for runtime in {cost.timed_in for cost in costs if cost.is_timed}:
        if fault := runtime_fault(runtime):
            yield f"{LATENCY}.{fault[0]}", f"{fault[1]}; change it, or list what you measured on a device in {COSTS}"


def _onnx_versions(runtime: Runtime) -> list[str]:
    return [f"onnxruntime {version('onnxruntime')}"] if runtime.name == "onnx" else []


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
