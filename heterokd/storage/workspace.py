"""Workspace (`--root`): folders of studies, teachers, caches and MLflow's store."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from heterokd.config.names import unprintable
from heterokd.config.sentences import given
from heterokd.errors import ConfigError, StudyError, did_you_mean
from heterokd.storage.files import read_json
from heterokd.storage.filesystem import RemoteDir, open_folder
from heterokd.storage.stored_data.refusals import check_store
from heterokd.storage.study_dir import CHECKPOINT, StudyFolder, previous_checkpoint
from heterokd.storage.sync import FolderSync
from heterokd.storage.typed_json import parse

CHECKPOINTS = (CHECKPOINT, previous_checkpoint(Path(CHECKPOINT)).name)
HEAVY = (*CHECKPOINTS, "student.safetensors")
"""Large files of a trial, which the driver fetches only for the study's leaders."""
OF_TUNE = ("tune",)
LONGEST_ROOT = 1900
"""Maximum length of the folder as a URI; MLflow allows 2048 characters for the location of an artifact folder."""
DATABASES = ("study.db", "study.db-journal", "study.db-wal", "study.db-shm")


@dataclass(frozen=True)
class _Leader:
    number: int


@dataclass(frozen=True)
class _Leaders:
    """Trials of summary.json whose weights are fetched."""

    leaders: tuple[_Leader, ...] = ()
    winner: _Leader | None = None
    scratch: _Leader | None = None


@dataclass(frozen=True)
class Workspace:
    """Folder of all state.

    Attributes:
        path: local folder.
        url: URL of the store, of which `path` is a working copy; None: there is only `path`.
    """

    path: Path
    url: str | None = None

    def __str__(self) -> str:
        return self.url or str(self.path)

    @property
    def store(self) -> RemoteDir | None:
        """Store, or None."""
        return None if self.url is None else open_folder(self.url)

    def on_node(self) -> Workspace:
        """Resolve the workspace for the current node: the same folder, or this machine's working copy."""
        if self.url is None:
            return Workspace(self.path.resolve())
        return Workspace(working_folder(self.url) / "node", self.url)

    def mirror(self, path: Path) -> FolderSync:
        """Create the sync between a folder below `path` and its counterpart in the store."""
        store = self.store
        return FolderSync(path, None if store is None else store.at(path.relative_to(self.path).as_posix()))

    def fetched(self, path: Path, source: Workspace) -> Path:
        """Fetch a file of another process's working copy, such as a teacher's weights; return its local path.

        Args:
            path: path below `source.path`, or a path that is the same on every machine.
            source: the other process's workspace.

        Raises:
            OSError: the store does not answer.
        """
        if self.url is None or not path.is_relative_to(source.path):
            return path
        local = self.path / path.relative_to(source.path)
        self.mirror(local.parent).fetch(without=CHECKPOINTS)
        return local

    @property
    def mlflow_database(self) -> Path:
        """Default tracking store of MLflow: a SQLite file."""
        return self.path / "mlflow.db"

    @property
    def artifacts(self) -> Path:
        """Default artifact folder of MLflow."""
        return self.path / "artifacts"

    @property
    def teachers(self) -> Path:
        """Fitted teachers, by hash."""
        return self.path / "teachers"

    @property
    def pixels(self) -> Path:
        """Folder of decoded images that the processes of a machine share."""
        return self.caches / "pixels"

    @property
    def caches(self) -> Path:
        """Local folder of the teachers' caches, by cache key; with a store, of copies of their shards."""
        return self.path / "caches"

    @property
    def cache_folder(self) -> RemoteDir:
        """Folder of the caches, in the store if there is a store."""
        store = self.store
        return open_folder(self.caches) if store is None else store.at("caches")

    def study(self, name: str) -> StudyFolder:
        """Return the folder of a study, which need not exist."""
        return StudyFolder(self.path / "studies" / name)

    def studies(self) -> list[StudyFolder]:
        """List the folders of the studies on this machine, by name."""
        return [self.study(path.parent.name) for path in sorted(self.path.glob("studies/*/experiment.yaml"))]

    def fetch_study(self, name: str) -> StudyFolder:
        """Fetch a study from the store, with the weights of its leaders only; return its folder.

        Raises:
            OSError: the store does not answer.
        """
        folder = self.study(name)
        mirror = self.mirror(folder.path)
        mirror.fetch(without=(*HEAVY, *DATABASES), skip=OF_TUNE)
        self.fetch_leaders(folder)
        return folder

    def fetch_leaders(self, folder: StudyFolder) -> None:
        """Fetch the weights of a study's leaders, winner and baseline.

        Raises:
            OSError: the store does not answer.
        """
        if self.url is None:
            return
        found = parse(_Leaders, read_json(folder.summary_file))
        numbers = {leader.number for leader in (*found.leaders, found.winner, found.scratch) if leader is not None}
        numbers |= {trial.number for trial in folder.trials() if trial.snapshot.confirms in numbers}
        for number in sorted(numbers):
            self.mirror(folder.trial(number).path).fetch(without=CHECKPOINTS)

    def check_new(self, name: str) -> None:
        """Refuse the name of an existing study.

        Raises:
            StudyError: the study exists.
        """
        folder = self.study(name)
        if folder.experiment_file.exists() or folder.trials():
            raise StudyError(
                f"{folder.path}: the study {name!r} exists already; "
                "go on with it (--resume) or give another name (--set name=NEW)"
            )

    def existing_study(self, name: str) -> StudyFolder:
        """Return the folder of an existing study.

        Raises:
            StudyError: the study does not exist.
        """
        folder = self.fetch_study(name)
        if not folder.experiment_file.exists():
            known = [folder.path.name for folder in self.studies()]
            hint = did_you_mean(name, known) if known else "start one with `heterokd search EXPERIMENT`"
            raise StudyError(f"{self.path / 'studies'}: there is no study {name!r}; {hint}")
        return folder


def open_workspace(place: str | Path, *, checked: bool = True) -> Workspace:
    """Open the workspace that `--root` names: a folder, or a store's URL (s3://BUCKET/..., gs://BUCKET/...,
    file:///MOUNT/...).

    Args:
        place: the folder or URL.
        checked: ask an object store whether it answers.

    Raises:
        ConfigError: an unsupported URL, a URL that contains credentials, a path that databases cannot hold, or a store
            that does not answer or refuses this machine.
    """
    text = str(place)
    if unprintable(text):
        raise ConfigError(f"--root {text!r}: the path contains control characters or is not UTF-8; give another folder")
    if "://" not in text:
        try:
            place = Path(text).resolve()
        except RuntimeError:  # Python 3.13 resolves it, and `check_root` refuses it
            raise ConfigError(f"--root {given(text)}: is a loop of symbolic links; give another folder") from None
        if len(place.as_uri()) > LONGEST_ROOT:
            raise ConfigError(
                f"--root {given(text)}: the path has more than {LONGEST_ROOT} characters as a URI, too many for "
                "MLflow; give another folder"
            )
        return Workspace(Path(text))
    parts = urlsplit(text)
    if parts.username or parts.password or "secret" in parts.query.lower():
        raise ConfigError(
            f"--root {parts.scheme}://***@{parts.hostname}{parts.path}: a URL must not contain credentials; "
            "give each machine a role, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    folder = open_folder(text)
    if checked and folder.local is None:
        check_store(folder, text)
    return Workspace(working_folder(text) / "driver", text.rstrip("/"))


def working_folder(url: str) -> Path:
    """Local folder of the working copies of a store."""
    return Path.home().resolve() / ".cache" / "heterokd" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
