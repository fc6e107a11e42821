"""The cached teacher in the place of the live one: the same student, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quick import cases

from heterokd.config.reading import load_experiment
from heterokd.config.recipe import Recipe
from heterokd.datasets import load_dataset
from heterokd.datasets.io.draws import make_draws
from heterokd.datasets.io.loaders import Loaders, make_loaders
from heterokd.datasets.io.split import Splits
from heterokd.datasets.views.policy import POLICIES, ViewSpec
from heterokd.errors import CacheError, MissingSignal
from heterokd.networks.network import build_network
from heterokd.networks.weights import weights_hash
from heterokd.outputs import Batch, Outputs, Signal
from heterokd.storage.filesystem import open_folder
from heterokd.teachers.cache.build import build_shards, finish, missing
from heterokd.teachers.cache.cached_teacher import CacheAccess, CachedTeacher, open_or_build
from heterokd.teachers.cache.compute import block_outputs, view_outputs
from heterokd.teachers.cache.key import CacheSettings
from heterokd.training.teacher import LiveTeacher, Teacher
from heterokd.training.train import build_distiller, train

NEEDS = Signal.LOGITS | Signal.EMBEDDING
POLICY = POLICIES["digits"]
FP32 = CacheSettings(dtype="fp32", shard_bytes=2000)
NETWORKS = {"test_vit": {"img_size": 32, "patch_size": 8}, "test_resnet": {}, "test_efficientnet": {}}


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_dataset("digits", image_size=32, labels_per_class=4)


def live_teacher(name: str = "test_vit", seed: int = 0) -> LiveTeacher:
    torch.manual_seed(seed)
    return LiveTeacher(build_network(name, 10, NETWORKS[name]))


def recipe_of(tiny_file: Callable[..., Path], method: str, batch_size: int) -> Recipe:
    recipe = load_experiment(tiny_file(search={"space": {"methods": "all"}})).recipe({"method": method})
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"batch_size": batch_size})})


def loaders_of(splits: Splits, recipe: Recipe, views: int) -> Loaders:
    return make_loaders(splits, ViewSpec(POLICY, recipe.training.seed, views), recipe.training.batch_size)


def trained(recipe: Recipe, teacher: Teacher, splits: Splits, views: int = 3) -> tuple[str, dict[str, float]]:
    done = train(recipe, teacher, loaders_of(splits, recipe, views), lambda metrics: True)
    metrics = {name: value for name, value in done.metrics.items() if not name.startswith("time/")}
    return weights_hash(done.student), metrics


def cached(caches: Path, splits: Splits, live: LiveTeacher, views: int = 3, **more: Any) -> CachedTeacher:
    settings = more.pop("settings", FP32)
    return open_or_build(caches, splits, ViewSpec(POLICY, 0, views), live, settings, CacheAccess(**more))


FOLLOWED = [("kd", "test_vit"), ("kd", "test_resnet"), ("fbt", "test_vit")]


@pytest.mark.parametrize(("method", "network"), cases(FOLLOWED, quick={("kd", "test_vit"), ("fbt", "test_vit")}))
def test_a_finished_fp32_cache_trains_the_student_of_the_live_teacher(
    method: str, network: str, splits: Splits, tiny_file: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, live = recipe_of(tiny_file, method, 16), live_teacher(network)
    teacher = cached(tmp_path, splits, live)
    assert build_distiller(recipe, live, 10).teacher_needs in teacher.serves
    assert missing(teacher.records.folder, teacher.records.key) == []
    assert trained(recipe, teacher, splits) == trained(recipe, live, splits)


@pytest.mark.parametrize("network", cases(NETWORKS, quick={"test_vit"}))
def test_every_batch_is_the_live_teachers_to_the_last_bit(network: str, splits: Splits, tmp_path: Path) -> None:
    """At a batch size of full blocks as it is, at any other in blocks; in epochs that mix views, too."""
    live = live_teacher(network)
    teacher = cached(tmp_path, splits, live)
    for size in (32, 7, 20):
        # Every sixth batch, to save time: early epochs show one view, from the fourth on a batch mixes views.
        for batch in islice(batches(splits, 3, 5, size), 0, None, 6):
            read = teacher.outputs(batch, NEEDS)
            run = {"logits": live.outputs(batch, NEEDS).logits, "embedding": live.outputs(batch, NEEDS).embedding}
            if size != 32:
                run = block_outputs(live, batch, NEEDS)
            assert torch.equal(read.logits, run["logits"])
            assert torch.equal(read.embedding, run["embedding"])


def test_with_balanced_sampling_the_cached_teacher_is_the_live_one(
    tiny_file: Callable[..., Path], tmp_path: Path
) -> None:
    whole = load_dataset("digits", image_size=32, labels_per_class=6)
    uneven = replace(
        whole, train=whole.train.chosen(np.flatnonzero((whole.train.labels > 7) | (np.arange(60) % 6 < 2)))
    )
    live = live_teacher()
    teacher = cached(tmp_path, uneven, live)
    draws = make_draws(uneven.train, uneven.class_names, "balanced", "inverse")
    loaders = make_loaders(uneven, ViewSpec(POLICY, 0, 3), 16, draws=draws)
    recipe = recipe_of(tiny_file, "kd", 16)
    students = [train(recipe, source, loaders, lambda metrics: True).student for source in (teacher, live)]
    assert weights_hash(students[0]) == weights_hash(students[1])
    shown = torch.cat([batch.shown for epoch in range(3) for batch in loaders.train.epoch(epoch)])
    assert shown[:, 1].max() == 2
    assert len(torch.unique(shown, dim=0)) < len(shown)  # views of rare images repeat


def test_outputs_computed_in_bfloat16_are_another_cache_and_read_back_as_computed(
    splits: Splits, tmp_path: Path
) -> None:
    live = live_teacher()
    settings = CacheSettings(Signal.LOGITS, dtype="fp32", precision="bf16")
    teacher = cached(tmp_path, splits, live, settings=settings)
    plain = cached(tmp_path, splits, live, settings=CacheSettings(Signal.LOGITS, dtype="fp32"))
    assert teacher.records.key.id != plain.records.key.id
    assert '"precision": "bf16"' in teacher.records.key.to_json()
    assert "precision" not in plain.records.key.to_json()
    batch = next(iter(batches(splits, 3, 1, 20)))
    read = teacher.outputs(batch, Signal.LOGITS).logits
    run = block_outputs(live, batch, Signal.LOGITS, "bf16")["logits"]
    assert read.dtype == torch.float32
    assert torch.equal(read, run)
    exact = plain.outputs(batch, Signal.LOGITS).logits
    assert not torch.equal(read, exact)
    torch.testing.assert_close(read, exact, atol=0.1, rtol=0.1)


def test_a_partial_cache_trains_the_same_student(
    splits: Splits, tiny_file: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, live = recipe_of(tiny_file, "kd", 16), live_teacher()
    whole = trained(recipe, cached(tmp_path / "whole", splits, live), splits)
    empty = cached(tmp_path / "partial", splits, live, mode="partial")
    assert trained(recipe, empty, splits) == whole
    folder = empty.records.folder
    full = tmp_path / "whole" / folder.path.rsplit("/", 1)[1]
    for name in ("000001", "000004"):
        folder.write(f"shards/{name}.arrow", (full / f"shards/{name}.arrow").read_bytes())
    part = cached(tmp_path / "partial", splits, live, mode="partial")
    assert trained(recipe, part, splits) == whole
    assert sorted(part.records._mapped) == [1, 4]
    with pytest.raises(
        CacheError, match=r"no complete cache of logits \[10\].*the most similar cache, \w+, is incomplete"
    ):
        cached(tmp_path / "partial", splits, live, mode="complete")
    completed = cached(tmp_path / "partial", splits, live)
    assert completed.records.manifest is not None


def test_a_finished_cache_needs_no_teacher(splits: Splits, tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    recipe, live = recipe_of(tiny_file, "kd", 16), live_teacher()
    teacher = cached(tmp_path, splits, live)
    expected = trained(recipe, teacher, splits)  # stores the decisions on val, too
    alone = CachedTeacher(teacher.records, teacher.spec)
    assert trained(recipe, alone, splits) == expected
    with pytest.raises(MissingSignal, match="serves"):
        alone.outputs(next(iter(loaders_of(splits, recipe, 3).train.epoch(0))), Signal.TAIL)


def batches(splits: Splits, views: int, epochs: int, size: int = 16) -> Iterator[Batch]:
    loader = make_loaders(splits, ViewSpec(POLICY, views=views), size).train
    for epoch in range(epochs):
        yield from loader.epoch(epoch)


@pytest.mark.parametrize("settings", [CacheSettings(), CacheSettings(top_k=4), CacheSettings(signals=Signal.LOGITS)])
def test_other_formats_are_near(settings: CacheSettings, splits: Splits, tmp_path: Path) -> None:
    live = live_teacher()
    teacher = cached(tmp_path, splits, live, settings=settings)
    needs = teacher.serves & NEEDS
    assert needs == settings.signals
    for batch in batches(splits, 3, 5):  # beyond K epochs the views of a batch differ
        read, run = teacher.outputs(batch, needs), live.outputs(batch, needs)
        assert isinstance(read, Outputs)
        assert read.logits.dtype == torch.float32
        if settings.top_k is None:
            torch.testing.assert_close(read.logits, run.logits, atol=1e-3, rtol=1e-3)
        if Signal.EMBEDDING in needs:
            torch.testing.assert_close(read.embedding, run.embedding, atol=2e-3, rtol=1e-3)
        assert torch.equal(read.logits.argmax(1), run.logits.argmax(1))


def test_what_changes_makes_another_cache_or_is_refused(splits: Splits, tmp_path: Path) -> None:
    live = live_teacher()
    teacher = cached(tmp_path, splits, live)
    with pytest.raises(CacheError, match=r"the most similar cache, \w+, differs: teacher is"):
        cached(tmp_path, splits, live_teacher(seed=1), mode="complete")
    with pytest.raises(CacheError, match="differs: policy is"):
        open_or_build(tmp_path, splits, ViewSpec(POLICIES["cifar"], 0, 3), live, FP32, CacheAccess("complete"))
    # A cache that calls itself that of another teacher is found out by running that teacher.
    other = live_teacher(seed=1)
    stolen = cached(tmp_path / "other", splits, other)
    for file in stolen.records.folder.files():
        if file.name.startswith("shards/"):
            stolen.records.folder.delete(file.name)
    wrong = view_outputs(splits.train, ViewSpec(POLICY), live)
    build_shards(stolen.records.folder, stolen.records.key, wrong)
    finish(stolen.records.folder, stolen.records.key)
    with pytest.raises(CacheError, match="they are of another teacher"):
        cached(tmp_path / "other", splits, other, mode="complete")
    assert open_folder(tmp_path).at(teacher.records.key.id).exists("last_used")


def test_views_do_not_depend_on_the_batch(splits: Splits) -> None:
    index, view = np.arange(40), np.arange(40) % 3
    order = np.random.default_rng(0).permutation(40)
    for name in NETWORKS:
        compute = view_outputs(splits.train, ViewSpec(POLICY), live_teacher(name))
        whole = compute(index, view)["logits"]
        assert torch.equal(compute(index[order], view[order])["logits"], whole[order])
        assert torch.equal(compute(index[5:6], view[5:6])["logits"], whole[5:6])
