"""Small caches for the tests: made-up outputs of made-up views, each a function of (index, view)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heterokd.storage.filesystem import RemoteDir
from heterokd.teachers.cache.build import build_shards, finish
from heterokd.teachers.cache.compute import Compute
from heterokd.teachers.cache.key import CacheKey
from heterokd.teachers.cache.records import Records, open_records


def small_key(**changes: Any) -> CacheKey:
    """Seventeen images, five views, ten classes, six features; a few shards."""
    values: dict[str, Any] = {
        "data": "d" * 64,
        "split": "train",
        "images": 17,
        "size": (8, 8),
        "policy": "p" * 16,
        "seed": 0,
        "views": 5,
        "teacher": "t" * 64,
        "network": "test_vit",
        "options": "{}",
        "input_size": 8,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "libraries": ("torch 2.14",),
        "dtype": "fp32",
        "logits": (10,),
        "embedding": (6,),
        "shard_bytes": 400,
    }
    return CacheKey(**{**values, **changes})


def made_up(key: CacheKey, salt: int = 0) -> Compute:
    """Outputs that any other process makes the same."""

    def compute(index: NDArray[np.int64], view: NDArray[np.int64]) -> Mapping[str, Tensor]:
        shapes = {"logits": key.logits, "embedding": key.embedding}
        found: dict[str, list[Tensor]] = {name: [] for name, shape in shapes.items() if shape is not None}
        for image, number in zip(index.tolist(), view.tolist(), strict=True):
            random = np.random.default_rng((image, number, salt))
            for name in found:
                found[name].append(torch.from_numpy(3 * random.normal(size=shapes[name])).float())
        return {name: torch.stack(tensors) for name, tensors in found.items()}

    return compute


def built(caches: RemoteDir, key: CacheKey, **more: Any) -> Records:
    """A finished cache, opened."""
    folder = caches.at(key.id)
    build_shards(folder, key, made_up(key))
    finish(folder, key)
    return open_records(folder, key, **more)
