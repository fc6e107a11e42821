"""Train every configuration of a pair with every seed, many at a time, and keep the results as a table.

Resumable: each batch of trainings is a file under runs/search_efficiency/ until the table is complete. Several
processes may build one table: each takes the batches that no other is at.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from benchmarks.search_efficiency import digits, table, teachers
from benchmarks.search_efficiency.methods import Shown
from benchmarks.search_efficiency.networks import Weights
from benchmarks.search_efficiency.pairs import PAIRS, Config, Pair
from benchmarks.search_efficiency.students import Structure, train

PARTS = Path(__file__).parents[2] / "runs" / "search_efficiency"
AT_A_TIME = 1024
"""Students that are trained together: more share the overhead of a step, but fall out of the processor's cache."""


def build_all(names: Sequence[str], processes: int, limit: float | None = None) -> bool:
    """Build several tables with several processes; whether all are complete.

    Args:
        names: of the pairs.
        processes: of one thread each.
        limit: seconds after which no further batch is begun.
    """
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(_train_missing_of, [(list(names), limit)] * processes, chunksize=1)
    complete = [_assemble(PAIRS[name]) for name in names]
    return all(complete)


def _train_missing_of(names: Sequence[str], limit: float | None) -> None:
    began = time.monotonic()
    for name in names:
        _train_missing(PAIRS[name], None if limit is None else max(0.0, limit - (time.monotonic() - began)))


def _train_missing(pair: Pair, limit: float | None) -> None:
    """Train the batches of a table that are missing and that no other process is at."""
    torch.set_num_threads(1)
    began = time.monotonic()
    folder = PARTS / pair.name
    folder.mkdir(parents=True, exist_ok=True)
    given, configs = digits.load(), pair.configs()
    weights = _teacher(pair, folder, given)
    shown = teachers.show(pair.teacher, weights, given)
    batches = batches_of(configs)
    for number, batch in enumerate(batches):
        file = folder / f"{number:03}.npz"
        late = limit is not None and time.monotonic() - began > limit
        with suppress(Timeout), FileLock(file.with_suffix(".lock"), timeout=0):
            if not file.exists() and not late:
                _train_batch(pair, given, shown, [configs[row] for row in batch], file)


def _assemble(pair: Pair) -> bool:
    """Make the table of its batches; whether all are there."""
    folder, configs = PARTS / pair.name, pair.configs()
    batches = batches_of(configs)
    done = sum((folder / f"{number:03}.npz").exists() for number in range(len(batches)))
    if done < len(batches):
        print(f"{pair.name}: {done} of {len(batches)} batches; run this again to go on", flush=True)
        return False
    parts = [dict(np.load(folder / f"{number:03}.npz")) for number in range(len(batches))]
    weights: Weights = torch.load(folder / "teacher.pt", weights_only=True)
    rows = np.argsort(np.concatenate([np.array(batch) for batch in batches]))
    content = {key: np.concatenate([part[key] for part in parts])[rows] for key in parts[0]}
    table.save(table.Table(**content, teacher={key: value.numpy() for key, value in weights.items()}), pair.name)
    print(f"{pair.name}: {len(configs)} configurations, {content['seconds'].sum():.0f} s", flush=True)
    return True


def batches_of(configs: Sequence[Config]) -> list[list[int]]:
    """Numbers of the configurations that are trained together."""
    alike: dict[Structure, list[int]] = {}
    for row, config in enumerate(configs):
        alike.setdefault(Structure.of(config), []).append(row)
    size = AT_A_TIME // (len(table.SHOWN) + len(table.HIDDEN))
    return [rows[start : start + size] for rows in alike.values() for start in range(0, len(rows), size)]


def _train_batch(pair: Pair, given: digits.Digits, shown: Shown, configs: Sequence[Config], file: Path) -> None:
    began = time.process_time()
    seen = train(pair, given, shown, configs, table.SHOWN, every_epoch=True)
    seconds = (time.process_time() - began) / len(configs)
    hidden = train(pair, given, shown, configs, table.HIDDEN, every_epoch=False)
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


def _teacher(pair: Pair, folder: Path, given: digits.Digits) -> Weights:
    file = folder / "teacher.pt"
    with FileLock(folder / "teacher.lock"):
        if not file.exists():
            weights = teachers.fit(pair.teacher, given)
            score = teachers.score(pair.teacher, weights, given.val_images, given.val_labels)
            print(f"{pair.name}: the teacher has {score:.4f} on val", flush=True)
            torch.save(weights, file)
    found: Weights = torch.load(file, weights_only=True)
    return found
