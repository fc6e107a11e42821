"""State in a store: what one machine changes, the next one finds; a store that is away is waited for."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from object_store import SECRET, gs_server, s3_server
from pyarrow import fs

from heterokd.errors import ConfigError
from heterokd.execution import study_sync
from heterokd.storage.files import write_text
from heterokd.storage.filesystem import RemoteDir, open_folder
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.sync import FolderSync
from heterokd.storage.workspace import Workspace, open_workspace

Write = Callable[..., Path]
URL = "s3://state/runs"


@pytest.fixture(params=["shared mount", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RemoteDir:
    if request.param == "shared mount":
        return open_folder(f"file://{tmp_path}/mount")
    memory = fs._MockFileSystem()
    memory.create_dir("bucket/runs")
    return RemoteDir(memory, "bucket/runs")


def test_what_one_machine_pushes_another_fetches(store: RemoteDir, tmp_path: Path) -> None:
    one, other = FolderSync(tmp_path / "one", store), FolderSync(tmp_path / "other", store)
    write_text(one.local / "metrics.jsonl", "1\n")
    write_text(one.local / "trial.json", "running")
    (one.local / "checkpoint.pt").write_bytes(b"\0" * (9 * 1024**2))
    (one.local / ".lock").touch()
    assert one.push()
    other.fetch(without=("checkpoint.pt",))
    assert {path.name for path in other.local.iterdir()} == {"metrics.jsonl", "trial.json"}
    with (one.local / "metrics.jsonl").open("a") as file:
        file.write("2\n")
    assert one.push()
    other.fetch()
    assert (other.local / "metrics.jsonl").read_text() == "1\n2\n"
    assert (other.local / "checkpoint.pt").read_bytes() == (one.local / "checkpoint.pt").read_bytes()


@dataclass(frozen=True)
class Watched(RemoteDir):
    """A folder that notes what is moved to it and from it."""

    moved: list[str] = field(default_factory=list)

    def copy_from(self, place: Path, name: str) -> None:
        self.moved.append(f"up {name}")
        super().copy_from(place, name)

    def copy_to(self, name: str, place: Path) -> None:
        self.moved.append(f"down {name}")
        super().copy_to(name, place)


def test_only_what_changed_is_moved(store: RemoteDir, tmp_path: Path) -> None:
    watched = Watched(store.filesystem, store.path)
    moved = watched.moved
    one, other = FolderSync(tmp_path / "one", watched), FolderSync(tmp_path / "other", watched)
    for name in ("trial.json", "a", "b"):
        write_text(one.local / name, name)
    one.push()
    one.push()
    # What says that others are there comes after them.
    assert moved == ["up a", "up b", "up trial.json"]
    other.fetch()
    other.fetch()
    other.push()
    assert sorted(moved[3:]) == ["down a", "down b", "down trial.json"]


def test_what_lay_there_from_before_does_not_count(store: RemoteDir, tmp_path: Path) -> None:
    write_text(tmp_path / "here/checkpoint.pt", "of a trial that went on elsewhere")
    store.write("trial.json", b"{}")
    here = FolderSync(tmp_path / "here", store)
    here.replace()
    assert [path.name for path in here.local.iterdir()] == ["trial.json"]


def test_a_running_trial_is_followed(store: RemoteDir, tmp_path: Path) -> None:
    here = FolderSync(tmp_path / "here", store)
    here.follow(every=0.02)
    write_text(here.local / "checkpoint.pt", "state")
    deadline = time.monotonic() + 10
    while not store.exists("checkpoint.pt"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    write_text(here.local / "trial.json", "done")
    here.close()
    assert store.read("trial.json") == b"done"
    assert not [one for one in threading.enumerate() if one.name == "sync"]


def test_a_store_that_is_away_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mount = tmp_path / "mount"
    mount.write_text("a file where the folder was: nothing can be written below")
    here = FolderSync(tmp_path / "here", open_folder(f"file://{mount}/runs"), patience=20.0)
    write_text(here.local / "trial.json", "done")
    assert not here.push()
    assert "kept locally and uploaded later" in caplog.text

    def back() -> None:
        time.sleep(0.5)
        mount.unlink()

    coming = threading.Thread(target=back)
    coming.start()
    here.close()
    coming.join()
    assert (mount / "runs/trial.json").read_text() == "done"


def test_a_store_that_stays_away_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mount").write_text("no folder")
    here = FolderSync(tmp_path / "here", open_folder(f"file://{tmp_path}/mount/runs"), patience=0.0)
    write_text(here.local / "trial.json", "done")
    with pytest.raises(OSError):
        here.close()
    assert (here.local / "trial.json").read_text() == "done"


def test_a_local_root_is_its_own_truth(tmp_path: Path) -> None:
    root = open_workspace(str(tmp_path))
    assert root == Workspace(tmp_path)
    assert root.on_node().path == tmp_path
    folder = root.mirror(tmp_path / "studies/x")
    folder.follow()
    folder.fetch()
    folder.close()
    assert folder.push()
    assert list(tmp_path.iterdir()) == []


def test_addresses_of_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    root = open_workspace("file:///mnt/shared/")
    assert root.url == "file:///mnt/shared"
    assert root.path.is_relative_to(tmp_path)
    assert root.on_node().path != root.path
    assert root.on_node().on_node() == root.on_node()
    with pytest.raises(ConfigError, match=r"s3://\*\*\*@bucket/x: a URL must not contain credentials") as told:
        open_workspace(f"s3://key:{SECRET}@bucket/x")
    assert SECRET not in str(told.value)
    with pytest.raises(ConfigError, match="not supported"):
        open_workspace("ftp://host/x")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as environment:
        yield environment


@pytest.fixture(scope="module")
def gs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with gs_server(tmp_path_factory.mktemp("gs") / "log") as environment:
        yield environment


def heterokd(
    home: Path, store: dict[str, str], *arguments: str | Path, root: str = URL
) -> subprocess.CompletedProcess[str]:
    """The command line on a machine of its own: `home` is all it has."""
    home.mkdir(exist_ok=True)
    environment = {**os.environ, **store, "HOME": str(home), "HETEROKD_ROOT": root}
    return subprocess.run(
        [sys.executable, "-m", "heterokd", *map(str, arguments)],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def bucket(s3: dict[str, str], name: str = "") -> RemoteDir:
    client = fs.S3FileSystem(
        access_key=s3["AWS_ACCESS_KEY_ID"],
        secret_key=s3["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=s3["AWS_ENDPOINT_URL"].removeprefix("http://"),
        scheme="http",
        region="us-east-1",
    )
    return RemoteDir(client, f"state/runs{name}")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_search_in_an_object_store_goes_on_from_another_machine(
    scheme: str, request: pytest.FixtureRequest, tmp_path: Path, tiny_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: dict[str, str] = request.getfixturevalue(scheme)
    for name, value in store.items():
        monkeypatch.setenv(name, value)
    url = f"{scheme}://state/runs"
    seen = open_folder(url)
    experiment = tiny_file(search={"trials": 2, "confirm_leaders": 1, "space": {"methods": ["scratch", "kd"]}})
    first = heterokd(tmp_path / "a", store, "search", experiment, "--json", root=url)
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout.splitlines()[-1])
    stored = {file.name: file for file in seen.files()}
    for name in ("experiment.yaml", "study.db", "summary.json", "report.html", "tracking.json"):
        assert f"studies/tiny/{name}" in stored
    for number in range(2):
        trial = f"studies/tiny/trials/{number:04d}"
        assert {
            f"{trial}/{name}" for name in ("recipe.yaml", "trial.json", "metrics.jsonl", "student.safetensors")
        } <= set(stored)
        assert json.loads(seen.read(f"{trial}/trial.json"))["state"] == "complete"
    assert any(name.startswith("teachers/") and name.endswith("teacher.safetensors") for name in stored)
    assert any(name.startswith("caches/") and name.endswith("manifest.json") for name in stored)
    assert not list(tmp_path.glob("a/runs"))

    # Another machine, which has nothing: it goes on with the study, and trains what is new.
    second = heterokd(tmp_path / "b", store, "search", experiment, "--resume", "--trials", "3", "--json", root=url)
    assert second.returncode == 0, second.stderr
    more = json.loads(second.stdout.splitlines()[-1])
    assert more["standing"]["complete"] + more["standing"]["pruned"] == 3
    after = {file.name: file for file in seen.files()}
    weights = "studies/tiny/trials/0000/student.safetensors"
    assert after[weights].modified == stored[weights].modified, "a trial that was complete was trained again"
    assert more["teacher"]["weights"] == found["teacher"]["weights"]
    assert not [name for name in after if SECRET.encode() in seen.read(name)]

    third = heterokd(tmp_path / "c", store, "report", "tiny", "--json", root=url)
    assert third.returncode == 0, third.stderr
    caches = heterokd(tmp_path / "c", store, "cache", "--list", root=url)
    assert "test_vit" in caches.stdout, caches.stdout + caches.stderr
    unknown = heterokd(tmp_path / "c", store, "report", "tinny", root=url)
    assert unknown.returncode == 2
    assert SECRET not in first.stdout + first.stderr + second.stderr


LOOK_AROUND = """
import json, sys
from heterokd.config.reading import load_experiment
from heterokd.execution.planning.plan import existing_stock
from heterokd.storage.workspace import open_workspace

