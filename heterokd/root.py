"""Where state lives: `runs/`, `--root` or `HETEROKD_ROOT`, and the folders of a study and of a trial inside it.

    ROOT/mlflow.db  artifacts/                 MLflow's store (a projection of what follows)
         teachers/<hash>/                      fitted teachers
         studies/<name>/experiment.yaml        the resolved question
                         study.db              the Optuna study
                         summary.json          standing and leaders, rewritten after each trial
                         measured.json         the winner on val, in numbers: the page needs no data
                         report.html
                         pictures/             PNG files with captions.json, shown on the page
                         trials/0007/          recipe.yaml, trial.json, metrics.jsonl, checkpoint.pt,
                                               student.safetensors, error.txt

The files of a trial are the truth: the study and MLflow can be completed from them.

Where the root is a store (s3://, gs://, file://), every machine works on a copy below its `~/.cache/heterokd`, the
driver's and the trials' apart, and `heterokd.mirror` moves what changed; caches of teachers' outputs lie in the store
alone, and their shards are copied near where they are read. MLflow's SQLite file and measured precisions stay local.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from heterokd.config import Recipe, load_recipe
from heterokd.disk import when_writable
from heterokd.errors import ConfigError, StudyError, did_you_mean
from heterokd.mirror import Mirror
from heterokd.storage import Folder, open_folder


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all (temporary file in the same folder, then rename).

    A disk that cannot be written for the moment is waited for.
    """
    when_writable(path, lambda: _replace(path, text))


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when the file does not exist.

    Raises:
        StudyError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StudyError(f"{path}: is damaged ({error}); remove it, or restore it from a backup") from None
    if not isinstance(content, dict):
        raise StudyError(f"{path}: is damaged (expected a JSON object); remove it, or restore it from a backup")
    return content


@lru_cache(maxsize=64)
def _recipe(file: Path, written: int) -> Recipe:
    """Read once a process, and again when it was written anew: a driver asks for it at each event of a trial."""
    return load_recipe(file)


@dataclass(frozen=True)
class TrialFolder:
    """One trial's files."""

    path: Path

    @property
    def number(self) -> int:
        """The trial's number in its study."""
        return int(self.path.name)

    @property
    def recipe(self) -> Recipe:
        """What is trained."""
        file = self.path / "recipe.yaml"
        return _recipe(file, file.stat().st_mtime_ns if file.exists() else 0)

    @property
    def weights(self) -> Path:
        """The student's weights, once trained."""
        return self.path / "student.safetensors"

    @property
    def checkpoint(self) -> Path:
        """Training state of the last rung, to resume."""
        return self.path / "checkpoint.pt"

    @property
    def status(self) -> dict[str, Any]:
        """trial.json: state (running, complete, pruned, failed), origin, confirms, sample, metrics of the end."""
        return read_json(self.path / "trial.json")

    @property
    def error(self) -> str | None:
        """The traceback of a failed trial."""
        file = self.path / "error.txt"
        return file.read_text(encoding="utf-8") if file.exists() else None

    def start(self, recipe: Recipe, status: Mapping[str, Any]) -> None:
        """Write recipe.yaml and trial.json of a trial that begins or goes on."""
        if not (self.path / "recipe.yaml").exists():
            write_text(self.path / "recipe.yaml", recipe.to_yaml())
        self.update({"state": "running", **status})

    def update(self, changes: Mapping[str, Any]) -> None:
        """Change keys of trial.json."""
        write_text(self.path / "trial.json", json.dumps({**self.status, **changes}, indent=1))

    def append(self, metrics: Mapping[str, float]) -> None:
        """Add one report (it holds `epoch`) to metrics.jsonl; an epoch that is already there is left alone."""
        reports = self.metrics()
        if reports and metrics["epoch"] <= reports[-1]["epoch"]:
            return
        when_writable(self.path, lambda: self._append(json.dumps(dict(metrics)) + "\n"))

    def _append(self, line: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "metrics.jsonl").open("ab", buffering=0) as file:
            whole, content = file.tell(), line.encode()
            if file.write(content) < len(content):
                # A full disk took a part of it, which the next line would be appended to.
                file.truncate(whole)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def metrics(self) -> list[dict[str, float]]:
        """All reports, one an epoch, in order. A line that a crash cut off is left out."""
        file = self.path / "metrics.jsonl"
        reports: list[dict[str, float]] = []
        if file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    report = json.loads(line)
                except ValueError:
                    continue
                if not reports or report["epoch"] > reports[-1]["epoch"]:
                    reports.append(report)
        return reports


