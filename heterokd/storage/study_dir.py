"""Files of a study and of its trials."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from heterokd.config.reading import load_recipe
from heterokd.config.recipe import Recipe
from heterokd.errors import StudyError
from heterokd.storage.disk import when_writable
from heterokd.storage.files import read_json, write_text
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus


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
    def snapshot(self) -> TrialSnapshot:
        """The content of trial.json.

        Raises:
            StudyError: the file is damaged.
        """
        file = self.path / "trial.json"
        try:
            return TrialSnapshot.from_json(read_json(file))
        except ValueError as error:
            raise StudyError(f"{file}: is damaged ({error}); remove it, or restore it from a backup") from None

    @property
    def status(self) -> TrialStatus:
        """Where the trial stands."""
        return self.snapshot.status

    @property
    def error(self) -> str | None:
        """The traceback of a failed trial."""
        file = self.path / "error.txt"
        return file.read_text(encoding="utf-8") if file.exists() else None

    def start(self, recipe: Recipe, snapshot: TrialSnapshot) -> None:
        """Write recipe.yaml and trial.json of a trial that begins or goes on."""
        if not (self.path / "recipe.yaml").exists():
            write_text(self.path / "recipe.yaml", recipe.to_yaml())
        self.save(snapshot)

    def save(self, snapshot: TrialSnapshot) -> None:
        """Replace trial.json."""
        write_text(self.path / "trial.json", json.dumps(snapshot.to_json(), indent=1))

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
    def summary_file(self) -> Path:
        """What the study has found so far: its progress and the leaders."""
        return self.path / "summary.json"

    def trial(self, number: int) -> TrialFolder:
        """The folder of one trial, which need not exist yet."""
        return TrialFolder(self.path / "trials" / f"{number:04d}")

    def trials(self) -> list[TrialFolder]:
        """All trials with files, by number."""
        return [TrialFolder(path) for path in sorted((self.path / "trials").glob("[0-9]*")) if path.is_dir()]
