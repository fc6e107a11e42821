"""Every decision of whole searches is the one that the first version took (tests/golden/README.md).

One trial at a time, without Ray, with made-up trainings in place of real ones. A made-up training is a function of
sample, seed and epoch, of sums and quotients alone: a last bit that a library's exp or log rounds differently in a
sample moves no score by more than a last bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from golden_files import differences, read

from heterokd.config.reading import load_experiment
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.assignment import Assignment
from heterokd.study.options import StudyOptions
from heterokd.study.storage import StudyFacts
from heterokd.study.study import Study

LEARNING_RATE = {"training.learning_rate": {"low": 0.005, "high": 0.5, "log": True}}
SHARED = {**LEARNING_RATE, "training.task_weight": {"options": [0.1, 0.5, 1.0]}}
SEVERAL = ["scratch", "kd", "dkd", "dist", "ofa", "hcd", "fitnet", "crd"]

QUESTIONS: dict[str, dict[str, Any]] = {
    "pruned": {"search": {"space": {"methods": SEVERAL, "shared": SHARED}, "trials": 40, "prior_weight": 0.3}},
    "harmful": {
        "search": {
            "space": {"methods": ["scratch", "kd", "dist", "fitnet", "hcd", "crd"]},
            "trials": 30,
            "first_rung": 0.3,
            "reduction_factor": 2,
        },
    },
    "students": {
        "student": {"network": ["resnet10t", "test_resnet"]},
        "search": {
            "space": {"methods": SEVERAL[:4], "shared": LEARNING_RATE},
            "trials": 16,
            "reduction_factor": 2,
            "objectives": ["val/top1", "student/params_m", "student/latency_ms"],
        },
    },
    "budget": {
        "training": {"epochs": 10},
        "search": {
            "space": {"methods": SEVERAL[:5], "shared": SHARED},
            "budget": {"hours": 1.5, "price": 2.0},
            "min_epochs": 1,
        },
    },
    "teachers": {
        "teacher": {"network": ["resnet18", "test_vit"]},
        "search": {
            "space": {"methods": SEVERAL[:5], "shared": LEARNING_RATE},
            "trials": 14,
            "prior_weight": 0.5,
            "metric": "val/loss",
            "confirm_leaders": 2,
            "confirm_seeds": 2,
        },
    },
}
GIVEN = {
    "students": StudyFacts(
        costs={
            "resnet10t": {"params_m": 4.9, "latency_ms": 3.1},
            "test_resnet": {"params_m": 0.4, "latency_ms": 0.9},
        }
    ),
    "teachers": StudyFacts(excluded={"ofa from test_vit": "made up"}),
}
"""What a driver finds out before it begins a study."""


def open_study(name: str, folder: Path, clock: Clock) -> Study:
    file = folder / "experiment.yaml"
    question = {
        "schema": 5,  # without repetitions of references
        "name": name,
        "data": {"dataset": "digits"},
        "teacher": {"network": "resnet18"},
        "student": {"network": "resnet10t"},
        "training": {"epochs": 27},
    }
    file.write_text(yaml.safe_dump({**question, **QUESTIONS[name]}), encoding="utf-8")
    options = StudyOptions(GIVEN.get(name, StudyFacts()), clock=clock)
    return Study.open(load_experiment(file), StudyFolder(folder / name), options)


class Clock:
    """Time that passes with epochs."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def draw(*words: object) -> float:
    """A number in [0, 1) that depends on the words alone."""
    digest = hashlib.sha256(" ".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def skill(assignment: Assignment) -> float:
    """Where a training ends: by its method, how far its numbers are from the best ones, and its words."""
    found = {"scratch": 0.7, "hcd": 0.1}.get(assignment.recipe.method, 0.65 + 0.1 * draw(assignment.recipe.method))
    for key, value in sorted(assignment.sample.items()):
        if isinstance(value, float):
            found -= 0.4 * (value / (1 + value) - draw(key)) ** 2
        else:
            found -= 0.02 * draw(key, value)
    return found


def epochs_of(assignment: Assignment) -> Iterator[dict[str, float]]:
    """What a made-up training reports; some become no number."""
    seed = assignment.recipe.training.seed
    best, hasty = skill(assignment), draw(assignment.number, "hasty") > 0.93
    for epoch in range(1, assignment.recipe.training.epochs + 1):
        noise = 0.08 * (draw(assignment.number, seed, epoch) - 0.5)
        top1 = math.nan if hasty and epoch > 5 else best * epoch / (epoch + 2) + noise
        yield {"epoch": epoch, "val/top1": top1, "val/loss": 2 - 2 * top1}


def train(study: Study, assignment: Assignment, clock: Clock) -> dict[str, Any]:
    """Run one trial; what was decided about it."""
    curve: list[dict[str, float]] = []
    answers: list[list[Any]] = []
    state = "failed" if draw(assignment.number, "dies") > 0.95 else "complete"
    for metrics in epochs_of(assignment):
        clock.now += (10 + 50 * draw(assignment.number, "seconds")) * (1 + 2 * (assignment.origin == "confirm"))
        curve.append(metrics)
        if metrics["epoch"] in assignment.rungs or assignment.is_timed:
            goes_on = study.report(assignment.number, int(metrics["epoch"]), metrics, curve)
            answers.append([metrics["epoch"], goes_on])
            if not goes_on:
                state = "pruned"
                break
        if state == "failed" and metrics["epoch"] == 4:
            break
    ended = "diverged" if state == "complete" and math.isnan(curve[-1]["val/top1"]) else state
    why = study.why(assignment.number)
    study.finish(assignment.number, ended, curve[-1], "made up" if ended in ("failed", "diverged") else None)
    standing = study.progress()
    return {
        "number": assignment.number,
        "origin": assignment.origin,
        "confirms": assignment.confirms,
        "seed": assignment.recipe.training.seed,
        "teacher": assignment.recipe.teacher.network,
        "student": assignment.recipe.student.network,
        "sample": assignment.sample,
        "rungs": list(assignment.rungs),
        "answers": answers,
        "why": why,
        "state": ended,
        "planned": [standing.planned, standing.confirmations_planned],
    }


def rows(folder: StudyFolder) -> list[list[Any]]:
    """What the database holds of each trial: samples that were known already as well."""
    trials = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder.database}").trials
    return [
        [one.number, one.state.name, one.value, sorted(one.intermediate_values.items()), one.params] for one in trials
    ]


