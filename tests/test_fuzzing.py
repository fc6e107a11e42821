"""Experiments that a machine has broken: whatever stands in a file or behind --set, reading it ends in a sentence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import fuzz as files_fuzz
from heterokd.config.reading import load_experiment
from heterokd.errors import UserError

KEYS = [
    *("name", "data", "data.dataset", "data.image_size", "data.root", "data.augment", "data.crop", "data.seed"),
    *("teacher", "teacher.network", "teacher.options", "teacher.training", "teacher.checkpoint", "teacher.min_score"),
    *("student", "student.network", "student.options", "training", "training.epochs", "training.learning_rate"),
    *("training.workers", "training.optimizer", "training.warmup_epochs", "training.accumulate", "training.seed"),
    *("search", "search.space", "search.space.methods", "search.space.shared", "search.space.overrides"),
    *("search.trials", "search.metric", "search.budget", "search.gpus_per_trial", "cache", "cache.top_k"),
    *("tracking", "tracking.uri", "tracking.registered_model", "promotion", "promotion.min_gain"),
    *("search.space.shared.training.learning_rate", "search.space.overrides.kd.temperature"),
]
WORDS = ["all", "kd", "hcd", "sgd", "low", "high", "log", "options", "digits", "image_folder", "digit_scenes", "auto"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from([*WORDS, "", " ", "\x00", "..", "a/b", "\u202e", "1e400", "~", "=", "<<", "!!int x"]),
)
NAMES = st.one_of(st.sampled_from([*WORDS, *(key.rpartition(".")[2] for key in KEYS)]), st.text(max_size=8))
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(NAMES, st.integers(), st.booleans(), st.none()), inner, max_size=3),
    ),
    max_leaves=6,
)
CHANGES = st.lists(
    st.tuples(st.one_of(st.sampled_from(KEYS), NAMES), st.sampled_from(["set", "drop", "nest", "list"]), ANYTHING),
    min_size=1,
    max_size=3,
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["{", "[", "!!int x", "!!binary x", "&a [*a]", "{low: 1, high: .nan}", "0x" + "f" * 4000, "- - -"]),
    ANYTHING.map(lambda value: yaml.safe_dump(value, default_flow_style=True)),
)
OVERRIDES = st.lists(
    st.one_of(st.builds("{}={}".format, st.one_of(st.sampled_from(KEYS), NAMES), TEXTS), st.text(max_size=20)),
    max_size=3,
)


def changed(changes: list[tuple[str, str, Any]]) -> dict[Any, Any]:
    content = copy.deepcopy(TINY)
    for key, how, value in changes:
        *sections, last = key.split(".")
        place: Any = content
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            continue
        if how == "set":
            place[last] = value
        elif how == "drop":
            place.pop(last, None)
        elif how == "nest":
            place[last] = {last: place.get(last, value)}
        else:
            place[last] = [place.get(last), value]
    return content


def read(folder: Path, text: str, overrides: list[str]) -> None:
    file = folder / "broken.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        experiment = load_experiment(file, overrides)
    except UserError:
        return
    for method in experiment.methods:  # what was accepted can be asked about
        experiment.recipe(experiment.published(method))


def fuzz(folder: Path, cases: int) -> None:
    quick = settings(
        max_examples=cases // 2,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    @quick
    @given(CHANGES, OVERRIDES)
    def of_values(changes: list[tuple[str, str, Any]], overrides: list[str]) -> None:
        read(folder, yaml.safe_dump(changed(changes), allow_unicode=True), overrides)

    @quick
    @given(st.sampled_from(KEYS), TEXTS, st.integers(0, 600), OVERRIDES)
    def of_texts(key: str, text: str, place: int, overrides: list[str]) -> None:
        whole = yaml.safe_dump(TINY)
        read(folder, f"{whole[:place]}{text}{whole[place + len(key) :]}", overrides)

    of_values()
    of_texts()


def test_a_hundred_broken_experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fuzz(tmp_path, 100)


@pytest.mark.slow
def test_ten_thousand_broken_experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fuzz(tmp_path, 10_000)


def test_four_hundred_damaged_images_and_label_maps_are_read_or_named() -> None:
    counts = files_fuzz(400)
    assert counts.total() == 400
    assert set(counts) == {f"{kind}: {end}" for kind in ("image_folder", "voc2012") for end in ("read", "named")}


@pytest.mark.thorough
def test_ten_thousand_damaged_images_and_label_maps_are_read_or_named() -> None:
    counts = files_fuzz(10_000, seed=1)
    assert counts.total() == 10_000
    assert not [end for end in counts if end.endswith("wrong")]
