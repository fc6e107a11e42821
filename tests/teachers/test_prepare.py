"""Several teachers: a list is searched; each is fitted once and has its own cache, scratch is trained once for all."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fabricated
import mlflow
import pytest

from heterokd.cli.terminal.tables import plan_lines
from heterokd.config.experiment import Experiment
from heterokd.config.reading import dump_experiment, load_experiment
from heterokd.config.recipe import Recipe
from heterokd.domains import Choice
from heterokd.errors import ConfigError
from heterokd.execution.check import check_experiment
from heterokd.execution.doctor import examine
from heterokd.execution.driver import search as run_search
from heterokd.execution.planning.plan import existing_stock, plan_experiment
from heterokd.execution.reproduce import reproduce
from heterokd.methods import BASELINE
from heterokd.networks.network import build_network
from heterokd.networks.weights import save_weights
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.assignment import Assignment
from heterokd.study.options import StudyOptions
from heterokd.study.plan.counts import count
from heterokd.study.priors import expected_ranks
from heterokd.study.read_summary import read_summary
from heterokd.study.similar_studies import SimilarStudy
from heterokd.study.storage import StudyFacts
from heterokd.study.study import Study
from heterokd.study.warm_start import warm_starts
from heterokd.teachers.cache.maintenance import list_caches
from heterokd.teachers.cache_policy import cache_key, searched_signals
from heterokd.teachers.prepare import open_prepared, prepare_teachers, teacher_recipe
from heterokd.training.data import open_splits
from heterokd.training.teacher import teacher_hash

Write = Callable[..., Path]
QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart.yaml"
VIT, CNN = "test_vit", "test_resnet"
BOTH = {
    "network": [VIT, CNN],
    "options": {VIT: {"img_size": 32, "patch_size": 8}},
    "training": {"epochs": 2, "warmup_epochs": 0, "batch_size": 64, "precision": "fp32", "channels_last": False},
}


def asked(methods: list[str] | str = "all", teachers: Any = (VIT, CNN), **search: Any) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "teachers",
            "data": {"dataset": "digits", "image_size": 32},
            "teacher": {"network": list(teachers) if len(teachers) > 1 else teachers[0]},
            "student": {"network": "test_efficientnet"},
            "training": {"epochs": 9},
            "search": {"space": {"methods": methods}, **search},
        }
    )


def run(study: Study, worth: dict[str, float]) -> list[Assignment]:
    """Play a study: what a student reaches is what its teacher is worth, and a little luck."""
    done = []
    while isinstance(step := study.next(), Assignment):
        done.append(step)
        value = 0.5 if step.recipe.method == BASELINE else worth[step.recipe.teacher.network]
        value += random.Random(step.recipe.hash).gauss(0, 0.005)
        study.finish(step.number, "complete", {"val/top1": value, "epoch": 9})
    assert step is None
    return done


# --- what an experiment says


def test_what_one_teacher_names_is_named_as_before() -> None:
    """Hashes of version 0.1 before lists of teachers: studies, teachers and caches of then are found."""
    experiment = load_experiment(QUICKSTART, ["schema=2"])
    hashes = {method: experiment.recipe(experiment.published(method)).hash for method in ("scratch", "kd")}
    assert hashes == {"scratch": "5a803b4808ab83c5", "kd": "8c2db8ce86f25ea6"}
    settings = experiment.teacher.settings_of()
    assert teacher_hash(settings, teacher_recipe(experiment), "f") == "65d04185a8c10828"
    assert experiment.recipe(experiment.published("kd")).teacher == settings


@pytest.mark.parametrize(
    ("teacher", "sentence"),
    [
        ({"network": [VIT, VIT]}, "names a network twice"),
        ({"network": []}, "is empty"),
        ({"network": [VIT, CNN], "checkpoint": "a.safetensors"}, r"one file cannot hold 2 networks; write .*test_vit"),
        (
            {"network": [VIT, CNN], "checkpoint": {"test_vitt": "a"}},
            "'test_vitt' is not in the list; .*'test_vit'",
        ),
        ({"network": [VIT, CNN], "checkpoint": {VIT: "a"}, "pretrained": True}, "not both"),
        ({"network": [VIT, CNN], "options": {VIT: {"depth": 2}, "depth": 3}}, "'depth' is not a network of the list"),
        ({"network": [VIT, CNN], "options": {VIT: 3}}, r"options\.test_vit: expected the options of this network"),
        ({"network": [VIT, CNN], "options": {VIT: {"num_classes": 3}}}, "num_classes follows from the data set"),
    ],
)
def test_teachers_that_make_no_sense_are_refused(teacher: dict[str, Any], sentence: str, tiny_file: Write) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_experiment(tiny_file(teacher={"options": {}, **teacher}))


def test_checkpoints_are_by_network_and_the_others_are_fitted(tiny_file: Write, tmp_path: Path) -> None:
    given = tmp_path / "vit.safetensors"
    experiment = load_experiment(tiny_file(teacher={**BOTH, "checkpoint": {VIT: str(given)}}))
    assert [experiment.teacher.settings_of(network).checkpoint for network in (VIT, CNN)] == [given, None]
    assert experiment.for_teacher(VIT).teacher.settings_of() == experiment.teacher.settings_of(VIT)
    assert Experiment.model_validate_json(experiment.model_dump_json()) == experiment
    with pytest.raises(Exception, match=r"teacher\.checkpoint\.test_vit: there is no file"):
        check_experiment(experiment)
    file = tmp_path / "again.yaml"
    file.write_text(dump_experiment(experiment))
    assert load_experiment(file) == experiment


def test_a_sample_says_whom_it_follows_and_scratch_follows_nobody() -> None:
    experiment = asked(["scratch", "kd"])
    assert experiment.domains("kd")["teacher.network"] == Choice(VIT, CNN)
    assert "teacher.network" not in experiment.domains("scratch")
    recipes = {name: experiment.recipe({"method": "kd", "teacher.network": name}) for name in (VIT, CNN)}
    for name, recipe in recipes.items():
        alone = asked(["scratch", "kd"], [name])
        assert recipe.teacher.network == name
        assert recipe.hash == alone.recipe({"method": "kd"}).hash, "as in a search of this teacher alone"
        assert Recipe.model_validate(recipe.model_dump()) == recipe
    assert recipes[VIT].hash != recipes[CNN].hash
    scratch = experiment.recipe(experiment.published("scratch"))
    assert scratch.hash == asked(["scratch", "kd"], [VIT]).recipe({"method": "scratch"}).hash
    with pytest.raises(ConfigError, match="'scratch' reads no teacher"):
        experiment.recipe({"method": "scratch", "teacher.network": CNN})
    with pytest.raises(ConfigError, match="'resnet18' is not in the experiment; known: test_vit, test_resnet"):
        experiment.recipe({"method": "kd", "teacher.network": "resnet18"})


def test_options_are_for_all_or_by_network() -> None:
    content = asked(["kd"]).model_dump(mode="json")
    content["teacher"]["options"] = {"drop_rate": 0.1}
    each = Experiment.model_validate(content).teacher
    assert each.options_of(VIT) == each.options_of(CNN) == {"drop_rate": 0.1}
    content["student"] = {"network": ["test_vit", "test_efficientnet"], "options": {VIT: {"patch_size": 8}}}
    student = Experiment.model_validate(content).student
    assert [student.settings_of(name).options for name in student.networks] == [{"patch_size": 8}, {}]


def test_commands_for_one_pair_take_the_first_teacher_or_ask_for_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.network: a list is searched; give the teacher"):
        reproduce(asked(["kd"]), Workspace(tmp_path), on_epoch=lambda method, seed, metrics: True)
    experiment = asked(["kd"])
    assert teacher_recipe(experiment).student.network == VIT


# --- methods that exist for one teacher alone


def test_a_method_is_left_out_for_the_teachers_that_it_does_not_exist_for() -> None:
    """OFD reads what enters the last ReLU after a batch norm, which a ViT does not have."""
    experiment = asked(["scratch", "kd", "ofd"], trials=80, confirm_leaders=0)
    excluded = check_experiment(experiment)
    assert set(excluded) == {"ofd from test_vit"}
    assert "test_vit (teacher)" in excluded["ofd from test_vit"]
    with pytest.raises(ConfigError, match="take 'ofd' off the list"):
        check_experiment(asked(["scratch", "kd", "ofd"], [VIT, "test_vit2"]))  # for neither of them
    study = Study.open(
        experiment, StudyFolder(Path("nowhere")), StudyOptions(StudyFacts(excluded=excluded), storage="memory")
    )
    done = run(study, {VIT: 0.8, CNN: 0.7})
    pairs = Counter((one.recipe.method, one.recipe.teacher.network) for one in done if one.recipe.method != BASELINE)
    assert set(pairs) == {("kd", VIT), ("kd", CNN), ("ofd", CNN)}
    assert sum(one.recipe.method == BASELINE for one in done) == 1
    starts = [(one.recipe.method, one.sample.get("teacher.network")) for one in done[:4]]
    assert starts[:2] == [("scratch", None), ("kd", CNN)]
    assert set(starts[2:]) == {("kd", VIT), ("ofd", CNN)}, "each by the first teacher that it exists for"


def test_every_teacher_is_seen_early_and_the_better_one_is_followed_more() -> None:
    experiment = asked(["scratch", "kd", "dkd", "dist"], trials=60, confirm_leaders=0)
    study = Study.open(experiment, StudyFolder(Path("nowhere")), StudyOptions(storage="memory"))
    done = run(study, {VIT: 0.6, CNN: 0.8})
    starts = [one for one in done if one.origin == "published"]
    assert [one.recipe.method for one in starts[:2]] == ["scratch", "kd"]
    assert [one.recipe.teacher.network for one in starts] == [VIT, CNN, VIT, VIT, VIT]
    late = [one.recipe.teacher.network for one in done[30:] if one.recipe.method != BASELINE]
    assert late.count(CNN) > 2 * late.count(VIT)
    assert study.summary().winner.sample["teacher.network"] == CNN


def test_studies_go_on_with_the_same_samples_after_a_restart(tmp_path: Path) -> None:
    experiment = asked(["scratch", "kd", "ofd"], trials=12, confirm_leaders=0)
    excluded = {"ofd from test_vit": "ofd does not exist for this pair"}
    whole = Study.open(experiment, StudyFolder(tmp_path / "whole"), StudyOptions(StudyFacts(excluded=excluded)))
    samples = [one.sample for one in run(whole, {VIT: 0.8, CNN: 0.7})]
    for _ in range(12):  # opened anew for every trial
        study = Study.open(experiment, StudyFolder(tmp_path / "cut"), StudyOptions(StudyFacts(excluded=excluded)))
        step = study.next()
        assert isinstance(step, Assignment)
        assert step.sample == samples[step.number]
        value = 0.5 if step.recipe.method == BASELINE else {VIT: 0.8, CNN: 0.7}[step.recipe.teacher.network]
        value += random.Random(step.recipe.hash).gauss(0, 0.005)
        study.finish(step.number, "complete", {"val/top1": value, "epoch": 9})
    assert Study.open(experiment, StudyFolder(tmp_path / "cut")).summary().excluded == excluded


def test_what_led_with_another_teacher_is_tried_with_that_teacher() -> None:
    experiment = asked(["scratch", "kd", "dkd"])
    summary = fabricated.summary(fabricated.ranked(1, "dkd"), teacher=fabricated.card(CNN))
    (sample,) = warm_starts(experiment, [SimilarStudy(summary, 1.0)]).samples
    assert sample["teacher.network"] == CNN
    other_teacher = replace(summary, teacher=fabricated.card("resnet50"))
    (other,) = warm_starts(experiment, [SimilarStudy(other_teacher, 1.0)]).samples
    assert other["teacher.network"] == VIT


def test_published_ranks_are_of_the_pair_of_the_sample() -> None:
    """Where the tables choose, samples take turns with the teachers, and methods follow each one's ranks."""
    experiment = asked(["kd", "dkd", "ofa"], prior_weight=1.0, trials=12, confirm_leaders=0)
    study = Study.open(experiment, StudyFolder(Path("nowhere")), StudyOptions(storage="memory"))
    first = study._proposer._prior(0)
    second = study._proposer._prior(1)
    assert {values["teacher.network"] for values, _ in first} == {VIT}
    assert {values["teacher.network"] for values, _ in second} == {CNN}
    of_vit, of_cnn = ({str(values["method"]): share for values, share in prior} for prior in (first, second))
    assert sum(of_vit.values()) == pytest.approx(1.0)
    for name, likely in ((VIT, of_vit), (CNN, of_cnn)):
        ranks = expected_ranks(experiment.for_teacher(name), list(likely))
        assert sorted(likely, key=lambda method: -likely[method]) == list(ranks)


