"""Index of a large data set of image files in a file, so that not every process lists a million names.

The file holds names, labels, splits and fingerprint. It is used as long as no folder of the data set has changed
(modification times) and a sample of the files have their sizes; otherwise it is written again. A file that is replaced
by one of the same size is not noticed, as by the fingerprint itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from heterokd.datasets.io.image_files import FileImages, LabelledFiles
from heterokd.datasets.io.split import SPLIT_NAMES, Split, SplitName, Splits
from heterokd.formatting import package_version

FORMAT = 1
LEAST_FILES = 50_000
"""Data sets with fewer files are listed in a fraction of a second."""
CHECKED_FILES = 1000
"""Number of evenly spaced files of each split whose sizes are compared."""
SETTLED_NS = 2 * 10**9
"""Age of a folder's last change below which no index is written: file systems' clocks are coarse."""


def default_folder() -> Path:
    """Return the folder of indexes: of the user, on this machine."""
    return Path.home() / ".cache" / "heterokd" / "indexes"


def indexed_splits(
    make: Callable[[], Splits],
    root: Path,
    settings: Mapping[str, object],
    watched: Callable[[], Iterable[Path]],
    *,
    store: Path | None = None,
    least: int = LEAST_FILES,
) -> Splits:
    """Return the splits from a saved index, or make them and save their index.

    Args:
        make: finds the files; their images are `FileImages` that are read as they are, without crops of photos.
        root: folder of the data set.
        settings: what else decides the splits, as JSON.
        watched: returns the folders (and lists of names) whose modification times are compared.
        store: folder of indexes; None: `default_folder`.
        least: minimum number of files of an index.

    Raises:
        DataError: see `make`.
    """
    name = json.dumps([FORMAT, package_version(), str(root.resolve()), settings], sort_keys=True)
    file = (store or default_folder()) / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.npz"
    with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
        return _read(file, root)
    state = {str(path): _changed(path) for path in watched()}
    splits = make()
    count = sum(len(split) for split in (splits.train, splits.val, splits.test))
    is_settled = max(state.values()) < time.time_ns() - SETTLED_NS
    if count >= least and is_settled:
        with suppress(OSError):  # a read-only disk: every process lists the files
            _write(file, splits, state)
    return splits


def _changed(path: Path) -> int:
    return os.stat(path).st_mtime_ns


def _files(split: Split) -> LabelledFiles:
    assert isinstance(split.images, FileImages)  # see `indexed_splits`
    return split.images.files


def _sizes(files: LabelledFiles) -> list[int]:
    places = np.unique(np.linspace(0, len(files) - 1, min(CHECKED_FILES, len(files))).astype(np.int64))
    return [os.stat(files.path(place)).st_size for place in places]


def _write(file: Path, splits: Splits, state: Mapping[str, int]) -> None:
    parts = {split.name: _files(split) for split in (splits.train, splits.val, splits.test)}
    content = {
        "state": state,
        "sizes": {name: _sizes(files) for name, files in parts.items()},
        "classes": splits.class_names,
        "fingerprint": splits.fingerprint,
        "image_size": splits.image_size,
    }
    arrays: dict[str, Any] = {"content": np.array(json.dumps(content))}
    for name, files in parts.items():
        arrays |= {f"{name}_names": files.names, f"{name}_labels": files.labels}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as output:
            np.savez(output, **arrays)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _read(file: Path, root: Path) -> Splits:
    """Read an index.

    Raises:
        OSError: there is none, or a file of the data set is missing.
        ValueError: it is damaged, or the data set has changed.
    """
    with np.load(file, allow_pickle=False) as stored:
        content = json.loads(str(stored["content"]))
        if any(_changed(Path(path)) != changed for path, changed in content["state"].items()):
            raise ValueError("the data set has changed")
        splits: dict[SplitName, Split] = {}
        for name in SPLIT_NAMES:
            files = LabelledFiles(root, stored[f"{name}_names"], stored[f"{name}_labels"])
            if _sizes(files) != content["sizes"][name]:
                raise ValueError("the data set has changed")
            splits[name] = Split(FileImages(files, content["image_size"]), files.labels, name)
    classes, size = tuple(content["classes"]), int(content["image_size"])
    return Splits(**splits, class_names=classes, image_size=size, fingerprint=content["fingerprint"], notes=())
