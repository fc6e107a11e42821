"""Shards: Arrow IPC files of fixed-size records; the key determines the position of the record of (index, view).

CACHES/<id>/key.json              what the outputs depend on
            shards/000000.arrow   a block of images in a block of views; its header holds key, number, checksum
            manifest.json         size and checksum of every shard; written last, marks a complete cache
            classes/val.npy       the teacher's predictions on plain images
            last_used             empty; its modification time is the time of the last opening
            locks/                locks of builders, and use.lock against deletion
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from heterokd.errors import CacheError
from heterokd.teachers.cache.key import CacheKey

GROUPED_BYTES = 2**22
"""Size up to which views of a small data set share a shard, to avoid a small file per view."""

FOOTPRINT = 4096
"""Maximum overhead of a shard in bytes: schema, header and padding of the last page."""


class DamagedShard(CacheError):
    """A shard whose file is missing or damaged."""


Arrays = dict[str, NDArray[np.generic]]
"""Records by column: `logits`, `embedding`; or `logits_values`, `logits_classes`, `logits_rest` of top-k logits."""


@dataclass(frozen=True)
class ShardLayout:
    """Assignment of records (index, view) to shards and rows.

    Attributes:
        key: key of the cache.
        block_images: images per shard (the last block of images may have fewer).
        block_views: views per shard (the last block of views may have fewer).
    """

    key: CacheKey
    block_images: int
    block_views: int

    @property
    def image_blocks(self) -> int:
        """Number of shards per block of views."""
        return math.ceil(self.key.images / self.block_images)

    @property
    def shards(self) -> int:
        """Number of shards; those of early views come first."""
        return self.image_blocks * math.ceil(self.key.views / self.block_views)

    def locate(self, index: NDArray[np.int64], view: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return shard [B] and row [B] of each record."""
        image_block, image = np.divmod(index, self.block_images)
        view_block, inner = np.divmod(view, self.block_views)
        width = np.minimum(self.block_images, self.key.images - image_block * self.block_images)
        return view_block * self.image_blocks + image_block, inner * width + image

    def records(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return index [R] and view [R] of a shard's records, in the order of its rows."""
        view_block, image_block = divmod(number, self.image_blocks)
        first, start = image_block * self.block_images, view_block * self.block_views
        images = np.arange(first, min(first + self.block_images, self.key.images))
        views = np.arange(start, min(start + self.block_views, self.key.views))
        return np.tile(images, len(views)), np.repeat(views, len(images))

    def length(self, number: int) -> int:
        """Return the number of rows R of a shard."""
        return len(self.records(number)[0])


def layout_of(key: CacheKey) -> ShardLayout:
    """Return the layout of a key; it depends only on the key, so that all builders and readers agree."""
    most = max(key.shard_bytes // record_bytes(key), 1)
    blocks = math.ceil(key.images / most)
    block_images = math.ceil(key.images / blocks)
    grouped = min(GROUPED_BYTES, key.shard_bytes) // (record_bytes(key) * key.images)
    return ShardLayout(key, block_images, min(max(grouped, 1), key.views) if blocks == 1 else 1)


def columns(key: CacheKey) -> dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]]:
    """Return dtype and shape of each column of a record, by name."""
    number: np.dtype[np.generic] = np.dtype(np.float16 if key.dtype == "fp16" else np.float32)
    found: dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]] = {}
    if key.logits is not None and key.top_k is None:
        found["logits"] = (number, key.logits)
    elif key.logits is not None and key.top_k is not None:
        grid = key.logits[1:]
        found["logits_values"] = (number, (key.top_k, *grid))
        found["logits_classes"] = (np.dtype(np.uint16), (key.top_k, *grid))
        found["logits_rest"] = (np.dtype(np.float32), (1, *grid))
    if key.embedding is not None:
        found["embedding"] = (number, key.embedding)
    return found


