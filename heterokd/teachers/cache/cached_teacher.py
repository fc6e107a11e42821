"""CachedTeacher: the stored outputs as a teacher; `open_or_build` is how to get one."""

from __future__ import annotations

import io
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from heterokd.datasets.io.loaders import EvalLoader
from heterokd.datasets.io.split import Splits
from heterokd.datasets.views.policy import AugmentPolicy
from heterokd.errors import CacheError, MissingSignal
from heterokd.outputs import Batch, Outputs, OutputSpec, Signal, Tail
from heterokd.storage.filesystem import RemoteDir, open_folder
from heterokd.teachers.cache.build import Progress, begin, build_shards, finish, missing, write
from heterokd.teachers.cache.compute import NetworkTeacher, SteadyTeacher, view_outputs
from heterokd.teachers.cache.key import SHARD_BYTES, STORABLE, Dtype, make_key
from heterokd.teachers.cache.locks import Hold, hold
from heterokd.teachers.cache.maintenance import LAST_USED, nearest
from heterokd.teachers.cache.records import Records, Verify, open_records
from heterokd.teachers.cache.shards import decode, encode


class CachedTeacher:
    """A teacher whose logits and embedding come from a cache.

    Args:
        records: the opened cache.
        spec: shapes of the teacher's outputs.
        live: computes batches of which a partial cache lacks a view, and decisions on plain images that are not stored.
        tail: the teacher's last stages, where they are loaded; served as it is.
        held: keeps the cache from being deleted while this teacher is there.
    """

    def __init__(
        self,
        records: Records,
        spec: OutputSpec,
        *,
        live: NetworkTeacher | None = None,
        tail: Tail | None = None,
        held: Hold | None = None,
    ) -> None:
        self.records, self.spec, self._tail, self._held = records, spec, tail, held
        self._live = None if live is None else SteadyTeacher(live)
        self.serves = records.key.serves | (Signal.NONE if tail is None else Signal.TAIL)

    def outputs(self, batch: Batch, needs: Signal) -> Outputs:
        """See `Teacher`.

        Raises:
            MissingSignal: `needs` holds a signal that is not served.
            CacheError: a damaged shard; a view that is neither stored nor computable.
        """
        if needs & ~self.serves:
            raise MissingSignal(f"the teacher cache serves {self.serves}, not {needs & ~self.serves}: run it live")
        found = self._stored(batch) if needs & STORABLE else {}
        outputs = Outputs(logits=found.get("logits"), embedding=found.get("embedding"), tail=self._tail)
        return outputs.only(needs, "teacher")

    def classes(self, loader: EvalLoader, device: torch.device | str) -> Tensor | None:
        """See `Teacher`; decisions on a split are stored beside the shards once they are known.

        Raises:
            CacheError: they are neither stored nor computable.
        """
        folder, name = self.records.folder, f"classes/{loader.split.name}.npy"
        if folder.exists(name):
            try:
                stored = np.load(io.BytesIO(folder.read(name)), allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise CacheError(f"{folder}/{name}: is damaged ({error}); delete it") from None
            if stored.shape == (len(loader.split),) and stored.dtype == np.int64:
                return torch.from_numpy(stored)
        if self._live is None:
            raise CacheError(f"{folder}: holds no decisions on {loader.split.name}; open it once with the live teacher")
        classes = self._live.classes(loader, device)
        if classes is not None and classes.dim() == 1:
            content = io.BytesIO()
            np.save(content, classes.cpu().numpy().astype(np.int64))
            with suppress(CacheError):  # a folder that may only be read serves all the same
                write(folder, name, content.getvalue())
        return classes

    def _stored(self, batch: Batch) -> dict[str, Tensor]:
        """Every stored signal of a batch, read, or computed as a whole and rounded as if it had been read."""
        device, key = batch.images.device, self.records.key
        if batch.shown is None:
            raise CacheError("a cached teacher knows views of training images; these batches name none (Batch.shown)")
        index, view = batch.shown.numpy().T
        arrays = self.records.gather(index, view)
        if arrays is None:
            if self._live is None:
                raise CacheError(f"{self.records.folder}: is not finished; build it, or give the live teacher")
            arrays = encode(key, self._live.tensors(batch, key.serves))
        return decode(key, arrays, device)


@dataclass(frozen=True)
class CacheSettings:
    """How outputs are stored.

    Attributes:
        signals: LOGITS, EMBEDDING or both.
        dtype: of a record; fp32 is bit equal to the live teacher on a CPU, fp16 takes half the space.
        top_k: keep this many logits of each view; None keeps all.
        shard_bytes: largest shard.
    """

    signals: Signal = STORABLE
    dtype: Dtype = "fp16"
    top_k: int | None = None
    shard_bytes: int = SHARD_BYTES


DEFAULT = CacheSettings()


def open_or_build(
    caches: RemoteDir | Path | str,
    splits: Splits,
    policy: AugmentPolicy,
    seed: int,
    views: int,
    live: NetworkTeacher,
    settings: CacheSettings = DEFAULT,
    *,
    build: bool = True,
    partial: bool = False,
    crop: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    verify: Verify = "sample",
    copies: Path | None = None,
    progress: Progress | None = None,
) -> CachedTeacher:
    """A cached teacher for the views of the train split: opened, and first completed when asked to.

    Args:
        caches: the folder of all caches.
        splits: the data set.
        policy: how views differ.
        seed: of the views, that of `TrainLoader`.
        views: K, that of `TrainLoader`.
        live: the teacher; computes what is built, and a sample for the audit.
        settings: how outputs are stored.
        build: compute in this process what is missing.
        partial: open a cache that is not complete; what is missing is then computed live, step by step.
        crop: see `make_key`.
        device: where to compute.
        verify: see `open_records`.
        copies: where shards of an object store are copied to; None: the machine's folder for temporary files.
        progress: told after each shard.

    Raises:
        CacheError: damaged, of something else, too large for the disk; or missing and not to be built.
    """
    key = make_key(
        splits,
        policy,
        seed,
        views,
        live.network,
        signals=settings.signals,
        dtype=settings.dtype,
        top_k=settings.top_k,
        crop=crop,
        shard_bytes=settings.shard_bytes,
    )
    root = caches if isinstance(caches, RemoteDir) else open_folder(caches)
    folder = root.at(key.id)
    compute = view_outputs(splits.train, policy, seed, live, signals=key.serves, crop=crop, device=device)
    held = hold(folder) if build or partial or folder.exists("manifest.json") else None
    if build and (not folder.exists("manifest.json") or missing(folder, key)):
        build_shards(folder, key, compute, progress=progress)
        finish(folder, key)
    elif partial and not folder.exists("key.json"):
        begin(folder, key)
    elif not partial and not folder.exists("manifest.json"):
        raise CacheError(f"{root}: there is no finished cache of {key.describe()}; {nearest(root, key)}")
    copies = copies or Path(tempfile.gettempdir()) / "heterokd-caches"
    records = open_records(folder, key, verify=verify, copies=copies)
    records.audit(compute)
    folder.touch(LAST_USED)
    tail = live.network.tail if Signal.TAIL in live.serves else None
    return CachedTeacher(records, live.spec, live=live, tail=tail, held=held)
