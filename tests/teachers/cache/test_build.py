"""Building: by several at once, after a crash, and into an object store."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from cached_views import built, made_up, small_key
from numpy.typing import NDArray
from processes import exit_code
from pyarrow import fs
from torch import Tensor

from heterokd.errors import CacheError
from heterokd.storage.files import PARTIAL
from heterokd.storage.filesystem import RemoteDir, open_folder
from heterokd.teachers.cache.build import build_shards, finish, missing
from heterokd.teachers.cache.records import open_records
from heterokd.teachers.cache.shards import layout_of

KEY = small_key()


def contents(folder: RemoteDir) -> dict[str, bytes]:
    return {file.name: folder.read(file.name) for file in folder.files() if file.name.startswith("shards/")}


def test_two_builders_at_once_share_the_work(tmp_path: Path) -> None:
    folder = open_folder(tmp_path).at(KEY.id)
    together = threading.Barrier(2)
    built_by: dict[int, list[int]] = {}

    def build(builder: int) -> None:
        first = True

        def compute(index: NDArray[np.int64], view: NDArray[np.int64]) -> Mapping[str, Tensor]:
            nonlocal first
            if first:
                together.wait(10)  # both are in the midst of a shard: so they are at two different ones
                first = False
            return made_up(KEY)(index, view)

        built_by[builder] = build_shards(folder, KEY, compute)

    threads = [threading.Thread(target=build, args=(builder,)) for builder in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(built_by[0] + built_by[1]) == list(range(layout_of(KEY).shards))
    assert built_by[0]
    assert built_by[1]
    finish(folder, KEY)
    assert contents(folder) == contents(built(open_folder(tmp_path / "alone"), KEY).folder)


def test_actors_build_the_shards_they_are_given(tmp_path: Path) -> None:
    folder = open_folder(tmp_path).at(KEY.id)
    assert build_shards(folder, KEY, made_up(KEY), [3, 1]) == [1, 3]
    assert build_shards(folder, KEY, made_up(KEY), [1]) == []
    assert missing(folder, KEY) == [number for number in range(layout_of(KEY).shards) if number not in (1, 3)]


def build_until_killed(folder: RemoteDir) -> None:
    real, synced = os.fsync, itertools.count(1)

    def fsync(descriptor: int) -> None:
        if next(synced) == 5:
            os.kill(os.getpid(), signal.SIGKILL)  # key.json, then the fourth shard
        real(descriptor)

    os.fsync = fsync
    build_shards(folder, KEY, made_up(KEY))


def test_a_killed_builder_costs_one_shard(tmp_path: Path) -> None:
    folder = open_folder(tmp_path).at(KEY.id)
    assert exit_code(build_until_killed, folder) == -signal.SIGKILL
    assert any(file.name.endswith(PARTIAL) for file in folder.files())
    total = layout_of(KEY).shards
    assert build_shards(folder, KEY, made_up(KEY)) == list(range(3, total))
    assert not any(file.name.endswith(PARTIAL) for file in folder.files())
    finish(folder, KEY)
    open_records(folder, KEY, verify="full")


def test_a_damaged_shard_of_a_broken_off_build_is_built_again(tmp_path: Path) -> None:
    folder = open_folder(tmp_path).at(KEY.id)
    build_shards(folder, KEY, made_up(KEY), [0, 1, 2])
    path = tmp_path / KEY.id / "shards/000001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert 1 in missing(folder, KEY)
    assert build_shards(folder, KEY, made_up(KEY), [0, 1, 2]) == [1]


def test_an_object_store_serves_through_copies(tmp_path: Path) -> None:
    memory = fs._MockFileSystem()
    memory.create_dir(f"bucket/caches/{KEY.id}/shards")
    store = RemoteDir(memory, "bucket/caches")
    records = built(store, KEY, copies=tmp_path, verify="full")
    assert missing(records.folder, KEY) == []
    arrays = records.gather(np.arange(17), np.full(17, 4))
    assert arrays is not None
    expected = made_up(KEY)(np.arange(17), np.full(17, 4))
    assert torch.equal(torch.from_numpy(arrays["logits"]), expected["logits"])
    copy = tmp_path / KEY.id / "shards/000000.arrow"
    broken = bytearray(copy.read_bytes())
    broken[len(broken) // 2] ^= 1
    copy.write_bytes(broken)
    with pytest.raises(CacheError, match="000000"):
        open_records(store.at(KEY.id), KEY, copies=tmp_path, verify="full")