def record_bytes(key: CacheKey) -> int:
    """Return the bytes per record."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in columns(key).values())


def cache_bytes(key: CacheKey) -> int:
    """Return the maximum size of a complete cache on the disk, in bytes."""
    return key.records * record_bytes(key) + (layout_of(key).shards + 4) * FOOTPRINT


def encode(key: CacheKey, outputs: Mapping[str, Tensor]) -> Arrays:
    """Convert teacher outputs to records.

    Args:
        key: signals, number format and top-k.
        outputs: `logits` [B, K, ...] and `embedding` [B, D, ...], those that the key stores.

    Raises:
        CacheError: a shape that differs from the key's, a value that is not finite or does not fit fp16.
    """
    arrays: Arrays = {}
    for name, shape in (("logits", key.logits), ("embedding", key.embedding)):
        if shape is None:
            continue
        values = outputs[name].detach().float().cpu()
        if tuple(values.shape[1:]) != shape:
            raise CacheError(
                f"the teacher's {name} of a view have shape {list(values.shape[1:])}, the cache stores {list(shape)}"
            )
        most = torch.finfo(torch.float16 if key.dtype == "fp16" else torch.float32).max
        if not bool((values.abs() <= most).all()):
            raise CacheError(
                f"the teacher's {name} hold a value that is not finite or does not fit {key.dtype} (at most {most:g}); "
                f"{'store fp32' if key.dtype == 'fp16' else 'check the teacher'}"
            )
        if name == "logits" and key.top_k is not None:
            largest, classes = values.topk(key.top_k, dim=1)
            others = values.scatter(1, classes, -torch.inf)
            arrays["logits_values"] = largest.numpy()
            arrays["logits_classes"] = classes.numpy().astype(np.uint16)
            arrays["logits_rest"] = others.logsumexp(dim=1, keepdim=True).numpy()
        else:
            arrays[name] = values.numpy()
    return {name: arrays[name].astype(dtype, copy=False) for name, (dtype, _) in columns(key).items()}


def decode(key: CacheKey, arrays: Arrays, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Convert records to teacher outputs in float32: `logits` and `embedding`.

    The mass of the logits that are not stored is distributed evenly over their classes, so that softmax preserves the
    mass of each stored class.
    """
    if key.top_k is None or key.logits is None:
        return {name: _on(device, array).float() for name, array in arrays.items()}
    values, rest = (_on(device, arrays[f"logits_{name}"]).float() for name in ("values", "rest"))
    classes = _on(device, arrays["logits_classes"].astype(np.int64))
    spread = rest - math.log(key.logits[0] - key.top_k)
    decoded = {"logits": spread.expand(-1, *key.logits).clone().scatter_(1, classes, values)}
    if key.embedding is not None:
        decoded["embedding"] = _on(device, arrays["embedding"]).float()
    return decoded


def _on(device: torch.device | str, array: NDArray[np.generic]) -> Tensor:
    """Copy an array to a device; copies to a GPU use pinned memory and are asynchronous."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def shard_name(number: int) -> str:
    """Return the name of a shard's file in the cache's folder."""
    return f"shards/{number:06d}.arrow"


def checksum(arrays: Mapping[str, NDArray[np.generic]]) -> str:
    """Return the CRC-32 of the records, column by column, as 8 hexadecimal digits."""
    value = 0
    for array in arrays.values():
        value = zlib.crc32(array.reshape(-1).view(np.uint8).data, value)
    return f"{value:08x}"


def write_shard(key: CacheKey, number: int, arrays: Arrays) -> memoryview:
    """Serialise a shard; the same records give the same bytes."""
    stored, shown = [], []
    for name, array in arrays.items():
        shape = list(array.shape[1:])
        flat = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), math.prod(shape))
        kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(array.dtype), shape)
        stored.append(pa.ExtensionArray.from_storage(kind, flat))
        shown.append(pa.field(name, kind, nullable=False))
    schema = pa.schema(shown, metadata={"cache": key.id, "shard": str(number), "crc32": checksum(arrays)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(stored, schema=schema))
    return memoryview(sink.getvalue())


def read_shard(key: CacheKey, number: int, path: str) -> tuple[Arrays, str]:
    """Return the records of a shard, memory-mapped and read-only, and the checksum in its header.

    Raises:
        DamagedShard: the file is missing, truncated, not a shard, or belongs to another cache or number.
    """
    repair = "delete it and build the cache again: only what is missing is computed"
    try:
        # The mapping lives as long as the arrays; closing releases the file descriptor.
        with pa.memory_map(path) as mapped:
            reader = pa.ipc.open_file(mapped)
            batch = reader.get_batch(0)
            batch.validate()
        header = {name.decode(): value.decode() for name, value in (batch.schema.metadata or {}).items()}
        claimed, owner, position = header["crc32"], header["cache"], int(header["shard"])
    except FileNotFoundError:
        raise DamagedShard(
            f"{path}: the shard is missing; build the cache again: only this shard is computed"
        ) from None
    except (pa.ArrowException, OSError, KeyError, ValueError, IndexError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise DamagedShard(f"{path}: is truncated or damaged ({first}); {repair}") from None
    if (owner, position) != (key.id, number):
        raise DamagedShard(f"{path}: is shard {position} of cache {owner}, not shard {number} of {key.id}; {repair}")
    length = layout_of(key).length(number)
    arrays: Arrays = {}
    try:
        for name, (dtype, shape) in columns(key).items():
            column = batch.column(batch.schema.get_field_index(name))
            flat = column.storage.flatten().to_numpy(zero_copy_only=True)
            if flat.dtype != dtype:
                raise ValueError(f"{name} is {flat.dtype}, not {dtype}")
            arrays[name] = flat.reshape(length, *shape)
    except (pa.ArrowException, AttributeError, IndexError, ValueError) as error:
        raise DamagedShard(f"{path}: is damaged ({error}); {repair}") from None
    return arrays, claimed
