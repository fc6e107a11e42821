"""Data sets in stores and shards read as the folders that they were made of; each node has one bounded copy."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import Run
from mounts import small_disk
from object_store import free_port, gs_server, s3_server
from PIL import Image
from pydantic import ValidationError
from shards import (
    CLASSES,
    COUNTS,
    hugging_face,
    picture,
    pictures,
    upload,
    write_arrow,
    write_parquet,
    write_tar,
    write_webdataset,
)
from tiny_datasets import write_image_folder, write_mask_folder

from heterokd.config.data import DataSettings
from heterokd.datasets.io.describe import describe_images
from heterokd.datasets.io.split import SPLIT_NAMES, Splits
from heterokd.datasets.io.stored_files import StoredFiles, stored_sources
from heterokd.errors import DataError
from heterokd.storage.stored_data.data_index import INDEX
from heterokd.storage.stored_data.node_copy import NodeCopy
from heterokd.storage.stored_data.open_data import open_data, write_index
from heterokd.storage.stored_data.push import push_data
from heterokd.storage.workspace import Workspace
from heterokd.training.data import fetch_files, measured_splits, open_splits, training_splits

BUCKET = "images"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with s3_server(tmp_path_factory.mktemp("s3") / "log", BUCKET) as environment:
        yield environment


@pytest.fixture
def s3(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with gs_server(tmp_path_factory.mktemp("gs") / "log", BUCKET) as environment:
        yield environment


@pytest.fixture
def gs(google: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in google.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HETEROKD_DATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "set"
    place.mkdir()
    write_image_folder(place)
    (place / "classes.txt").write_text("emu\ncat\ndog\n")
    (place / ".hidden").write_text("not read")
    (place / "notes.md").write_text("not an image")
    return place


def splits_of(root: object, **data: Any) -> Splits:
    return open_splits(DataSettings.model_validate({"dataset": "image_folder", "root": str(root), **data}))


def copy_of(splits: Splits) -> NodeCopy:
    (stored,) = stored_sources(splits.train.images)
    assert isinstance(stored, NodeCopy)
    return stored


def here(stored: StoredFiles) -> list[str]:
    return sorted(path.name for path in stored.folder.rglob("*") if path.is_file())


def assert_equal(found: Splits, wanted: Splits) -> None:
    """Classes, splits, labels, and every pixel."""
    assert found.class_names == wanted.class_names
    assert found.fingerprint == wanted.fingerprint
    for name in SPLIT_NAMES:
        assert getattr(found, name).digest == getattr(wanted, name).digest


def pushed(folder: Path, place: str, tmp_path: Path, **options: Any) -> str:
    url = (tmp_path / "store").as_uri() if place == "file" else f"{place}://{BUCKET}/{tmp_path.name}"
    push_data(folder, url, **options)
    return url


@pytest.mark.parametrize("place", ["s3", "gs", "file"])
def test_a_pushed_folder_reads_as_the_folder(place: str, folder: Path, tmp_path: Path, s3: None, gs: None) -> None:
    url = pushed(folder, place, tmp_path, shard_bytes=40_000)
    found, wanted = splits_of(url), splits_of(folder)
    assert wanted.class_names == ("emu", "cat", "dog")
    assert found.notes == tuple(note.replace(str(folder), url) for note in wanted.notes)
    assert "notes.md" in " ".join(found.notes)
    stored = copy_of(found)
    assert len(stored.index.shards) > 3
    assert here(stored) == ["classes.txt"]  # all above is from the index alone
    index = np.array([3, 1])
    np.testing.assert_array_equal(found.val.images.read(index), wanted.val.images.read(index))
    assert len(here(stored)) == 3
    assert stored.missing_bytes
    training_splits(found, Workspace(tmp_path / "runs"))
    assert not stored.missing_bytes
    assert len(here(stored)) == 56  # images and classes.txt; other files stay in the store
    assert_equal(found, wanted)
    assert_equal(pickle.loads(pickle.dumps(found)), wanted)


def test_objects_in_a_store_read_as_the_folder(folder: Path, tmp_path: Path, s3: None) -> None:
    url = upload(folder, BUCKET, tmp_path.name)
    found, wanted = splits_of(url, class_order="natural"), splits_of(folder, class_order="natural")
    assert here(copy_of(found)) == ["classes.txt"]
    assert describe_images(found) == describe_images(wanted)
    assert_equal(found, wanted)


def test_a_table_and_label_maps_are_read_from_a_store(folder: Path, tmp_path: Path, s3: None) -> None:
    rows = [f"{path.relative_to(folder)},{path.parent.name}" for path in sorted(folder.glob("*/*"))]
    (folder / "list.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    url = pushed(folder, "s3", tmp_path)
    assert_equal(splits_of(url, table="list.csv"), splits_of(folder, table="list.csv"))

    masks = tmp_path / "masks"
    masks.mkdir()
    write_mask_folder(masks)
    done = push_data(masks, f"s3://{BUCKET}/{tmp_path.name}-masks")
    assert (done.files, done.images) == (40, 0)
    assert_equal(splits_of(done.url, dataset="mask_folder"), splits_of(masks, dataset="mask_folder"))


@pytest.mark.parametrize(
    ("write", "kind"),
    [(write_parquet, "PNG"), (write_arrow, "PNG"), (write_webdataset, "JPEG")],
    ids=["parquet", "arrow", "webdataset"],
)
def test_shards_of_others_are_read(write: Any, kind: str, tmp_path: Path, s3: None) -> None:
    """Numbers keep their names, splits are those of the shards' names, and pixels are those of the files."""
    folder = tmp_path / "shards"
    write(folder)
    local, stored = splits_of(folder, image_size=12), splits_of(upload(folder, BUCKET, tmp_path.name), image_size=12)
    assert local.class_names == CLASSES
    assert local.notes[0] == "train, val, test are as given"
    for split, name in zip(SPLIT_NAMES, COUNTS, strict=True):
        shown = pictures(name, kind)
        found = getattr(local, split)
        assert sorted(found.labels) == sorted(label for _, label in shown)
        wanted = {(np.asarray(Image.open(io.BytesIO(content))).tobytes(), label) for content, label in shown}
        pixels = found.images.read(np.arange(len(found)))
        assert {(image.tobytes(), int(label)) for image, label in zip(pixels, found.labels, strict=True)} == wanted
    assert_equal(stored, local)
    fetch_files(stored)
    assert not copy_of(stored).missing_bytes