@dataclass(frozen=True)
class StudyFolder:
    """One study's files."""

    path: Path

    @property
    def name(self) -> str:
        """The study's name."""
        return self.path.name

    @property
    def experiment_file(self) -> Path:
        """The resolved experiment."""
        return self.path / "experiment.yaml"

    @property
    def database(self) -> Path:
        """The Optuna study."""
        return self.path / "study.db"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.path / "report.html"

    @property
    def match_file(self) -> Path:
        """What `heterokd match` found: similarities, and the starts that it proposes."""
        return self.path / "match.json"

    @property
    def measured_file(self) -> Path:
        """What val says of the winner, in numbers; the page is drawn from it."""
        return self.path / "measured.json"

    @property
    def pictures(self) -> Path:
        """Pictures that the page shows, with captions.json beside them."""
        return self.path / "pictures"

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json: standing and leaders."""
        return read_json(self.path / "summary.json")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace summary.json."""
        write_text(self.path / "summary.json", json.dumps(dict(summary), indent=1))

    def trial(self, number: int) -> TrialFolder:
        """The folder of one trial, which need not exist yet."""
        return TrialFolder(self.path / "trials" / f"{number:04d}")

    def trials(self) -> list[TrialFolder]:
        """All trials with files, by number."""
        return [TrialFolder(path) for path in sorted((self.path / "trials").glob("[0-9]*")) if path.is_dir()]


HEAVY = ("checkpoint.pt", "student.safetensors")
"""Files of a trial that its driver does not need, but for those of the study's leaders."""
OF_TUNE = ("tune",)
DATABASES = ("study.db", "study.db-journal", "study.db-wal", "study.db-shm")


@dataclass(frozen=True)
class Root:
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
    def store(self) -> Folder | None:
        """The store; None where there is none."""
        return None if self.url is None else open_folder(self.url)

    def on_node(self) -> Root:
        """The root as a trial's process sees it: the same folder, or this machine's own working copy."""
        if self.url is None:
            return Root(self.path.resolve())
        return Root(working_folder(self.url) / "node", self.url)

    def mirror(self, path: Path) -> Mirror:
        """The way between a folder below `path` and its place in the store."""
        store = self.store
        return Mirror(path, None if store is None else store.at(path.relative_to(self.path).as_posix()))

    def fetched(self, path: Path, whose: Root) -> Path:
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
    def cache_folder(self) -> Folder:
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
        self.fetch_leaders(folder, folder.summary)
        return folder

    def fetch_leaders(self, folder: StudyFolder, summary: Mapping[str, Any]) -> None:
        """Bring here the weights of a study's leaders, winner and baseline.

        Raises:
            OSError: the store does not answer.
        """
        if self.url is None:
            return
        leaders = [*(summary.get("leaders") or ()), summary.get("winner") or {}, summary.get("scratch") or {}]
        numbers = {int(one["number"]) for one in leaders if "number" in one}
        numbers |= {trial.number for trial in folder.trials() if trial.status.get("confirms") in numbers}
        for number in sorted(numbers):
            self.mirror(folder.trial(number).path).fetch(without=("checkpoint.pt",))

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


def open_root(place: str | Path) -> Root:
    """What `--root` names: a folder, or a store by its address (s3://BUCKET/..., gs://BUCKET/..., file:///MOUNT/...).

    Raises:
        ConfigError: an address of another kind, or one with a password in it.
    """
    text = str(place)
    if "://" not in text:
        return Root(Path(text))
    parts = urlsplit(text)
    if parts.username or parts.password or "secret" in parts.query.lower():
        raise ConfigError(
            f"--root {parts.scheme}://***@{parts.hostname}{parts.path}: credentials do not belong into an address; "
            "give each machine a role, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    open_folder(text)
    return Root(working_folder(text) / "driver", text.rstrip("/"))


def working_folder(url: str) -> Path:
    """Where this machine keeps its working copies of a store."""
    return Path.home().resolve() / ".cache" / "heterokd" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
