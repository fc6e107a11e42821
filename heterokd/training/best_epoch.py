"""BestEpoch: keep the weights of a training's best epoch, and end a training that has stopped improving."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from heterokd.networks.network import AnyNetwork
from heterokd.networks.weights import file_digest
from heterokd.storage.files import read_derived, write_text
from heterokd.training.student import save_student


class BestEpoch:
    """The best epoch of a training so far, by a metric on val; of equal scores, the first.

    Args:
        file: receives the weights of the best epoch; the score is stored next to it, so that a training is resumed.
        metric: `val/top1` or `val/miou`.
        patience: number of epochs without a better score after which the training ends; None: it never ends early.

    Attributes:
        score: score of the best epoch; minus infinity before the first.
        metrics: all metrics of the best epoch on val.
        epoch: number of finished epochs when it was reached.
    """

    def __init__(self, file: Path, metric: str, patience: int | None = None) -> None:
        self.file, self.metric, self.patience = file, metric, patience
        self.score, self.epoch = float("-inf"), 0
        self.metrics: dict[str, float] = {}

    @property
    def score_file(self) -> Path:
        """File of the score, next to the weights."""
        return self.file.with_suffix(".json")

    def resume(self, epoch: int) -> None:
        """Read the stored score of a training that resumes after `epoch` finished epochs."""
        stored = read_derived(self.score_file)
        with suppress(KeyError, TypeError, ValueError, OSError):
            score, best = float(str(stored["score"])), int(str(stored["epoch"]))
            # A killed process, or a store's copy of its files, may have left the weights of another epoch.
            if best <= epoch and stored.get("file") in (None, file_digest(self.file)):
                self.score, self.epoch = score, best
                metrics = stored.get("metrics")
                self.metrics = {**(metrics if isinstance(metrics, dict) else {}), self.metric: score}

    def update(self, metrics: Mapping[str, float], network: AnyNetwork) -> bool:
        """Save the network if its score is the best so far; return whether the training is worth continuing."""
        epoch = int(metrics["epoch"])
        if metrics[self.metric] > self.score:
            self.score, self.epoch = metrics[self.metric], epoch
            self.metrics = {key: value for key, value in metrics.items() if key.startswith("val/")}
            save_student(network, self.file)
            digest = file_digest(self.file)
            stored = {"score": self.score, "epoch": self.epoch, "file": digest, "metrics": self.metrics}
            write_text(self.score_file, json.dumps(stored))
        return self.patience is None or epoch - self.epoch < self.patience

    def remove(self) -> None:
        """Delete the files."""
        for file in (self.file, self.score_file):
            file.unlink(missing_ok=True)
