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
from heterokd.networks.student_costs import STUDENT_COSTS
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.options import StudyOptions
from heterokd.study.storage import StudyFacts
from heterokd.study.study import Study
from heterokd.training.student_costs import measure_students, parameters_m, student_cost


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
    first = student_cost("latency_ms", settings, 10, (32, 32), 32, root)
    assert first > 0
    assert torch.get_num_threads() == threads
    assert (
        student_cost("latency_ms", settings, 10, (32, 32), 32, root) == first
    )  # to the last digit: it was not measured again
    student_cost("latency_ms", settings, 10, (64, 64), 64, root)
    assert len(json.loads((tmp_path / "students.json").read_text())) == 2


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
