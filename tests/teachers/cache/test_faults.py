"""Faults, injected for real: each is detected and said in one sentence, and nothing wrong is ever read."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Mapping
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cached_views import built, made_up, small_key
from mounts import fill, small_disk
from numpy.typing import NDArray
from processes import CONTEXT, exit_code
from torch import Tensor

from heterokd.errors import CacheError
from heterokd.storage.filesystem import RemoteDir, open_folder
from heterokd.teachers.cache.build import build_shard, build_shards, check_space, finish, missing
from heterokd.teachers.cache.key import CacheKey
from heterokd.teachers.cache.records import Records, open_records, problems, read_manifest

KEY = small_key()
SHARD = "shards/000002.arrow"


@pytest.fixture
def folder(tmp_path: Path) -> RemoteDir:
    return built(open_folder(tmp_path), KEY).folder


def file_of(folder: RemoteDir, name: str = SHARD) -> Path:
    assert folder.local is not None
    return folder.local / name


def everything(records: Records) -> dict[str, np.ndarray[Any, Any]]:
    index, view = (grid.ravel() for grid in np.meshgrid(np.arange(KEY.images), np.arange(KEY.views)))
    arrays = records.gather(index, view)
    assert arrays is not None
    return arrays


def test_a_truncated_shard_is_said_and_only_it_is_built_again(folder: RemoteDir) -> None:
    whole = file_of(folder).read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        file_of(folder).write_bytes(whole[:length])
        with pytest.raises(CacheError, match=rf"{SHARD}: has {length:,} bytes instead of {len(whole):,}; delete it"):
            open_records(folder, KEY)
        assert missing(folder, KEY) == [2]
    assert build_shards(folder, KEY, made_up(KEY)) == [2]
    assert file_of(folder).read_bytes() == whole
    open_records(folder, KEY, verify="full")


def test_a_missing_shard_is_said(folder: RemoteDir) -> None:
    file_of(folder).unlink()
    with pytest.raises(CacheError, match=rf"{SHARD}: is missing"):
        open_records(folder, KEY)


def test_a_flipped_bit_anywhere_is_detected_or_changes_nothing(folder: RemoteDir) -> None:
    truth = everything(open_records(folder, KEY))
    whole = file_of(folder).read_bytes()
    detected = 0
    random = np.random.default_rng(0)
    places = random.choice(len(whole), 150, replace=False)
    for place in places.tolist():
        broken = bytearray(whole)
        broken[place] ^= 1 << int(random.integers(8))
        file_of(folder).write_bytes(broken)
        told = problems(Records(folder, KEY, read_manifest(folder, KEY)), "full")
        assert all("000002" in sentence for sentence in told)
        detected += bool(told)
        # Without the full audit it is found when the shard is first used.
        try:
            read = everything(open_records(folder, KEY))
        except CacheError:
            continue
        assert all((read[name] == truth[name]).all() for name in truth)
    assert detected > 20


def test_every_flipped_bit_of_the_records_is_detected(folder: RemoteDir) -> None:
    whole = file_of(folder).read_bytes()
    index, view = open_records(folder, KEY).layout.records(2)
    body = made_up(KEY)(index, view)["logits"].numpy().tobytes()
    start = whole.index(body)
    for place in range(start, start + len(body), 7):
        broken = bytearray(whole)
        broken[place] ^= 1
        file_of(folder).write_bytes(broken)
        with pytest.raises(CacheError, match="does not match its checksum"):
            open_records(folder, KEY, verify="full")
        with pytest.raises(CacheError, match="does not match its checksum"):
            everything(Records(folder, KEY, None))


def test_a_shard_of_another_place_or_cache_is_refused(folder: RemoteDir, tmp_path: Path) -> None:
    kept = file_of(folder).read_bytes()
    shutil.copy(file_of(folder, "shards/000005.arrow"), file_of(folder))
    with pytest.raises(CacheError, match="is shard 5 of cache"):
        open_records(folder, KEY, verify="full")
    other = small_key(seed=1)
    build_shard(open_folder(tmp_path).at(other.id), other, 2, made_up(other))
    file_of(folder).write_bytes((tmp_path / other.id / SHARD).read_bytes())
    with pytest.raises(CacheError, match=f"is shard 2 of cache {other.id}, not shard 2 of {KEY.id}"):
        open_records(folder, KEY, verify="full")
    file_of(folder).write_bytes(kept)
    open_records(folder, KEY, verify="full")


def test_foreign_files_are_named(folder: RemoteDir) -> None:
    file_of(folder, "shards/notes.txt").write_text("mine")
    with pytest.raises(CacheError, match=r"shards/notes.txt: is not a file of a cache; move it away"):
        open_records(folder, KEY)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cache": "x"}', '{"cache": "x", "shards": [{}]}', "\xff"])
def test_unreadable_manifests_and_keys_are_named(text: str, folder: RemoteDir) -> None:
    manifest = file_of(folder, "manifest.json").read_text()
    file_of(folder, "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(CacheError, match=r"manifest.json: is damaged"):
        open_records(folder, KEY)
    file_of(folder, "manifest.json").write_text(manifest)
    file_of(folder, "key.json").write_text(text, encoding="latin-1")
    with pytest.raises(CacheError, match=r"key.json: is damaged"):
        open_records(folder, KEY)


def test_the_manifest_of_another_cache_is_refused(folder: RemoteDir) -> None:
    content = json.loads(file_of(folder, "manifest.json").read_text())
    file_of(folder, "manifest.json").write_text(json.dumps({**content, "cache": "0" * 16}))
    with pytest.raises(CacheError, match="belongs to cache 0000000000000000"):
        open_records(folder, KEY)


CHANGES: dict[str, Any] = {
    "data": "e" * 64,
    "split": "val",
    "images": 18,
    "size": (9, 8),
    "policy": "q" * 16,
    "seed": 7,
    "views": 6,
    "teacher": "u" * 64,
    "network": "test_resnet",
    "options": '{"depth": 4}',
    "input_size": 16,
    "mean": (0.4, 0.5, 0.5),
    "std": (0.4, 0.5, 0.5),
    "libraries": ("torch 2.15",),
    "dtype": "fp16",
    "logits": (11,),
    "embedding": None,
    "top_k": 2,
    "shard_bytes": 800,
    "version": 99,
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_key_that_differs_has_another_id_and_says_what_differs(field: str, folder: RemoteDir) -> None:
    other = small_key(**{field: CHANGES[field]})
    assert other.id != KEY.id
    assert CacheKey.from_json(other.to_json()) == other
    (told,) = KEY.differences(other)
    with pytest.raises(CacheError) as caught:
        open_records(folder, other)
    assert told in str(caught.value)
    assert str(caught.value).endswith("here")


@pytest.mark.parametrize("changes", [{}, {"dtype": "fp16"}, {"top_k": 3}])
def test_a_teacher_that_says_something_else_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    key = small_key(**changes)
    records = built(open_folder(tmp_path), key)
    assert records.audit(made_up(key)) == 0
    with pytest.raises(CacheError, match=r"differ from the teacher's by .* they are of another teacher"):
        records.audit(made_up(key, salt=1))


def test_too_small_a_disk_is_refused_before_building(tmp_path: Path) -> None:
    folder = open_folder(tmp_path).at(KEY.id)
    huge = small_key(images=10**13, shard_bytes=2**47)
    with pytest.raises(CacheError, match=r"needs 3,200,[\d,]+ more bytes, [\d,]+ are free; free some"):
        build_shards(folder, huge, lambda index, view: pytest.fail("computed"))
    check_space(folder, huge, 0)


def build_within(folder: RemoteDir, largest: int, answers: Queue[str]) -> None:
    """Build where no file may be larger, as the kernel sees to it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, -1))
    try:
        build_shards(folder, KEY, made_up(KEY))
    except CacheError as error:
        answers.put(str(error))


