"""Upkeep: listing, verifying, pruning."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
from cached_views import built, made_up, small_key

from heterokd.errors import CacheError
from heterokd.storage.filesystem import open_folder
from heterokd.teachers.cache.build import build_shards, finish
from heterokd.teachers.cache.maintenance import list_caches, mend_cache, prune_caches, verify_cache


@pytest.fixture
def caches(tmp_path: Path) -> Path:
    """Three caches, used 30, 20 and 10 days ago; the last one is partial. And a folder of somebody else."""
    root = open_folder(tmp_path)
    for seed, days in ((0, 30), (1, 20), (2, 10)):
        key = small_key(seed=seed)
        if seed == 2:
            build_shards(root.at(key.id), key, made_up(key), [0])
        else:
            built(root, key)
        root.at(key.id).touch("last_used")
        used = time.time() - days * 86400
        os.utime(tmp_path / key.id / "last_used", (used, used))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("not a cache")
    return tmp_path


def test_cards_say_what_there_is(caches: Path) -> None:
    cards = list_caches(caches)
    assert [card.id for card in cards] == [small_key(seed=seed).id for seed in (2, 1, 0)]
    assert [card.complete for card in cards] == [False, True, True]
    assert [card.records for card in cards] == [6, 85, 85]
    assert cards[0].description == (
        "logits [10] and embedding [6] in fp32 of test_vit (tttttttt) on 5 view(s) of 17 train images at 8 x 8 "
        "(data dddddddd, seed 2)"
    )
    assert cards[1].bytes == sum(file.stat().st_size for file in (caches / cards[1].id).rglob("*") if file.is_file())
    assert list_caches(caches / "nothing") == []


def test_verifying_reads_every_shard(caches: Path) -> None:
    folder = caches / small_key().id
    assert verify_cache(folder) == []
    for number in (1, 7):
        path = folder / f"shards/{number:06d}.arrow"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    told = verify_cache(folder)
    assert ["000001" in told[0], "000007" in told[1], len(told)] == [True, True, 2]
    (folder / "key.json").write_text("{")
    assert "key.json: is damaged" in verify_cache(folder)[0]
    assert "is damaged" in next(card.description for card in list_caches(caches) if card.id == small_key().id)


def test_mending_removes_what_is_damaged_and_nothing_else(caches: Path) -> None:
    key = small_key()
    folder = open_folder(caches).at(key.id)
    assert mend_cache(folder) == mend_cache(caches / small_key(seed=2).id) == mend_cache(caches / "nothing") == []
    path = caches / key.id / "shards/000003.arrow"
    path.write_bytes(path.read_bytes()[:-100])
    (caches / key.id / "shards/000005.arrow").unlink()
    assert mend_cache(folder) == ["shards/000003.arrow", "shards/000005.arrow", "manifest.json"]
    assert build_shards(folder, key, made_up(key)) == [3, 5]
    finish(folder, key)
    assert verify_cache(folder) == []
    (caches / key.id / "manifest.json").write_text("{")
    assert mend_cache(folder) == ["manifest.json"]
    assert build_shards(folder, key, made_up(key)) == []
    (caches / key.id / "manifest.json").write_text("{}")
    (caches / key.id / "key.json").write_text("{")
    with pytest.raises(CacheError, match=r"key\.json: is damaged"):
        mend_cache(folder)


def test_pruning_by_age_size_and_name(caches: Path) -> None:
    ids = [small_key(seed=seed).id for seed in range(3)]
    assert prune_caches(caches) == []
    assert [card.id for card in prune_caches(caches, unused_for=timedelta(days=25))] == [ids[0]]
    sizes = {card.id: card.bytes for card in list_caches(caches)}
    assert prune_caches(caches, max_bytes=sizes[ids[1]] + sizes[ids[2]]) == []
    assert [card.id for card in prune_caches(caches, max_bytes=sizes[ids[2]])] == [ids[1]]
    with pytest.raises(CacheError, match=f"no cache 'nope'; known: {ids[2]}"):
        prune_caches(caches, ids=["nope"])
    assert [card.id for card in prune_caches(caches, ids=[ids[2]])] == [ids[2]]
    assert (caches / "mine/notes.txt").exists()
    assert sorted(path.name for path in caches.iterdir()) == ["mine"]
