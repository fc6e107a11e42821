"""The workspace (`--root`): folders of studies, teachers, caches and MLflow's store."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from heterokd.errors import ConfigError, StudyError, did_you_mean
from heterokd.storage.files import read_json
from heterokd.storage.filesystem import RemoteDir, open_folder
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.sync import FolderSync

HEAVY = ("checkpoint.pt", "student.safetensors")
"""Files of a trial that its driver does not need, but for those of the study's leaders."""
OF_TUNE = ("tune",)
DATABASES = ("study.db", "study.db-journal", "study.db-wal", "study.db-shm")


@dataclass(frozen=True)
class Workspace:
    """The folder that holds all state.

    Attributes:
        path: on this machine.
        url: of the store whose working copy `path` is; None: `path` is the truth itself.
    """

    path: Path
    url: str | None = None

    def __str__(self) -> str:
        return self.url or str(self.path)

    @property
    def store(self) -> RemoteDir | None:
        """The store; None where there is none."""
        return None if self.url is None else open_folder(self.url)

    def on_node(self) -> Workspace:
        """The root as a trial's process sees it: the same folder, or this machine's own working copy."""
        if self.url is None:
            return Workspace(self.path.resolve())
        return Workspace(working_folder(self.url) / "node", self.url)

    def mirror(self, path: Path) -> FolderSync:
        """The way between a folder below `path` and its place in the store."""
        store = self.store
        return FolderSync(path, None if store is None else store.at(path.relative_to(self.path).as_posix()))

    def fetched(self, path: Path, whose: Workspace) -> Path:
        """A file of another process's working copy (a teacher's weights, say), here.

        Args:
            path: below `whose.path`, or a file that every machine has at the same place.
            whose: the other's root.

        Raises:
            OSError: the store does not answer.
        """
        if self.url is None or not path.is_relative_to(whose.path):
            return path
        near = self.path / path.relative_to(whose.path)
        self.mirror(near.parent).fetch(without=("checkpoint.pt",))
        return near

    @property
    def mlflow_database(self) -> Path:
        """MLflow's SQLite file, used unless another tracking URI is given."""
        return self.path / "mlflow.db"

    @property
    def artifacts(self) -> Path:
        """MLflow's artifacts, likewise."""
        return self.path / "artifacts"

    @property
    def teachers(self) -> Path:
        """Fitted teachers, by hash."""
        return self.path / "teachers"

    @property
    def pixels(self) -> Path:
        """Decoded images that the processes of a machine share."""
        return self.caches / "pixels"

    @property
    def caches(self) -> Path:
        """Caches of teachers' outputs, by the name of their key; copies of their shards where they lie in a store."""
        return self.path / "caches"

    @property
    def cache_folder(self) -> RemoteDir:
        """Where the caches themselves are."""
        store = self.store
        return open_folder(self.caches) if store is None else store.at("caches")

    def study(self, name: str) -> StudyFolder:
        """The folder of a study, which need not exist yet."""
        return StudyFolder(self.path / "studies" / name)

    def fetch_study(self, name: str) -> StudyFolder:
        """The folder of a study, brought up to the store: all but the weights of those that do not lead.

        Raises:
            OSError: the store does not answer.
        """
        folder = self.study(name)
        mirror = self.mirror(folder.path)
        mirror.fetch(without=(*HEAVY, *DATABASES), skip=OF_TUNE)
        self.fetch_leaders(folder)
        return folder

    def fetch_leaders(self, folder: StudyFolder) -> None:
        """Bring here the weights of a study's leaders, winner and baseline.

        Raises:
            OSError: the store does not answer.
        """
        if self.url is None:
            return
        summary = read_json(folder.summary_file)
        leaders = [*(summary.get("leaders") or ()), summary.get("winner") or {}, summary.get("scratch") or {}]
        numbers = {int(one["number"]) for one in leaders if "number" in one}
        numbers |= {trial.number for trial in folder.trials() if trial.snapshot.confirms in numbers}
        for number in sorted(numbers):
            self.mirror(folder.trial(number).path).fetch(without=("checkpoint.pt",))

    def check_new(self, name: str) -> None:
        """Refuse the name of a study that has been started.

        Raises:
            StudyError: there is one.
        """
        folder = self.study(name)
        if folder.experiment_file.exists():
            raise StudyError(
                f"{folder.path}: the study {name!r} exists already; "
                "go on with it (--resume) or give another name (--set name=NEW)"
            )

    def existing_study(self, name: str) -> StudyFolder:
        """The folder of a study that has been started.

        Raises:
            StudyError: there is none of that name.
        """
        folder = self.fetch_study(name)
        if not folder.experiment_file.exists():
            known = [path.parent.name for path in self.path.glob("studies/*/experiment.yaml")]
            hint = did_you_mean(name, known) if known else "start one with `heterokd search EXPERIMENT`"
            raise StudyError(f"{self.path / 'studies'}: there is no study {name!r}; {hint}")
        return folder


def open_workspace(place: str | Path) -> Workspace:
    """What `--root` names: a folder, or a store by its address (s3://BUCKET/..., gs://BUCKET/..., file:///MOUNT/...).

    Raises:
        ConfigError: an address of another kind, or one with a password in it.
    """
    text = str(place)
    if "://" not in text:
        return Workspace(Path(text))
    parts = urlsplit(text)
    if parts.username or parts.password or "secret" in parts.query.lower():
        raise ConfigError(
            f"--root {parts.scheme}://***@{parts.hostname}{parts.path}: credentials do not belong into an address; "
            "give each machine a role, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    open_folder(text)
    return Workspace(working_folder(text) / "driver", text.rstrip("/"))


def working_folder(url: str) -> Path:
    """Where this machine keeps its working copies of a store."""
    return Path.home().resolve() / ".cache" / "heterokd" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
