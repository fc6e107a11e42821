"""Files of studies and trials."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Final

from heterokd.config.reading import load_recipe
from heterokd.config.recipe import Recipe
from heterokd.storage.disk import when_writable
from heterokd.storage.files import damaged, read_json, write_text
from heterokd.storage.trial_status import RecipeFacts, TrialSnapshot, TrialStatus


@lru_cache(maxsize=64)
def _recipe(file: Path, written: int) -> Recipe:
    """Read a recipe, cached by modification time: a driver needs it at each event of a trial."""
    return load_recipe(file)


CHECKPOINT: Final = "checkpoint.pt"


def previous_checkpoint(file: Path) -> Path:
    """Return the file of the checkpoint before the last, from which a training resumes if the last is damaged."""
    return file.with_name(f"{file.stem}.previous{file.suffix}")


def exception_line(text: str) -> str | None:
    """Return the type and the first line of the message of a traceback's exception; None of an empty text.

    A message may have several lines, of which the last alone would not name the type.
    """
    lines = text.strip().splitlines()
    starts = [place for place, line in enumerate(lines) if line.startswith(TRACEBACK)]
    after = [line for line in lines[starts[-1] + 1 :] if not line.startswith(" ")] if starts else []
    return next(iter(after or lines[-1:]), None)


TRACEBACK = "Traceback (most recent call last)"
"""First line of a traceback in error.txt."""


def recipe_facts(recipe: Recipe) -> RecipeFacts:
    """Return what trial.json holds of a recipe."""
    training = recipe.training
    return RecipeFacts(recipe.method, recipe.student.network, training.seed, training.epochs, recipe.configuration)


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
        return self.path / CHECKPOINT

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

    @property
    def error_line(self) -> str | None:
        """Type and message of a failed trial's exception in a line, or None."""
        return None if self.error is None else exception_line(self.error)

    @property
    def metrics_size(self) -> int:
        """Size of metrics.jsonl in bytes, which grows with each epoch; 0 before the first."""
        file = self.path / "metrics.jsonl"
        return file.stat().st_size if file.exists() else 0

    @property
    def has_progressed(self) -> bool:
        """Whether its last process has finished an epoch; True also if the start of that process is unknown."""
        began, file = self.snapshot.began, self.path / "metrics.jsonl"
        return began is None or (file.exists() and file.stat().st_mtime >= began)

    @property
    def cost(self) -> float | None:
        """Cost of all its processes, each until its end or last report, by `TrialSnapshot.price`; None without it."""
        snapshot, file = self.snapshot, self._metrics_file
        if snapshot.price is None or snapshot.began is None:
            return None
        ended = snapshot.ended
        if ended is None:
            ended = file.stat().st_mtime if file.exists() else snapshot.began
        return snapshot.paid + snapshot.price * max(ended - snapshot.began, 0.0) / 3600

    def start(self, recipe: Recipe, snapshot: TrialSnapshot) -> None:
        """Write recipe.yaml and trial.json of a trial that starts or resumes."""
        if not (self.path / "recipe.yaml").exists():
            write_text(self.path / "recipe.yaml", recipe.to_yaml())
        self.save(replace(snapshot, recipe=recipe_facts(recipe)))

    def save(self, snapshot: TrialSnapshot) -> None:
        """Replace trial.json; a trial that has ended needs no checkpoint before the last."""
        write_text(self.path / "trial.json", json.dumps(snapshot.to_json(), indent=1))
        if snapshot.status.is_final:
            previous_checkpoint(self.checkpoint).unlink(missing_ok=True)

    def append(self, metrics: Mapping[str, float]) -> None:
        """Append an epoch's metrics, with the key `epoch`, to metrics.jsonl, unless the epoch was reported before."""
        if metrics["epoch"] not in {report["epoch"] for report in self.metrics()}:
            when_writable(self.path, lambda: self._append(json.dumps(dict(metrics)) + "\n"))

    def _append(self, line: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with self._metrics_file.open("a+b", buffering=0) as file:
            end, content = file.seek(0, os.SEEK_END), line.encode()
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                content = b"\n" + content  # The last line was cut by a crash: it stays a line by itself.
            if file.write(content) < len(content):
                # The disk is full: remove the partial line, or the next line would be appended to it.
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    @property
    def _metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def metrics(self) -> list[dict[str, float]]:
        """Read the metrics of all epochs in order, skipping lines that are no report, as a crash leaves them."""
        reports: dict[float, dict[str, float]] = {}
        if self._metrics_file.exists():
            for line in self._metrics_file.read_bytes().splitlines():
                report = _parse_report(line)
                if report is not None:
                    reports.setdefault(report["epoch"], report)
        return [reports[epoch] for epoch in sorted(reports)]

    def reported_epochs(self) -> int:
        """Count the epochs from the first that were reported without a gap."""
        epochs = {report["epoch"] for report in self.metrics()}
        return next(epoch for epoch in range(len(epochs) + 1) if epoch + 1 not in epochs)


def _parse_report(line: bytes) -> dict[str, float] | None:
    """Parse a line of metrics.jsonl; None if it does not hold an epoch and numbers."""
    try:
        report = json.loads(line)
        if not isinstance(report, dict) or not all(type(value) in (int, float) for value in report.values()):
            return None
        epoch, *_ = map(float, (report.get("epoch", 0), *report.values()))
    except (ValueError, OverflowError, RecursionError):
        return None
    return report if epoch >= 1 and epoch.is_integer() else None


@dataclass(frozen=True)
class TrialEnd:
    """End of a trial whose process cannot write it, since it hangs or has died.

    Attributes:
        status: final status, or paused.
        reason: see `TrialSnapshot`.
        error: a line.
    """

    status: TrialStatus
    reason: str | None
    error: str

    def write(self, folder: TrialFolder) -> None:
        """Write trial.json, and error.txt of a failure; nothing if the trial has ended or has not begun."""
        snapshot = folder.snapshot
        if snapshot.began is None or snapshot.status != TrialStatus.RUNNING:
            return
        if self.status.is_failure:
            write_text(folder.path / "error.txt", f"{self.error}\n")
        folder.save(replace(snapshot, status=self.status, reason=self.reason, ended=time.time()))


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
    def changes_file(self) -> Path:
        """What was changed of the search space while the study was resumed, and when."""
        return self.path / "changes.json"

    @property
    def database(self) -> Path:
        """Optuna's SQLite file."""
        return self.path / "study.db"

    @property
    def log_file(self) -> Path:
        """Log of the study's searches: warnings, failures and their tracebacks."""
        return self.path / "search.log"

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
