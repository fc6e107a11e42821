"""What students cost is measured before they are trained; who exceeds a limit is left out with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from heterokd.config.experiment import Experiment
from heterokd.config.networks import NetworkSettings
from heterokd.errors import ConfigError
from heterokd.networks.network import build_network
from heterokd.networks.student_cost import Runtime
from heterokd.networks.student_costs import STUDENT_COSTS
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.options import StudyOptions
from heterokd.study.storage import StudyFacts
from heterokd.study.study import Study
from heterokd.training.precision import device_name
from heterokd.training.student_costs import CostMeter, measure_students, parameters_m

ONNX_GPU = {"runtime": "onnx", "device": "cuda"}


def make_experiment(students: list[str] | str = "resnet10t", **search: Any) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "students",
            "data": {"dataset": "digits"},
            "teacher": {"network": "resnet18"},
            "student": {"network": students},
            "training": {"epochs": 27},
            "search": {"space": {"methods": ["scratch", "kd", "dkd"]}, **search},
        }
    )


@pytest.mark.parametrize(
    ("network", "options"),
    [
        ("test_resnet", {}),
        ("test_vit", {}),  # takes the size of the images
        ("torchvision:squeezenet1_1", {"taps": {"stages": ["features.2", "features.5", "features.8", "features.12"]}}),
        ("segformer-mit_b0", {}),  # computes while it is made
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parameters_are_those_of_the_network_that_is_built(network: str, options: dict[str, object]) -> None:
    built = build_network(network, 10, options, image_size=64)
    count = sum(parameter.numel() for parameter in built.parameters()) / 1e6
    assert parameters_m(NetworkSettings(network=network, options=options), 10, 64) == count


def test_a_latency_is_measured_once(tmp_path: Path) -> None:
    settings, root = NetworkSettings(network="test_resnet"), Workspace(tmp_path)
    threads = torch.get_num_threads()
    meter = CostMeter(root, 10, (32, 32), 32)
    first = meter.cost("latency_ms", settings)
    assert first > 0
    assert torch.get_num_threads() == threads
    assert meter.cost("latency_ms", settings) == first  # to the last digit: it was not measured again
    CostMeter(root, 10, (64, 64), 64).cost("latency_ms", settings)
    assert len(json.loads((tmp_path / "students.json").read_text())) == 2
    # the key of versions that only knew torch on a single core
    key = json.dumps([device_name("cpu"), "test_resnet", [], 10, (32, 32), 1, torch.__version__])
    (tmp_path / "students.json").write_text(json.dumps({key: 7.0}))
    assert meter.cost("latency_ms", settings) == 7.0


@pytest.mark.parametrize("name", STUDENT_COSTS)
def test_every_cost_is_a_positive_number_that_says_how_it_was_measured(name: str, tmp_path: Path) -> None:
    cost = STUDENT_COSTS[name]()
    meter, settings = CostMeter(Workspace(tmp_path), 10, (32, 32), 32), NetworkSettings(network="test_resnet")
    value = meter.cost(name, settings)
    assert 0 < value < 1000
    assert cost.figure(value).endswith(f"{cost.symbol} {cost.name}")
    assert cost.label() == f"{cost.name} in {cost.unit}"
    assert (tmp_path / "students.json").exists() == cost.is_timed
    if cost.is_timed:
        assert cost.conditions((32, 32)).startswith(f"median of 30, batch 1, 32 x 32 pixels, {cost.timed_in}")
        assert meter.cost(name, settings) == value
        slower = Runtime("onnx", threads=2)
        assert (STUDENT_COSTS[name](slower).timed_in.name, str(slower)) == ("onnx", "ONNX Runtime, CPU, 2 threads")


def test_what_is_timed_can_be_chosen(tmp_path: Path) -> None:
    asked = {"limits": {"student/int8_ms": 1e3}, "max_latency_ms": 1e3, "latency": {"runtime": "onnx"}}
    experiment = make_experiment("test_resnet", **asked)
    costs = measure_students(experiment, Workspace(tmp_path), 10).costs["test_resnet"]
    assert list(costs) == ["params_m", "latency_ms", "int8_ms"]
    known = [json.loads(key) for key in json.loads((tmp_path / "students.json").read_text())]
    assert [(key[5], key[7]) for key in known] == [(1, "latency_ms"), (1, "int8_ms")]
    assert all(key[8].startswith("onnxruntime ") for key in known)
    assert "ONNX Runtime, CPU, 1 thread" in experiment.cost_conditions["latency_ms"]
    assert STUDENT_COSTS["int8_ms"](Runtime("torch", 3, "cuda")).timed_in == Runtime("onnx", 3, "cpu")


def test_a_machine_that_cannot_time_students_is_refused_with_the_key(tmp_path: Path) -> None:
    objectives = ["val/top1", "student/latency_ms"]
    for latency, key in (({"threads": 1000}, "threads"), ({"device": "cuda"}, "device"), (ONNX_GPU, "device")):
        if key == "device" and torch.cuda.is_available():
            continue
        experiment = make_experiment("test_resnet", objectives=objectives, latency=latency)
        with pytest.raises(ConfigError, match=rf"^search\.latency\.{key}: is (1000|cuda), but .*; change it, or list"):
            measure_students(experiment, Workspace(tmp_path), 10)
        table = {"student/latency_ms": {"test_resnet": 2.5}}
        listed = make_experiment("test_resnet", objectives=objectives, latency=latency, costs=table)
        assert measure_students(listed, Workspace(tmp_path), 10).costs["test_resnet"]["latency_ms"] == 2.5


class Spectral(nn.Module):
    """A classifier that ONNX cannot express."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, stride=4), nn.Linear(8, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.linalg.svdvals(self.conv(images))[:, :, 0])
        return logits


