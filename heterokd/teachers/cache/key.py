"""CacheKey: all that stored teacher outputs depend on, and the name of their folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import Any, Literal

from heterokd.datasets.io.split import Splits
from heterokd.datasets.views.policy import ViewSpec
from heterokd.errors import CacheError
from heterokd.networks.network import AnyNetwork
from heterokd.networks.weights import weights_hash
from heterokd.outputs import OutputSpec, Signal

CACHE_VERSION = 1
"""Part of every key; to be raised when the same teacher and view give other bytes."""

SHARD_BYTES = 2**27
"""Maximum size of a shard: large, so that a batch reads few files; small enough to be built in memory."""

STORABLE = Signal.LOGITS | Signal.EMBEDDING
LIBRARIES = ("torch", "torchvision", "timm")
MOST_CLASSES = 2**16  # class numbers of top-k logits are stored in 16 bits
Dtype = Literal["fp16", "fp32"]

FIRST_FIELDS = (
    *("data", "split", "images", "size", "policy", "seed", "views"),
    *("teacher", "network", "options", "input_size", "mean", "std", "libraries"),
    *("dtype", "logits", "embedding", "top_k", "shard_bytes", "version"),
)
"""Fields of the first keys, part of every cache's name."""

WORDS = {
    "data": "the data set's content",
    "split": "the split",
    "images": "the number of images",
    "size": "the size of a view",
    "policy": "the augmentation policy",
    "seed": "the seed of the views",
    "views": "the number of views",
    "teacher": "the teacher's weights",
    "network": "the teacher's network",
    "options": "the teacher's options",
    "input_size": "the teacher's input size",
    "mean": "the teacher's mean",
    "std": "the teacher's standard deviation",
    "libraries": "the library versions",
    "dtype": "the number format",
    "logits": "the shape of the logits",
    "embedding": "the shape of the embedding",
    "top_k": "the number of logits kept",
    "shard_bytes": "the size of a shard",
    "version": "the version of the cache's code",
}
"""Description of each field, for messages about the difference of two keys."""


