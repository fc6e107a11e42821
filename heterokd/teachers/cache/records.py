"""Records: a cache opened for reading, its verification, and batches of any views from memory-mapped shards."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from heterokd.datasets.views.random import permutation
from heterokd.errors import CacheError
from heterokd.storage.files import PARTIAL
from heterokd.storage.filesystem import RemoteDir, open_folder
from heterokd.storage.typed_json import parse
from heterokd.teachers.cache.build import MANIFEST
from heterokd.teachers.cache.compute import Compute
from heterokd.teachers.cache.key import CacheKey
from heterokd.teachers.cache.shards import (
    Arrays,
    DamagedShard,
    checksum,
    columns,
    decode,
    encode,
    layout_of,
    read_shard,
    shard_name,
)

Verify = Literal["sample", "full"]
SAMPLED_SHARDS = 4
SAMPLED_VIEWS = 32

TOLERANCES = {"fp32": 5e-3, "fp16": 1e-2}
"""Maximum difference between stored and computed outputs, relative to a view's largest value: above the differences
between devices (TF32, other kernels), far below those of another teacher, policy or data set."""
BF16_TOLERANCE = 5e-2
"""The same for outputs that were computed in bfloat16, which has 8 bits."""
MASS_TOLERANCE = 2e-2
"""Maximum difference of softmax masses of top-k logits, whose classes may swap if their values are close."""

CACHE_FILES = re.compile(
    r"(key\.json|manifest\.json|last_used|shards/\d{6}\.arrow|locks/(\d{6}|use)\.lock|classes/\w+\.npy)"
)
REPAIR = "delete it and build the cache again: only what is missing is computed"


@dataclass(frozen=True)
class StoredShard:
    """A shard in manifest.json: its size, and its checksum, which is None in an object store."""

    bytes: int
    crc32: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json.

    Attributes:
        cache: id of the cache.
        shards: every shard, in order.
    """

    cache: str
    shards: tuple[StoredShard, ...]


class Records:
    """A cache opened for reading. A shard is mapped and verified against its checksum at its first use.

    Args:
        folder: folder of the cache.
        key: key of the cache.
        manifest: manifest of a complete cache; None if it is partial.
        copies: folder for copies of an object store's shards, shared by the processes of a node.
    """

    def __init__(self, folder: RemoteDir, key: CacheKey, manifest: Manifest | None, copies: Path | None = None) -> None:
        self.folder, self.key, self.manifest, self.copies = folder, key, manifest, copies
        self.layout = layout_of(key)
        self._columns = columns(key)
        self._mapped: dict[int, Arrays] = {}

    def gather(self, index: NDArray[np.int64], view: NDArray[np.int64]) -> Arrays | None:
        """Return the records [B] of some views, as new arrays; None if a partial cache lacks any of them.

        Raises:
            CacheError: a view or image outside the cache's range; a damaged shard.
        """
        if len(index) == 0:
            return {name: np.empty((0, *shape), dtype) for name, (dtype, shape) in self._columns.items()}
        if view.max() >= self.key.views or index.max() >= self.key.images or min(view.min(), index.min()) < 0:
            raise CacheError(
                f"{self.folder}: view {view.max()} of image {index.max()} was requested, the cache holds "
                f"{self.key.views} views of {self.key.images} images; give the loader views={self.key.views}"
            )
        shards, rows = self.layout.locate(index, view)
        numbers = np.unique(shards)
        mapped = [self.shard(number) for number in numbers.tolist()]
        if any(arrays is None for arrays in mapped):
            return None
        if len(numbers) == 1:
            return {name: np.take(array, rows, axis=0) for name, array in (mapped[0] or {}).items()}
        out = {name: np.empty((len(index), *shape), dtype) for name, (dtype, shape) in self._columns.items()}
        for number, arrays in zip(numbers, mapped, strict=True):
            places = np.flatnonzero(shards == number)
            for name, array in (arrays or {}).items():
                out[name][places] = array[rows[places]]
        return out

    def shard(self, number: int) -> Arrays | None:
        """Return a shard's records, memory-mapped; None if a partial cache lacks the shard.

        Raises:
            DamagedShard: it is damaged, or missing from a complete cache.
        """
        if number not in self._mapped:
            path = self._path(number)
            if path is None:
                return None
            arrays, claimed = read_shard(self.key, number, str(path))
            expected = None if self.manifest is None else self.manifest.shards[number].crc32
            if checksum(arrays) != claimed or expected not in (None, claimed):
                raise DamagedShard(f"{path}: is damaged (its content does not match its checksum); {REPAIR}")
            self._mapped[number] = arrays
        return self._mapped[number]

    def has(self, number: int) -> bool:
        """Return whether a shard's file exists."""
        return number in self._mapped or self.folder.exists(shard_name(number))

    def audit(self, compute: Compute, views: int = SAMPLED_VIEWS) -> float:
        """Compare a sample of stored views with the teacher's outputs now; return the largest relative difference.

        Raises:
            CacheError: the difference is larger than number formats and devices explain.
        """
        present = [number for number in range(self.layout.shards) if self.has(number)]
        worst = 0.0
        if not present:
            return worst
        drawn = permutation(max(len(present), views), 0, "audit", self.key.id)[:views]
        chosen = [present[number % len(present)] for number in drawn]
        pairs = []
        for place, number in enumerate(sorted(chosen)):
            index, view = self.layout.records(number)
            row = permutation(len(index), place, "audit", self.key.id)[0]
            pairs.append((index[row], view[row]))
        index, view = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
        stored = self.gather(index, view)
        if stored is None:
            return worst
        now, before = decode(self.key, encode(self.key, compute(index, view))), decode(self.key, stored)
        for name in now:
            a, b, most = now[name].double(), before[name].double(), TOLERANCES[self.key.dtype]
            most = BF16_TOLERANCE if self.key.precision == "bf16" else most
            is_mass = name == "logits" and self.key.top_k is not None
            if is_mass:
                a, b, most = a.softmax(1), b.softmax(1), max(most, MASS_TOLERANCE)
            scale = torch.ones(len(a)) if is_mass else a.flatten(1).abs().amax(1).clamp(min=1e-6)
            difference = float(((a - b).flatten(1).abs().amax(1) / scale).max())
            worst = max(worst, difference)
            if not difference <= most:
                raise CacheError(
                    f"{self.folder}: the stored {name} differ from the teacher's by {difference:.3g} (at most {most:g} "
                    f"is allowed) on a sample of {len(index)} views, so they are of another teacher, policy or data "
                    "set; remove the cache and build it again"
                )
        return worst

    def _path(self, number: int) -> Path | None:
        """Return the path of a shard's local file, copied from an object store at first use; None if not stored."""
        if self.folder.local is not None:
            path = self.folder.local / shard_name(number)
            return path if self.manifest is not None or path.exists() else None
        if self.copies is None:
            raise CacheError(f"{self.folder}: an object store cannot be memory-mapped; give a folder for copies")
        local = open_folder(self.copies / self.key.id)
        stored = self.folder.stat(shard_name(number))
        if stored is None and self.manifest is not None:
            raise DamagedShard(f"{self.folder}/{shard_name(number)}: is missing; {REPAIR}")
        if stored is None:
            return None
        copy = local.stat(shard_name(number))
        if copy is None or copy.size != stored.size:
            local.write(shard_name(number), self.folder.read(shard_name(number)))
        return self.copies / self.key.id / shard_name(number)