def test_a_full_disk_keeps_what_is_finished_and_the_build_goes_on_later(tmp_path: Path) -> None:
    """The limit falls into the third shard."""
    folder = open_folder(tmp_path).at(KEY.id)
    size = len(built(open_folder(tmp_path / "other"), KEY).folder.read(SHARD))
    build_shards(folder, KEY, made_up(KEY), [0, 1])
    answers = CONTEXT.Queue()
    assert exit_code(build_within, folder, size - 100, answers) == 0
    said = answers.get(timeout=10)
    assert "000002.arrow" in said
    assert "the disk is full" in said
    assert {file.name for file in folder.files() if "locks" not in file.name} == {
        "key.json",
        "shards/000000.arrow",
        "shards/000001.arrow",
    }
    with pytest.raises(CacheError, match=r"shards are missing"):
        finish(folder, KEY)
    assert 0 not in build_shards(folder, KEY, made_up(KEY))
    finish(folder, KEY)
    everything(open_records(folder, KEY, verify="full"))


def test_no_space_left_on_the_device_is_said(tmp_path: Path) -> None:
    """Something else fills the disk while the first shard is computed."""
    compute = made_up(KEY)

    def meanwhile(index: NDArray[np.int64], view: NDArray[np.int64]) -> Mapping[str, Tensor]:
        fill(tmp_path / "small")
        return compute(index, view)

    with small_disk(tmp_path / "small", "2m") as place:
        folder = open_folder(place).at(KEY.id)
        with pytest.raises(CacheError, match=r"the disk is full \(No space left on device\)"):
            build_shards(folder, KEY, meanwhile)
        assert missing(folder, KEY) == list(range(len(missing(folder, KEY))))