@dataclass(frozen=True)
class CacheKey:
    """Identity of a cache.

    Attributes:
        data: fingerprint of the data set.
        split: the split whose views are stored.
        images: N of that split.
        size: height and width of a view, in pixels.
        policy: hash of the augmentation policy.
        seed: seed of the views.
        views: K, the number of views of each image.
        teacher: SHA-256 of the teacher's weights.
        network: name of the teacher's network.
        options: options of the network, as sorted JSON.
        input_size: height = width of the network's input, in pixels.
        mean, std: normalisation of the input, per channel.
        libraries: `name major.minor` of the libraries in `LIBRARIES`.
        dtype: number format of a record.
        logits: shape of an image's logits, [K] or [K, h, w]; None: not stored.
        embedding: shape of an image's embedding, [D] or [D, h, w]; None: not stored.
        top_k: number of logits stored of each view, the largest; None: all.
        shard_bytes: maximum size of a shard, which holds at least one record.
        version: version of the code that computes and stores, `CACHE_VERSION`.
    """

    data: str
    split: str
    images: int
    size: tuple[int, int]
    policy: str
    seed: int
    views: int
    teacher: str
    network: str
    options: str
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    libraries: tuple[str, ...]
    dtype: Dtype
    logits: tuple[int, ...] | None
    embedding: tuple[int, ...] | None
    top_k: int | None = None
    shard_bytes: int = SHARD_BYTES
    version: int = CACHE_VERSION
    # A field added here needs a default that changes nothing: at its default it is no part of the id, see `to_json`.

    def __post_init__(self) -> None:
        if self.logits is None and self.embedding is None:
            raise CacheError("a cache stores logits, embedding or both; neither was asked for")
        if self.views < 1 or self.images < 1:
            raise CacheError(f"a cache needs images and views, got images={self.images}, views={self.views}")
        if self.top_k is not None:
            if self.logits is None:
                raise CacheError(f"top_k={self.top_k}: the cache stores no logits; leave top_k out")
            if not 1 <= self.top_k < self.logits[0] <= MOST_CLASSES:
                raise CacheError(
                    f"top_k={self.top_k}: keep 1 to {min(self.logits[0], MOST_CLASSES) - 1} of {self.logits[0]} logits"
                    f" (of at most {MOST_CLASSES} classes), or leave top_k out to keep all"
                )

    @property
    def id(self) -> str:
        """Name of the cache's folder: 16 hexadecimal digits of SHA-256 over `to_json`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @property
    def serves(self) -> Signal:
        """Stored signals."""
        logits = Signal.LOGITS if self.logits is not None else Signal.NONE
        return logits | (Signal.EMBEDDING if self.embedding is not None else Signal.NONE)

    @property
    def records(self) -> int:
        """Number of views in a complete cache."""
        return self.images * self.views

    def describe(self) -> str:
        """Describe the cache in a line."""
        kept = [] if self.logits is None else [f"logits {list(self.logits)}"]
        if self.top_k is not None:
            kept = [f"the {self.top_k} largest of logits {list(self.logits or ())}"]
        if self.embedding is not None:
            kept.append(f"embedding {list(self.embedding)}")
        height, width = self.size
        return (
            f"{' and '.join(kept)} in {self.dtype} of {self.network} ({self.teacher[:8]}) on {self.views} view(s) "
            f"of {self.images} {self.split} images at {height} x {width} (data {self.data[:8]}, seed {self.seed})"
        )

    def differences(self, other: CacheKey) -> list[str]:
        """List the differences in words, with `other` as here: `the number format is fp16 there and fp32 here`."""
        found = []
        for field in fields(self):
            there, here = getattr(self, field.name), getattr(other, field.name)
            if there != here:
                found.append(f"{WORDS[field.name]} is {_short(there)} there and {_short(here)} here")
        return found

    def to_json(self) -> str:
        """Return the text of key.json: the fields of `FIRST_FIELDS`, and others that differ from their default."""
        later = {field.name: field.default for field in fields(self) if field.name not in FIRST_FIELDS}
        content = {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}
        return json.dumps(content, sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> CacheKey:
        """Parse the text of key.json.

        Raises:
            ValueError: the text is not a key.
        """
        content: Any = json.loads(text)
        known = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or not set(FIRST_FIELDS) <= set(content) <= known:
            raise ValueError("expected a JSON object with the fields of a cache's key")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        return cls(**values)


@dataclass(frozen=True)
class CacheSettings:
    """How outputs are stored.

    Attributes:
        signals: LOGITS, EMBEDDING or both.
        dtype: number format of a record; fp32 is bit-equal to the live teacher on a CPU, fp16 takes half the space.
        top_k: number of logits stored of each view; None stores all.
        shard_bytes: maximum size of a shard.
    """

    signals: Signal = STORABLE
    dtype: Dtype = "fp16"
    top_k: int | None = None
    shard_bytes: int = SHARD_BYTES


DEFAULT = CacheSettings()


def make_key(splits: Splits, views: ViewSpec, network: AnyNetwork, settings: CacheSettings = DEFAULT) -> CacheKey:
    """Return the key of a teacher's outputs on the train split.

    Args:
        splits: the data set; `Batch.index` is a position in its train split.
        views: views of the training images, as many as `views.views`.
        network: network of the teacher.
        settings: how outputs are stored.

    Raises:
        CacheError: nothing to store, another signal, or an impossible `top_k`.
    """
    signals = settings.signals
    if signals & ~STORABLE:
        raise CacheError(f"a cache stores LOGITS and EMBEDDING; {signals & ~STORABLE} needs the live teacher")
    if views.views is None:
        raise CacheError("a cache stores a fixed number of views of each image; give ViewSpec.views")
    size = views.crop or (splits.image_size, splits.image_size)
    spec = network.spec
    shapes = signal_shapes(spec, size)
    return CacheKey(
        data=splits.fingerprint,
        split=splits.train.name,
        images=len(splits.train),
        size=size,
        policy=views.policy.hash,
        seed=views.seed,
        views=views.views,
        teacher=weights_hash(network),
        network=str(network.name),
        options=json.dumps(network.options, sort_keys=True, default=str),
        input_size=spec.image_size,
        mean=tuple(network.mean.flatten().tolist()),
        std=tuple(network.std.flatten().tolist()),
        libraries=tuple(f"{name} {'.'.join(version(name).split('.')[:2])}" for name in LIBRARIES),
        dtype=settings.dtype,
        logits=shapes["logits"] if Signal.LOGITS in signals else None,
        embedding=shapes["embedding"] if Signal.EMBEDDING in signals else None,
        top_k=settings.top_k,
        shard_bytes=settings.shard_bytes,
    )


def signal_shapes(spec: OutputSpec, size: tuple[int, int]) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of a view's logits and embedding for views of `size`; segmentation: at the decoder's stride."""
    stride = spec.logits_stride
    grid = () if stride is None else tuple(math.ceil(side / stride) for side in size)
    return {"logits": (spec.num_classes, *grid), "embedding": (spec.embedding_dim, *grid)}


def _short(value: object) -> str:
    return value[:16] if isinstance(value, str) else str(list(value) if isinstance(value, tuple) else value)