def decisions(name: str, folder: Path) -> dict[str, Any]:
    """Run a whole search."""
    clock = Clock()
    study = open_study(name, folder, clock)
    trials = []
    while isinstance(assignment := study.next(), Assignment):
        trials.append(train(study, assignment, clock))
    found = {"trials": trials, "rows": rows(study.folder), "summary": study.summary().to_json()}
    found["opened_again"] = open_study(name, folder, clock).summary().to_json()
    plain: dict[str, Any] = json.loads(json.dumps(found), parse_constant=lambda _: None)  # no NaN, no tuples
    return plain


QUICK = ("budget", "teachers")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough) for name in QUESTIONS]
)
def test_decisions_stay(name: str, tmp_path: Path) -> None:
    stored = read("decisions.json")[name]
    assert differences(stored, decisions(name, tmp_path))[:20] == []


def test_the_log_holds_every_kind_of_decision() -> None:
    stored = read("decisions.json")
    trials = [trial for name in QUESTIONS for trial in stored[name]["trials"]]
    assert {trial["origin"] for trial in trials} == {"published", "sampled", "confirm"}
    assert {trial["state"] for trial in trials} == {"complete", "pruned", "diverged", "failed"}
    assert {trial["why"] for trial in trials} == {None, "behind", "negative transfer", "not finite", "budget"}
