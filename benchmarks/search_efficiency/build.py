"""Train every configuration of a pair with every seed, many at a time, and keep the results as a table.

Resumable: each batch of trainings is a file under runs/search_efficiency/ until the table is complete. Several
processes may build one table: each takes the batches that no other is at.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from benchmarks.search_efficiency import digits, table, teachers
from benchmarks.search_efficiency.methods import Shown
from benchmarks.search_efficiency.networks import Weights
from benchmarks.search_efficiency.pairs import EPOCHS, PAIRS, Config, Pair
from benchmarks.search_efficiency.students import Structure, train

PARTS = Path(__file__).parents[2] / "runs" / "search_efficiency"
AT_A_TIME = 1024
"""Students that are trained together: more share the overhead of a step, but fall out of the processor's cache."""


@dataclass(frozen=True)
class Build:
    """One table to build.

    Attributes:
        pair: teacher and student.
        configs: what is trained.
        shown: seeds whose accuracy is kept after every epoch.
        hidden: seeds whose accuracy is kept at the end.
        epochs: of each training.
        teacher_epochs: of the teacher's.
        parts: where finished batches lie.
        tables: where the table goes.
    """

    pair: Pair
    configs: Sequence[Config]
    shown: Sequence[int] = table.SHOWN
    hidden: Sequence[int] = table.HIDDEN
    epochs: int = EPOCHS
    teacher_epochs: int = teachers.EPOCHS
    parts: Path = PARTS
    tables: Path = table.FOLDER

    @property
    def batches(self) -> list[list[int]]:
        """Numbers of the configurations that are trained together."""
        alike: dict[Structure, list[int]] = {}
        for row, config in enumerate(self.configs):
            alike.setdefault(Structure.of(config), []).append(row)
        size = AT_A_TIME // (len(self.shown) + len(self.hidden))
        return [rows[start : start + size] for rows in alike.values() for start in range(0, len(rows), size)]

    @property
    def folder(self) -> Path:
        """Where the pair's finished batches lie."""
        return self.parts / self.pair.name

    def train_missing(self, limit: float | None) -> None:
        """Train the batches that are missing and that no other process is at.

        Args:
            limit: seconds after which no further batch is begun.
        """
        torch.set_num_threads(1)
        began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        given = digits.load()
        shown = teachers.show(self.pair.teacher, self._teacher(given), given)
        for number, batch in enumerate(self.batches):
            file = self.folder / f"{number:03}.npz"
            late = limit is not None and time.monotonic() - began > limit
            with suppress(Timeout), FileLock(file.with_suffix(".lock"), timeout=0):
                if not file.exists() and not late:
                    self._train_batch(given, shown, [self.configs[row] for row in batch], file)

    def assemble(self) -> bool:
        """Make the table of its batches; whether all are there."""
        files = [self.folder / f"{number:03}.npz" for number in range(len(self.batches))]
        done = sum(file.exists() for file in files)
        if done < len(files):
            print(f"{self.pair.name}: {done} of {len(files)} batches; run this again to go on", flush=True)
            return False
        parts = [dict(np.load(file)) for file in files]
        weights: Weights = torch.load(self.folder / "teacher.pt", weights_only=True)
        rows = np.argsort(np.concatenate([np.array(batch) for batch in self.batches]))
        content = {key: np.concatenate([part[key] for part in parts])[rows] for key in parts[0]}
        built = table.Table(**content, teacher={key: value.numpy() for key, value in weights.items()})
        table.save(built, self.pair.name, self.tables)
        print(f"{self.pair.name}: {len(rows)} configurations, {content['seconds'].sum():.0f} s", flush=True)
        return True

    def _train_batch(self, given: digits.Digits, shown: Shown, configs: Sequence[Config], file: Path) -> None:
        began = time.process_time()
        seen = train(self.pair, given, shown, configs, self.shown, every_epoch=True, epochs=self.epochs)
        seconds = (time.process_time() - began) / len(configs)
        hidden = train(self.pair, given, shown, configs, self.hidden, every_epoch=False, epochs=self.epochs)
        counts = {
            key: value.view(len(configs), -1, *value.shape[1:]).numpy().astype(np.uint16)
            for key, value in {
                "val": seen.val,
                "test": seen.test,
                "hidden_val": hidden.val.squeeze(1),
                "hidden_test": hidden.test.squeeze(1),
            }.items()
        }
        new = file.with_suffix(".new.npz")
        np.savez(new, **counts, seconds=np.full(len(configs), seconds, np.float32))
        new.rename(file)

    def _teacher(self, given: digits.Digits) -> Weights:
        file = self.folder / "teacher.pt"
        with FileLock(self.folder / "teacher.lock"):
            if not file.exists():
                weights = teachers.fit(self.pair.teacher, given, epochs=self.teacher_epochs)
                score = teachers.score(self.pair.teacher, weights, given.val_images, given.val_labels)
                print(f"{self.pair.name}: the teacher has {score:.4f} on val", flush=True)
                torch.save(weights, file)
        found: Weights = torch.load(file, weights_only=True)
        return found


def build_all(names: Sequence[str], processes: int, limit: float | None = None) -> bool:
    """Build several tables with several processes; whether all are complete.

    Args:
        names: of the pairs.
        processes: of one thread each.
        limit: seconds after which no further batch is begun.
    """
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(_train_missing_of, [(list(names), limit)] * processes, chunksize=1)
    complete = [_of(name).assemble() for name in names]
    return all(complete)


def _of(name: str) -> Build:
    return Build(PAIRS[name], PAIRS[name].configs())


def _train_missing_of(names: Sequence[str], limit: float | None) -> None:
    began = time.monotonic()
    for name in names:
        _of(name).train_missing(None if limit is None else max(0.0, limit - (time.monotonic() - began)))
