"""`search.warm_start_from: auto`: which finished studies a search starts from, and what it takes from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import fabricated
import pytest

from heterokd.config.experiment import Experiment
from heterokd.config.reading import dump_experiment
from heterokd.report.wording import notes
from heterokd.storage.workspace import Workspace
from heterokd.study.options import StudyOptions
from heterokd.study.progress import StudyProgress
from heterokd.study.similar_studies import MOST_STUDIES, similar_studies
from heterokd.study.storage import StudyFacts
from heterokd.study.study import Study
from heterokd.study.warm_start import MOST_SAMPLES, WarmStart, warm_start

CNN, VIT, MLP = "resnet10t", "vit_tiny_patch16_224", "mixer_s32_224"
DIGITS = {"dataset": "digits", "image_size": 32, "labels_per_class": 20}


def make(name: str, teacher: str = VIT, student: str = CNN, **sections: Any) -> Experiment:
    settings = {"teacher": {"network": teacher}, "student": {"network": student}, "search": {"space": SPACE}}
    return fabricated.experiment(name, **{"data": DIGITS, **settings, **sections})


SPACE = {"methods": ["scratch", "kd", "dkd", "hcd"]}


def keep(root: Workspace, experiment: Experiment, *methods: str, images: int = 300, **summary: Any) -> None:
    folder = root.study(experiment.name)
    folder.path.mkdir(parents=True)
    folder.experiment_file.write_text(dump_experiment(experiment))
    leaders = [
        fabricated.ranked(
            number, method, sample={"method": method, **({} if method == "hcd" else {f"{method}.temperature": 3.0})}
        )
        for number, method in enumerate(methods or ("kd",))
    ]
    content = {"progress": StudyProgress(finished=True), "val_images": images, "metric": experiment.metric, **summary}
    fabricated.summary(*leaders, name=experiment.name, **content).write(folder)


@pytest.fixture
def root(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def weights(root: Workspace, experiment: Experiment, **known: Any) -> dict[str, float]:
    found = similar_studies(experiment, root, **{"val_images": 300, "num_classes": 10, **known})
    return {study.summary.name: study.weight for study in found}


def test_the_similarity_falls_with_each_difference(root: Workspace) -> None:
    keep(root, make("twin"))
    keep(root, make("other-student", student=MLP))
    keep(root, make("other-pair", teacher=CNN, student=MLP))
    keep(root, make("fewer-labels", data={**DIGITS, "labels_per_class": 2}))
    found = weights(root, make("new"))
    assert list(found) == ["twin", *sorted(["other-student", "fewer-labels"], key=list(found).index), "other-pair"]
    assert found == pytest.approx(
        {"twin": 1, "other-student": math.exp(-1), "fewer-labels": math.exp(-1), "other-pair": math.exp(-2)}
    )


def test_images_size_and_classes_count(root: Workspace) -> None:
    keep(root, make("same"), images=300)
    assert weights(root, make("new"), val_images=3000)["same"] == pytest.approx(math.exp(-1))
    assert weights(root, make("new", data={**DIGITS, "image_size": 64}))["same"] == pytest.approx(math.exp(-0.5))
    keep(root, make("known"), teacher=fabricated.card(VIT, num_classes=100))
    assert weights(root, make("new"))["known"] == pytest.approx(math.exp(-1))


def test_what_is_unlike_or_not_there_is_left_out(root: Workspace) -> None:
    keep(root, make("new"))  # itself
    keep(root, make("running"), progress=StudyProgress())
    keep(root, make("other-metric", search={"space": SPACE, "metric": "val/macro_f1"}))
    keep(root, make("far", teacher=CNN, student=MLP, data={**DIGITS, "labels_per_class": None}), images=5)
    keep(root, make("damaged"))
    root.study("damaged").summary_file.write_text("{")
    keep(root, make("without-a-file"))
    root.study("without-a-file").experiment_file.unlink()
    assert weights(root, make("new")) == {}


def test_the_most_similar_studies_are_taken(root: Workspace) -> None:
    for number in range(MOST_STUDIES + 2):
        keep(root, make(f"study-{number}"), images=300 + 10 * number)
    assert list(weights(root, make("new"))) == [f"study-{number}" for number in range(MOST_STUDIES)]


def test_ranks_are_means_by_similarity_and_the_samples_few(root: Workspace) -> None:
    keep(root, make("twin"), "kd", "dkd", "hcd")
    keep(root, make("other-student", student=MLP), "dkd", "kd", "hcd")
    keep(root, make("other-pair", teacher=CNN, student=MLP), "hcd", "dkd", "kd")
    experiment = make("new", search={"space": SPACE, "warm_start_from": "auto", "trials": 12})
    warm = warm_start(experiment, root, 300, 10)
    near, middle, far = 1.0, math.exp(-1), math.exp(-2)
    assert warm.ranks["kd"] == pytest.approx((middle / 2 + far) / (near + middle + far))
    assert warm.studies == pytest.approx({"twin": near, "other-student": middle, "other-pair": far})
    assert [sample["method"] for sample in warm.samples[:3]] == ["kd", "dkd", "hcd"]
    assert len(warm.samples) <= MOST_SAMPLES

    study = Study.open(experiment, root.study("new"), StudyOptions(StudyFacts(warm=warm)))
    assert Study.open(experiment, root.study("new")).facts.warm == warm
    (note,) = (note for note in notes(study.summary()) if "tried first" in note)
    assert "twin (1.00), other-student (0.37), other-pair (0.14)" in note


def test_a_workspace_without_a_like_study_changes_nothing(root: Workspace) -> None:
    experiment = make("new", search={"space": SPACE, "warm_start_from": "auto"})
    assert warm_start(experiment, root, 300, 10) == WarmStart()
    assert Study.open(experiment, root.study("new")).summary().to_json().get("warm_studies") is None