def test_names_of_classes_are_sorted_or_ordered(tmp_path: Path, s3: None) -> None:
    folder = tmp_path / "shards"
    write_webdataset(folder, "json")
    assert splits_of(folder).class_names == ("ant", "zebra")
    assert splits_of(folder, class_order=["zebra", "ant"]).class_names == ("zebra", "ant")


def test_an_index_is_written_beside_shards(tmp_path: Path, s3: None, cli: Run) -> None:
    folder = tmp_path / "shards"
    write_webdataset(folder)
    url = upload(folder, BUCKET, tmp_path.name)
    wanted = splits_of(folder)
    found = cli("data", "index", url, "--json")
    assert (found.code, found.last["files"], found.last["kind"]) == (0, 28, "tar")
    assert_equal(splits_of(url), wanted)
    write_index(folder.as_uri())
    assert (folder / INDEX).exists()


def truncated(folder: Path) -> None:
    write_webdataset(folder)
    file = folder / "noise-train-000000.tar"
    os.truncate(file, file.stat().st_size // 2 + 100)


def damaged(folder: Path) -> None:
    write_parquet(folder)
    file = next(folder.glob("data/train-00000*"))
    file.write_bytes(file.read_bytes()[:-200] + bytes(200))


def unlabelled_table(folder: Path) -> None:
    folder.mkdir()
    pq.write_table(hugging_face("train").drop_columns("label"), folder / "train.parquet")


def unlabelled_tar(folder: Path) -> None:
    folder.mkdir()
    write_tar(folder / "a.tar", {"0001.jpg": picture(0, "JPEG"), "0001.txt": b"a caption"})


def paths_only(folder: Path) -> None:
    folder.mkdir()
    pq.write_table(
        hugging_face("train").drop_columns("image").append_column("image", [["a.png"] * 16]), folder / "a.pq"
    )


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (truncated, r"noise-train-000000.tar: is no whole tar file \(.*\); upload it again"),
        (damaged, r"train-00000-of-00002.parquet: cannot be read as a table \(.*\); upload it again"),
        (unlabelled_table, "train.parquet: has no column 'label', only 'image'; rename a column"),
        (unlabelled_tar, "a.tar: 0001.jpg has no label; add 0001.cls with a class, or 0001.json with the key 'label'"),
        (paths_only, "a.pq: has no column 'image' with the bytes of images, only 'label', 'image'; write"),
    ],
    ids=["truncated tar", "damaged table", "no column of labels", "no label in a tar", "paths without images"],
)
def test_damaged_shards_are_refused(write: Any, sentence: str, tmp_path: Path, s3: None) -> None:
    folder = tmp_path / "shards"
    write(folder)
    for root in (folder, upload(folder, BUCKET, tmp_path.name)):
        with pytest.raises(DataError, match=f"^data.root: .*{sentence}"):
            splits_of(root)


