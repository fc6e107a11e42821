"""heterokd in a program: light to import, and the notebook's cells run as they stand."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import pickle
import runpy
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import fabricated
import pytest
import torch
from PIL import Image
from tiny_datasets import write_classes

import heterokd
from heterokd import Experiment, distill, load_experiment, load_student
from heterokd.errors import StudyError, UserError
from heterokd.networks.network import deployable

EXAMPLES = Path(__file__).parents[1] / "examples"


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_it_imports_nothing_heavy() -> None:
    assert not modules_after("import heterokd") & {"torch", "timm", "ray", "optuna", "mlflow", "pydantic"}


def test_reading_an_experiment_imports_no_service() -> None:
    loaded = modules_after("from heterokd import Experiment, load_experiment, search, distill, load_student")
    assert "heterokd.api" in loaded
    assert not loaded & {"ray", "optuna", "mlflow"}


def test_the_names_are_shown_and_are_what_they_seem() -> None:
    assert set(heterokd.__all__) <= set(dir(heterokd))
    assert set(importlib.import_module("heterokd.api").__all__) <= set(heterokd.__all__)
    for name in heterokd.__all__:
        value = getattr(heterokd, name)
        if isinstance(value, type) or inspect.isfunction(value):
            assert pickle.loads(pickle.dumps(value)) is value
    parameters = list(inspect.signature(heterokd.search).parameters)
    assert parameters == ["experiment", "root", "resume", "address", "listener", "teacher_progress"]


def test_a_function_stays_a_function_when_the_modules_behind_it_are_imported() -> None:
    for module in (
        "execution.driver",
        "execution.planning.plan",
        "students.promotion.promote",
        "students.export.export",
    ):
        importlib.import_module(f"heterokd.{module}")
    assert all(inspect.isfunction(getattr(heterokd, name)) for name in ("search", "plan", "promote", "export"))


def test_its_names_are_explained() -> None:
    for name in heterokd.__all__:
        assert getattr(heterokd, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'serch'"):
        _ = heterokd.serch  # type: ignore[attr-defined]


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    experiment = load_experiment(EXAMPLES.parent / "experiments" / "quickstart.yaml")
    assert isinstance(experiment, Experiment)
    with pytest.raises(UserError, match="did you mean 'hcd'"):
        distill(experiment, "hdc", tmp_path)
    with pytest.raises(StudyError, match="there is no study 'nothing'"):
        load_student("studies/nothing", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETEROKD_EXPERIMENT", str(EXAMPLES.parent / "experiments" / "quickstart.yaml"))
    monkeypatch.setenv("HETEROKD_ROOT", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    names = run_notebook("quickstart.ipynb")
    assert names["found"].summary.progress.finished  # type: ignore[attr-defined]
    logits = names["logits"]
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (1, 10)


def run_notebook(file: str) -> dict[str, object]:
    """Run the cells of a notebook of examples/; return its names."""
    notebook = json.loads((EXAMPLES / file).read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs are cleared before a notebook is committed"
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_notebook_on_a_folder_runs_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, split in enumerate(("train", "val", "test")):
        write_classes(tmp_path / "images" / split, {"cat": 8, "dog": 8, "owl": 8}, seed)
    monkeypatch.setenv("HETEROKD_IMAGES", str(tmp_path / "images"))
    monkeypatch.setenv("HETEROKD_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("HETEROKD_TRIALS", "2")
    monkeypatch.setenv("HETEROKD_EPOCHS", "3")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    names = run_notebook("icons.ipynb")
    assert names["found"].summary.progress.finished  # type: ignore[attr-defined]
    for name, images in (("pictures", 3), ("answers", 12)):
        drawn = [axis for axis in names[name].axes if axis.images]  # type: ignore[attr-defined]
        assert len(drawn) == images
        assert all(axis.get_title() for axis in drawn)
    assert names["axis"].lines  # type: ignore[attr-defined]
    assert (tmp_path / "runs/studies/icons/report.html").is_file()


def test_a_loss_in_a_loop_of_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "own_loop.py"), run_name="__main__")
    scores = {name: float(score) for name, score in map(str.split, capsys.readouterr().out.splitlines())}
    assert list(scores) == ["teacher", "student"]
    assert min(scores.values()) > 0.7


def test_a_student_is_served() -> None:
    names = runpy.run_path(str(EXAMPLES / "serve.py"))
    file = io.BytesIO()
    Image.new("L", (20, 30), 255).save(file, "PNG")
    with names["server"](deployable(fabricated.random_student()), 32, 0) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_address[1]}", data=file.getvalue()) as answer:
            found = json.loads(answer.read())
        thread.join()
    assert found["class"] in range(10)
    assert 0.1 <= found["probability"] <= 1


def test_examples_are_short() -> None:
    files = list(EXAMPLES.glob("*.py"))
    assert len(files) >= 3
    for file in files:
        assert len(file.read_text().splitlines()) < 40, f"{file.name} is no longer short"


def test_the_example_compiles() -> None:
    file = EXAMPLES / "quickstart.py"
    compile(file.read_text(), str(file), "exec")
