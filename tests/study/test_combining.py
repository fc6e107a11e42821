"""Combinations of the best methods in a search (`search.combine`)."""

from __future__ import annotations

import math

import pytest
from test_study import make_experiment

from heterokd.config.experiment import Experiment
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.assignment import Assignment
from heterokd.study.combining import LEADERS
from heterokd.study.study import Study

LISTED = ["scratch", "kd", "dist", "dkd", "rkd"]
WORTH = {"scratch": 0.6, "kd": 0.75, "dist": 0.7, "dkd": 0.65, "rkd": 0.3, "kd+dist": 0.9}


@pytest.fixture
def folder(tmp_path) -> StudyFolder:
    return StudyFolder(tmp_path / "study")


def experiment(**changes: object) -> Experiment:
    return make_experiment(space={"methods": LISTED}, trials=40, confirm_leaders=0, prune=False, **changes)


def search(study: Study) -> list[Assignment]:
    """Train in a table: each method has its worth, a little better near temperature 2."""
    done: list[Assignment] = []
    while isinstance(assignment := study.next(), Assignment):
        temperature = assignment.sample.get("kd.temperature", assignment.sample.get("kd+dist.kd_temperature", 2.0))
        near = 0.02 * abs(math.log(float(str(temperature)) / 2))
        value = WORTH.get(str(assignment.sample["method"]), 0.5) - near
        study.finish(assignment.number, "complete", {"val/top1": value, "val/loss": 1 - value})
        done.append(assignment)
    return done


def test_only_pairs_of_the_best_methods_are_tried_and_the_first_has_their_best_values(folder) -> None:
    done = search(Study.open(experiment(combine=2), folder))
    tried = [str(each.sample["method"]) for each in done]
    assert set(tried) >= {"kd+dist"}
    best = sorted(set(LISTED) - {"scratch"}, key=WORTH.__getitem__)[-LEADERS:]
    assert {member for name in tried if "+" in name for member in name.split("+")} <= set(best)
    assert all("+" not in name for name in tried[: len(LISTED)]), "published settings come first"
    first = tried.index("kd+dist")
    earlier = [each for each in done[:first] if each.sample["method"] == "kd"]
    values = [each.sample["kd.temperature"] for each in earlier]
    near = min(values, key=lambda value: abs(math.log(float(str(value)) / 2)))
    assert done[first].sample["kd+dist.kd_temperature"] == near
    assert done[first].recipe.params["second_weight"] == 1.0
    later = [each.sample["kd+dist.kd_temperature"] for each in done[first + 1 :] if each.sample["method"] == "kd+dist"]
    assert len(set(later)) > 1, "the estimator proposes others"
    assert tried.count("kd+dist") > len(tried) / 5, "and prefers what is best"


@pytest.mark.thorough
def test_without_combine_nothing_changes(folder, tmp_path) -> None:
    plain = search(Study.open(experiment(), folder))
    again = search(Study.open(experiment(combine=1), StudyFolder(tmp_path / "again")))
    assert [each.sample for each in plain] == [each.sample for each in again]
    assert all("+" not in str(each.sample["method"]) for each in plain)


def test_a_named_combination_has_a_published_start(folder) -> None:
    asked = make_experiment(space={"methods": ["scratch", "kd", "kd+dist"]}, trials=6, confirm_leaders=0)
    done = search(Study.open(asked, folder))
    assert {str(each.sample["method"]) for each in done[:3]} == {"scratch", "kd", "kd+dist"}
    assert done[0].origin == done[1].origin == done[2].origin == "published"


@pytest.mark.thorough
def test_a_search_with_combinations_goes_on_after_a_restart(folder, tmp_path) -> None:
    whole = search(Study.open(experiment(combine=2), folder))
    parts = StudyFolder(tmp_path / "parts")
    study, again = Study.open(experiment(combine=2), parts), []
    for _ in range(20):
        assignment = study.next()
        assert isinstance(assignment, Assignment)
        again.append(assignment.sample)
        value = next(WORTH.get(str(assignment.sample["method"]), 0.5) for _ in (0,))
        temperature = assignment.sample.get("kd.temperature", assignment.sample.get("kd+dist.kd_temperature", 2.0))
        value -= 0.02 * abs(math.log(float(str(temperature)) / 2))
        study.finish(assignment.number, "complete", {"val/top1": value, "val/loss": 1 - value})
    again += [each.sample for each in search(Study.open(experiment(combine=2), parts))]
    assert again == [each.sample for each in whole]