def test_what_a_store_refuses_is_a_sentence_before_work(tiny_file: Any, tmp_path: Path, s3: None, cli: Run) -> None:
    file = tiny_file(data={"dataset": "image_folder", "root": "s3://nowhere/x", "labels_per_class": None})
    done = cli("search", file)
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: data.root: s3://nowhere/x: there is no bucket 'nowhere'; correct the address\n"
    assert not list(tmp_path.glob("runs/*"))
    with pytest.raises(DataError, match=r"^data.root: .*there are no files below it; correct the address"):
        splits_of(f"s3://{BUCKET}/empty")
    with pytest.raises(DataError, match=r"^data.root: .*there is no such folder; correct the address"):
        splits_of((tmp_path / "nothing").as_uri())
    with pytest.raises(ValidationError, match="a URL must not contain credentials"):
        splits_of("s3://me:secret@bucket/x")
    with pytest.raises(ValidationError, match=r"expected a folder, s3://BUCKET/\.\.\., gs://"):
        splits_of("ftp://host/x")


@pytest.mark.slow
def test_missing_and_wrong_credentials_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INITIAL_NO_AUTH_ACTION_COUNT", "1")  # of moto: only the bucket is made without rights
    with s3_server(tmp_path / "log", BUCKET) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role"
        with pytest.raises(DataError, match=f"data.root: s3://{BUCKET}/x: cannot be read .*ACCESS_DENIED.*{advice}"):
            open_data(f"s3://{BUCKET}/x")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(DataError, match=advice):
            open_data(f"s3://{BUCKET}/x")


@pytest.mark.slow
def test_missing_credentials_of_google_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where Google's client looks for a login
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{free_port()}")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"gs://bucket/x: cannot be read .*set GOOGLE_APPLICATION_CREDENTIALS, or give"):
        open_data("gs://bucket/x")
    assert time.monotonic() - began < 150  # Google's client tries for a quarter of an hour


