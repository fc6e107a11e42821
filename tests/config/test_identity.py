"""What names a recipe, a teacher or a cache, and what an older file means, survives new keys and changed defaults."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from golden_files import GOLDEN, unpack
from pydantic import BaseModel, Field, create_model, model_validator
from pydantic_core import PydanticUndefined

from heterokd.config.data import DataSettings
from heterokd.config.experiment import Experiment
from heterokd.config.methods import methods_of
from heterokd.config.networks import NetworkSettings, StudentSettings, TeacherSettings, TeachersSettings
from heterokd.config.reading import at_schema, load_experiment, load_recipe
from heterokd.config.recipe import Recipe
from heterokd.config.schema import CHANGED_DEFAULTS, REQUIRED, SCHEMA, ChangedDefault, Schema, keys_of_schema_1
from heterokd.config.search import BudgetSettings, SearchSettings
from heterokd.config.services import (
    CachingSettings,
    ClusterSettings,
    NodeSettings,
    PromotionSettings,
    TrackingSettings,
)
from heterokd.config.training import TeacherTraining, TrainingSettings
from heterokd.datasets.views.policy import BLACK, FIRST_SCENES, NETWORK_MEAN, POLICIES, AugmentPolicy
from heterokd.domains import Choice
from heterokd.errors import ConfigError, StudyError
from heterokd.methods import METHODS
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.question import check_question, only_new_methods, question, space_change
from heterokd.study.space_change import SpaceChange
from heterokd.study.stored_question import as_stored, read_attributes
from heterokd.teachers.cache.key import CacheKey
from heterokd.teachers.prepare import teacher_recipe
from heterokd.training.teacher import teacher_hash

Write = Callable[..., Path]


def later(model: type[BaseModel], **sections: Any) -> Any:
    """The model as a later version may have it: one more key, which is off; and later sections."""
    filled = {
        name: section if isinstance(section, tuple) else (section, model.model_fields[name])
        for name, section in sections.items()
    }
    return create_model(f"Later{model.__name__}", __base__=model, new_key=(bool, False), **filled)


LaterPolicy = later(AugmentPolicy)
LaterData = later(DataSettings, augment=(str | LaterPolicy | None, None))
LaterTraining = later(TrainingSettings)
LaterTeacherTraining = later(TeacherTraining)
LaterCache = later(CachingSettings)
LaterTeacher = later(TeacherSettings, training=(LaterTeacherTraining, Field(default_factory=LaterTeacherTraining)))
RECIPE = {
    "data": LaterData,
    "teacher": LaterTeacher,
    "student": later(NetworkSettings),
    "training": LaterTraining,
    "cache": LaterCache,
}
LaterRecipe = later(Recipe, **RECIPE)
LaterBudget = later(BudgetSettings)
LaterNodes = later(NodeSettings)
EXPERIMENT = {
    "data": LaterData,
    "teacher": later(TeachersSettings, training=(LaterTeacherTraining, Field(default_factory=LaterTeacherTraining))),
    "student": later(StudentSettings),
    "training": (LaterTraining, Field(default_factory=LaterTraining)),
    "cache": (LaterCache, Field(default_factory=LaterCache)),
    "search": later(SearchSettings, budget=(LaterBudget, Field(default_factory=LaterBudget))),
    "tracking": later(TrackingSettings),
    "cluster": later(ClusterSettings, nodes=(dict[str, LaterNodes], Field(default_factory=dict))),
    "promotion": later(PromotionSettings),
}
LaterExperiment = later(Experiment, **EXPERIMENT)


class LaterParams(METHODS["kd"].Params):  # type: ignore[name-defined,misc]
    new_key: bool = False


class RecipeOfLaterMethod(Recipe):
    """A recipe in a version where `kd` has one parameter more."""

    @model_validator(mode="after")
    def _known_method(self) -> RecipeOfLaterMethod:
        return self

    @property
    def method_params(self) -> Any:
        return LaterParams.model_validate(self.params)


@pytest.fixture
def experiment(tiny_file: Write) -> Experiment:
    cluster = {"nodes": {"a": {"count": 1}}}
    return load_experiment(tiny_file(cluster=cluster), ["data.augment={rotation: 5.0}", "search.budget={trials: 4}"])


@pytest.fixture
def recipe(experiment: Experiment) -> Recipe:
    return experiment.recipe({"method": "kd"})


def keys_of(recipe: Recipe) -> dict[str, Any]:
    """What a recipe.yaml holds, without the schema number, which `load_recipe` takes out."""
    content: dict[str, Any] = yaml.safe_load(recipe.to_yaml())
    assert content.pop("schema") == SCHEMA.number
    return content


def changed(content: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    copied: dict[str, Any] = json.loads(json.dumps(content))
    *sections, last = key.split(".")
    place = copied
    for section in sections:
        place = place[section]
    place[last] = value
    return copied


def test_a_key_that_is_off_leaves_recipes_and_their_checkpoints(recipe: Recipe) -> None:
    content = keys_of(recipe)
    assert LaterRecipe.model_validate(content).hash == recipe.hash, "a checkpoint holds it, and is refused by it"
    for section in ("", "data.", "data.augment.", "teacher.", "teacher.training.", "student.", "training.", "cache."):
        off, on = (LaterRecipe.model_validate(changed(content, f"{section}new_key", value)) for value in (False, True))
        assert (off.hash == recipe.hash, on.hash == recipe.hash) == (True, False), section


def test_a_parameter_that_is_off_leaves_a_methods_recipes(recipe: Recipe) -> None:
    content = keys_of(recipe)
    without, off, on = (
        RecipeOfLaterMethod.model_validate({**content, "params": {**content["params"], **more}}).hash
        for more in ({}, {"new_key": False}, {"new_key": True})
    )
    assert without == off == recipe.hash != on


def test_a_key_that_is_off_leaves_fitted_teachers(experiment: Experiment) -> None:
    fit, teacher = teacher_recipe(experiment), experiment.teacher.settings_of()
    folder = teacher_hash(teacher, fit, "data")
    content, settings = keys_of(fit), teacher.model_dump(mode="json")
    assert teacher_hash(LaterTeacher.model_validate(settings), LaterRecipe.model_validate(content), "data") == folder
    on = LaterRecipe.model_validate(changed(content, "training.new_key", True))
    assert teacher_hash(teacher, on, "data") != folder


def test_a_setting_of_views_that_is_off_leaves_their_pixels() -> None:
    policy = POLICIES["ofa"]
    assert LaterPolicy(**policy.model_dump()).hash == policy.hash
    assert LaterPolicy(**policy.model_dump(), new_key=True).hash != policy.hash


@dataclass(frozen=True)
class LaterKey(CacheKey):
    new_field: str | None = None


def test_a_field_that_is_off_leaves_caches() -> None:
    (stored, *_) = json.loads((GOLDEN.parent / "golden_hashes.json").read_text())["stored_keys"]
    key = CacheKey.from_json(json.dumps(stored["key"]))
    again = LaterKey.from_json(key.to_json())
    assert (again.id, again.to_json()) == (key.id, key.to_json())
    on = LaterKey(**{**asdict(again), "new_field": "on"})
    assert on.id != key.id
    assert LaterKey.from_json(on.to_json()) == on
    with pytest.raises(ValueError, match="fields of a cache's key"):
        CacheKey.from_json(on.to_json())


def stored(experiment: Experiment) -> dict[str, Any]:
    """The attributes of a study that was begun with an experiment."""
    return {"methods": list(experiment.methods), "question": question(experiment, experiment.methods)}


def test_a_key_that_is_off_leaves_studies(experiment: Experiment, tmp_path: Path) -> None:
    content = json.loads(experiment.model_dump_json())
    folder = StudyFolder(tmp_path)
    check_question(stored(experiment), LaterExperiment.model_validate(content), folder)
    for section in ("data", "data.augment", "teacher", "teacher.training", "student", "training", "cache", "search"):
        on = LaterExperiment.model_validate(changed(content, f"{section}.new_key", True))
        with pytest.raises(StudyError, match=rf"{section}.new_key was absent when this study started and is true now"):
            check_question(stored(experiment), on, folder)
    for section in ("tracking", "cluster", "cluster.nodes.a", "promotion", "search.budget"):  # a search may change them
        on = LaterExperiment.model_validate(changed(content, f"{section}.new_key", True))
        check_question(stored(experiment), on, folder)


def test_a_study_searches_what_it_was_begun_with(tmp_path: Path) -> None:
    folder = StudyFolder(unpack("interrupted", tmp_path) / "studies/interrupted")
    asked = load_experiment(GOLDEN / "interrupted.yaml", ["schema=1"])
    assert as_stored(load_experiment(GOLDEN / "interrupted.yaml"), folder) == as_stored(asked, folder) == asked
    assert as_stored(asked, StudyFolder(tmp_path / "nowhere")) == asked
    with pytest.raises(StudyError, match=r"training\.epochs was 8 when this study started and is 9 now"):
        as_stored(load_experiment(GOLDEN / "interrupted.yaml", ["training.epochs=9"]), folder)

    # As if `dist` had been given the parameter after the study began.
    with closing(sqlite3.connect(folder.database)) as database, database:
        (text,) = database.execute("SELECT value_json FROM study_user_attributes WHERE key = 'question'").fetchone()
        content = json.loads(text)
        del content["search"]["space"]["dist.inter_weight"]
        database.execute(
            "UPDATE study_user_attributes SET value_json = ? WHERE key = 'question'", (json.dumps(content),)
        )
    pinned = as_stored(asked, folder)
    assert pinned.method_domains("dist")["dist.inter_weight"] == Choice(1.0)
    assert as_stored(pinned, folder) == pinned
    other = as_stored(asked.with_overrides({"dist.inter_weight": 2.0}), folder)
    change = space_change(read_attributes(folder), other, folder)
    assert change == SpaceChange(domains={"dist.inter_weight": ("absent", "2.0")})


def test_a_paper_that_is_added_leaves_studies_of_all_methods() -> None:
    before = methods_of("segmentation")
    now = (*before, "of_next_year")
    assert only_new_methods(before, now, now)
    assert not only_new_methods(before, now, (*now, "another")), "a list that somebody wrote"
    assert not only_new_methods(before[1:], now, now), "a method that was there and not asked for"


WARMUP = ChangedDefault("training.warmup_epochs", 2, 0.0, 1.0)
AGAIN = ChangedDefault("training.warmup_epochs", 3, 1.0, 2.0)
TEMPERATURE = ChangedDefault("methods.kd.temperature", 2, 1.0, 4.0)
FORM = ChangedDefault("methods.ofa.form", 2, "paper", "code")
NEXT = Schema((WARMUP, TEMPERATURE, FORM, AGAIN))
NextTraining = create_model("NextTraining", __base__=TrainingSettings, warmup_epochs=(float, 2.0))
NextRecipe = create_model("NextRecipe", __base__=Recipe, training=(NextTraining, ...))
NextExperiment: Any = create_model(
    "NextExperiment", __base__=Experiment, training=(NextTraining, Field(default_factory=NextTraining))
)


def test_a_changed_default_leaves_the_meaning_of_older_files(recipe: Recipe) -> None:
    content = keys_of(recipe)
    del content["training"]["warmup_epochs"]
    old, middle, new = (NextRecipe.model_validate(NEXT.complete(NextRecipe, content, schema)) for schema in (1, 2, 3))
    assert [one.training.warmup_epochs for one in (old, middle, new)] == [0.0, 1.0, 2.0]
    assert old.hash == recipe.hash != new.hash
    assert content == yaml.safe_load(yaml.safe_dump(content)), "what is read is not changed"
    assert (NEXT.number, NEXT.mark(), Schema((), ()).mark()) == (3, {"schema": 3}, {})
    assert [NEXT.parameters("kd", schema) for schema in (1, 2)] == [{"temperature": 1.0}, {}]
    assert NEXT.parameters("dkd", 1) == {}


def test_a_changed_default_leaves_older_studies(tiny_file: Write, tmp_path: Path) -> None:
    content = yaml.safe_load(tiny_file().read_text())
    before, folder = stored(Experiment.model_validate(content)), StudyFolder(tmp_path)
    now = NextExperiment.model_validate(content)
    with pytest.raises(StudyError, match=r"training\.warmup_epochs was 0\.0 when this study started and is 2\.0 now"):
        check_question(before, now, folder)
    check_question(before, NEXT.older(now, 1), folder)
    asked = NextExperiment.model_validate(changed(content, "training.warmup_epochs", 1.0))
    assert NEXT.older(asked, 1).training.warmup_epochs == 1.0, "what somebody set stays"


def test_a_changed_default_of_a_method_leaves_older_studies(tiny_file: Write) -> None:
    file = tiny_file(search={"space": {"methods": ["kd", "ofa"]}})
    older = at_schema(load_experiment(file), 1, NEXT)
    assert older.recipe({"method": "ofa"}).params["form"] == "paper"
    assert older.space.overrides == {"ofa.form": "paper"}, "the temperature is searched; this is not"
    asked = load_experiment(file, ["search.space.overrides.ofa.form=code"])
    assert at_schema(asked, 1, NEXT).recipe({"method": "ofa"}).params["form"] == "code", "what somebody set stays"


def test_older_files_keep_their_views_of_scenes(tiny_file: Write) -> None:
    scenes = [
        "data={dataset: digit_scenes, augment: scenes}",
        "teacher={network: segformer-mit_b0}",
        "student={network: fpn-test_resnet}",
        "search.space={methods: [scratch]}",
    ]
    first, second, third = (load_experiment(tiny_file(), [*scenes, f"schema={number}"]) for number in (3, 4, 6))
    assert (first.data.policy, first.data.fill) == (FIRST_SCENES, BLACK)
    assert (second.data.policy, second.data.fill) == (POLICIES["scenes"], (124 / 255, 116 / 255, 104 / 255))
    assert (third.data.policy, third.data.fill) == (POLICIES["scenes"], NETWORK_MEAN)
    hashes = [asked.recipe({"method": "scratch"}).hash for asked in (first, second, third)]
    assert len(set(hashes)) == 3
    plain = [load_experiment(tiny_file(), [f"schema={number}"]).recipe({"method": "kd"}).hash for number in (3, 4)]
    assert plain[0] == plain[1], "images with one class have no such views"


def test_files_say_their_schema(recipe: Recipe, tiny_file: Write, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    content = keys_of(recipe)
    for number in ({}, {"schema": 1}, {"schema": SCHEMA.number}):
        file.write_text(yaml.safe_dump(number | content))
        assert load_recipe(file) == recipe, "which leaves no key out"
    first = [
        "data.reader=1",
        "data.scene_views=1",
        "data.evaluation_size=canvas",
        "teacher.fit=all",
        "search.confirm_references=false",
        "search.evaluate=every",
    ]  # the keys without a method whose defaults have changed
    assert load_experiment(tiny_file(), ["schema=1"]) == load_experiment(tiny_file(), first)
    for number in (SCHEMA.number + 1, 0, "new"):
        file.write_text(yaml.safe_dump({"schema": number} | content))
        with pytest.raises(ConfigError, match=rf"{file}: schema: expected 1 to {SCHEMA.number}, got "):
            load_recipe(file)
        with pytest.raises(ConfigError, match=rf"--set schema={number}: expected 1 to {SCHEMA.number}, got "):
            load_experiment(tiny_file(), [f"schema={number}"])


def older_recipe(recipe: Recipe, method: str, tmp_path: Path) -> Recipe:
    """Write a recipe as schema 1 did, with that schema's defaults of the method, and read it."""
    content = keys_of(recipe) | {"method": method, "params": dict(keys_of_schema_1()[f"methods.{method}"])}
    file = tmp_path / f"{method}.yaml"
    file.write_text(yaml.safe_dump(content))
    return load_recipe(file)


