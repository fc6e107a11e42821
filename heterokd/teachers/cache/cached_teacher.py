"""CachedTeacher: a teacher that serves stored outputs; `open_or_build` opens it."""

from __future__ import annotations

import io
import logging
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from heterokd.datasets.io.loaders import EvalLoader
from heterokd.datasets.io.split import Splits
from heterokd.datasets.views.policy import ViewSpec
from heterokd.errors import CacheError, MissingSignal
from heterokd.outputs import Batch, Outputs, OutputSpec, Signal, Tail
from heterokd.storage.filesystem import RemoteDir, open_folder
from heterokd.storage.use_locks import SharedLock, shared_lock
from heterokd.teachers.cache.build import MANIFEST, begin, build_shards, finish, missing, write
from heterokd.teachers.cache.compute import block_outputs, view_outputs
from heterokd.teachers.cache.key import DEFAULT, STORABLE, CacheSettings, make_key
from heterokd.teachers.cache.maintenance import LAST_USED, nearest
from heterokd.teachers.cache.records import Records, Verify, open_records
from heterokd.teachers.cache.shards import DamagedShard, decode, encode
from heterokd.training.teacher import LiveTeacher

logger = logging.getLogger(__name__)


class CachedTeacher:
    """A teacher whose logits and embedding come from a cache.

    Args:
        records: opened cache.
        spec: shapes of the teacher's outputs.
        live: live teacher, for its tail, for batches with a view that a partial cache lacks or whose shard is damaged,
            and for predictions on plain images that are not stored.
        lock: lock that protects the cache from deletion as long as this object exists.
    """

    def __init__(
        self, records: Records, spec: OutputSpec, *, live: LiveTeacher | None = None, lock: SharedLock | None = None
    ) -> None:
        self.records, self.spec, self._live, self._lock = records, spec, live, lock
        self._tail = cast(Tail, live.network.tail) if live is not None and Signal.TAIL in live.serves else None
        self._damaged: set[str] = set()
        self.serves = records.key.serves | (Signal.NONE if self._tail is None else Signal.TAIL)

    def outputs(self, batch: Batch, needs: Signal) -> Outputs:
        """See `Teacher`.

        Raises:
            MissingSignal: `needs` contains a signal that is not served.
            CacheError: a damaged shard; a view that is neither stored nor computable.
        """
        if needs & ~self.serves:
            raise MissingSignal(f"the teacher cache serves {self.serves}, not {needs & ~self.serves}: run it live")
        found = self._stored(batch) if needs & STORABLE else {}
        outputs = Outputs(logits=found.get("logits"), embedding=found.get("embedding"), tail=self._tail)
        return outputs.only(needs, "teacher")

    def classes(self, loader: EvalLoader, device: torch.device | str) -> Tensor | None:
        """See `Teacher`; predictions on a split are stored next to the shards once computed.

        Raises:
            CacheError: they are neither stored nor computable.
        """
        folder, name = self.records.folder, f"classes/{loader.split.name}.npy"
        if folder.exists(name):
            try:
                stored = np.load(io.BytesIO(folder.read(name)), allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                logger.warning("%s/%s: is damaged (%s); it is computed again", folder, name, error)
                stored = np.empty(0)
            if stored.shape == (len(loader.split),) and stored.dtype == np.int64:
                return torch.from_numpy(stored)
        if self._live is None:
            raise CacheError(
                f"{folder}: holds no predictions on {loader.split.name}; open it once with the live teacher"
            )
        classes = self._live.classes(loader, device)
        if classes is not None and classes.dim() == 1:
            content = io.BytesIO()
            np.save(content, classes.cpu().numpy().astype(np.int64))
            with suppress(CacheError):  # a read-only cache can still be used
                write(folder, name, content.getvalue())
        return classes

    def _stored(self, batch: Batch) -> dict[str, Tensor]:
        """Read all stored signals of a batch; if a view is missing, compute the batch and round it as a record."""
        device, key = batch.images.device, self.records.key
        if batch.shown is None:
            raise CacheError("a cached teacher needs the index and view of each image; this batch has no Batch.shown")
        index, view = batch.shown.numpy().T
        try:
            arrays = self.records.gather(index, view)
        except DamagedShard as error:
            if self._live is None:
                raise
            if str(error) not in self._damaged:
                logger.warning("%s; the teacher runs for its views", error)
                self._damaged.add(str(error))
            arrays = None
        if arrays is None:
            if self._live is None:
                raise CacheError(f"{self.records.folder}: is not finished; build it, or give the live teacher")
            arrays = encode(key, block_outputs(self._live, batch, key.serves, key.precision))
        return decode(key, arrays, device)


@dataclass(frozen=True)
class CacheAccess:
    """How a cache is opened.

    Attributes:
        mode: "build" computes missing shards first; "partial" opens an incomplete cache and computes missing views in
            each step; "complete" requires a complete cache.
        device: device of the teacher.
        verify: checksums to verify, see `open_records`.
        copies: folder for copies of an object store's shards; None: the machine's folder for temporary files.
    """

    mode: Literal["build", "partial", "complete"] = "build"
    device: torch.device | str = "cpu"
    verify: Verify = "sample"
    copies: Path | None = None


BUILD = CacheAccess()


def open_or_build(
    caches: RemoteDir | Path | str,
    splits: Splits,
    views: ViewSpec,
    live: LiveTeacher,
    settings: CacheSettings = DEFAULT,
    access: CacheAccess = BUILD,
) -> CachedTeacher:
    """Open a cached teacher for views of the train split.

    Args:
        caches: folder of all caches.
        splits: the data set.
        views: views of the training images.
        live: the teacher; computes missing outputs, and a sample to compare with the stored outputs.
        settings: how outputs are stored.
        access: whether missing outputs are built, and how the cache is verified.

    Raises:
        CacheError: the cache is damaged, has another key, is too large for the disk, or is incomplete.
    """
    key = make_key(splits, views, live.network, settings)
    root = open_folder(caches)
    folder = root.at(key.id)
    compute = view_outputs(splits.seen, views, live, signals=key.serves, device=access.device, precision=key.precision)
    complete = folder.exists(MANIFEST)
    lock = shared_lock(folder) if access.mode != "complete" or complete else None
    if access.mode == "build" and (not complete or missing(folder, key)):
        build_shards(folder, key, compute)
        finish(folder, key)
    elif access.mode == "partial" and not folder.exists("key.json"):
        begin(folder, key)
    elif access.mode == "complete" and not complete:
        raise CacheError(f"{root}: there is no complete cache of {key.describe()}; {nearest(root, key)}")
    copies = access.copies or Path(tempfile.gettempdir()) / "heterokd-caches"
    records = open_records(folder, key, verify=access.verify, copies=copies)
    records.audit(compute)
    folder.touch(LAST_USED)
    return CachedTeacher(records, live.spec, live=live, lock=lock)