def test_a_student_that_cannot_be_quantized_is_left_out_with_the_reason(tmp_path: Path) -> None:
    network, objectives = f"{__name__}:Spectral", ["val/top1", "student/int8_ms"]
    candidates = measure_students(
        make_experiment([network, "test_resnet"], objectives=objectives), Workspace(tmp_path), 10
    )
    assert candidates.left_out[network].startswith(
        f"{network}: its int8 latency is unknown, since it cannot be quantized to 8 bits as ONNX (No ONNX function"
    )
    assert candidates.costs["test_resnet"]["int8_ms"] > 0
    with pytest.raises(ConfigError, match=r"no student is within the limits .* or name other students"):
        measure_students(make_experiment(network, objectives=objectives), Workspace(tmp_path), 10)


def test_costs_of_a_device_are_read_from_a_table(tmp_path: Path) -> None:
    students, objectives = ["test_resnet", "resnet10t"], ["val/top1", "student/latency_ms", "student/int8_ms"]
    table = {"student/latency_ms": {"test_resnet": 9.5, "resnet10t": 3}, "student/int8_ms": {"resnet10t": 1, "x": 2}}
    with pytest.raises(ConfigError, match=r"search\.costs\.student/int8_ms: has no value for student test_resnet"):
        measure_students(make_experiment(students, objectives=objectives, costs=table), Workspace(tmp_path), 10)
    table["student/int8_ms"]["test_resnet"] = 4
    limits = {"max_latency_ms": 9}
    experiment = make_experiment(students, objectives=objectives, costs=table, **limits)
    candidates = measure_students(experiment, Workspace(tmp_path), 10)
    assert candidates.costs["resnet10t"] == {"params_m": pytest.approx(4.93, abs=0.1), "latency_ms": 3, "int8_ms": 1}
    assert candidates.left_out == {"test_resnet": "test_resnet: 9.5 ms latency, search.max_latency_ms allows 9"}
    assert not (tmp_path / "students.json").exists()
    study = Study.open(experiment, StudyFolder(tmp_path), StudyOptions(StudyFacts(costs=candidates.costs)))
    source = "from a table of yours (search.costs)"
    assert study.summary().cost_conditions == {"latency_ms": source, "int8_ms": source}
    assert make_experiment(students).cost_conditions == {}


def test_students_over_a_limit_are_left_out_with_the_reason(tmp_path: Path) -> None:
    experiment = make_experiment(["test_resnet", "resnet10t"], max_params_m=1.0)
    candidates = measure_students(experiment, Workspace(tmp_path), 10)
    assert set(candidates.left_out) == {"resnet10t"}
    assert "search.max_params_m allows 1" in candidates.left_out["resnet10t"]
    assert experiment.without(candidates.left_out).student.networks == ("test_resnet",)
    assert not (tmp_path / "students.json").exists()  # nobody asked for latency
    with pytest.raises(ConfigError, match="no student is within the limits"):
        measure_students(make_experiment("resnet10t", max_params_m=0.1), Workspace(tmp_path), 10)
    with pytest.raises(ConfigError, match="max_latency_ms allows 1e-06"):
        measure_students(make_experiment("test_resnet", max_latency_ms=1e-6), Workspace(tmp_path), 10)


def test_flops_are_an_objective_and_a_limit_by_their_file_alone(tmp_path: Path) -> None:
    students, objectives = ["test_resnet", "resnet10t"], ["val/top1", "student/flops_g"]
    experiment = make_experiment(students, objectives=objectives)
    costs = measure_students(experiment, Workspace(tmp_path), 10).costs
    assert 0 < costs["test_resnet"]["flops_g"] < costs["resnet10t"]["flops_g"]
    assert "latency_ms" not in costs["test_resnet"]
    limited = make_experiment(students, limits={"student/flops_g": costs["test_resnet"]["flops_g"]})
    reason = measure_students(limited, Workspace(tmp_path), 10).left_out["resnet10t"]
    assert re.fullmatch(r"resnet10t: 0\.\d+ G FLOPs, search\.limits\.student/flops_g allows 0\.\d+", reason)
    study = Study.open(experiment, StudyFolder(tmp_path), StudyOptions(StudyFacts(costs=costs)))
    assert list(study.summary().objectives) == objectives
    sample = {"method": "kd", "student.network": "test_resnet"}
    assert experiment.recipe(sample).hash == make_experiment(students).recipe(sample).hash


def test_a_multiply_add_counts_as_two_flops() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Flatten(), nn.Linear(8 * 8 * 6, 5))
    wanted = 2 * (3 * 3 * 3) * 8 * (8 * 6) + 2 * (8 * 8 * 6) * 5
    assert STUDENT_COSTS["flops_g"]().measure(network, (10, 8)) == wanted / 1e9
