"""Optuna's pruners and samplers in a study: each decides as in Optuna, on what Optuna would show it."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.errors import ConfigError, StudyError
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.assignment import Assignment
from heterokd.study.options import StudyOptions
from heterokd.study.plugins import OptunaPruner, OptunaSampler, check_plugins, make_pruner
from heterokd.study.study import Study

EPOCHS = 12
SPACE = {
    "methods": ["scratch", "kd", "dist"],
    "shared": {"training.learning_rate": {"low": 0.01, "high": 0.2, "log": True}},
}
MEMORY = StudyOptions(storage="memory", clock=lambda: 0.0)
DISK = StudyOptions(clock=lambda: 0.0)
NOWHERE = StudyFolder(Path("nowhere"))


def make_experiment(**search: Any) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "plugins",
            "data": {"dataset": "digits"},
            "teacher": {"network": "resnet18"},
            "student": {"network": "resnet10t"},
            "training": {"epochs": EPOCHS},
            "search": {"space": SPACE, "trials": 20, "confirm_leaders": 0, **search},
        }
    )


def curve_of(assignment: Assignment) -> list[dict[str, float]]:
    """A made-up training, best at temperature 4 and a learning rate of 0.05; without the noise of a real one nobody
    could be sure of anything."""
    sample, draw = assignment.sample, random.Random(assignment.recipe.hash)
    distance = (
        1.5
        if sample["method"] == "scratch"
        else abs(math.log(float(sample.get("training.learning_rate", 0.05)) / 0.05))
    )
    if sample["method"] == "kd":
        distance += abs(math.log(float(sample["kd.temperature"]) / 4))
    values = [(0.9 - 0.1 * distance) * epoch / (epoch + 1) for epoch in range(1, EPOCHS + 1)]
    return [{"epoch": epoch, "val/top1": value + draw.gauss(0, 0.005)} for epoch, value in enumerate(values, start=1)]


def train(study: Study, assignment: Assignment) -> list[float]:
    """One trial to its end, reported like `run_trial` does; the values that it reported."""
    curve = curve_of(assignment)
    for epoch, metrics in enumerate(curve, start=1):
        seen = curve[:epoch] if epoch in assignment.rungs else []
        if not study.report(assignment.number, epoch, metrics, seen):
            study.finish(assignment.number, "pruned", metrics)
            return [each["val/top1"] for each in curve[:epoch]]
    study.finish(assignment.number, "complete", curve[-1])
    return [each["val/top1"] for each in curve]


def search(study: Study, most: int = 100) -> list[Assignment]:
    """One trial at a time."""
    done: list[Assignment] = []
    while len(done) < most and isinstance(assignment := study.next(), Assignment):
        train(study, assignment)
        done.append(assignment)
    return done


PRUNERS: dict[str, optuna.pruners.BasePruner] = {}
with warnings.catch_warnings():
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    PRUNERS |= {
        "MedianPruner": optuna.pruners.MedianPruner(n_startup_trials=3),
        "WilcoxonPruner": optuna.pruners.WilcoxonPruner(),
        "SuccessiveHalvingPruner": optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
        "HyperbandPruner": optuna.pruners.HyperbandPruner(min_resource=1, max_resource=EPOCHS),
        "PatientPruner": optuna.pruners.PatientPruner(optuna.pruners.MedianPruner(n_startup_trials=3), patience=1),
    }
OPTIONS: Mapping[str, dict[str, Any]] = {
    "MedianPruner": {"n_startup_trials": 3},
    "SuccessiveHalvingPruner": {"min_resource": 1, "reduction_factor": 3},
    "HyperbandPruner": {"min_resource": 1, "max_resource": EPOCHS},
}


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "PatientPruner"])
def test_a_pruner_stops_whom_it_stops_in_optuna(name: str) -> None:
    """The same reports in a plain Optuna study, asked by `trial.should_prune()` after each."""
    settings = {"name": f"optuna.pruners:{name}", "options": OPTIONS.get(name, {})}
    study = Study.open(make_experiment(pruner=settings), NOWHERE, MEMORY)
    # Hyperband draws brackets from the name.
    optunas = optuna.create_study(
        study_name=study._trials.database.study_name, direction="maximize", pruner=PRUNERS[name]
    )
    stopped = 0
    while isinstance(assignment := study.next(), Assignment):
        reported = train(study, assignment)
        trial = optunas.ask()
        is_reference = assignment.origin == "published" and assignment.sample["method"] in ("scratch", "kd")
        verdicts = []
        for epoch, value in enumerate(reported, start=1):
            trial.report(value, epoch)
            if epoch < EPOCHS:
                verdicts.append(trial.should_prune())
        if is_reference:  # trained to the end, whatever the pruner says: the others are compared with it
            assert len(reported) == EPOCHS
        else:
            assert verdicts[:-1] == [False] * (len(verdicts) - 1)
            assert verdicts[-1] == (len(reported) < EPOCHS)
        is_stopped = len(reported) < EPOCHS
        stopped += is_stopped
        assert study.why(assignment.number) == (name if is_stopped else None)
        optunas.tell(trial, None if is_stopped else reported[-1], TrialState.PRUNED if is_stopped else None)
    assert 2 <= stopped < 18
    assert study.progress().pruned == stopped


def test_a_pruner_in_python_has_the_last_word() -> None:
    """Also one that wraps another, which YAML cannot say."""
    options = replace(MEMORY, pruner=OptunaPruner(PRUNERS["PatientPruner"]))
    study = Study.open(make_experiment(), NOWHERE, options)
    reasons = {study.why(assignment.number) for assignment in search(study)}
    assert reasons == {None, "PatientPruner"}


def test_what_a_pruner_has_seen_survives_a_restart(tmp_path: Path) -> None:
    """Halving keeps its rungs with the trials of the database; what rungs compare is kept beside them."""
    asked = make_experiment(
        pruner={"name": "optuna.pruners:SuccessiveHalvingPruner", "options": {"min_resource": 1}},
        trials=9,
        confirm_leaders=1,
        confirm_seeds=1,
    )
    whole = Study.open(asked, NOWHERE, MEMORY)
    expected = search(whole)
    folder = StudyFolder(tmp_path)
    done = search(Study.open(asked, folder, DISK), 6)
    study = Study.open(asked, folder, DISK)
    assert done + search(study) == expected
    assert [study.why(one.number) for one in expected] == [whole.why(one.number) for one in expected]
    assert study.summary() == whole.summary()
    rows = optuna.load_study(study_name="plugins", storage=f"sqlite:///{folder.database}").trials
    assert sorted(rows[0].intermediate_values) == list(range(1, EPOCHS + 1))


def test_rungs_hold_means_whatever_the_pruner_reads() -> None:
    """Which configuration is repeated follows from them."""
    plain, pruned = (
        Study.open(make_experiment(trials=8, **settings), NOWHERE, MEMORY)
        for settings in ({"prune": False}, {"pruner": "optuna.pruners:NopPruner"})
    )
    assert [one.sample for one in search(plain)] == [one.sample for one in search(pruned)]
    assert plain.leaders() == pruned.leaders()
    assert [one.reports for one in plain._trials] == [one.reports for one in pruned._trials]


@pytest.mark.parametrize("value", [math.nan, None])
def test_a_metric_that_is_no_number_ends_a_trial_at_any_epoch(value: float | None) -> None:
    study = Study.open(make_experiment(pruner="optuna.pruners:NopPruner"), NOWHERE, MEMORY)
    first = study.next()
    assert isinstance(first, Assignment)
    assert first.is_timed
    assert study.report(first.number, 1, {"val/top1": 0.5})
    assert not study.report(first.number, 2, {} if value is None else {"val/top1": value})
    assert study.why(first.number) == "not finite"


SAMPLERS: dict[str, dict[str, Any]] = {
    "RandomSampler": {},
    "TPESampler": {"multivariate": True, "n_startup_trials": 5},
    "GPSampler": {"n_startup_trials": 5},
    "NSGAIISampler": {"population_size": 4},
    "QMCSampler": {"scramble": True},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_proposes_samples_of_each_method(name: str) -> None:
    experiment = make_experiment(
        sampler={"name": f"optuna.samplers:{name}", "options": SAMPLERS[name]}, trials=14, prune=False
    )
    check_plugins(experiment)
    done = search(Study.open(experiment, NOWHERE, MEMORY))
    assert {one.origin for one in done[3:]} == {"sampled"}
    for one in done:
        method = str(one.sample["method"])
        assert set(one.sample) == {"method", "training.learning_rate", *experiment.method_domains(method)}
        assert one.recipe == experiment.recipe(one.sample)
    assert len({one.recipe.hash for one in done}) == 14


@pytest.mark.parametrize("name", ["RandomSampler", "QMCSampler"])  # one draws by its seed, one counts in the database
def test_a_study_that_goes_on_samples_something_new(name: str, tmp_path: Path) -> None:
    sampler, folder = f"optuna.samplers:{name}", StudyFolder(tmp_path)
    done = search(Study.open(make_experiment(sampler=sampler, trials=6, prune=False), folder, DISK))
    second = Study.open(make_experiment(sampler=sampler, trials=9, prune=False), folder, DISK)
    assert len({one.recipe.hash for one in done + search(second)}) == 9
    assert len(second._trials) == 9, "nothing was proposed again"


class Watched(optuna.samplers.RandomSampler):
    """Notes what a sampler is asked for, and which trials it sees."""

    def __init__(self) -> None:
        super().__init__(seed=0)
        self.asked: list[tuple[set[str], set[str]]] = []

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        seen = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        assert all(search_space.keys() <= one.params.keys() for one in seen)
        self.asked.append((set(search_space), {str(one.params["method"]) for one in seen}))
        return {name: self.sample_independent(study, trial, name, search_space[name]) for name in search_space}


def test_a_sampler_sees_the_trials_that_have_what_it_samples() -> None:
    """Samplers of one space for all trials (GP, CMA-ES) work on methods, each of which has parameters of its own."""
    watched = Watched()
    done = search(Study.open(make_experiment(prune=False), NOWHERE, replace(MEMORY, sampler=OptunaSampler(watched))))
    shared, asked = {"method", "training.learning_rate"}, iter(watched.asked)
    for one in done[3:]:
        space, methods = next(asked)
        assert space == shared
        assert methods == {str(other.sample["method"]) for other in done[: one.number]}
        if one.sample["method"] != "scratch":  # it has no values of its own
            space, methods = next(asked)
            assert space == set(one.sample) - shared
            assert methods == {one.sample["method"]}
    assert not list(asked)


def test_a_gaussian_process_finds_what_is_best() -> None:
    space = {"methods": ["kd"], "overrides": {"kd.weight": 1.0}}
    sampler = {"name": "optuna.samplers:GPSampler", "options": {"n_startup_trials": 4}}
    study = Study.open(make_experiment(space=space, sampler=sampler, trials=12, prune=False), NOWHERE, MEMORY)
    temperatures = [math.log(float(one.sample["kd.temperature"]) / 4) for one in search(study)]
    assert min(map(abs, temperatures[-4:])) < 0.3
    assert sum(map(abs, temperatures[-4:])) < sum(map(abs, temperatures[1:5]))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pruner", "optuna.pruners:MedianPruner2", "did you mean 'MedianPruner'"),
        ("pruner", "optuna.samplers:TPESampler", "is no subclass of optuna.pruners.BasePruner"),
        ("pruner", "optuna.pruners:BasePruner", "cannot be constructed"),
        ("pruner", "no.such.module:Name", "no.such.module cannot be imported"),
        ("pruner", "optuna.pruners:ThresholdPruner", r"cannot be constructed .* set search\.pruner\.options"),
        ("pruner", {"name": "optuna.pruners:MedianPruner", "options": {"patience": 3}}, "patience"),
        ("sampler", "optuna.pruners:MedianPruner", "is no subclass of optuna.samplers.BaseSampler"),
        (
            "sampler",
            {"name": "optuna.samplers:GridSampler", "options": {"search_space": {"method": ["kd", "dist"]}}},
            "cannot sample the parameters of method .scratch. .* supports conditional search spaces",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"search\.{key}.*{message}") as caught:
        check_plugins(make_experiment(**{key: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"pruner": "MedianPruner"}, r"search\.pruner\.name: expected package\.module:Name"),
        ({"pruner": "optuna.pruners:NopPruner", "prune": False}, "has no effect if search.prune is false"),
        ({"sampler": {"name": "optuna.samplers:GPSampler", "options": {"seed": 1}}}, "follows from search.seed"),
        ({"pruner": {"name": "optuna.pruners:MedianPruner", "option": {}}}, "did you mean 'options'"),
    ],
)
def test_a_wrong_key_is_said_when_the_file_is_read(tiny_file: Any, search: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment(tiny_file(search=search))


def test_keys_that_are_left_out_change_no_study(tmp_path: Path) -> None:
    search(Study.open(make_experiment(), StudyFolder(tmp_path)), 3)
    database = optuna.load_study(study_name="plugins", storage=f"sqlite:///{StudyFolder(tmp_path).database}")
    question = database.user_attrs["question"]
    question["search"] = {key: value for key, value in question["search"].items() if key not in ("pruner", "sampler")}
    database.set_user_attr("question", question)  # as an older version wrote it
    assert Study.open(make_experiment(), StudyFolder(tmp_path)).next() is not None
    with pytest.raises(StudyError, match=r"search\.pruner"):
        Study.open(make_experiment(pruner="optuna.pruners:MedianPruner"), StudyFolder(tmp_path))


def test_without_names_the_pruner_is_ours() -> None:
    assert type(make_pruner(make_experiment())).__name__ == "AsynchronousHalving"
    assert type(make_pruner(make_experiment(prune=False))).__name__ == "NoPruning"
