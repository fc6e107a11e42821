"""Published settings over seeds, beside the published numbers; tiny, on digits."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import fabricated
import pytest
import yaml
from command_line import Run

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.errors import ConfigError
from heterokd.execution import reproduce
from heterokd.storage.workspace import Workspace
from heterokd.study.published import PublishedPair, PublishedResult

Write = Callable[..., Path]
PAIR = PublishedPair(
    dataset="digits",
    teacher="test_vit",
    student="test_efficientnet",
    teacher_name="ViT",
    student_name="EfficientNet",
    teacher_kind="attention",
    student_kind="cnn",
    teacher_value=98.0,
    results=(
        PublishedResult("scratch", 90.0, None, "A paper, Table 1"),
        PublishedResult("kd", 95.0, None, "A paper, Table 1"),
    ),
)

SCENE_PAIR = replace(
    PAIR,
    dataset="digit_scenes",
    teacher="segformer-test_efficientnet",
    student="segformer-test_resnet",
    teacher_value=None,
    results=tuple(
        PublishedResult(method, value, None, "A paper, Table 1", metric="miou")
        for method, value in (("scratch", 70.0), ("pixel_kd", 75.0))
    ),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """One root for this module: its trainings share the fitted teacher."""
    return fabricated.root_with_store(tmp_path_factory.mktemp("state"))


@pytest.fixture
def published(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that has the tiny pair, or the parameter."""
    pair: PublishedPair = getattr(request, "param", PAIR)
    monkeypatch.setattr("heterokd.study.published._pairs", lambda: {(pair.dataset, pair.teacher, pair.student): pair})


def tiny(tiny_file: Write, **changes: Any) -> Experiment:
    return load_experiment(tiny_file(training={"epochs": 1}, **changes))


def run(
    experiment: Experiment, root: Workspace, **options: Any
) -> tuple[reproduce.Reproduction, list[tuple[str, int]]]:
    trained: list[tuple[str, int]] = []

    def epoch(method: str, seed: int, metrics: dict[str, float]) -> bool:
        trained.append((method, seed))
        return True

    return reproduce.reproduce(experiment, root, on_epoch=epoch, **options), trained


@pytest.mark.thorough
@pytest.mark.usefixtures("published")
def test_the_table_is_measured_once_and_compared(tiny_file: Write, root: Workspace) -> None:
    experiment = tiny(tiny_file)
    first, trained = run(experiment, root, seeds=1)
    assert trained == [("scratch", 0), ("kd", 0)], "the methods of the table, not dkd, which is searched as well"
    found, trained = run(experiment, root, seeds=2)
    assert trained == [("scratch", 1), ("kd", 1)], "seed 0 is not trained twice"
    assert [row.method for row in found.rows] == ["kd", "scratch"], "best published first"
    kd = found.rows[0]
    trials = [trial for trial in found.folder.trials() if trial.recipe.method == "kd"]
    assert [trial.recipe.training.seed for trial in trials] == [0, 1]
    values = [100 * trial.snapshot.metrics["val/top1"] for trial in trials]
    assert list(kd.values) == values
    assert kd.values[0] == first.rows[0].values[0]
    assert kd.mean == pytest.approx(fmean(values))
    assert kd.deviation == pytest.approx(stdev(values))
    assert kd.difference == pytest.approx(fmean(values) - 95.0)
    assert (kd.published, kd.source, kd.settings) == (95.0, "A paper, Table 1", "the method's defaults")
    assert first.rows[0].deviation is None
    assert f"Teacher: 98.00 published, {found.teacher_value:.2f} measured" in found.sentences()[0]


