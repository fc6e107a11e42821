"""Fixtures: one local Ray for all tests that need one, and a tiny experiment on real images."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from another_process import AnotherProcess

if TYPE_CHECKING:
    from command_line import Run
    from fake_ray import FakeRay

# Before anything imports them: no telemetry, a Ray that stays on the loopback interface, one thread a process.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"dataset": "digits", "image_size": 32, "labels_per_class": 4},
    "teacher": {
        "network": "test_vit",
        "options": {"img_size": 32, "patch_size": 8},
        "training": {"epochs": 2, "warmup_epochs": 0, "batch_size": 64, "precision": "fp32", "channels_last": False},
    },
    "student": {"network": "test_efficientnet"},
    "training": {"epochs": 3, "batch_size": 20, "learning_rate": 0.05, "precision": "fp32", "channels_last": False},
    "search": {
        "space": {
            "methods": ["scratch", "kd", "dkd"],
            "shared": {"training.learning_rate": {"low": 0.01, "high": 0.2, "log": True}},
        },
        "trials": 4,
        # Trainings of a few epochs have rungs, too.
        "min_epochs": 1,
        "confirm_leaders": 1,
        "confirm_seeds": 1,
        "confirm_references": False,
        "parallel": 1,
    },
}


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the MLflow store that the processes of pytest-xdist share (`fabricated.root_with_store`)."""
    nodes = getattr(config.pluginmanager.get_plugin("dsession"), "nodemanager", None)
    if nodes is not None:
        for suffix in ("db", "lock"):
            (Path(tempfile.gettempdir()) / f"heterokd-empty-store-{nodes.testrunuid}.{suffix}").unlink(missing_ok=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that start Ray first: they take longest."""

    def starts_ray(item: pytest.Item) -> bool:
        return item.get_closest_marker("ray") is not None or "local_ray" in getattr(item, "fixturenames", ())

    items.sort(key=lambda item: not starts_ray(item))


@pytest.fixture
def tiny_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny experiment, with sections replaced key by key, to a file."""

    def write(**changes: dict[str, Any]) -> Path:
        content = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
        for section, values in changes.items():
            if isinstance(values, dict):
                content[section] = {**content.get(section, {}), **values}
            else:
                content[section] = values
        file = tmp_path / "tiny.yaml"
        file.write_text(yaml.safe_dump(content))
        return file

    return write


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process, in an empty folder."""
    from command_line import run_command

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HETEROKD_ROOT", raising=False)
    return partial(run_command, capfd)


@pytest.fixture(scope="session")
def elsewhere() -> Iterator[AnotherProcess]:
    """Runs code in another process, the same one for the whole session: importing torch takes seconds."""
    with AnotherProcess() as process:
        yield process


@pytest.fixture(autouse=True)
def _no_store_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow itself sets the variable while it logs a model; a test that needs it sets it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """Ray's calls answered in this process, also where another test of it has started a Ray."""
    from fake_ray import FakeRay

    fake = FakeRay()
    for module, name, answer in fake.answers():
        monkeypatch.setattr(module, name, answer)
    return fake


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One local Ray for the session: starting one takes seconds."""
    from heterokd.execution.ray_connection import connected

    with connected(None, cores=2):
        yield