CHANGED = sorted({change.key.split(".")[1] for change in CHANGED_DEFAULTS if change.key.startswith("methods.")})


@pytest.mark.parametrize("method", CHANGED)
def test_an_older_recipe_keeps_its_values_and_its_name(method: str, recipe: Recipe, tmp_path: Path) -> None:
    old = older_recipe(recipe, method, tmp_path)
    written = keys_of_schema_1()[f"methods.{method}"]
    assert {name: old.params[name] for name in written} == written
    later = {change.key.rpartition(".")[2]: change.old for change in CHANGED_DEFAULTS if f".{method}." in change.key}
    params = old.method_params.model_dump()
    assert {name: params[name] for name in later} == later, "also of keys that it does not have"

    plain = json.loads(json.dumps(old.model_dump(mode="json")))
    assert SCHEMA.identity(old.method_params, f"methods.{method}", old.params) == written, "its hash of schema 1"
    assert Recipe.model_validate({**plain, "params": {}}).hash != old.hash, "defaults of today are another recipe"
    file = tmp_path / "again.yaml"
    file.write_text(old.to_yaml())
    assert load_recipe(file) == old, "written with today's schema number, it means the same"


@pytest.mark.parametrize(("name", "prefix"), [("heteroakd", ""), ("heteroakd+cwd", "heteroakd_")])
def test_an_older_recipe_of_heteroakd_keeps_the_teachers_grid(name: str, prefix: str, tiny_file: Write) -> None:
    key = f"{prefix}teacher_grid"
    scenes = {
        "data": {"dataset": "digit_scenes", "scene_views": 2, "labels_per_class": None},
        "teacher": {"network": "segformer-mit_b0"},
        "student": {"network": "fpn-test_resnet"},
    }
    for resolution in ("map", "label"):
        space = {"methods": [name], "overrides": {f"{name}.{prefix}resolution": resolution}}
        file = tiny_file(**scenes, search={"space": space})
        older, newer = (load_experiment(file, [f"schema={number}"]).recipe({"method": name}) for number in (4, 5))
        assert (older.params[key], newer.params[key]) == ("student", "native")
        without = {parameter: value for parameter, value in older.params.items() if parameter != key}
        written = older.model_dump(mode="json") | {"params": without}
        stored = file.with_name("recipe.yaml")
        stored.write_text(yaml.safe_dump({"schema": 4} | written))
        assert load_recipe(stored) == older, "as a version that did not know the key wrote it"
        assert (older.hash == newer.hash) == (resolution == "map"), "a map on the student's grid is the same"