@pytest.mark.usefixtures("published")
def test_the_files_hold_the_table(tiny_file: Write, root: Workspace) -> None:
    found, _ = run(tiny(tiny_file), root, seeds=2)
    content = json.loads((found.folder.path / "reproduction.json").read_text())
    assert content["rows"] == json.loads(json.dumps(found.to_json()))["rows"]
    with (found.folder.path / "reproduction.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["kd", "scratch"]
    assert float(rows[0]["mean"]) == pytest.approx(found.rows[0].mean, abs=0.005)
    assert rows[0]["seeds"] == "2"
    (compared,) = content["comparisons"]
    assert (compared["first"], compared["second"], compared["seeds"]) == ("kd", "scratch", [0, 1])
    means = {row["method"]: float(row["mean"]) for row in rows}
    assert compared["difference"] == pytest.approx(means["kd"] - means["scratch"], abs=0.011)
    assert found.comparisons[0].sentence(digits=2) in content["sentences"]


@pytest.mark.thorough
@pytest.mark.usefixtures("published")
def test_a_method_that_no_table_has(tiny_file: Write, root: Workspace) -> None:
    found, trained = run(tiny(tiny_file), root, methods=["dkd"], seeds=1)
    assert {method for method, _ in trained} == {"dkd"}
    assert found.rows[0].published is None
    assert found.rows[0].difference is None
    assert "No table has dkd for this pair." in found.sentences()


def test_a_pair_that_no_table_has(tiny_file: Write, root: Workspace) -> None:
    experiment = tiny(tiny_file)
    assert reproduce.chosen_methods(experiment, None) == experiment.methods
    found, _ = run(experiment, root, methods=["scratch"], seeds=1)
    assert found.pair is None
    assert found.sentences()[0].startswith("Nothing is published for this data set, teacher and student")


@pytest.mark.thorough
@pytest.mark.parametrize("published", [SCENE_PAIR], ids=["scenes"], indirect=True)
@pytest.mark.usefixtures("published")
def test_segmentation_is_compared_by_miou(
    cli: Run, tmp_path: Path, root: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of a pair of segmentation, as the command prints it."""
    content = {
        "name": "scenes",
        "data": {"dataset": "digit_scenes", "image_size": 32, "train_images": 16},
        "teacher": {"network": SCENE_PAIR.teacher, "training": {"epochs": 1, "batch_size": 8, "warmup_epochs": 0}},
        "student": {"network": SCENE_PAIR.student},
        "training": {"epochs": 1, "batch_size": 8, "precision": "fp32", "channels_last": False},
        "search": {"space": {"methods": ["scratch", "pixel_kd", "cwd"]}},
    }
    file = tmp_path / "scenes.yaml"
    file.write_text(yaml.safe_dump(content))
    assert reproduce.chosen_methods(load_experiment(file), None) == ("scratch", "pixel_kd")

    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = cli("reproduce", file, "--seeds", 1, "--root", root.path)
    assert code == 0
    assert "published mIoU" in out
    assert "measured mIoU" in out
    assert "Teacher: unknown published" in out
    found = json.loads((root.study("scenes-reproduce").path / "reproduction.json").read_text())
    assert found["metric"] == "mIoU"
    assert [(row["method"], row["published"]) for row in found["rows"]] == [("pixel_kd", 75.0), ("scratch", 70.0)]
    for row in found["rows"]:
        trial = next(one for one in root.study("scenes-reproduce").trials() if one.recipe.method == row["method"])
        assert row["mean"] == 100 * trial.snapshot.metrics["val/miou"]


def test_methods_that_are_not_asked_about(tiny_file: Write, root: Workspace) -> None:
    with pytest.raises(ConfigError, match="--methods hcd: is not searched by this experiment; known: dkd, kd, scratch"):
        run(tiny(tiny_file), root, methods=["hcd"])
    with pytest.raises(ConfigError, match=r"student\.network: a list"):
        run(tiny(tiny_file, student={"network": ["test_efficientnet", "test_resnet"]}), root)


def test_the_command(cli: Run, tiny_file: Write, root: Workspace) -> None:
    file = tiny_file(training={"epochs": 1})
    for more in ([], ["--json"]):
        code, out, _ = cli("reproduce", file, "--methods", "kd,scratch", "--seeds", 1, "--root", root.path, *more)
        assert code == 0
        if more:
            assert {row["method"] for row in json.loads(out)["rows"]} == {"kd", "scratch"}
        else:
            assert "Nothing is published" in out
            assert "reproduction.csv" in out
