"""Values of parameters that a sample leaves out: those of the schema that the experiment's file was written for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heterokd.config.reading import at_schema, dump_experiment, load_experiment, load_study_experiment
from heterokd.config.schema import CHANGED_DEFAULTS, ChangedDefault, keys_of_schema_1
from heterokd.domains import domains
from heterokd.errors import ConfigError
from heterokd.methods import METHODS

Write = Callable[..., Path]

SEARCHED = [
    change
    for change in CHANGED_DEFAULTS
    if change.key.startswith("methods.")
    and change.key.rpartition(".")[2] in domains(METHODS[change.key.split(".")[1]].Params)
] + [change for change in CHANGED_DEFAULTS if change.key == "methods.rsd.hidden_dim"]  # searched by schema 1 alone


@pytest.mark.parametrize("change", SEARCHED, ids=lambda change: change.key)
def test_a_sample_that_leaves_a_searched_parameter_out(
    change: ChangedDefault, tiny_file: Write, tmp_path: Path
) -> None:
    """In a file of schema 1 it has that schema's default, also after the experiment was dumped and read again."""
    _, method, name = change.key.split(".")
    file = tiny_file(search={"space": {"methods": [method]}})
    now, older = load_experiment(file), load_experiment(file, ["schema=1"])
    assert now.recipe({"method": method}).params[name] == change.new
    assert now.published(method).get(f"{method}.{name}", change.new) == change.new
    for experiment in (older, at_schema(now, 1)):
        assert experiment.recipe({"method": method}).params[name] == change.old
        assert experiment.published(method)[f"{method}.{name}"] == change.old
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_experiment(older))
    for experiment in (load_study_experiment(dumped), load_experiment(dumped)):
        assert experiment.recipe({"method": method}) == older.recipe({"method": method})
        assert experiment.published(method) == older.published(method)
    assert older.with_methods([method, "kd"]).recipe({"method": method}).params[name] == change.old

    sample: dict[str, Any] = {"method": method, f"{method}.{name}": change.new}
    assert older.recipe(sample).params[name] == change.new, "what a sample sets stays"
    pinned = load_experiment(file, ["schema=1", f"search.space.overrides.{method}.{name}={json.dumps(change.new)}"])
    assert pinned.recipe({"method": method}).params[name] == change.new, "what an experiment pins stays"
    assert pinned.published(method)[f"{method}.{name}"] == change.new


def test_the_first_sample_of_an_older_file_is_that_of_its_version(tiny_file: Write) -> None:
    """Every method, every parameter: the published sample of schema 1 as schema 1's defaults give it."""
    changed = {change.key.split(".")[1] for change in CHANGED_DEFAULTS if change.key.startswith("methods.")}
    methods = sorted(method for method in changed if "classification" in METHODS[method].tasks)
    older = load_experiment(tiny_file(search={"space": {"methods": methods}}), ["schema=1"])
    for method in methods:
        first = keys_of_schema_1()[f"methods.{method}"]
        params = older.recipe(older.published(method)).params
        assert {name: params[name] for name in first} == first


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rsd.weigth=1", "defaults.rsd.weigth=1: 'rsd' has no parameter 'weigth'; did you mean 'weight'?"),
        ("rsq.weight=1", "defaults.rsq.weight=1: there is no method 'rsq'"),
        ("rsd.weight=-1", "defaults.rsd.weight=-1: "),
    ],
)
def test_a_default_that_cannot_be(text: str, says: str, tiny_file: Write) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_experiment(tiny_file(search={"space": {"methods": ["rsd"]}}), [f"search.space.defaults.{text}"])
