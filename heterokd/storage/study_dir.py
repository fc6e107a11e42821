"""Files of studies and trials."""

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
from heterokd.storage.disk import when_writable
from heterokd.storage.files import damaged, read_json, write_text
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus


@lru_cache(maxsize=64)
def _recipe(file: Path, written: int) -> Recipe:
    """Read a recipe, cached by modification time: a driver needs it at each event of a trial."""
    return load_recipe(file)


@dataclass(frozen=True)
class TrialFolder:
    """Files of a trial."""

    path: Path

    @property
    def number(self) -> int:
        """Number of the trial in its study."""
        return int(self.path.name)

    @property
    def recipe(self) -> Recipe:
        """Recipe of the training."""
        file = self.path / "recipe.yaml"
        return _recipe(file, file.stat().st_mtime_ns if file.exists() else 0)

    @property
    def weights(self) -> Path:
        """File of the trained student's weights."""
        return self.path / "student.safetensors"

    @property
    def checkpoint(self) -> Path:
        """File of the training state at the last rung, to resume from."""
        return self.path / "checkpoint.pt"

    @property
    def snapshot(self) -> TrialSnapshot:
        """Content of trial.json.

        Raises:
            StudyError: the file is damaged.
        """
        file = self.path / "trial.json"
        try:
            return TrialSnapshot.from_json(read_json(file))
        except ValueError as error:
            raise damaged(file, error) from None

    @property
    def status(self) -> TrialStatus:
        """Status of the trial."""
        return self.snapshot.status

    @property
    def error(self) -> str | None:
        """Traceback of a failed trial, or None."""
        file = self.path / "error.txt"
        return file.read_text(encoding="utf-8") if file.exists() else None

    def start(self, recipe: Recipe, snapshot: TrialSnapshot) -> None:
        """Write recipe.yaml and trial.json of a trial that starts or resumes."""
        if not (self.path / "recipe.yaml").exists():
            write_text(self.path / "recipe.yaml", recipe.to_yaml())
        self.save(snapshot)

    def save(self, snapshot: TrialSnapshot) -> None:
        """Replace trial.json."""
        write_text(self.path / "trial.json", json.dumps(snapshot.to_json(), indent=1))

    def append(self, metrics: Mapping[str, float]) -> None:
        """Append an epoch's metrics, with the key `epoch`, to metrics.jsonl, unless the epoch was reported before."""
        reports = self.metrics()
        if reports and metrics["epoch"] <= reports[-1]["epoch"]:
            return
        when_writable(self.path, lambda: self._append(json.dumps(dict(metrics)) + "\n"))

    def _append(self, line: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "metrics.jsonl").open("ab", buffering=0) as file:
            end, content = file.tell(), line.encode()
            if file.write(content) < len(content):
                # The disk is full: remove the partial line, or the next line would be appended to it.
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def metrics(self) -> list[dict[str, float]]:
        """Read the metrics of all epochs in order, skipping a line that a crash truncated."""
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
    """Files of a study."""

    path: Path

    @property
    def name(self) -> str:
        """Name of the study."""
        return self.path.name

    @property
    def experiment_file(self) -> Path:
        """File of the resolved experiment."""
        return self.path / "experiment.yaml"

    @property
    def database(self) -> Path:
        """Optuna's SQLite file."""
        return self.path / "study.db"

    @property
    def report(self) -> Path:
        """HTML report."""
        return self.path / "report.html"

    @property
    def match_file(self) -> Path:
        """Result of `heterokd match`: similarities and proposed initial trials."""
        return self.path / "match.json"

    @property
    def measured_file(self) -> Path:
        """Measurements of the winner on val, which the report shows."""
        return self.path / "measured.json"

    @property
    def pictures(self) -> Path:
        """Folder of the report's figures and their captions.json."""
        return self.path / "pictures"

    @property
    def summary_file(self) -> Path:
        """Summary of the study: its progress and the leaders."""
        return self.path / "summary.json"

    def trial(self, number: int) -> TrialFolder:
        """Return the folder of a trial, which need not exist."""
        return TrialFolder(self.path / "trials" / f"{number:04d}")

    def trials(self) -> list[TrialFolder]:
        """Return the existing trials' folders, sorted by number."""
        return [TrialFolder(path) for path in sorted((self.path / "trials").glob("[0-9]*")) if path.is_dir()]
