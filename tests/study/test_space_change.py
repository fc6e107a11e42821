"""A search space that changes while a study is resumed, with a made-up objective in place of training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from heterokd.config.experiment import Experiment
from heterokd.config.reading import dump_experiment
from heterokd.domains import Scalar
from heterokd.errors import StudyError
from heterokd.storage.files import write_text
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus
from heterokd.study.assignment import REMOVED, Assignment
from heterokd.study.distributions import fitted
from heterokd.study.importance import importances
from heterokd.study.question import space_change
from heterokd.study.sampler import STOP_AFTER
from heterokd.study.space_change import SpaceChange
from heterokd.study.stored_question import as_stored, changed_space, read_attributes
from heterokd.study.study import Study
from heterokd.study.summary import StudySummary

NARROW = {"kd.temperature": {"options": [1.0, 2.0]}, "kd.weight": {"low": 0.5, "high": 1.0}}
FIRST: dict[str, Any] = {"methods": ["scratch", "kd"], "shared": {"training.learning_rate": {"low": 0.01, "high": 0.1}}}
GOOD = {"scratch": 0.5, "kd": 0.7, "ofa": 0.7, "dist": 0.8, "dkd": 0.6}
"""Value of a method on the first student; the second is better by 0.05."""


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path / "study")


def asked(space: dict[str, Any] | None = None, student: Any = "resnet10t", **search: Any) -> Experiment:
    settings = {"trials": 8, "prune": False, "confirm_leaders": 0, **search, "space": {**FIRST, **(space or {})}}
    return Experiment.model_validate(
        {
            "name": "study",
            "data": {"dataset": "digits"},
            "teacher": {"network": "resnet18"},
            "student": student if isinstance(student, dict) else {"network": student},
            "training": {"epochs": 9},
            "search": settings,
        }
    )


def value(assignment: Assignment) -> float:
    recipe = assignment.recipe
    noise = random.Random(str(sorted(assignment.sample.items()))).random() / 100
    return GOOD[recipe.method] + 0.05 * (recipe.student.network != "resnet10t") + noise


def opened(experiment: Experiment, folder: StudyFolder) -> Study:
    """Open a study as the driver does: compared, and with its experiment.yaml."""
    experiment = as_stored(experiment, folder)
    study = Study.open(experiment, folder)
    write_text(folder.experiment_file, dump_experiment(experiment))
    return study


def begin(study: Study) -> Assignment:
    assignment = study.next()
    assert isinstance(assignment, Assignment)
    return started(study, assignment)


def started(study: Study, assignment: Assignment) -> Assignment:
    snapshot = TrialSnapshot(origin=assignment.origin, confirms=assignment.confirms, sample=assignment.sample)
    study.folder.trial(assignment.number).start(assignment.recipe, snapshot)
    return assignment


def train(study: Study, most: int = 100) -> list[Assignment]:
    """Run trials one at a time, at most so many."""
    done: list[Assignment] = []
    while len(done) < most and isinstance(assignment := study.next(), Assignment):
        started(study, assignment)
        metrics = {"val/top1": value(assignment), "val/loss": 1.0, "epoch": 9.0}
        trial = study.folder.trial(assignment.number)
        trial.append(metrics)
        snapshot = TrialSnapshot(TrialStatus.COMPLETE, sample=assignment.sample, confirms=assignment.confirms)
        trial.save(TrialSnapshot(**{**vars(snapshot), "metrics": metrics, "origin": assignment.origin}))
        study.report(assignment.number, 9, metrics)
        study.finish(assignment.number, TrialStatus.COMPLETE, metrics)
        done.append(assignment)
    study.summary().write(study.folder)
    return done


def methods_of(done: list[Assignment]) -> set[str]:
    return {assignment.recipe.method for assignment in done}


def winner(study: Study) -> tuple[str, str]:
    found = study.summary().winner
    assert found is not None
    return found.method, found.student


def test_a_method_and_a_student_are_added(folder: StudyFolder) -> None:
    """The published settings of the method, and scratch and the leader with the student, are tried first."""
    before = train(opened(asked(), folder))
    samples = {each.number: each.recipe.hash for each in before}
    grown = asked({"methods": ["dist", "scratch", "kd"]}, ["resnet26t", "resnet10t"], trials=20)
    study = opened(grown, folder)
    later = train(study)
    assert [each.number for each in later] == list(range(8, 20))
    first = [(each.recipe.method, each.recipe.student.network, each.origin) for each in later[:3]]
    assert set(first[:2]) == {("scratch", "resnet26t", "warm"), ("kd", "resnet26t", "warm")}
    assert first[2][::2] == ("dist", "published")
    assert winner(study) == ("dist", "resnet26t")
    # Trials of before mean what they meant: their samples name their student.
    for number, identity in samples.items():
        sample: dict[str, Scalar] = study._trials[number].sample
        assert sample["student.network"] == "resnet10t"
        assert study.experiment.recipe(sample).hash == identity
    # The estimator learns from them: they have all parameters in Optuna's database.
    params = [trial.params for trial in study._trials.database.get_trials() if trial.params.get("method") == "kd"]
    assert all({"student.network", "training.learning_rate", "kd.temperature"} <= set(found) for found in params)
    assert importances(folder)[0].shares


def test_the_leader_of_the_study_is_tried_with_an_added_student(folder: StudyFolder) -> None:
    study = opened(asked(), folder)
    train(study)
    leader = study.leaders()[0]
    later = train(opened(asked(student=["resnet10t", "resnet26t"], trials=10), folder))
    best = next(each for each in later if each.recipe.method == "kd")
    shared = {key: value for key, value in best.sample.items() if key != "student.network"}
    assert shared == leader.sample
    assert best.sample["student.network"] == "resnet26t"


def test_what_was_removed_stays_and_does_not_win(folder: StudyFolder) -> None:
    three = {"methods": ["scratch", "kd", "dist", "dkd"]}
    study = opened(asked(three, ["resnet10t", "resnet26t"], trials=16), folder)
    train(study)
    assert winner(study) == ("dist", "resnet26t")
    less = asked({"methods": ["scratch", "kd", "dkd"]}, "resnet10t", trials=24)
    study = opened(less, folder)
    assert winner(study) == ("kd", "resnet10t"), "decided anew before anything is trained"
    later = train(study)
    assert methods_of(later) <= {"scratch", "kd", "dkd"}
    assert {each.recipe.student.network for each in later} == {"resnet10t"}
    assert {leader.method for leader in study.leaders()} <= {"scratch", "kd", "dkd"}
    assert {record.method for record in study._trials.search} >= {"dist"}
    summary = study.summary()
    (told,) = summary.changes
    assert "method dist and student resnet26t removed. The 16 trials that have ended count on; those" in told
    assert StudySummary.from_json(json.loads(json.dumps(summary.to_json()))).changes == summary.changes
    # Back again: what it had learned counts, too.
    study = opened(asked(three, ["resnet10t", "resnet26t"], trials=28), folder)
    assert winner(study) == ("dist", "resnet26t")
    assert len(study.summary().changes) == 2
    names = {trial.params.get("method") for trial in study._trials.database.get_trials()}
    assert names == {"kd", "dist", "dkd", "scratch"}


def test_scratch_stays_the_reference(folder: StudyFolder) -> None:
    train(opened(asked(), folder))
    study = opened(asked({"methods": ["kd", "dist"]}, trials=12), folder)
    later = train(study)
    assert "scratch" not in methods_of(later)
    scratch = study.summary().scratch
    assert scratch is not None
    assert scratch.number < 8


def test_a_trial_of_what_was_removed_is_not_continued(folder: StudyFolder) -> None:
    study = opened(asked({"methods": ["scratch", "kd", "dist"]}), folder)
    train(study, 1)
    begun = [begin(study), begin(study)]
    (dist,) = [each for each in begun if each.recipe.method == "dist"]
    (kd,) = [each for each in begun if each.recipe.method == "kd"]
    study = opened(asked(), folder)
    assert study._trials[dist.number].status == TrialStatus.PRUNED
    assert (folder.trial(dist.number).snapshot.status, folder.trial(dist.number).snapshot.reason) == (
        TrialStatus.PRUNED,
        REMOVED,
    )
    following = study.next()
    assert isinstance(following, Assignment)
    assert following.number == kd.number


def test_domains_are_narrowed_and_widened(folder: StudyFolder) -> None:
    """Also from options to a range, and from one value to several: Optuna alone refuses both."""
    train(opened(asked({"overrides": {**NARROW, "kd.temperature": 2.0}}), folder))
    wide = {"overrides": {"kd.temperature": {"low": 1.0, "high": 8.0}}}
    study = opened(asked(wide, trials=16), folder)
    assert "kd.temperature 2.0 -> 1 to 8, log; kd.weight 0.5 to 1, log -> 0.1 to 10, log" in study.summary().changes[0]
    later = train(study)
    assert len({each.sample["kd.temperature"] for each in later if each.recipe.method == "kd"}) > 3
    params = [trial.params for trial in study._trials.database.get_trials()]
    assert {found.get("kd.temperature") for found in params[:8]} == {None, 2.0}
    best = study.leaders()[0]
    narrow = {"overrides": {"kd.temperature": {"options": [6.0, 7.0]}, "kd.weight": 3.0}}
    study = opened(asked(narrow, trials=20), folder)
    assert study.leaders()[0].number == best.number, "outside of the domains, it may still win"
    later = [each for each in train(study) if each.recipe.method == "kd"]
    assert {each.sample["kd.temperature"] for each in later} <= {6.0, 7.0}
    assert {each.sample["kd.weight"] for each in later} == {3.0}


def test_a_winner_outside_of_the_domains_is_repeated(folder: StudyFolder) -> None:
    train(opened(asked(), folder))
    narrow = {"overrides": {"kd.temperature": {"options": [100.0]}}}
    study = opened(asked(narrow, confirm_leaders=1, confirm_seeds=1), folder)
    best = study.leaders()[0]
    assert best.number in {each.confirms for each in train(study)}


def test_an_exhausted_space_goes_on_when_it_grows(folder: StudyFolder) -> None:
    tiny = {"overrides": {"kd.temperature": 1.0, "kd.weight": {"options": [1.0, 2.0]}}, "shared": {}}
    study = opened(asked(tiny, trials=40), folder)
    assert len(train(study)) == 3
    assert study._trials.known_in_a_row == STOP_AFTER
    wide = {**tiny, "overrides": {**tiny["overrides"], "kd.temperature": {"options": [1.0, 2.0, 4.0]}}}
    assert len(train(opened(asked(wide, trials=40), folder))) == 4


def test_the_study_remembers(folder: StudyFolder) -> None:
    """Changes are in changes.json; a later resume, and a database that is rebuilt, have the new space."""
    train(opened(asked(), folder))
    grown = asked({"methods": ["scratch", "kd", "dist"]}, ["resnet26t", "resnet10t"], trials=16)
    train(opened(grown, folder))
    (entry,) = json.loads(folder.changes_file.read_text())["changes"]
    assert entry["added"] == {"methods": ["dist"], "students": ["resnet26t"]}
    assert entry["ended_trials"] == 8
    assert space_change(read_attributes(folder), as_stored(grown, folder), folder) is None
    study = opened(grown, folder)
    before, leaders = study.summary().changes, [leader.number for leader in study.leaders()]
    assert study.next() is None
    folder.database.unlink()
    study = opened(grown, folder)
    assert study.next() is None
    assert [leader.number for leader in study.leaders()] == leaders
    assert study.summary().changes == before


def test_a_lost_database_and_a_changed_space(folder: StudyFolder) -> None:
    train(opened(asked(), folder))
    folder.database.unlink()
    study = opened(asked({"methods": ["scratch", "kd", "dist"]}, ["resnet26t", "resnet10t"], trials=12), folder)
    assert ("dist" in study.methods, len(study.leaders())) == (True, 8)
    assert len(train(study)) == 4


def test_combinations_may_be_asked_for_later(folder: StudyFolder) -> None:
    three = {"methods": ["scratch", "kd", "dist"]}
    train(opened(asked(three), folder))
    change = space_change(read_attributes(folder), asked(three, combine=2), folder)
    assert change is not None
    assert change.sentence(8).startswith("The search space has changed: 1 combination added. The 8 trials that have")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (
            {"space": {"shared": {"training.epochs": {"options": [9, 18]}}}},
            r"search\.space\.training\.epochs was absent",
        ),
        ({"student": {"network": ["resnet10t", "resnet26t"], "pretrained": True}}, r"student\.network was"),
        ({"student": {"network": "resnet26t"}}, r"none of the study's students \(resnet10t\) is left"),
        ({"metric": "val/loss"}, r'search\.metric was "val/top1"'),
        ({"seed": 3}, r"search\.seed was 0"),
    ],
)
def test_what_finished_trials_mean_may_not_change(changes: dict[str, Any], key: str, folder: StudyFolder) -> None:
    train(opened(asked(), folder), 2)
    with pytest.raises(StudyError, match=key):
        as_stored(asked(**{"student": "resnet10t", **changes}), folder)


def test_a_table_of_costs_grows_with_the_students_and_keeps_its_values(folder: StudyFolder) -> None:
    objectives, key = ["val/top1", "student/latency_ms"], "student/latency_ms"

    def listed(student: Any, **costs: float) -> Experiment:
        return asked(student=student, objectives=objectives, costs={key: costs})

    train(opened(listed("resnet10t", resnet10t=3), folder), 2)
    assert space_change(read_attributes(folder), listed("resnet10t", resnet10t=3, resnet50=9), folder) is None
    more = listed(["resnet10t", "resnet26t"], resnet10t=3, resnet26t=5)
    assert space_change(read_attributes(folder), more, folder) == SpaceChange(added_students=("resnet26t",))
    with pytest.raises(StudyError, match=r"search\.costs\.student/latency_ms\.resnet10t was 3\.0 .* and is 4\.0 now"):
        as_stored(listed(["resnet10t", "resnet26t"], resnet10t=4, resnet26t=5), folder)
    with pytest.raises(StudyError, match=r"search\.costs\.student/latency_ms\.resnet10t was 3\.0 .* and is absent now"):
        as_stored(asked(objectives=objectives), folder)
    with pytest.raises(StudyError, match=r"search\.latency\.threads was 1"):
        as_stored(asked(objectives=objectives, costs={key: {"resnet10t": 3}}, latency={"threads": 4}), folder)


def test_a_student_keeps_its_options(folder: StudyFolder) -> None:
    vit = {"network": "vit_tiny_patch16_224", "options": {"img_size": 32, "depth": 2}}
    train(opened(asked(student=vit), folder), 2)
    more = {"network": ["vit_tiny_patch16_224", "resnet10t"], "options": {"vit_tiny_patch16_224": vit["options"]}}
    change = space_change(read_attributes(folder), as_stored(asked(student=more), folder), folder)
    assert change == SpaceChange(added_students=("resnet10t",))
    more["options"] = {"vit_tiny_patch16_224": {"img_size": 32, "depth": 3}}
    with pytest.raises(StudyError, match=r"student\.network was"):
        as_stored(asked(student=more), folder)


def test_no_trial_is_left_for_what_is_added(folder: StudyFolder) -> None:
    train(opened(asked(), folder))
    grown = as_stored(asked({"methods": ["scratch", "kd", "dist"]}), folder)
    with pytest.raises(
        StudyError, match=r"search\.trials: .* 8 trials already, .* none is left for method dist; raise"
    ):
        changed_space(grown, folder, ())
    told = changed_space(as_stored(asked({"methods": ["scratch"]}), folder), folder, ())
    assert told is not None
    assert "method kd removed" in told
    assert changed_space(asked(), folder, ()) is None
    assert changed_space(asked(), StudyFolder(folder.path / "none"), ()) is None


def test_pinned_values_do_not_change_what_was_trained(folder: StudyFolder) -> None:
    """A parameter that is not searched has its default in the trials of before, also if it is pinned later."""
    done = train(opened(asked({"methods": ["scratch", "ofa"]}), folder), 2)
    (before,) = [each for each in done if each.recipe.method == "ofa"]
    assert ("ofa.form" in before.sample, before.recipe.params["form"]) == (False, "code")
    study = opened(asked({"methods": ["scratch", "ofa"], "overrides": {"ofa.form": "paper"}}), folder)
    assert study.experiment.recipe(study._trials[before.number].sample).hash == before.recipe.hash
    later = next(each for each in train(study) if each.recipe.method == "ofa")
    assert later.recipe.params["form"] == "paper"


def test_values_of_another_space_are_left_out_or_extend_a_range(folder: StudyFolder) -> None:
    spaces = {"kd": asked({"overrides": NARROW}).domains("kd"), "scratch": {}}
    sample: dict[str, Scalar] = {
        "method": "kd",
        "kd.temperature": 1.0,
        "kd.weight": 3.0,
        "training.learning_rate": 0.05,
    }
    values, ranges = fitted(spaces, sample)
    assert values == sample
    assert (ranges["kd.weight"].low, ranges["kd.weight"].high) == (0.5, 3.0)  # type: ignore[attr-defined]
    values, _ = fitted(spaces, {**sample, "kd.temperature": 4.0, "kd.weight": 0.1})
    assert values == {"method": "kd", "kd.weight": 0.1, "training.learning_rate": 0.05}
    assert "kd.weight" not in fitted(spaces, {**sample, "kd.weight": "all"})[0]
