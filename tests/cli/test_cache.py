"""`heterokd cache`: what it lists, verifies, prunes and refuses. Building is tried in test_teacher_cache.py."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from cached_views import built, made_up, small_key
from command_line import Done, Run
from processes import CONTEXT

from heterokd.errors import CacheError
from heterokd.storage.filesystem import RemoteDir, open_folder
from heterokd.storage.use_locks import shared_lock
from heterokd.teachers.cache.build import build_shards
from heterokd.teachers.cache.maintenance import list_caches, prune_caches

Command = Callable[..., Done]
IDS = [small_key(seed=seed).id for seed in range(3)]


@pytest.fixture
def command(cli: Run) -> Command:
    """Runs `heterokd cache` in this process, in an empty folder."""
    return partial(cli, "cache")


@pytest.fixture
def caches(tmp_path: Path) -> Path:
    """Three caches, used 40, 20 and 10 days ago; the last one is partial."""
    root = open_folder(tmp_path / "runs/caches")
    for seed, days in ((0, 40), (1, 20), (2, 10)):
        key = small_key(seed=seed)
        if seed == 2:
            build_shards(root.at(key.id), key, made_up(key), [0])
        else:
            built(root, key)
        root.at(key.id).touch("last_used")
        used = time.time() - days * 86400
        os.utime(tmp_path / "runs/caches" / key.id / "last_used", (used, used))
    return tmp_path / "runs/caches"


def test_what_there_is(command: Command, caches: Path) -> None:
    code, out, _ = command("--list")
    assert code == 0
    first, second, third, total = out.splitlines()
    assert first.startswith(IDS[2])
    assert "partial   used 10 d ago  logits [10] and embedding [6] in fp32 of test_vit" in first
    assert "complete  used 20 d ago" in second
    assert third.startswith(IDS[0])
    assert total.startswith("3 cache(s), ")
    held = shared_lock(open_folder(caches).at(IDS[0]))
    assert held is not None
    rows = json.loads(command("--list", "--json")[1])["caches"]
    assert [(row["id"], row["complete"], row["in_use"]) for row in rows] == [
        (IDS[2], False, False),
        (IDS[1], True, False),
        (IDS[0], True, True),
    ]
    assert sum(row["bytes"] for row in rows) == json.loads(command("--list", "--json")[1])["bytes"] > 0


def test_damage_is_told_sentence_by_sentence(command: Command, caches: Path) -> None:
    assert command("--verify", IDS[0], IDS[2])[:2] == (0, f"{IDS[0]}  is sound\n{IDS[2]}  is sound\n")
    shard = caches / IDS[1] / "shards/000003.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (caches / IDS[1] / "shards/000004.arrow").unlink()
    code, out, err = command("--verify")
    assert code == 2
    assert f"{IDS[1]}  is damaged" in out.splitlines()
    missing, flipped = err.splitlines()
    assert missing.startswith("error: ")
    assert "000004.arrow: is missing" in missing
    assert "000003.arrow: is damaged" in flipped
    code, out, err = command("--verify", IDS[1], "--json")
    assert code == 2
    assert len(json.loads(out)["caches"][0]["problems"]) == 2


def test_pruning(command: Command, caches: Path) -> None:
    code, out, _ = command("--prune", "--unused-for", "30d", "--dry-run")
    assert code == 0
    assert out.splitlines()[0].startswith(f"would delete {IDS[0]}")
    assert len(list_caches(caches)) == 3
    deleted = json.loads(command("--prune", "--unused-for", "30d", "--json")[1])["deleted"]
    assert [row["id"] for row in deleted] == [IDS[0]]
    assert "deleted 0 cache(s), 0 B" in command("--prune", "--max-size", "1.5MB")[1]
    assert command("--prune", IDS[2])[0] == 0
    assert [card.id for card in list_caches(caches)] == [IDS[1]]
    assert command("--prune", "--all")[0] == 0
    assert not list(caches.iterdir())


def hold_on(folder: RemoteDir, held: Event) -> None:
    lock = shared_lock(folder)
    assert lock is not None
    held.set()
    time.sleep(600)


@pytest.mark.thorough
def test_a_cache_in_use_is_kept_until_its_process_ends_however_that_ends(command: Command, caches: Path) -> None:
    held = CONTEXT.Event()
    holder = CONTEXT.Process(target=hold_on, args=(open_folder(caches / IDS[0]), held))
    holder.start()
    assert held.wait(60)
    assert [card.id for card in prune_caches(caches, max_bytes=0)] == [IDS[2], IDS[1]]
    code, _, err = command("--prune", IDS[0])
    assert code == 2
    assert f"cache {IDS[0]} is in use by a running search or training" in err
    assert command("--prune", "--unused-for", "1d")[1].startswith("deleted 0 cache(s)")
    holder.kill()
    holder.join()
    assert [card.id for card in prune_caches(caches, max_bytes=0)] == [IDS[0]]


def test_who_waited_for_a_cache_that_was_deleted_holds_the_new_one(caches: Path) -> None:
    folder = open_folder(caches).at(IDS[0])
    before = shared_lock(folder)
    assert before is not None
    before.release()
    prune_caches(caches, ids=[IDS[0]])
    held = shared_lock(folder)
    assert held is not None
    built(open_folder(caches), small_key(seed=0))
    with pytest.raises(CacheError, match="is in use"):
        prune_caches(caches, ids=[IDS[0]])
    del held  # nobody needs it any more
    assert [card.id for card in prune_caches(caches, ids=[IDS[0]])] == [IDS[0]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give an EXPERIMENT to build its cache, or --list, --verify or --prune"),
        (["one.yaml", "two.yaml"], "builds the cache of a single EXPERIMENT; remove 'two.yaml'"),
        (["--list", "--prune", "--all"], "--list, --verify, --prune: cannot be combined"),
        (["--list", "abc"], "--list: lists all caches and takes no name; remove 'abc'"),
        (["x.yaml", "--all"], "--unused-for, --max-size, --all, --dry-run: need --prune"),
        (["--verify", "--set", "a=1"], "--set, --address: are only for building a cache"),
        (["--prune"], "--prune: names no caches; give ids, --unused-for 30d, --max-size 10GB or --all"),
        (
            ["--prune", "--unused-for", "soon"],
            "--unused-for soon: expected a number and one of m, h, d, w, such as 30d",
        ),
        (["--prune", "--max-size", "10"], "--max-size 10: expected a number and one of KB, MB, GB, TB, such as 10GB"),
        (["--verify", "abc"], f"there is no cache 'abc'; known: {IDS[2]}, {IDS[1]}, {IDS[0]}"),
        (["--prune", "abc"], "there is no cache 'abc'; known: "),
        (["no.yaml"], "no.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_go_together_is_refused(command: Command, caches: Path, arguments: list[str], says: str) -> None:
    code, out, err = command(*arguments)
    assert code == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert len(list_caches(caches)) == 3