def test_an_older_study_of_rsd_searches_what_it_searched(tiny_file: Write) -> None:
    older = load_experiment(tiny_file(search={"space": {"methods": ["rsd"]}}), ["schema=1"])
    assert {key: str(domain) for key, domain in older.method_domains("rsd").items()} == {
        "rsd.weight": "0.1 to 10, log",
        "rsd.off_diagonal_weight": "0.001 to 0.1, log",
        "rsd.hidden_ratio": "2",
        "rsd.hidden_dim": "128 to 4096, log",
        "rsd.reduction": "mean",
        "rsd.initialisation": "uniform",
    }
    asked = load_experiment(
        tiny_file(search={"space": {"methods": ["rsd"], "overrides": {"rsd.weight": 3.0}}}), ["schema=1"]
    )
    assert asked.method_domains("rsd")["rsd.weight"] == Choice(3.0), "what somebody set stays"


def defaults_of_schema_1() -> list[tuple[str, Any, type[BaseModel], str]]:
    """Section and key as `CHANGED_DEFAULTS` names them, the first default, and where the default is now."""
    found = []
    for section, keys in keys_of_schema_1().items():
        for key, default in keys.items():
            if section.startswith("methods."):
                found.append((f"{section}.{key}", default, METHODS[section.partition(".")[2]].Params, key))
            else:
                model = Recipe if section == "recipe" else Experiment
                path = key if section in ("recipe", "experiment") else f"{section}.{key}"
                found.append((path, default, model, path))
    return found


def test_a_default_that_changes_is_listed() -> None:
    newest = {change.key: change.new for change in CHANGED_DEFAULTS}  # the last change of a key
    for name, first, model, path in defaults_of_schema_1():
        default = Schema(()).default(model, path, 0)
        if first == REQUIRED:
            assert default is PydanticUndefined, name
        elif first == "(section)":
            assert isinstance(default, dict), name
        else:
            assert default == newest.get(name, first), f"{name}: list its new default in CHANGED_DEFAULTS"
    for change in {change.key: change for change in CHANGED_DEFAULTS}.values():
        _, method, name = change.key.split(".") if change.key.startswith("methods.") else ("", "", "")
        new = METHODS[method].Params.model_fields[name].default if method else SCHEMA.default(Experiment, change.key, 9)
        assert new == change.new, change.key
    assert [change.schema for change in CHANGED_DEFAULTS] == sorted(change.schema for change in CHANGED_DEFAULTS)
