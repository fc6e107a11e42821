"""Several students: limits before training, a Pareto front, repetitions on it; and beginning where others ended."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import fabricated
import pytest

from heterokd.config.experiment import Experiment
from heterokd.errors import StudyError
from heterokd.methods import BASELINE
from heterokd.report.wording import notes, verdict
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.assignment import Assignment
from heterokd.study.options import StudyOptions
from heterokd.study.priors import expected_ranks, method_prior
from heterokd.study.progress import StudyProgress
from heterokd.study.ranked_config import scratch_of
from heterokd.study.storage import StudyFacts
from heterokd.study.study import Study
from heterokd.study.warm_start import finished_summaries, warm_start

STUDENTS = ["small", "middle", "large", "poor"]
FACTS = {
    "small": {"params_m": 1.0, "latency_ms": 3.0},
    "middle": {"params_m": 2.0, "latency_ms": 2.0},
    "large": {"params_m": 9.0, "latency_ms": 9.0},
    "poor": {"params_m": 8.0, "latency_ms": 8.0},
}
REACHED = {"small": 0.70, "middle": 0.80, "large": 0.90, "poor": 0.60}


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


def run(study: Study) -> list[Assignment]:
    done = []
    while isinstance(step := study.next(), Assignment):
        done.append(step)
        gain = 0.0 if step.recipe.method == BASELINE else 0.03
        value = REACHED.get(step.recipe.student.network, 0.8) + gain
        value += random.Random(step.recipe.hash).gauss(0, 0.005)
        state = "complete"
        for rung in step.rungs:
            if not study.report(step.number, rung, {"val/top1": value * rung / 27}):
                state = "pruned"
                break
        study.finish(step.number, state, {"val/top1": value, "epoch": 27 if state == "complete" else rung})
    assert step is None
    return done


def test_a_study_remembers_who_was_left_out(tmp_path: Path) -> None:
    experiment, folder = make_experiment(STUDENTS, trials=6), StudyFolder(tmp_path)
    study = Study.open(experiment, folder, StudyOptions(StudyFacts(left_out={"poor": "poor is too slow"})))
    done = run(study)
    assert "poor" not in {one.recipe.student.network for one in done}
    again = Study.open(experiment, folder)
    assert again.summary().left_out == {"poor": "poor is too slow"}
    assert "Excluded: poor is too slow." in notes(again.summary())


def test_the_front_holds_the_best_of_each_student_that_nothing_beats() -> None:
    experiment = make_experiment(
        STUDENTS, objectives=["val/top1", "student/params_m", "student/latency_ms"], budget={"trainings": 60}
    )
    study = Study.open(
        experiment,
        StudyFolder(Path("nowhere")),
        StudyOptions(StudyFacts(costs=FACTS), storage="memory", clock=lambda: 0.0),
    )
    done = run(study)
    summary = study.summary()
    # `poor` is smaller and faster than `large`, but `middle` beats it in everything.
    assert [member.student for member in summary.front] == ["large", "middle", "small"]
    assert [member["params_m"] for member in summary.to_json()["front"]] == [9.0, 2.0, 1.0]
    assert summary.winner is not None
    assert summary.winner.student == "large"
    searched = [one.recipe.student.network for one in done if one.origin != "confirm"]
    counts = [searched.count(student) for student in STUDENTS]
    assert max(counts) - min(counts) <= 1
    repeated = {one.recipe.student.network for one in done if one.origin == "confirm"}
    assert {"large", "middle", "small"} <= repeated
    assert all(member.confirmed for member in summary.front)
    assert {one.recipe.student.network for one in done if one.recipe.method == BASELINE} == set(STUDENTS)


def test_a_student_is_compared_with_scratch_of_its_own_network() -> None:
    found = [
        fabricated.ranked(0, BASELINE, 0.9, 0.01, student="large"),
        fabricated.ranked(1, "kd", 0.8, 0.01, student="small"),
        fabricated.ranked(2, "dkd", 0.7, 0.01, student="large"),
        fabricated.ranked(3, BASELINE, 0.6, 0.01, student="small"),
    ]
    objectives = ("val/top1", "student/params_m")
    of_large = fabricated.summary(*found, scratch=found[0], objectives=objectives)
    assert "dkd (trial 2), the best distilled student" in verdict(of_large)
    assert "kd (trial 1), the best distilled student" in verdict(replace(of_large, objectives=()))
    ranked = [found[1], found[0], *found[2:]]
    assert scratch_of(ranked, by_student=True) == found[3]
    assert scratch_of(ranked, by_student=False) == found[0]
    assert scratch_of(ranked[:2], by_student=True) == found[0], "the only one there is"
    assert scratch_of([], by_student=True) is None


def test_small_students_are_not_pruned_for_being_small() -> None:
    objectives = ["val/top1", "student/params_m"]
    study = Study.open(
        make_experiment(STUDENTS, objectives=objectives, trials=60, confirm_leaders=0),
        StudyFolder(Path("nowhere")),
        StudyOptions(StudyFacts(costs=FACTS), storage="memory"),
    )
    run(study)
    assert {leader.student for leader in study.leaders()} == set(STUDENTS)


@pytest.mark.parametrize(
    ("search", "sentence"),
    [
        ({"objectives": ["student/params_m"]}, "the first objective is the metric"),
        ({"objectives": ["val/top1", "val/top5"]}, "val/top5: only the first objective is a metric"),
        ({"objectives": ["val/top1", "student/params_m", "student/params_m"]}, "names an objective twice"),
        ({"objectives": ["val/top1", "student/flops"]}, "no such cost of a student; did you mean 'student/flops_g'"),
        ({"objectives": ["val/top1"], "metric": "val/loss"}, "leave search.metric out"),
        ({"limits": {"student/params_m": 1.0}}, "student/params_m: is limited by max_params_m"),
        ({"limits": {"student/flops_g": 0.0}}, "greater than 0"),
    ],
)
def test_objectives_that_make_no_sense_are_refused(search: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_experiment(**search)


# --- where others ended


def finished(root: Workspace, name: str, methods: list[str]) -> None:
    folder = root.study(name)
    folder.path.mkdir(parents=True)
    folder.experiment_file.write_text("name: other\n")
    leaders = [
        fabricated.ranked(
            number, method, sample={"method": method, f"{method}.temperature": 100.0, "training.momentum": 0.8}
        )
        for number, method in enumerate(methods)
    ]
    fabricated.summary(*leaders, progress=StudyProgress(finished=True)).write(folder)


def test_a_search_begins_with_what_led_elsewhere(tmp_path: Path) -> None:
    root = Workspace(tmp_path)
    finished(root, "other", ["dkd", "kd", "hcd"])
    experiment = make_experiment(warm_start_from=["other"], trials=12)
    warm = warm_start(experiment, root, 0, None)
    # hcd is not searched here, momentum neither, and a temperature of 100 lies outside of both domains.
    assert [sample["method"] for sample in warm.samples] == ["dkd", "kd"]
    assert all("training.momentum" not in sample for sample in warm.samples)
    assert all(experiment.recipe(sample) for sample in warm.samples)
    assert warm.ranks == {"dkd": 0.0, "kd": 1.0}
    study = Study.open(experiment, root.study("students"), StudyOptions(StudyFacts(warm=warm)))
    done = run(study)
    assert [one.origin for one in done[:5]] == ["published", "warm", "warm", "published", "published"]
    assert [one.recipe.method for one in done[:3]] == [BASELINE, "dkd", "kd"]
    # It is told once: the study goes on with it also when nobody says it again.
    assert Study.open(experiment, root.study("students")).facts.warm == warm


def test_what_other_studies_say_of_methods_fades() -> None:
    ranks = expected_ranks(make_experiment(), ("kd", "dkd"))
    early, late = (method_prior(ranks, 0.0, finished, {"dkd": 0.0, "kd": 1.0}) for finished in (0, 20))
    assert early["dkd"] > early["kd"] > 0
    assert sum(early.values()) == pytest.approx(0.5)
    assert sum(late.values()) < 0.001


def test_studies_that_cannot_be_begun_from_are_refused(tmp_path: Path) -> None:
    root = Workspace(tmp_path)
    finished(root, "other", ["kd"])
    with pytest.raises(StudyError, match=r"search\.warm_start_from: .*no study 'othre'.*other"):
        finished_summaries(make_experiment(warm_start_from=["othre"]), root)
    with pytest.raises(StudyError, match="this study itself"):
        finished_summaries(make_experiment(warm_start_from=["students"]), root)
    fabricated.summary(progress=StudyProgress()).write(root.study("other"))
    with pytest.raises(StudyError, match="'other' is not finished"):
        finished_summaries(make_experiment(warm_start_from=["other"]), root)
