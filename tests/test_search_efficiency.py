"""The benchmark of the search: its tables are what unbatched training gives, and its simulator is deterministic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quick import cases

from benchmarks.search_efficiency import digits, table, teachers
from benchmarks.search_efficiency.build import Build
from benchmarks.search_efficiency.methods import Shown
from benchmarks.search_efficiency.pairs import EPOCHS, LEARNING_RATES, METHODS, PAIRS, Config, Pair
from benchmarks.search_efficiency.replay import Ask, Choice, Question, Replay, question
from benchmarks.search_efficiency.run import Task, search, summarise
from benchmarks.search_efficiency.strategies import STRATEGIES, Heterokd
from benchmarks.search_efficiency.students import (
    BATCH,
    CLIP,
    MOMENTUM,
    WEIGHT_DECAY,
    Structure,
    Students,
    cosine,
    initial,
    order,
    train,
)
from heterokd.methods.dist import dist_loss
from heterokd.methods.dkd import dkd_loss
from heterokd.methods.fitnet import fitnet_loss
from heterokd.methods.hcd import HCD, hcd_loss
from heterokd.methods.kd import kd_loss
from heterokd.methods.ofa import ofa_loss


@pytest.fixture(scope="module", params=cases(PAIRS, quick={"cnn_mlp"}))
def pair(request: pytest.FixtureRequest) -> Pair:
    return PAIRS[request.param]


@pytest.fixture(scope="module")
def shown(pair: Pair) -> Shown:
    """What a teacher says that has learned nothing: the equations do not mind."""
    return teachers.show(pair.teacher, pair.teacher.init(torch.Generator().manual_seed(1)), digits.load())


@pytest.fixture(params=cases(table.stored(), quick={"cnn_mlp"}))
def built(request: pytest.FixtureRequest) -> str:
    """Every table that lies in the repository."""
    return request.param


@pytest.fixture
def invented() -> Question:
    """A table whose methods and learning rates differ, with noise of a hundredth, for what does not depend on truth."""
    rng, configs = np.random.default_rng(0), PAIRS["cnn_mlp"].configs()
    worth = dict(zip(METHODS, (-0.04, -0.01, -0.02, 0.0, -0.005, 0.0, -0.03, -0.04), strict=True))
    rates = dict(zip(LEARNING_RATES, (-0.01, 0.005, 0.0, -0.03), strict=True))
    mean = np.array([0.93 + worth[c["method"]] + rates[c["training.learning_rate"]] for c in configs])
    mean += rng.normal(0, 0.01, len(mean))
    grown = 1 - 0.5 * np.exp(-np.arange(1, EPOCHS + 1) / 4)

    def counts(seeds: int, total: int) -> np.ndarray:
        finals = np.clip(mean[:, None] + rng.normal(0, 0.01, (len(mean), seeds)), 0, 1)
        return np.round(total * finals[:, :, None] * grown / grown[-1]).astype(np.uint16)

    shown, hidden = len(table.SHOWN), len(table.HIDDEN)
    found = table.Table(
        counts(shown, digits.VAL),
        counts(shown, digits.TEST),
        counts(hidden, digits.VAL)[:, :, -1],
        counts(hidden, digits.TEST)[:, :, -1],
        np.full(len(mean), 0.02, np.float32),
        {},
    )
    return Question("cnn_mlp", found, configs)


def of(pair: Pair, method: str, which: int = -1) -> list[Config]:
    """Two configurations of one structure."""
    configs = [config for config in pair.configs() if config["method"] == method]
    structure = Structure.of(configs[which])
    return [config for config in configs if Structure.of(config) == structure][-2:]


def own_loss(config: Config, maps, weights, logits, labels, seen, progress: float) -> torch.Tensor:
    """A method's terms for one student, written anew with the project's functions; FBT is compared by its own test."""
    method = str(config["method"])
    value = {key.split(".")[1]: one for key, one in config.items() if key.startswith(f"{method}.")}

    def layer(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"].T, weights[f"{name}.bias"])

    if method == "kd":
        return value["weight"] * kd_loss(logits, seen["logits"], value["temperature"])
    if method == "dkd":
        loss = dkd_loss(
            logits, seen["logits"], labels, value["target_weight"], value["non_target_weight"], value["temperature"]
        )
        return min(1.0, progress / value["warmup"]) * loss
    if method == "dist":
        return dist_loss(logits, seen["logits"], value["inter_weight"], value["intra_weight"], value["temperature"])
    if method == "ofa":
        exits = [
            layer(f"ofa.{digit}.out", layer(f"ofa.{digit}.in", maps[int(digit) - 1].flatten(1)).relu())
            for digit in value["stages"]
        ]
        losses = [ofa_loss(one, seen["logits"], labels, value["eps"]) for one in (logits, *exits)]
        return losses[0] + value["stage_weight"] * sum(losses[1:])
    if method == "hcd":
        made = []
        for stage in range(1, 5):
            vector = layer(f"hcd.{stage}.projector", maps[stage - 1].flatten(1))
            both = torch.cat([vector, seen["embedding"]], dim=1)
            shared = layer(f"hcd.{stage}.mapper.out", layer(f"hcd.{stage}.mapper.in", both).relu())
            made.append(shared.view(len(shared), value["num_sublogits"], 10))
        return hcd_loss(logits, seen["logits"], made, labels, HCD.Params(**value))
    if method == "fitnet":
        ours, theirs = [], []
        for digit in value["stages"]:
            stage = int(digit) - 1
            side = int(maps[stage].shape[2] ** 0.5)
            matched = layer(f"fitnet.{digit}", maps[stage].transpose(1, 2)).transpose(1, 2)
            ours.append(matched.unflatten(2, (side, side)))
            other = int(seen["maps"][stage].shape[2] ** 0.5)
            theirs.append(seen["maps"][stage].unflatten(2, (other, other)))
        return value["weight"] * fitnet_loss(ours, theirs)
    return torch.zeros(())


@pytest.mark.parametrize("method", [method for method in METHODS if method != "fbt"])
def test_students_trained_together_are_those_trained_alone(pair: Pair, shown: Shown, method: str) -> None:
    steps, seeds, given = 4, (3, 5), digits.load()
    configs = of(pair, method)
    together = Students(pair, given, shown, configs, seeds)
    together.train_epoch(2, steps)
    for place, (config, seed) in enumerate((config, seed) for config in configs for seed in seeds):
        start = initial(pair, Structure.of(config), seed)
        weights = {name: value.clone().requires_grad_() for name, value in start.items()}
        decayed = [value for name, value in weights.items() if name.endswith(("weight", "kernel"))]
        rest = [value for name, value in weights.items() if not name.endswith(("weight", "kernel"))]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=MOMENTUM)
        for step in range(steps):
            at = order(seed, len(given.labels))[2, step * BATCH : (step + 1) * BATCH]
            image, view = at[:, 0], at[:, 1]
            maps, logits, _ = pair.student.outputs(weights, given.views[view, image])
            progress = (2 * together.steps + step) / (EPOCHS * together.steps)
            seen = {
                "logits": shown.logits[view, image],
                "embedding": shown.embedding[view, image],
                "maps": [one[view, image] for one in shown.maps],
            }
            labels = given.labels[image]
            loss = F.cross_entropy(logits, labels) + own_loss(config, maps, weights, logits, labels, seen, progress)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), CLIP)
            for group in optimizer.param_groups:
                group["lr"] = float(config["training.learning_rate"]) * cosine(progress)
            optimizer.step()
        for name, value in weights.items():
            torch.testing.assert_close(together.weights[name][place].detach(), value.detach(), rtol=1e-4, atol=1e-5)


def test_a_fused_network_teaches_and_learns(pair: Pair, shown: Shown) -> None:
    """FBT: the student gets gradient from both teachers, the bridge from the teacher, and the frozen stages none."""
    students = Students(pair, digits.load(), shown, of(pair, "fbt"), (0,))
    before = {name: value.detach().clone() for name, value in students.weights.items()}
    students.train_epoch(0, 2)
    moved = {name for name, value in students.weights.items() if not torch.equal(value.detach(), before[name])}
    assert {"fbt.bridge.weight", "fbt.logit_scale", "head.weight"} <= moved
    assert all(not value.requires_grad for value in shown.weights.values())


def test_a_table_is_what_its_command_builds(built: str) -> None:
    """A few configurations trained anew; a processor that rounds otherwise may turn an image or two."""
    pair, stored = PAIRS[built], table.load(built)
    configs, weights = pair.configs(), {name: torch.from_numpy(value) for name, value in stored.teacher.items()}
    shown = teachers.show(pair.teacher, weights, digits.load())
    for method in ("scratch", "dist"):
        rows = [row for row, config in enumerate(configs) if config["method"] == method][:2]
        again = train(pair, digits.load(), shown, [configs[row] for row in rows], table.SHOWN[:2], every_epoch=True)
        for counts, kept in ((again.val, stored.val), (again.test, stored.test)):
            difference = np.abs(counts.view(2, 2, -1).numpy() - kept[rows][:, :2].astype(int))
            assert difference[:, :, :9].mean() < 0.5
            assert difference.mean() < 2


def test_a_small_table_is_built_and_read_again(tmp_path: Path) -> None:
    """Three structures for two epochs, by the command's own functions; an interrupted build goes on."""
    pair, methods = PAIRS["cnn_mlp"], ("scratch", "hcd", "fbt")
    configs = [next(config for config in pair.configs() if config["method"] == method) for method in methods]
    tables = tmp_path / "tables"
    build = Build(
        pair,
        configs,
        shown=(0, 1),
        hidden=(1000, 1001, 1002),
        epochs=2,
        teacher_epochs=1,
        parts=tmp_path / "parts",
        tables=tables,
    )
    build.train_missing(0.0)  # no time: nothing is trained
    assert not build.assemble()
    build.train_missing(None)
    assert build.assemble()
    found = table.load(pair.name, tables)
    assert found.val.shape == (3, 2, 2)
    assert found.hidden_test.shape == (3, 3)
    assert table.checksums(tables) == {f"{pair.name}.npz": table.checksum(pair.name, tables)}
    shown = teachers.show(
        pair.teacher, {name: torch.from_numpy(value) for name, value in found.teacher.items()}, digits.load()
    )
    for row, config in enumerate(configs):
        again = train(pair, digits.load(), shown, [config], (0,), every_epoch=True, epochs=2)
        assert np.abs(again.val[0].numpy() - found.val[row, 0].astype(int)).max() <= 2


