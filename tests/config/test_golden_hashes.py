"""Recipes, teachers, caches and policies keep the names that the first version gave them (tests/golden/README.md)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment, load_recipe
from heterokd.datasets import load_dataset
from heterokd.datasets.views.policy import FIRST_SCENES, POLICIES, AugmentPolicy
from heterokd.outputs import OutputSpec, StageSpec
from heterokd.storage.workspace import Workspace
from heterokd.teachers.cache.key import CacheKey
from heterokd.teachers.cache_policy import cache_key, stored_signals
from heterokd.teachers.prepare import teacher_recipe
from heterokd.training.teacher import teacher_hash

FILE = Path(__file__).parents[1] / "golden_hashes.json"
STORED = json.loads(FILE.read_text(encoding="utf-8"))
LIBRARIES = ("torch 2.14", "torchvision 0.29", "timm 1.0")
"""Of the caches' keys, whatever is installed."""


def question(name: str, folder: Path, schema: int = 1) -> Experiment:
    """An experiment that was written for schema 1, or the same keys in a file of a later one."""
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump({"schema": schema, **STORED["experiments"][name]}), encoding="utf-8")
    return load_experiment(file)


def recipe_hash(case: dict[str, Any], folder: Path) -> str:
    return question(case["experiment"], folder).recipe(case["sample"], seed=case["seed"]).hash


def recipe_hash_of_schema_2(case: dict[str, Any], folder: Path) -> str:
    return question(case["experiment"], folder, schema=2).recipe(case["sample"], seed=case["seed"]).hash


def stored_recipe_hash(case: dict[str, Any], folder: Path) -> str:
    file = folder / "recipe.yaml"
    file.write_text(case["text"], encoding="utf-8")
    return load_recipe(file).hash


def fitted_teacher_hash(case: dict[str, Any], folder: Path) -> str:
    asked = question(case["experiment"], folder)
    alone = asked.for_teacher(case["network"])
    return teacher_hash(alone.teacher.settings_of(), teacher_recipe(alone), case["fingerprint"])


def stored_key_id(case: dict[str, Any], folder: Path) -> str:
    return CacheKey.from_json(json.dumps(case["key"])).id


def recipe_cache_id(case: dict[str, Any], folder: Path) -> str:
    """Of a recipe, on the real data set, with a teacher whose weights no library draws."""
    recipe = question(case["experiment"], folder).recipe(case["sample"], seed=case["seed"])
    data = recipe.data
    splits = load_dataset(
        data.dataset, image_size=data.image_size, labels_per_class=data.labels_per_class, seed=data.seed
    )
    network: Any = nn.Linear(3, 10, bias=False)
    network.weight.data = torch.arange(30.0).view(10, 3)
    network.name, network.options = recipe.teacher.network, recipe.teacher.options
    network.spec = OutputSpec(10, 3, (StageSpec(3, 8, "cnn"),) * 4, image_size=data.image_size)
    network.mean = network.std = torch.full((3,), 0.5)
    live: Any = SimpleNamespace(network=network, spec=network.spec)
    key = cache_key(
        recipe, splits, live, Workspace(folder), stored_signals(recipe.task)
    )  # everything, as first versions
    return replace(key, libraries=LIBRARIES).id


def policy_hash(case: dict[str, Any], folder: Path) -> str:
    named = {**POLICIES, "scenes": FIRST_SCENES}  # the stored hash is that of schema 3
    return (named[case["name"]] if "name" in case else AugmentPolicy.model_validate(case["settings"])).hash


FAMILIES = {
    "recipes": recipe_hash,
    "recipes_of_schema_2": recipe_hash_of_schema_2,
    "stored_recipes": stored_recipe_hash,
    "teachers": fitted_teacher_hash,
    "stored_keys": stored_key_id,
    "caches": recipe_cache_id,
    "policies": policy_hash,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_stay(family: str, tmp_path: Path) -> None:
    cases = STORED[family]
    assert [FAMILIES[family](case, tmp_path) for case in cases] == [case["hash"] for case in cases]
    assert len({case["hash"] for case in cases}) >= len(cases) - 2, "but for those that are meant to be the same"
