"""The teacher's cache in searches and trainings: the results are the live teacher's, whatever goes wrong with it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import Run
from filelock import FileLock
from mounts import small_disk
from quick import cases

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.config.services import CachingSettings
from heterokd.execution.cache_builders import RESTARTS, CacheBuild, plan_cache_build
from heterokd.execution.driver import search
from heterokd.execution.run import RunContext, run_recipe
from heterokd.outputs import Signal
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.trial_status import TrialSnapshot
from heterokd.storage.workspace import Workspace
from heterokd.study.search_result import SearchResult
from heterokd.study.summary import StudySummary
from heterokd.teachers.cache.cached_teacher import CachedTeacher
from heterokd.teachers.cache.maintenance import list_caches, prune_caches, verify_cache
from heterokd.teachers.cache.shards import cache_bytes
from heterokd.teachers.cache_policy import CacheUse, open_cache, training_teacher
from heterokd.teachers.prepare import open_prepared, prepare_teacher
from heterokd.training.data import open_splits, recipe_loaders
from heterokd.training.teacher import LiveTeacher

Write = Callable[..., Path]
# Full blocks: the live teacher's last bits are those of a cache only there.
BATCH = {"batch_size": 16}
ROUNDED = {"dtype": "fp16", "top_k": 4}
SEARCH = {"space": {"methods": ["kd"]}, "trials": 2, "prune": False, "confirm_leaders": 0}
SCENES = {
    "data": {"dataset": "digit_scenes", "image_size": 32, "labels_per_class": None, "train_images": 16},
    "teacher": {
        "network": "segformer-test_resnet",
        "options": {"decoder_segmentation_channels": 16},
        "training": {"epochs": 1, "warmup_epochs": 0, "batch_size": 64, "precision": "fp32", "channels_last": False},
    },
    "student": {"network": "segformer-test_efficientnet", "options": {"decoder_segmentation_channels": 16}},
    "training": {"epochs": 3, "batch_size": 16, "learning_rate": 0.01, "precision": "fp32", "channels_last": False},
    "search": {"space": {"methods": ["pixel_kd"]}, "trials": 2, "confirm_leaders": 0, "parallel": 1},
}


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The fitted teacher of the tiny experiment, for all of this module."""
    return Workspace(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def root(shared_root: Workspace, tmp_path: Path) -> Workspace:
    """A root of one's own, with the fitted teachers."""
    if shared_root.teachers.exists():
        shutil.copytree(shared_root.teachers, tmp_path / "runs/teachers")
    return Workspace(tmp_path / "runs")


@pytest.fixture
def asked(tiny_file: Write, shared_root: Workspace) -> Callable[..., tuple[Experiment, Path | None]]:
    """The tiny experiment with changes, and its teacher's weights."""

    def load(**changes: Any) -> tuple[Experiment, Path | None]:
        training = {**BATCH, **changes.pop("training", {})}
        experiment = load_experiment(tiny_file(training=training, **changes))
        return experiment, prepare_teacher(experiment, shared_root).weights

    return load


def trained(
    experiment: Experiment,
    weights: Path | None,
    root: Workspace,
    name: str,
    cache: CacheUse = "found",
    method: str = "kd",
) -> list[dict[str, float]]:
    """The reports of one training, without times."""
    folder = TrialFolder(root.path / name)
    recipe = experiment.recipe(experiment.published(method))
    folder.start(recipe, TrialSnapshot())
    run_recipe(recipe, folder, RunContext(root, weights, cache_use=cache), lambda metrics: True)
    return [{key: value for key, value in report.items() if "time/" not in key} for report in folder.metrics()]


class Forwards:
    """Counts how often the live teacher runs on views."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        real = LiveTeacher.outputs

        def outputs(teacher: LiveTeacher, *given: Any) -> Any:
            self.count += 1
            return real(teacher, *given)

        patch.setattr(LiveTeacher, "outputs", outputs)


def planned(experiment: Experiment, root: Workspace, weights: Path | None) -> CacheBuild:
    filling = plan_cache_build(experiment, root, weights)
    assert filling is not None
    return filling


def complete(experiment: Experiment, root: Workspace, weights: Path | None) -> CacheBuild:
    """The experiment's cache, built in this process."""
    filling = planned(experiment, root, weights)
    splits = open_splits(experiment.data)
    live = open_prepared(filling.recipe, weights, splits.num_classes)
    open_cache(filling.recipe, splits, live, root, "cpu", build=True, signals=filling.signals)
    return filling


@pytest.mark.thorough
def test_a_training_reads_a_complete_cache_and_is_the_live_teachers(
    asked: Callable[..., Any], root: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, weights = asked()
    forwards = Forwards(monkeypatch)
    live = trained(experiment, weights, root, "live")
    steps = forwards.count
    assert steps >= 6
    assert not root.caches.exists()
    filling = complete(experiment, root, weights)
    forwards.count = 0
    assert trained(experiment, weights, root, "cached") == live
    assert forwards.count == 1, "the audit's sample, and nothing else"
    assert verify_cache(filling.folder) == []


@pytest.mark.parametrize("method", cases(["dkd", "rsd"], quick={"rsd"}))
def test_methods_share_one_cache(method: str, asked: Callable[..., Any], root: Workspace) -> None:
    experiment, weights = asked(search={"space": {"methods": ["kd", method]}})
    live = trained(experiment, weights, root, "live", method=method)
    complete(experiment, root, weights)
    assert trained(experiment, weights, root, "cached", method=method) == live
    assert len(list_caches(root.caches)) == 1


def test_a_cache_holds_what_the_searched_methods_read(asked: Callable[..., Any], root: Workspace) -> None:
    """Logits alone first; a search that reads more builds another, which serves the first search as well."""

    def search(*methods: str) -> tuple[Experiment, Path | None]:
        return asked(search={"space": {"methods": list(methods)}}, training={"epochs": 2})

    logits, weights = search("kd", "dkd")
    small = complete(logits, root, weights)
    assert small.signals == small.key.serves == Signal.LOGITS
    assert small.key.embedding is None
    both, _ = search("kd", "rsd")
    large = planned(both, root, weights)
    assert large.signals == large.key.serves == Signal.LOGITS | Signal.EMBEDDING
    assert not large.is_complete
    assert cache_bytes(small.key) < cache_bytes(large.key)
    live = trained(both, weights, root, "live", method="rsd")
    complete(both, root, weights)
    assert {card.id for card in list_caches(root.caches)} == {small.key.id, large.key.id}
    assert trained(both, weights, root, "cached", method="rsd") == live

    prune_caches(root.caches, ids=[small.key.id])
    again = planned(logits, root, weights)
    assert (again.signals, again.key, again.is_complete) == (Signal.LOGITS, large.key, True)
    assert trained(logits, weights, root, "with more", method="dkd") == trained(
        both, weights, root, "dkd", method="dkd"
    )
    assert [card.id for card in list_caches(root.caches)] == [large.key.id]


def test_trials_of_a_search_read_the_cache_of_all_its_methods(asked: Callable[..., Any], root: Workspace) -> None:
    experiment, weights = asked(search={"space": {"methods": ["kd", "rsd"]}}, training={"epochs": 2})
    build = planned(experiment, root, weights)
    recipe = experiment.recipe({**experiment.published("kd"), "training.epochs": 2}, seed=7)
    splits = open_splits(recipe.data)
    live = open_prepared(recipe, weights, splits.num_classes)
    teacher = training_teacher(recipe, splits, live, root, "cpu", "built", build.signals)
    assert isinstance(teacher, CachedTeacher)
    assert teacher.records.key.serves == Signal.LOGITS | Signal.EMBEDDING
    alone = training_teacher(recipe, splits, live, root, "cpu", "found")
    assert isinstance(alone, CachedTeacher)
    assert alone.records.key == teacher.records.key


def _replace(file: Path, content: bytes) -> None:
    """By a new file: another process may have mapped the old one."""
    file.unlink()
    file.write_bytes(content)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    _replace(file, content)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "changed shard": ("shards/000000.arrow", _flip),
    "cut shard": ("shards/000000.arrow", lambda file: _replace(file, file.read_bytes()[:99])),
    "missing shard": ("shards/000000.arrow", Path.unlink),
    "manifest": ("manifest.json", lambda file: file.write_text("{half")),
    "key": ("key.json", lambda file: file.write_text("null")),
    "predictions": ("classes/val.npy", lambda file: (file.parent.mkdir(), file.write_bytes(b"no array"))),
}


@pytest.mark.parametrize("damage", cases(DAMAGE, quick={"changed shard"}))
def test_what_is_damaged_in_a_cache_is_computed_again(damage: str, asked: Callable[..., Any], root: Workspace) -> None:
    experiment, weights = asked(training={"epochs": 2})
    live = trained(experiment, weights, root, "live")
    folder = complete(experiment, root, weights).folder
    assert folder.local is not None
    name, harm = DAMAGE[damage]
    harm(folder.local / name)
    assert trained(experiment, weights, root, "during a search") == live
    again = complete(experiment, root, weights)
    assert again.is_complete
    assert verify_cache(folder) == []


def test_a_shard_that_breaks_while_it_is_read_costs_no_trial(
    asked: Callable[..., Any], root: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    experiment, weights = asked(training={"epochs": 2})
    build = complete(experiment, root, weights)
    splits = open_splits(experiment.data)
    teacher = open_cache(build.recipe, splits, open_prepared(build.recipe, weights, 10), root, "cpu", build=False)
    assert build.folder.local is not None
    for file in (build.folder.local / "shards").iterdir():
        _flip(file)
    teacher.records._mapped.clear()
    batch = next(recipe_loaders(build.recipe, splits, "cpu").train.epoch(0))
    assert teacher.outputs(batch, Signal.LOGITS).logits is not None
    assert "is damaged (its content does not match its checksum)" in caplog.text
    assert "the teacher runs for its views" in caplog.text


@pytest.mark.thorough
def test_heterokd_distill_reads_a_complete_cache(
    cli: Run, asked: Callable[..., Any], root: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, weights = asked()
    complete(experiment, root, weights)
    forwards = Forwards(monkeypatch)
    done = cli("distill", "tiny.yaml", "--method", "kd", "--root", root.path)
    assert done.code == 0, done.err
    assert forwards.count <= 1


@pytest.mark.parametrize(
    "cache", cases([{"dtype": "fp16"}, {"top_k": 4}, ROUNDED], quick={str(ROUNDED)}, names=str), ids=str
)
def test_rounded_outputs_belong_to_the_recipe_wherever_they_come_from(
    cache: dict[str, Any], asked: Callable[..., Any], root: Workspace
) -> None:
    exact = trained(*asked(), root, "exact")
    experiment, weights = asked(cache=cache)
    rounded = trained(experiment, weights, root, "live")  # nothing is stored yet: computed, and rounded alike
    complete(experiment, root, weights)
    assert trained(experiment, weights, root, "cached") == rounded != exact
    assert rounded[0]["train/loss"] == pytest.approx(exact[0]["train/loss"], rel=0.1)


def test_fewer_views_than_epochs_are_shown_again(asked: Callable[..., Any], root: Workspace) -> None:
    experiment, weights = asked(cache={"views": 2})
    live = trained(experiment, weights, root, "live")
    filling = complete(experiment, root, weights)
    assert filling.key.views == 2 < experiment.training.epochs
    assert trained(experiment, weights, root, "cached") == live
    recipe = TrialFolder(root.path / "cached").recipe
    assert (recipe.cache.views, recipe.views) == (2, 2)
    other = trained(*asked(), root, "others")
    assert [report["train/loss"] == one["train/loss"] for report, one in zip(live, other, strict=True)] == [
        True,
        True,
        False,
    ]


@pytest.mark.thorough
def test_another_teacher_policy_or_seed_is_another_cache(asked: Callable[..., Any], root: Workspace) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"teacher": {"training": {"epochs": 1, "warmup_epochs": 0, "precision": "fp32", "channels_last": False}}},
        {"data": {"augment": "none"}},
        {"training": {"seed": 1}},
        {"cache": {"dtype": "fp16"}},
    ]
    fillings = [complete(experiment, root, weights) for experiment, weights in (asked(**one) for one in changes)]
    assert len({filling.key.id for filling in fillings}) == len(changes)
    assert {card.id for card in list_caches(root.caches)} == {filling.key.id for filling in fillings}
    assert all(not filling.missing and verify_cache(filling.folder) == [] for filling in fillings)


def truncated(folder: Path) -> None:
    shard = folder / "shards/000000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1000])


def flipped(folder: Path) -> None:
    shard = folder / "shards/000000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def half_a_manifest(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:20])


def no_shard(folder: Path) -> None:
    (folder / "shards/000000.arrow").unlink()


@pytest.mark.parametrize(
    "damage",
    [flipped, *(pytest.param(damage, marks=pytest.mark.thorough) for damage in (truncated, half_a_manifest, no_shard))],
)
def test_a_search_builds_the_damaged_files_of_its_cache_again(
    damage: Callable[[Path], None], asked: Callable[..., Any], root: Workspace
) -> None:
    experiment, weights = asked()
    damage(Path(complete(experiment, root, weights).folder.path))
    build = planned(experiment, root, weights)
    assert (build.is_complete, build.obstacle) == (False, None)


def test_what_is_in_the_way_of_a_cache_is_said_and_the_teacher_runs_live(
    asked: Callable[..., Any], root: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    experiment, weights = asked(cache={"max_gb": 1e-6})
    live = trained(experiment, weights, root, "live")
    obstacle = planned(experiment, root, weights).obstacle
    assert obstacle is not None
    assert obstacle.startswith("cache.max_gb: a cache of logits [10] in fp32")
    assert trained(experiment, weights, root, "small", "built") == live
    experiment, weights = asked()
    with small_disk(root.caches, "8k"):
        obstacle = planned(experiment, root, weights).obstacle
        assert obstacle is not None
        assert re.search(r"more bytes, [\d,]+ are free", obstacle)
        assert trained(experiment, weights, root, "full", "built") == live
    (record,) = (each for each in caplog.records if each.name == "heterokd.teachers.cache_policy")
    assert record.getMessage().startswith("the teacher's cache is incomplete (")


@pytest.mark.thorough
def test_cached_maps_of_logits_train_the_live_teachers_student(asked: Callable[..., Any], root: Workspace) -> None:
    experiment, weights = asked(**SCENES)
    live = trained(experiment, weights, root, "live", method="pixel_kd")
    filling = complete(experiment, root, weights)
    assert filling.key.logits is not None
    assert len(filling.key.logits) == 3
    assert filling.key.embedding is None
    cached = trained(experiment, weights, root, "cached", method="pixel_kd")
    assert [report["val/miou"] for report in cached] == [report["val/miou"] for report in live]
    assert cached == live


@pytest.fixture
def find(tiny_file: Write, root: Workspace, local_ray: None) -> Callable[..., SearchResult]:
    def run(name: str, listener: Any = None, **changes: Any) -> SearchResult:
        settings = {"training": BATCH, "search": SEARCH, **changes}
        return search(load_experiment(tiny_file(name=name, **settings)), root, listener=listener)

    return run


@pytest.mark.thorough
@pytest.mark.usefixtures("local_ray")
def test_heterokd_cache_builds_once_and_mends(cli: Run, asked: Callable[..., Any], root: Workspace) -> None:
    experiment, weights = asked()
    filling = planned(experiment, root, weights)

    def command() -> str:
        done = cli("cache", "tiny.yaml", "--root", "runs")
        assert done.code == 0, done.err
        return done.out

    assert f"cache {filling.key.id} built in " in command()
    assert verify_cache(filling.folder) == []
    live = trained(experiment.model_copy(update={"cache": CachingSettings(enabled=False)}), weights, root, "live")
    assert trained(experiment, weights, root, "cached") == live
    assert f"cache {filling.key.id} is complete; nothing was built" in command()
    flipped(Path(filling.folder.path))
    removed = command()
    assert "shards/000000.arrow" in removed
    assert "damaged" in removed
    assert verify_cache(filling.folder) == []
    refused = cli("cache", "tiny.yaml", "--root", "runs", "--set", "cache.enabled=false")
    assert refused.code == 2
    assert "cache.enabled: is false" in refused.err


def outcomes(found: SearchResult) -> list[tuple[str, str, float]]:
    """State, sample and last validation loss of each trial."""
    return [
        (trial.status, str(trial.snapshot.sample), trial.metrics()[-1]["val/loss"]) for trial in found.folder.trials()
    ]


class Mapped:
    """Looks which trials' processes have a cache's shard in their memory."""

    def __init__(self) -> None:
        self.seen: dict[int, bool] = {}

    def __call__(self, event: str, trial: TrialFolder, summary: StudySummary) -> None:
        try:
            maps = Path(f"/proc/{trial.snapshot.pid}/maps").read_text()
        except OSError:  # after its last report a trial's process may be gone
            maps = ""
        self.seen[trial.number] = self.seen.get(trial.number, False) or "000000.arrow" in maps


@pytest.mark.slow
def test_a_search_fills_its_cache_and_finds_what_one_without_a_cache_finds(
    cli: Run, find: Callable[..., SearchResult], root: Workspace
) -> None:
    confirmed = {**SEARCH, "confirm_leaders": 1, "confirm_seeds": 1}
    first = find("first", search=confirmed)
    cards = list_caches(root.caches)
    assert [card.complete for card in cards] == [True, True], "of the experiment's seed, and of the confirmation's"
    assert all(verify_cache(root.caches / card.id) == [] for card in cards)
    reading = Mapped()
    second = find("second", reading, search=confirmed)
    assert reading.seen == {trial.number: True for trial in second.folder.trials()}
    live = find("live", search=confirmed, cache={"enabled": False})
    assert outcomes(first) == outcomes(second) == outcomes(live)
    assert first.summary.winner.number == live.summary.winner.number
    done = cli("cache", "tiny.yaml", "--set", "cache.enabled=true", "--root", "runs")
    assert done.code == 0
    assert "is complete; nothing was built" in done.out


def builders() -> Iterator[psutil.Process]:
    """Actors below this process that build a cache."""
    for process in psutil.Process().children(recursive=True):
        try:
            if any("ray::Builder.build" in part for part in process.cmdline()):
                yield process
        except psutil.Error:
            continue


@pytest.mark.slow
def test_a_killed_builder_costs_nothing_but_its_shard(
    find: Callable[..., SearchResult], asked: Callable[..., Any], root: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    experiment, weights = asked(name="killed", search=SEARCH)
    filling = planned(experiment, root, weights)
    killed: set[int] = set()
    ended = threading.Event()

    def kill() -> None:
        while not ended.wait(0.2):
            for process in builders():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.add(process.pid)

    locks = Path(filling.folder.path) / "locks"
    locks.mkdir(parents=True)
    killer = threading.Thread(target=kill, daemon=True)
    with FileLock(
        Path(filling.folder.path) / "locks/000000.lock"
    ):  # the builder waits for its shard until it is killed, and so do those that are started in its place
        killer.start()
        found = find("killed")
    ended.set()
    killer.join()
    assert len(killed) == RESTARTS + 1
    assert [state for state, _, _ in outcomes(found)] == ["complete", "complete"]
    assert "a builder died" in caplog.text
    assert not filling.is_complete
    again = find("again")  # completes it
    assert filling.is_complete
    assert outcomes(again) == outcomes(found)


@pytest.mark.slow
def test_a_disk_that_is_too_small_costs_one_sentence(
    find: Callable[..., SearchResult], root: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(root.caches, "4k"):
        found = find("full")
        assert [state for state, _, _ in outcomes(found)] == ["complete", "complete"]
        (record,) = [record for record in caplog.records if record.name == "heterokd.execution.driver"]
        assert record.getMessage().startswith("the teacher runs live (")
        assert list_caches(root.caches) == []


@pytest.mark.ray
@pytest.mark.slow
def test_two_searches_that_build_one_cache_at_once(
    tiny_file: Write, asked: Callable[..., Any], root: Workspace
) -> None:
    asked()
    if not root.teachers.exists():
        prepare_teacher(load_experiment(tiny_file(training=BATCH)), root)
    file = tiny_file(training=BATCH, search=SEARCH)
    program = [sys.executable, "-m", "heterokd", "search", str(file), "--root", str(root.path)]
    running = [
        subprocess.Popen([*program, "--set", f"name={name}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    for process in running:
        _, err = process.communicate(timeout=500)
        assert process.returncode == 0, err
    (card,) = list_caches(root.caches)
    assert card.complete
    assert verify_cache(root.caches / card.id) == []
    losses = [[trial.metrics()[-1]["val/loss"] for trial in root.study(name).trials()] for name in ("one", "two")]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_search_of_segmentation_reads_maps_of_logits(
    find: Callable[..., SearchResult], asked: Callable[..., Any], root: Workspace
) -> None:
    experiment, _ = asked(**SCENES)
    complete(experiment, root, prepare_teacher(experiment, root).weights)
    reading = Mapped()
    cached = find("cached", reading, **SCENES)
    assert all(reading.seen.values())
    live = find("live", **SCENES, cache={"enabled": False})
    assert outcomes(cached) == outcomes(live)
