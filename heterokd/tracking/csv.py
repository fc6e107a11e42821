"""CsvTracker: write a study's metrics to metrics.csv in its folder. An example of a `Tracker`."""

from __future__ import annotations

import csv

from heterokd.config.experiment import Experiment
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.study.summary import StudySummary
from heterokd.tracking.tracker import Status

COLUMNS = ("trial", "method", "seed", "epoch", "metric", "value")


class CsvTracker:
    """Appends the metrics of each epoch of a trial, one row per metric."""

    def __init__(self, experiment: Experiment, folder: StudyFolder) -> None:
        self.folder, self.file = folder, folder.path / "metrics.csv"
        self.epochs: dict[int, int] = {}
        if self.file.exists():
            with self.file.open(newline="", encoding="utf-8") as file:
                self.epochs = {int(row["trial"]): int(row["epoch"]) for row in csv.DictReader(file)}

    def sync(self, trial: TrialFolder) -> bool:
        """Append the epochs that are not in the file."""
        reports = [report for report in trial.metrics() if report["epoch"] > self.epochs.get(trial.number, 0)]
        if reports:
            about = (trial.number, trial.recipe.method, trial.recipe.training.seed)
            with self.file.open("a", newline="", encoding="utf-8") as file:
                rows = csv.writer(file)
                if file.tell() == 0:
                    rows.writerow(COLUMNS)
                for report in reports:
                    epoch = int(report["epoch"])
                    rows.writerows((*about, epoch, key, value) for key, value in report.items() if key != "epoch")
            self.epochs[trial.number] = epoch
        return True

    def finish(self, summary: StudySummary | None, status: Status = "FINISHED") -> bool:
        """Append the missing epochs of all trials."""
        return all(self.sync(trial) for trial in self.folder.trials())