def test_the_files_are_those_of_the_checksums() -> None:
    assert table.checksums() == {f"{name}.npz": table.checksum(name) for name in table.stored()}
    assert sum(file.stat().st_size for file in table.FOLDER.glob("*")) < 3e6


def test_a_table_holds_what_is_promised(built: str) -> None:
    stored, configs = table.load(built), PAIRS[built].configs()
    assert len(configs) == len(stored.val) >= 600
    assert stored.val.shape[1] + stored.hidden_val.shape[1] >= 16
    assert not set(table.SHOWN) & set(table.HIDDEN)
    assert {config["method"] for config in configs} == set(METHODS)
    best = {
        method: max(stored.truth[row] for row, config in enumerate(configs) if config["method"] == method)
        for method in METHODS
    }
    assert best["scratch"] < max(best.values()) - 5 * stored.noise / np.sqrt(
        len(table.HIDDEN)
    )  # distillation has something to give


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_is_deterministic_and_keeps_its_budget(strategy: str, invented: Question) -> None:
    first, second = (search(Task("cnn_mlp", strategy, 5, 3), invented) for _ in range(2))
    assert (first.regret, first.excess, first.spent) == (second.regret, second.excess, second.spent)
    assert first.spent <= 5 + 1e-9


def test_the_best_is_not_the_luckiest() -> None:
    """Configurations that are all alike: none is better than another, and the regret of each is about 0 on average."""
    rng = np.random.default_rng(0)
    hidden = rng.binomial(digits.VAL, 0.9, (400, len(table.HIDDEN))).astype(np.uint16)
    shown = np.zeros((400, len(table.SHOWN), EPOCHS), np.uint16)
    found = table.Table(shown, shown, hidden, hidden, np.ones(400, np.float32), {})
    noise_of_mean = found.noise / np.sqrt(len(table.HIDDEN))
    assert found.truth.max() > 0.9 + 2.5 * noise_of_mean
    assert abs(found._best[0] - 0.9) < 1.5 * noise_of_mean