def test_a_root_in_a_store_that_does_not_answer_is_refused_before_work(
    s3: None, cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    no_bucket = cli("report", "tiny", "--root", "s3://nowhere/x")
    assert no_bucket.code == 2
    assert no_bucket.err.endswith("s3://nowhere/x: there is no bucket 'nowhere'; create it, or correct the address\n")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    silent = cli("report", "tiny", "--root", f"s3://{BUCKET}/x")
    assert silent.code == 2
    assert silent.err.startswith(f"error: --root s3://{BUCKET}/x: cannot be read (")
    assert silent.err.endswith("; check the address, and that this machine reaches it\n")


def test_a_disk_or_a_limit_that_is_too_small_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = pushed(folder, "file", tmp_path)
    monkeypatch.setenv("HETEROKD_DATA_CACHE_GB", "0.0001")
    with pytest.raises(DataError, match=r"data.root: file.* takes 1.* may take 100.*HETEROKD_DATA_CACHE_GB"):
        open_data(url).fetch()
    monkeypatch.setenv("HETEROKD_DATA_CACHE_GB", "much")
    with pytest.raises(Exception, match="HETEROKD_DATA_CACHE_GB: expected gigabytes, a number above 0, got 'much'"):
        open_data(url)
    monkeypatch.delenv("HETEROKD_DATA_CACHE_GB")
    with small_disk(tmp_path / "small", "1m") as place:
        monkeypatch.setenv("HETEROKD_DATA_CACHE", str(place))
        small = open_data(url)
        for check in (small.check_room, small.fetch):
            with pytest.raises(
                DataError, match=r"needs 1.* more in .*small, where 0.* HETEROKD_DATA_CACHE to a folder"
            ):
                check()


FETCH = """
import logging, os, signal, sys
from heterokd.storage.stored_data.open_data import open_data

class Dies(logging.Handler):
    def emit(self, record):
        print("fetches", flush=True)

logger = logging.getLogger("heterokd.storage.stored_data.node_copy")
logger.setLevel(logging.INFO)
logger.addHandler(Dies())
stored = open_data(sys.argv[1])
until, write = int(sys.argv[2]), stored._write

def counted(row, content):
    write(row, content)
    if len(list(stored.folder.rglob("*.png"))) >= until:
        os.kill(os.getpid(), signal.SIGKILL)

stored._write = counted
print("opened", flush=True)
sys.stdin.readline()
stored.fetch()
"""


def fetching(url: str, until: int = 1000) -> subprocess.Popen[str]:
    """A process that fetches when its input ends, and is killed after so many files."""
    command = [sys.executable, "-c", FETCH, url, str(until)]
    ours = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=ours, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_processes_of_a_node_fetch_once(folder: Path, tmp_path: Path) -> None:
    url = pushed(folder, "file", tmp_path)
    processes = [fetching(url) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "opened\n"
    said = [process.communicate("\n", timeout=60)[0] for process in processes]
    assert sorted(text.count("fetches") for text in said) == [0, 2]  # at its begin and its end
    assert [process.returncode for process in processes] == [0, 0]
    assert_equal(splits_of(url), splits_of(folder))


def test_an_interrupted_fetch_goes_on(folder: Path, tmp_path: Path) -> None:
    url = pushed(folder, "file", tmp_path, shard_bytes=20_000)
    process = fetching(url, until=10)
    process.communicate("\n", timeout=60)
    assert process.returncode == -signal.SIGKILL
    stored = open_data(url)
    before = {path: path.stat().st_ino for path in stored.folder.rglob("*.png")}
    assert len(before) >= 10
    assert stored.missing_bytes
    stored.fetch()
    assert {path: path.stat().st_ino for path in before} == before  # fetched once
    assert not stored.missing_bytes
    assert_equal(splits_of(url), splits_of(folder))


def test_the_least_recently_used_copy_goes_and_never_one_in_use(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = []
    for number in range(3):
        folder = tmp_path / f"set{number}"
        (folder / "a").mkdir(parents=True)
        (folder / "b").mkdir()
        for place in range(8):
            (folder / "ab"[place % 2] / f"{place}.png").write_bytes(picture(100 * number + place, "PNG"))
        urls.append(folder.as_uri())
    monkeypatch.setenv("HETEROKD_DATA_CACHE_GB", f"{2.5 * 24_000 / 1e9}")
    kept = open_data(urls[0])
    kept.fetch()
    other = open_data(urls[1])
    other.fetch()
    unused = other.folder
    del other  # its lock is released
    os.utime(kept.copy.folder / "copy.json", (0, 0))  # least recently used, and in use
    open_data(urls[2]).fetch()
    assert kept.folder.exists()
    assert not unused.exists()
    held = open_data(urls[2])
    with pytest.raises(DataError, match="besides data sets in use; free some"):
        open_data(urls[1]).fetch()
    assert len(here(held)) == 8
    del kept
    open_data(urls[1]).fetch()


def test_a_push_goes_on_and_follows_the_folder(folder: Path, tmp_path: Path, cli: Run) -> None:
    store = tmp_path / "store"
    first = push_data(folder, store.as_uri(), 40_000)
    assert first.uploaded == first.shards > 3
    assert first.images == 55
    shards = sorted(store.glob("*.tar"))
    (store / INDEX).unlink()
    shards[0].unlink()
    os.truncate(shards[1], 1000)
    done = cli("data", "push", folder, store.as_uri(), "--shard-mb", 1, "--json")
    assert done.code == 0
    assert push_data(folder, store.as_uri(), 40_000).uploaded == first.shards  # those of another size were deleted
    assert push_data(folder, store.as_uri(), 40_000).uploaded == 0
    shards[0].unlink()
    os.truncate(shards[1], 1000)
    assert push_data(folder, store.as_uri(), 40_000).uploaded == 2
    before = splits_of(store.as_uri()).fingerprint
    (folder / "cat" / "new.png").write_bytes(picture(7, "PNG"))
    assert push_data(folder, store.as_uri(), 40_000).files == first.files + 1
    open_splits.__globals__["_splits"].cache_clear()
    open_splits.__globals__["_stored"].cache_clear()
    assert splits_of(store.as_uri()).fingerprint != before


def test_a_push_overwrites_nothing_of_others(folder: Path, tmp_path: Path, cli: Run) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine.txt").write_text("mine")
    refused = cli("data", "push", folder, (tmp_path / "store").as_uri())
    assert refused.code == 2
    assert "holds other files (such as mine.txt); push to an empty place" in refused.err
    assert cli("data", "push", folder, folder / "inside").code == 2
    assert cli("data", "push", tmp_path / "nothing", "s3://bucket/x").code == 2
    assert list((tmp_path / "store").iterdir()) == [tmp_path / "store" / "mine.txt"]


def test_a_plan_reads_some_images_of_a_store_again_and_again(folder: Path, tmp_path: Path) -> None:
    url = pushed(folder, "file", tmp_path)
    found = splits_of(url)
    shown = measured_splits(found, Workspace(tmp_path / "runs"))
    assert len(shown.train) == len(found.train)
    assert copy_of(found).missing_bytes  # of test at least
    np.testing.assert_array_equal(shown.train.labels, found.train.labels)


def test_changed_files_have_another_copy(folder: Path, tmp_path: Path) -> None:
    first = open_data(folder.as_uri())
    first.fetch()
    time.sleep(30 * 0.05)  # a list of 58 files takes less than this
    (folder / "cat" / "new.png").write_bytes(picture(7, "PNG"))
    ends = time.monotonic() + 20
    while (second := open_data(folder.as_uri())).copy.folder == first.copy.folder:
        assert time.monotonic() < ends
        time.sleep(0.1)
    assert len(second.names) == len(first.names) + 1