stock = existing_stock(load_experiment(sys.argv[1]), open_workspace(sys.argv[2]), {})
print(json.dumps([stock.teacher_ready, stock.cache_ready]))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_workers_that_share_a_training_and_a_plan_find_the_store(
    s3: dict[str, str], tmp_path: Path, tiny_file: Write
) -> None:
    experiment = tiny_file(
        name="shared",
        student={"network": "test_vit", "options": {"img_size": 32, "patch_size": 8}},
        training={"workers": 2, "epochs": 2},
        search={"trials": 1, "confirm_leaders": 0, "space": {"methods": ["kd"]}},
    )
    before = {file.name for file in bucket(s3).files() if file.name.startswith("caches/")}
    done = heterokd(tmp_path / "d", s3, "search", experiment, "--json")
    assert done.returncode == 0, done.stderr
    stored = {file.name for file in bucket(s3).files()}
    trial = "studies/shared/trials/0000"
    for name in ("recipe.yaml", "trial.json", "metrics.jsonl", "student.safetensors"):
        assert f"{trial}/{name}" in stored
    assert json.loads(bucket(s3).read(f"{trial}/trial.json"))["state"] == "complete"
    built = {name for name in stored if name.startswith("caches/")} - before
    assert any(name.endswith("manifest.json") for name in built), "the workers' cache lies in the store"

    # On another machine, a plan finds the teacher and its cache there.
    home = tmp_path / "e"
    home.mkdir()
    looked = subprocess.run(
        [sys.executable, "-c", LOOK_AROUND, str(experiment), URL],
        cwd=home,
        env={**os.environ, **s3, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert looked.returncode == 0, looked.stderr
    assert json.loads(looked.stdout.splitlines()[-1]) == [True, 1.0]


def test_the_later_copy_of_a_study_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    root = open_workspace(f"file://{tmp_path}/mount")
    folder: StudyFolder = root.study("one")

    def trials(count: int) -> None:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.database.unlink(missing_ok=True)
        with closing(sqlite3.connect(folder.database)) as database:
            database.execute("CREATE TABLE trials (state TEXT)")
            database.execute("CREATE TABLE trial_intermediate_values (x)")
            database.execute("CREATE TABLE trial_user_attributes (x)")
            database.execute("CREATE TABLE study_user_attributes (key TEXT, value_json TEXT)")
            database.executemany("INSERT INTO trials VALUES (?)", [("COMPLETE",)] * count)
            database.commit()

    trials(2)
    study_sync.upload_study(root, folder)
    trials(3)
    study_sync.download_study(root, folder)
    assert study_sync.row_count(folder.database) == 6
    trials(1)
    study_sync.download_study(root, folder)
    assert study_sync.row_count(folder.database) == 4
    folder.database.unlink()
    study_sync.download_study(root, folder)
    assert study_sync.row_count(folder.database) == 4