def test_workers_share_the_trainings(invented: Question) -> None:
    """Two workers need half the time of one for as many trainings."""

    class All:
        def __init__(self) -> None:
            self.begun = self.ended = 0

        def next(self) -> Ask | None:
            self.begun += 1
            return Ask(self.begun, 10) if self.begun <= 8 else None

        def report(self, ask: Ask, epoch: int, value: float) -> bool:
            raise AssertionError("nothing was to be reported")

        def finish(self, ask: Ask, epoch: int, value: float) -> None:
            self.ended += 1

        def choice(self) -> Choice:
            return Choice(10, 0.0)

    times = []
    for workers in (1, 2):
        replay, strategy = Replay(invented.table, 0), All()
        replay.run(strategy, workers)
        assert strategy.ended == 8
        assert replay.spent == pytest.approx(8)
        times.append(replay.now)
    assert times[0] == pytest.approx(2 * times[1])


def test_repetitions_of_a_configuration_see_fresh_seeds(invented: Question) -> None:
    replay = Replay(invented.table, 1)
    curves = {tuple(replay.curve(20)) for _ in table.SHOWN}
    assert len(curves) == len({tuple(one) for one in invented.table.val[20] / digits.VAL})
    assert replay.repeated == 0
    replay.curve(20)
    assert replay.repeated == 1


def test_the_search_repeats_its_leaders_within_the_budget(invented: Question) -> None:
    replay = Replay(invented.table, 2)
    strategy = Heterokd(invented, replay, 40, 2)
    found = replay.run(strategy)
    standing = strategy.study.progress()
    assert standing.finished
    assert standing.confirmations_done > 0
    assert invented.row(strategy.study.leaders()[0].sample) == found.row
    assert replay.spent <= 40 + 1e-9


@pytest.mark.slow
def test_the_search_finds_truly_better_students_than_the_grid(built: str) -> None:
    """The short version of the benchmark: twenty repetitions, bounds widened to three standard errors."""
    wanted = [Task(built, name, 40, number) for name in ("heterokd", "random") for number in range(20)]
    wanted += [Task(built, "grid", 0, number) for number in range(20)]
    rows = {row.strategy: row for row in summarise({task: search(task, question(built)) for task in wanted})}
    ours = rows["heterokd"]
    assert ours.regret < rows["grid"].regret + 3 * np.hypot(ours.error, rows["grid"].error)
    assert ours.regret < rows["random"].regret
    assert ours.regret < 0.07 + 3 * ours.error
    assert abs(ours.excess) < 0.3 + 3 * ours.excess_error
    assert ours.milliseconds is not None
    assert ours.milliseconds < 500
