"""Nothing listens to strangers, nothing is unpickled, and no password is kept or shown."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow.pytorch
import psutil
import pytest
import torch
from listening import listening, reached_from_outside
from mlflow.exceptions import MlflowException

import heterokd
from heterokd.config.reading import load_experiment
from heterokd.errors import ConfigError, without_password
from heterokd.storage.workspace import Workspace
from heterokd.tracking.store import first_line, quiet
from heterokd.tracking.ui_server import ui_command

PACKAGE = Path(heterokd.__file__).parent
Write = Callable[..., Path]

UNPICKLING = {"pickle", "_pickle", "cPickle", "joblib", "cloudpickle", "dill", "shelve", "marshal", "ray.cloudpickle"}
READS_A_PICKLE = "datasets/cifar100.py"
"""CIFAR-100 is shipped as pickles; its reader knows arrays and plain values, and refuses the rest."""


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, ast.expr]]]:
    """Dotted name and keywords of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {one.arg: one.value for one in node.keywords if one.arg}


def is_(value: ast.expr | None, constant: object) -> bool:
    return isinstance(value, ast.Constant) and value.value is constant


@pytest.mark.parametrize(
    "file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: Path(file).relative_to(PACKAGE).as_posix()
)
def test_nothing_is_unpickled(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    name = file.relative_to(PACKAGE).as_posix()
    imported = {
        module
        for node in ast.walk(tree)
        for module in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    of_pickle = {each for each in used if each.startswith("pickle.")}
    if name == READS_A_PICKLE:
        assert of_pickle == {"pickle.Unpickler", "pickle.UnpicklingError"}
    elif "pickle" in imported:
        # torch.load with weights_only raises it.
        assert (of_pickle, imported & UNPICKLING) == ({"pickle.UnpicklingError"}, {"pickle"})
    else:
        assert not imported & UNPICKLING
    for function, keywords in calls(tree):
        if function == "torch.load":
            assert is_(keywords.get("weights_only"), True), "torch.load without weights_only=True runs what a file says"
        elif function in ("torch.jit.load", "torch.package.PackageImporter", "pd.read_pickle", "pandas.read_pickle"):
            raise AssertionError(f"{function} runs what a file says")
        elif function == "yaml.load":
            assert ast.unparse(keywords["Loader"]) in ("_Loader", "yaml.SafeLoader")
        elif function.endswith("pytorch.log_model"):
            assert keywords["serialization_format"].value == "pt2"  # type: ignore[attr-defined]
        assert "allow_pickle" not in keywords or is_(keywords["allow_pickle"], False)
        assert not function.endswith((".unsafe_load", ".full_load"))


def test_a_model_that_is_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    """Whoever can write to the registry could run code otherwise, on the machine of whoever promotes."""
    ran, place = tmp_path / "ran", tmp_path / "model"
    with quiet():
        mlflow.pytorch.save_model(Marked(ran), place, serialization_format="pickle", pip_requirements=["torch"])
    ran.unlink(missing_ok=True)
    with pytest.raises(MlflowException, match=r"(?i)pickle"):
        mlflow.pytorch.load_model(str(place))
    assert not ran.exists()


class Marked(torch.nn.Module):
    """Leaves a file behind where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self.mark = mark

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self.mark.touch()


@pytest.mark.usefixtures("local_ray")
def test_a_local_ray_listens_on_loopback_alone() -> None:
    sockets = listening([psutil.Process(), *psutil.Process().children(recursive=True)])
    assert any("gcs_server" in name for name in sockets.values()), "Ray's own sockets are among them"
    assert reached_from_outside(sockets) == {}


def test_ray_tune_carries_no_keys() -> None:
    """It would in its runtime environments, which Ray logs; `test_submitting` looks at the logs themselves."""
    from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

    import heterokd.execution.ray_settings  # noqa: F401  which sees to it

    assert ENV_VARS_TO_PROPAGATE
    assert not [name for name in ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")]


def test_what_is_reached_from_outside_is_seen() -> None:
    places = {
        "0.0.0.0:1": "a",
        ":::2": "b",
        "10.0.0.1:3": "c",
        "127.0.0.1:4": "d",
        "::1:5": "e",
        "::ffff:127.0.0.1:6": "f",
    }
    assert set(reached_from_outside(places).values()) == {"a", "b", "c"}


@pytest.mark.parametrize("override", [False, True])
def test_an_experiment_holds_no_password(tiny_file: Write, override: bool) -> None:
    uri = "postgresql://me:canary@host/runs"
    file = tiny_file(tracking={} if override else {"uri": uri})
    overrides = [f"tracking.uri={uri}"] if override else []
    with pytest.raises(ConfigError, match=r"tracking.uri.*postgresql://\*\*\*@host/runs.*MLFLOW_TRACKING_URI") as told:
        load_experiment(file, overrides)
    assert "canary" not in str(told.value)


def test_addresses_are_shown_without_passwords(tmp_path: Path) -> None:
    assert without_password("see http://me:canary@host/x and http://host") == "see http://***@host/x and http://host"
    assert without_password("http://host:5000") == "http://host:5000"
    error = ValueError("API request to http://me:canary@host:5000/api failed.\nmore")
    assert first_line(error) == "API request to http://***@host:5000/api failed"
    # Arguments are seen by everybody on the machine.
    secret = "postgresql+psycopg2://me:canary@host:5432/runs"
    command, environment = ui_command(Workspace(tmp_path), 5000, secret)
    assert "canary" not in " ".join(command)
    assert environment["MLFLOW_BACKEND_STORE_URI"] == secret
