"""A method and a data set of a user's own files: what they are called, what identifies them, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import user_classes
import yaml
from command_line import Run

from heterokd import api
from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment, load_recipe
from heterokd.config.recipe import Recipe
from heterokd.errors import ConfigError, StudyError
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.study import Study
from heterokd.training.data import open_splits

METHOD, DATA = "./my_method.py:MyKD", "./my_data.py:MyData"
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    user_classes.write(tmp_path)


@pytest.fixture
def load(tiny_file: Write) -> Callable[..., Experiment]:
    def run(methods: Any = ("kd", METHOD), **space: Any) -> Experiment:
        return load_experiment(tiny_file(search={"space": {"methods": list(methods), **space}}))

    return run


def test_a_method_of_a_file_goes_by_its_class(load: Callable[..., Experiment]) -> None:
    experiment = load(overrides={"mykd.weight": {"low": 0.5, "high": 2.0}})
    assert experiment.methods == ("kd", "mykd")
    assert str(experiment.domains("mykd")["mykd.weight"]) == "0.5 to 2, log"
    recipe = experiment.recipe({"method": "mykd", "mykd.weight": 2.0})
    assert (recipe.method, recipe.params) == ("mykd", {"weight": 2.0})
    assert recipe.method_class.__name__ == "MyKD"
    assert recipe.method_class is experiment.method_class("mykd")
    assert experiment.recipe({"method": "kd"}).extension is None


def test_what_is_written_runs_without_the_file(load: Callable[..., Experiment], tmp_path: Path) -> None:
    experiment = load()
    recipe = experiment.recipe({"method": "mykd"})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    (tmp_path / "my_method.py").unlink()
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe
    assert again.method_class.__name__ == "MyKD"
    assert "\n    class MyKD(Method):\n" in recipe.to_yaml(), "its text is written as it was"
    assert Experiment.model_validate_json(experiment.model_dump_json()) == experiment


def test_reading_a_recipe_runs_nothing(load: Callable[..., Experiment], tmp_path: Path) -> None:
    recipe = load().recipe({"method": "mykd"})
    content = recipe.model_dump(mode="json")
    text = "raise SystemExit('it was run')\nclass MyKD: pass\n"
    content["extension"] |= {"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert load_recipe(tmp_path / "recipe.yaml").method == "mykd"
    content["extension"]["sha256"] = recipe.extension.sha256 if recipe.extension else ""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"extension: text: differs from the original text of \./my_method\.py"):
        load_recipe(tmp_path / "recipe.yaml")


def test_the_content_identifies_it_and_its_place_does_not(load: Callable[..., Experiment], tmp_path: Path) -> None:
    def recipe(method: str = METHOD) -> Recipe:
        return load([method]).recipe({"method": "mykd"})

    first = recipe()
    (tmp_path / "moved.py").write_text(user_classes.METHOD)
    assert recipe("moved.py:MyKD").hash == recipe(f"{tmp_path}/moved.py:MyKD").hash == first.hash
    (tmp_path / "my_method.py").write_text(f"{user_classes.METHOD}\n# another\n")
    assert recipe().hash != first.hash


def test_a_changed_file_does_not_go_on_with_a_study(load: Callable[..., Experiment], tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    Study.open(load(), folder)
    (tmp_path / "elsewhere.py").write_text(user_classes.METHOD)
    Study.open(load(["kd", "elsewhere.py:MyKD"]), folder)
    (tmp_path / "my_method.py").write_text(f"{user_classes.METHOD}\n# another\n")
    with pytest.raises(StudyError, match=r"search\.space\.extensions\.mykd\.sha256 was .* when this study started"):
        Study.open(load(), folder)


def test_a_data_set_of_a_file(tiny_file: Write, tmp_path: Path) -> None:
    experiment = load_experiment(tiny_file(data={"dataset": DATA}))
    plain = load_experiment(tiny_file())
    assert experiment.data.dataset == "mydata"
    assert experiment.metric == "val/top1"
    (tmp_path / "my_data.py").unlink()
    splits = open_splits(Experiment.model_validate_json(experiment.model_dump_json()).data)
    assert splits.class_names == ("0", "1")
    sample = {"method": "kd"}
    assert experiment.recipe(sample).hash != plain.recipe(sample).hash
    assert "extension" not in plain.recipe(sample).to_yaml()


@pytest.mark.thorough
def test_distill_takes_a_file_in_python(tiny_file: Write, tmp_path: Path) -> None:
    done = api.distill(load_experiment(tiny_file(training={"epochs": 1})), METHOD, tmp_path / "runs")
    assert done.trial.recipe.method == "mykd"
    assert "train/logit" in done.trial.metrics()[-1]


# --- refused in one sentence, before work

BROKEN = {
    "no file": ("none.py:MyKD", None, "there is no file none.py; relative paths start at the current directory"),
    "no class": ("m.py:Nothing", user_classes.METHOD, "m.py: there is no class 'Nothing'; "),
    "no class named": ("m.py", user_classes.METHOD, "m.py: the name of the class is missing; write m.py:Class"),
    "no Python": ("m.py:MyKD", "class MyKD:\n  def (", "m.py:2: is not valid Python (invalid syntax)"),
    "no method": ("m.py:MyKD", "class MyKD:\n    pass\n", "m.py: MyKD is not a subclass of heterokd.method.Method"),
    "abstract": (
        "m.py:MyKD",
        "from heterokd.method import Method\nclass MyKD(Method):\n    pass\n",
        "m.py: MyKD does not define forward; add it",
    ),
    "import": (
        "m.py:MyKD",
        "import absent_library\nclass MyKD:\n    pass\n",
        "m.py: cannot be imported (ModuleNotFoundError: No module named 'absent_library')",
    ),
    "constructor": (
        "m.py:MyKD",
        f"{user_classes.METHOD}\n    def __init__(self, params, student, teacher, more):\n        pass\n",
        "m.py: MyKD cannot be constructed from (params, student, teacher) (missing a required argument: 'more')",
    ),
    "default": (
        "m.py:MyKD",
        user_classes.METHOD.replace('Field(1.0, gt=0, description="multiplies the loss")', "Field(gt=0)"),
        "m.py: MyKD.Params: weight has no valid default",
    ),
    "taken": (
        "m.py:KD",
        user_classes.METHOD.replace("MyKD", "KD"),
        "m.py: class KD would have the name 'kd', which is taken; rename the class",
    ),
    "reserved": ("m.py:Training", "class Training:\n    pass\n", "would have the name 'training', which is taken"),
    "build": (
        "m.py:MyKD",
        f"{user_classes.METHOD}\n    def build(self, student, teacher):\n        self.x = student.nothing\n",
        "m.py: MyKD cannot be built for this pair (AttributeError: 'OutputSpec' object has no attribute 'nothing'); "
        "`heterokd methods m.py:MyKD --check` tries it on others",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_method_that_is_refused(cli: Run, tiny_file: Write, tmp_path: Path, fault: str) -> None:
    reference, text, sentence = BROKEN[fault]
    if text is not None:
        (tmp_path / "m.py").write_text(text)
    file = tiny_file(search={"space": {"methods": ["kd", reference]}})
    done = cli("search", str(file))
    assert done.code == 2, done.err
    assert sentence in done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "class MyData:\n    pass\n",
            "tiny.yaml: data.dataset: d.py: MyData is not a subclass of heterokd.datasets.io.split",
        ),
        (user_classes.DATA.replace("(Digits)", "(Digits, tasks='x')"), "d.py: cannot be imported (TypeError"),
        (user_classes.DATA + '\n    tasks = "detection"\n', "d.py: MyData.tasks is 'detection'; did you mean"),
        (user_classes.DATA.replace("< 2", "< nothing"), "d.py: MyData cannot load its images (NameError"),
    ],
)
def test_a_data_set_that_is_refused(cli: Run, tiny_file: Write, tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "d.py").write_text(text)
    done = cli("search", str(tiny_file(data={"dataset": "d.py:MyData"})))
    assert done.code == 2, done.err
    assert sentence in done.err
    assert len(done.err.splitlines()) == 1


# --- the command line


def test_methods_explains_and_checks_a_file(cli: Run, tmp_path: Path) -> None:
    shown = cli("methods", METHOD)
    assert shown.code == 0
    assert "source: no published source" in shown.out
    assert "mykd.weight = 1.0: multiplies the loss; domain 0.1 to 10, log" in shown.out
    assert "source: https://arxiv.org/abs/1503.02531" in cli("methods", "kd").out
    passed = cli("methods", METHOD, "--check")
    assert (passed.code, passed.out) == (0, "all checks passed\n")
    (tmp_path / "my_method.py").write_text(user_classes.METHOD.replace("teacher.detach()", "teacher"))
    failed = cli("methods", METHOD, "--check", "--json")
    assert failed.code == 2
    (problem,) = json.loads(failed.out)["problems"]
    assert problem.endswith("a gradient reaches the teacher's LOGITS; detach it")
