"""Two methods in one training: `kd+fitnet` keeps every rule of a method, and is the weighted sum of both."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from heterokd.config.experiment import Experiment
from heterokd.config.space_faults import method_faults, name_faults
from heterokd.domains import Float, domains
from heterokd.methods import METHODS, pairs_of
from heterokd.methods.conformance.checks import build, check_method, run
from heterokd.methods.conformance.random_pairs import UNLIKE_PAIRS

PAIR = UNLIKE_PAIRS[0]
NAMES = (
    "kd+fitnet",
    "dist+crd",
    *(pytest.param(name, marks=pytest.mark.thorough) for name in ("hcd+at", "fbt+ofa", "cwd+heteroakd")),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_combination_is_a_method(name: str) -> None:
    assert list(check_method(METHODS[name])) == []


def test_terms_add_up_and_the_second_is_weighted() -> None:
    first, second = METHODS["kd"], METHODS["dist"]
    pair = METHODS["kd+dist"]
    torch.manual_seed(0)
    both = run(build(pair, PAIR), PAIR)
    alone = run(build(first, PAIR), PAIR) | run(build(second, PAIR), PAIR)
    assert both.keys() == alone.keys()
    weighted = pair.Params(kd_temperature=3.0, kd_weight=2.0, dist_temperature=2.0, second_weight=0.5)
    changed = run(with_params(pair, weighted), PAIR)
    kd = run(with_params(first, first.Params(temperature=3.0, weight=2.0)), PAIR)
    dist = run(with_params(second, second.Params(temperature=2.0)), PAIR)
    for term, value in kd.items():
        assert torch.equal(changed[term], value)
    for term, value in dist.items():
        assert torch.allclose(changed[term], 0.5 * value)


def with_params(kind, params):
    from heterokd.methods.conformance.random_pairs import STUDENTS, TEACHERS

    torch.manual_seed(0)
    return kind(params, STUDENTS[PAIR[0]], TEACHERS[PAIR[1]])


def test_terms_of_equal_names_are_kept_apart() -> None:
    terms = run(build(METHODS["kd+dkd"], PAIR), PAIR)
    alone = {**run(build(METHODS["kd"], PAIR), PAIR), **run(build(METHODS["dkd"], PAIR), PAIR)}
    assert len(terms) >= len(alone)
    named = run(build(METHODS["tekap+tekap_feature"], PAIR), PAIR)
    parts = [run(build(METHODS[name], PAIR), PAIR) for name in ("tekap", "tekap_feature")]
    assert len(named) == sum(map(len, parts))


def test_domains_and_rules_are_those_of_the_members() -> None:
    params = METHODS["kd+fitnet"].Params
    found = domains(params)
    assert found["kd_temperature"] == domains(METHODS["kd"].Params)["temperature"]
    assert found["fitnet_stages"] == domains(METHODS["fitnet"].Params)["stages"]
    assert found["second_weight"] == Float(0.1, 10, log=True)
    with pytest.raises(ValidationError):
        params(kd_temperature=0.0)
    with pytest.raises(ValidationError):
        params(fitnet_stages="43")


def test_what_is_no_combination() -> None:
    for name in ("kd+kd", "kd+scratch", "scratch+kd", "kd+nothing", "kd+", "kd+dist+crd"):
        assert name not in METHODS
    assert pairs_of(("scratch", "kd", "dist", "kd+dist")) == ("kd+dist",)
    assert not any("+" in name for name in METHODS)


def test_an_experiment_narrows_members_in_combinations() -> None:
    experiment = Experiment.model_validate(
        {
            "name": "study",
            "data": {"dataset": "digits"},
            "teacher": {"network": "resnet18"},
            "student": {"network": "resnet10t"},
            "search": {
                "combine": 2,
                "space": {
                    "methods": ["scratch", "kd", "dist"],
                    "overrides": {"kd.temperature": 4.0, "dist.beta": {"low": 0.5, "high": 2.0}},
                },
            },
        }
    )
    assert experiment.methods == ("scratch", "kd", "dist", "kd+dist")
    assert experiment.listed_methods == ("scratch", "kd", "dist")
    recipe = experiment.recipe({"method": "kd+dist", "kd+dist.kd_weight": 3.0})
    assert recipe.params["kd_temperature"] == 4.0
    assert recipe.params["kd_weight"] == 3.0
    assert experiment.method_domains("kd+dist")["kd+dist.dist_beta"] == Float(0.5, 2.0)
    again = type(recipe).model_validate(recipe.model_dump())
    assert again.hash == recipe.hash
    assert again.method_class is METHODS["kd+dist"]


@pytest.mark.parametrize(
    ("methods", "sentence"),
    [
        (["kd+kd"], "'kd+kd': a combination is of two different methods"),
        (["kd+dist", "dist+kd"], "'dist+kd' and 'kd+dist' are the same combination"),
        (["kd+pixel_kd"], "supports no task, since its methods have none in common"),
        (["kd+nothing"], "there is no method 'kd+nothing'"),
    ],
)
def test_wrong_combinations_are_refused_once(methods: list[str], sentence: str) -> None:
    experiment = Experiment.model_validate(
        {
            "name": "study",
            "data": {"dataset": "digits"},
            "teacher": {"network": "resnet18"},
            "student": {"network": "resnet10t"},
            "search": {"space": {"methods": methods}},
        }
    )
    (fault,) = list(name_faults(experiment)) or list(method_faults(experiment))
    assert fault[0] == "methods"
    assert sentence in fault[1]