# --- before launch


def test_a_plan_counts_every_teacher(tiny_file: Write, tmp_path: Path) -> None:
    experiment = load_experiment(tiny_file(teacher=BOTH))
    excluded = check_experiment(experiment)
    counts = count(experiment, excluded)
    assert counts.starts == ("scratch", "kd", "kd", "dkd")
    assert counts.teachers == (VIT, CNN)
    both = existing_stock(experiment, Workspace(tmp_path), excluded)
    each = [existing_stock(experiment.for_teacher(name), Workspace(tmp_path), excluded) for name in (VIT, CNN)]
    for key in ("views", "cache_bytes", "teacher_bytes"):
        assert getattr(both, key) == sum(getattr(one, key) for one in each) > 0
    assert both.teacher_ready == 0


@pytest.mark.slow
def test_a_plan_times_methods_that_run_their_teacher_with_each(
    local_ray: None, tiny_file: Write, tmp_path: Path
) -> None:
    space = {"methods": ["scratch", "kd", "fitnet"]}
    experiment, root = load_experiment(tiny_file(teacher=BOTH, search={"space": space})), Workspace(tmp_path)
    said: list[str] = []
    plan = plan_experiment(experiment, root, say=said.append)
    # scratch, kd from the first teacher's cache, fitnet with either.
    assert said[-1].startswith("timing 4 kinds of training")
    assert plan.teachers == 2
    assert plan.trainings["published"] == 4
    assert any(
        "0 of 2 teachers are ready, the others will be fitted, their caches" in line for line in plan_lines(plan)
    )
    alone = plan_experiment(experiment.for_teacher(VIT), root)
    assert plan.phases["teacher"] > alone.phases["teacher"]