def read_key(folder: RemoteDir) -> CacheKey:
    """Read the key of a cache's folder.

    Raises:
        CacheError: key.json is missing or damaged.
    """
    try:
        return CacheKey.from_json(folder.read("key.json").decode())
    except FileNotFoundError:
        raise CacheError(f"{folder}: there is no cache (no key.json); build it first") from None
    except (OSError, ValueError, TypeError) as error:
        raise CacheError(f"{folder}/key.json: is damaged ({error}); remove the cache and build it again") from None


def read_manifest(folder: RemoteDir, key: CacheKey) -> Manifest | None:
    """Read the manifest of a cache; None if it is partial.

    Raises:
        CacheError: it is damaged or belongs to another cache.
    """
    try:
        text = folder.read(MANIFEST)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(f"{folder}/{MANIFEST}: cannot be read ({error}); check its permissions") from None
    try:
        manifest = parse(Manifest, json.loads(text))
    except ValueError as error:
        raise CacheError(f"{folder}/{MANIFEST}: is damaged ({error}); {REPAIR}") from None
    if manifest.cache != key.id or len(manifest.shards) != layout_of(key).shards:
        raise CacheError(f"{folder}/{MANIFEST}: belongs to cache {manifest.cache}, not to {key.id}; {REPAIR}")
    return manifest


def open_records(folder: RemoteDir, key: CacheKey, *, verify: Verify = "sample", copies: Path | None = None) -> Records:
    """Open a complete or partial cache and verify its key, manifest, files, sizes and checksums.

    Args:
        folder: folder of the cache.
        key: expected key.
        verify: checksums to verify: of a sample of the shards, or of all; other shards are verified at their first use.
        copies: see `Records`.

    Raises:
        CacheError: the key differs, or a file is damaged.
    """
    found = read_key(folder)
    if found != key:
        raise CacheError(f"{folder}: is a cache of something else: {'; '.join(found.differences(key))}")
    records = Records(folder, key, read_manifest(folder, key), copies)
    problem = next(iter(problems(records, verify)), None)
    if problem is not None:
        raise CacheError(problem)
    return records


def problems(records: Records, verify: Verify) -> list[str]:
    """Return a sentence for each problem of a cache's files."""
    folder, layout, found = records.folder, records.layout, []
    sizes = {}
    for file in folder.files():
        sizes[file.name] = file.size
        if not CACHE_FILES.fullmatch(file.name) and not file.name.endswith(PARTIAL):
            found.append(f"{folder}/{file.name}: is not a file of a cache; move it away")
    damaged = set()
    for number, shard in enumerate(records.manifest.shards if records.manifest else ()):
        size = sizes.get(shard_name(number))
        if size != shard.bytes:
            damaged.add(number)
            state = "is missing" if size is None else f"has {size:,} bytes instead of {shard.bytes:,}"
            found.append(f"{folder}/{shard_name(number)}: {state}; {REPAIR}")
    present = [n for n in range(layout.shards) if shard_name(n) in sizes and n not in damaged]
    if verify == "sample":
        present = [present[at] for at in permutation(len(present), 0, "verify", records.key.id)[:SAMPLED_SHARDS]]
    for number in present:
        try:
            records.shard(number)
        except CacheError as error:
            found.append(str(error))
    return found
