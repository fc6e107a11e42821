"""A table: what came of every configuration with every seed, in one compressed file, and a checksum of it in git."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.search_efficiency.digits import TEST, VAL

FOLDER = Path(__file__).parent / "tables"
CHECKSUMS = "SHA256SUMS"
"""The file beside the tables that holds their checksums."""

SHOWN = tuple(range(12))
"""Seeds that a search may see, with the accuracy after every epoch."""

HIDDEN = tuple(range(1000, 1048))
"""Seeds that no search sees: their mean is what a configuration is truly worth, to a seventh of a seed deviation."""

HALVINGS = 200
"""Of the hidden seeds, over which the best configuration's worth is averaged."""


@dataclass(frozen=True)
class Table:
    """All trainings of a pair; rows in the order of `Pair.configs`.

    Attributes:
        val: [C, SHOWN, EPOCHS] right answers of VAL images after each epoch.
        test: [C, SHOWN, EPOCHS] likewise, of TEST images.
        hidden_val: [C, HIDDEN] after the last epoch.
        hidden_test: likewise.
        seconds: [C] processor seconds of one training among its fellows.
        teacher: the teacher's weights, by name.
    """

    val: NDArray[np.uint16]
    test: NDArray[np.uint16]
    hidden_val: NDArray[np.uint16]
    hidden_test: NDArray[np.uint16]
    seconds: NDArray[np.float32]
    teacher: dict[str, NDArray[np.float32]]

    @cached_property
    def truth(self) -> NDArray[np.float64]:
        """[C] top-1 on val over the hidden seeds."""
        return self.hidden_val.mean(1) / VAL

    @cached_property
    def test_truth(self) -> NDArray[np.float64]:
        """[C] top-1 on test over the hidden seeds."""
        return self.hidden_test.mean(1) / TEST

    @cached_property
    def noise(self) -> float:
        """Deviation of one training's val top-1 between seeds, pooled over the best tenth: bad ones scatter more."""
        good = self.truth >= np.quantile(self.truth, 0.9)
        return float(np.sqrt((self.hidden_val[good] / VAL).var(1, ddof=1).mean()))

    def regret(self, config: int, *, on_test: bool = False) -> float:
        """(best - this) / (best - median) of the truth; below 0 for one that is better than `best` found."""
        truth, best = (self.test_truth, self._best[1]) if on_test else (self.truth, self._best[0])
        return float((best - truth[config]) / (best - np.median(truth)))

    def regret_of_largest(self, config: int) -> float:
        """The same with the largest mean as the best, which is too large: no search can choose its luck."""
        return float((self.truth.max() - self.truth[config]) / (self.truth.max() - np.median(self.truth)))

    @cached_property
    def _best(self) -> tuple[float, float]:
        """What the best configuration is worth on val and on test.

        The largest of hundreds of noisy means is larger than any true one. So the hidden seeds are halved, the best is
        chosen by val on one half and valued on the other; the mean over halvings in both directions.
        """
        rng, seeds = np.random.default_rng(0), self.hidden_val.shape[1]
        found = []
        for _ in range(HALVINGS):
            order = rng.permutation(seeds)
            for one, other in ((order[::2], order[1::2]), (order[1::2], order[::2])):
                row = int(self.hidden_val[:, one].mean(1).argmax())
                found.append((self.hidden_val[row, other].mean() / VAL, self.hidden_test[row, other].mean() / TEST))
        val, test = np.mean(found, axis=0)
        return float(val), float(test)


def save(table: Table, name: str, folder: Path = FOLDER) -> None:
    """Write a table and its checksum."""
    folder.mkdir(exist_ok=True)
    content = {key: value for key, value in vars(table).items() if isinstance(value, np.ndarray)}
    content |= {f"teacher.{key}": value for key, value in table.teacher.items()}
    np.savez_compressed(folder / f"{name}.npz", **content)
    sums = checksums(folder) | {f"{name}.npz": checksum(name, folder)}
    (folder / CHECKSUMS).write_text("".join(f"{digest}  {file}\n" for file, digest in sorted(sums.items())))


def load(name: str, folder: Path = FOLDER) -> Table:
    """Read a table."""
    with np.load(folder / f"{name}.npz") as file:
        content = dict(file)
    teacher = {key.removeprefix("teacher."): content.pop(key) for key in list(content) if key.startswith("teacher.")}
    return Table(**content, teacher=teacher)


def stored() -> tuple[str, ...]:
    """Names of the tables that were built."""
    return tuple(sorted(file.stem for file in FOLDER.glob("*.npz")))


def checksums(folder: Path = FOLDER) -> dict[str, str]:
    """What `SHA256SUMS` says of each file."""
    file = folder / CHECKSUMS
    return dict(line.split()[::-1] for line in file.read_text().splitlines()) if file.exists() else {}


def checksum(name: str, folder: Path = FOLDER) -> str:
    """SHA-256 of a table's file, as `sha256sum` prints it."""
    return hashlib.sha256((folder / f"{name}.npz").read_bytes()).hexdigest()