@pytest.mark.thorough
def test_doctor_asks_for_every_checkpoint(local_ray: None, tiny_file: Write, tmp_path: Path) -> None:
    given = tmp_path / "vit.safetensors"
    save_weights(build_network(VIT, 10, {"img_size": 32, "patch_size": 8}, image_size=32), given)
    experiment = load_experiment(tiny_file(teacher={**BOTH, "checkpoint": {VIT: str(given)}}))
    found = [one for one in examine(experiment, Workspace(tmp_path / "runs")) if one.name == "teacher"]
    assert len(found) == 2, "the driver, and the one node"
    assert all(one.passed for one in found)


def test_the_card_of_a_model_is_of_its_own_teacher() -> None:
    first, second = fabricated.card(VIT), fabricated.card(CNN)
    assert fabricated.summary(teacher=first, teachers=(first, second)).teacher_of(CNN) == second
    assert fabricated.summary(teacher=first).teacher_of(CNN) == first, "an older study's"
    assert fabricated.summary().teacher_of(CNN) is None


# --- the whole path


@pytest.mark.slow
def test_a_search_over_two_teachers_ends_with_a_registered_student_of_one(
    local_ray: None, tiny_file: Write, tmp_path: Path
) -> None:
    root, fitted = Workspace(tmp_path / "runs"), []

    def progress(metrics: dict[str, float], network: str) -> bool:
        fitted.append(network)
        return True

    file = tiny_file(name="both", teacher=BOTH, search={"trials": 5, "confirm_leaders": 0})
    experiment = load_experiment(file)
    found = run_search(experiment, root, teacher_progress=progress)
    assert fitted == [VIT, VIT, CNN, CNN], "each was fitted, and told by name"
    trials = found.folder.trials()
    assert Counter(trial.recipe.method for trial in trials)["scratch"] >= 1
    pairs = [(trial.recipe.method, trial.recipe.teacher.network) for trial in trials[:4]]
    assert pairs[:2] == [("scratch", VIT), ("kd", CNN)]
    assert {name for _, name in pairs[1:]} == {VIT, CNN}

    summary = read_summary(found.folder)
    assert summary is not None
    assert summary.winner is not None
    assert summary.teacher is not None
    assert [card.network for card in summary.teachers] == [VIT, CNN]
    winner = found.folder.trial(summary.winner.number)
    assert summary.teacher.network == found.teacher.network == winner.recipe.teacher.network
    page = found.folder.report.read_text()
    assert VIT in page
    assert CNN in page

    # Each trial read the outputs of its own teacher: there is a cache for each, and both are complete.
    prepared = prepare_teachers(experiment, root)
    splits = open_splits(experiment.data)
    keys = {}
    for network, teacher in prepared.items():
        assert not teacher.fitted, "the second time they are there"
        recipe = experiment.recipe({**experiment.published("kd"), "teacher.network": network})
        live = open_prepared(recipe, teacher.weights, splits.num_classes)
        signals = searched_signals(experiment.for_teacher(network), splits, live)
        keys[network] = cache_key(recipe, splits, live, root, signals).id
    cards = {card.id: card for card in list_caches(root.cache_folder)}
    assert set(keys.values()) <= set(cards)
    assert all(cards[key].complete for key in keys.values())

    client = mlflow.MlflowClient(found.uri)
    (kept,) = client.search_experiments(filter_string="name = 'both'")
    runs = client.search_runs([kept.experiment_id], max_results=100)
    named = {
        run.data.tags["heterokd.trial"]: run.data.params["teacher"] for run in runs if "teacher" in run.data.params
    }
    assert {int(key): name for key, name in named.items()} == {
        trial.number: trial.recipe.teacher.network for trial in trials
    }

    assert found.model is not None
    more = run_search(load_experiment(file, ["search.trials=7"]), root, resume=True, teacher_progress=progress)
    assert fitted == [VIT, VIT, CNN, CNN], "nothing was fitted again"
    assert more.summary.progress.planned == 7
    again = more.folder.trials()
    assert [trial.recipe.hash for trial in again[: len(trials)]] == [trial.recipe.hash for trial in trials]
    assert more.summary.teachers == summary.teachers
    assert more.model is not None
