"""Folders: whole files or none, dead writers' leftovers go, object stores behave alike."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounts import small_disk
from object_store import gs_server
from processes import exit_code
from pyarrow import fs

from heterokd.errors import ConfigError
from heterokd.storage.files import PARTIAL
from heterokd.storage.filesystem import RemoteDir, open_folder


@pytest.fixture(scope="module")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with gs_server(tmp_path_factory.mktemp("gs") / "log") as environment:
        yield environment


@pytest.fixture(params=["local", "object store", "gs"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteDir:
    if request.param == "local":
        return open_folder(tmp_path / "caches")
    if request.param == "gs":
        for name, value in request.getfixturevalue("google").items():
            monkeypatch.setenv(name, value)
        return open_folder(f"gs://state/{tmp_path.name}")
    memory = fs._MockFileSystem()
    memory.create_dir("bucket/caches/shards")
    return RemoteDir(memory, "bucket/caches")


def test_what_is_written_is_listed_read_and_deleted(folder: RemoteDir) -> None:
    assert not folder.exists("key.json")
    folder.write("key.json", b"{}")
    folder.write("shards/1.arrow", b"12345")
    assert [(file.name, file.size) for file in folder.files()] == [("key.json", 2), ("shards/1.arrow", 5)]
    assert folder.folders() == ["shards"]
    assert folder.read("shards/1.arrow") == b"12345"
    folder.write("key.json", b"new")
    assert folder.read("key.json") == b"new"
    folder.delete("key.json")
    folder.delete("key.json")
    assert not folder.exists("key.json")
    with pytest.raises(FileNotFoundError):
        folder.read("key.json")
    folder.delete_everything()
    folder.delete_everything()
    assert list(folder.files()) == []


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "64k") as place:
        folder = open_folder(place)
        folder.write("a", b"old")
        with pytest.raises(OSError, match="No space"):
            folder.write("a", bytes(2**17))
        assert folder.read("a") == b"old"
        assert [file.name for file in folder.files()] == ["a"]


def write_until_killed(folder: RemoteDir) -> None:
    os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
    folder.write("shards/a.arrow", b"half")


def test_partial_files_of_the_dead_go_and_of_the_living_stay(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    assert exit_code(write_until_killed, folder) == -signal.SIGKILL
    (left,) = folder.files()
    assert left.name.endswith(PARTIAL)
    mine = left.name.replace(left.name.split(".")[-3], str(os.getpid()))
    folder.write(mine, b"living")
    other = tmp_path / f".b.elsewhere.{os.getpid()}.00000000{PARTIAL}"
    other.write_bytes(b"of another machine, just now")
    assert folder.sweep() == [left.name]
    os.utime(other, (0, 0))
    assert folder.sweep() == [other.name]


def test_unknown_kinds_of_folder_are_refused() -> None:
    with pytest.raises(ConfigError, match="ftp:// is not supported"):
        open_folder("ftp://host/folder")
    with pytest.raises(ConfigError, match="check the address"):
        open_folder("s3://bucket/x?nonsense=1")
    assert open_folder("file:///a/b").local == Path("/a/b")
    assert open_folder("gs://bucket/x/").path == "bucket/x"
    assert str(open_folder("s3://bucket/x?region=us-east-1")) == "s3://bucket/x"
