"""CacheKey: everything that stored teacher outputs depend on, and the name of their folder."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import Literal

from heterokd.config.data_sizes import scaled
from heterokd.datasets.io.split import Splits
from heterokd.datasets.views.policy import BLACK, ViewSpec
from heterokd.errors import CacheError
from heterokd.networks.network import AnyNetwork
from heterokd.networks.weights import weights_hash
from heterokd.outputs import Signal
from heterokd.storage.typed_json import parse

CACHE_VERSION = 1
"""Part of every key; increase it when the same teacher and view give other bytes."""

SHARD_BYTES = 2**27
"""Maximum size of a shard: large, so that a batch reads few files; small enough to be built in memory."""

STORABLE = Signal.LOGITS | Signal.EMBEDDING
LIBRARIES = ("torch", "torchvision", "timm")
MAX_CLASSES = 2**16
"""Class numbers of top-k logits are stored in 16 bits."""
Dtype = Literal["fp16", "fp32"]

FIRST_FIELDS = (
    *("data", "split", "images", "size", "policy", "seed", "views"),
    *("teacher", "network", "options", "input_size", "mean", "std", "libraries"),
    *("dtype", "logits", "embedding", "top_k", "shard_bytes", "version"),
)
"""Fields that are part of every id, whatever their value."""


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
        teacher_size: height = width at which the teacher saw the views, in pixels; None: `size`.
        fill: colour of views outside their images.
        precision: number format of the teacher's forward pass: fp32, or bf16 under autocast.
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
    teacher_size: int | None = None
    # A later field needs a default with which the outputs are unchanged: it is then no part of the id, see `to_json`.
    fill: tuple[float, ...] = BLACK
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if self.logits is None and self.embedding is None:
            raise CacheError("a cache stores logits, embedding or both; neither was requested")
        if self.views < 1 or self.images < 1:
            raise CacheError(f"a cache needs images and views, got images={self.images}, views={self.views}")
        if self.top_k is not None:
            if self.logits is None:
                raise CacheError(f"top_k={self.top_k}: the cache stores no logits; leave top_k out")
            if not 1 <= self.top_k < self.logits[0] <= MAX_CLASSES:
                raise CacheError(
                    f"top_k={self.top_k}: keep 1 to {min(self.logits[0], MAX_CLASSES) - 1} of {self.logits[0]} logits"
                    f" (of at most {MAX_CLASSES} classes), or leave top_k out to keep all"
                )

    @property
    def id(self) -> str:
        """Name of the cache's folder: 16 hexadecimal digits of SHA-256 over `to_json`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @property
    def serves(self) -> Signal:
        """Signals that the cache stores."""
        logits = Signal.LOGITS if self.logits is not None else Signal.NONE
        return logits | (Signal.EMBEDDING if self.embedding is not None else Signal.NONE)

    @property
    def records(self) -> int:
        """Number of views in a complete cache."""
        return self.images * self.views

    def describe(self) -> str:
        """Describe the cache in a line."""
        stored = []
        if self.logits is not None:
            stored.append(f"{f'the {self.top_k} largest of ' if self.top_k else ''}logits {list(self.logits)}")
        if self.embedding is not None:
            stored.append(f"embedding {list(self.embedding)}")
        height, width = self.size if self.teacher_size is None else (self.teacher_size, self.teacher_size)
        of = "image size " if self.teacher_size is not None and self.logits is not None and len(self.logits) > 1 else ""
        return (
            f"{' and '.join(stored)} in {self.dtype} of {self.network} ({self.teacher[:8]}) on {self.views} view(s) "
            f"of {self.images} {self.split} images at {of}{height} x {width} (data {self.data[:8]}, seed {self.seed})"
        )

    def differences(self, other: CacheKey) -> list[str]:
        """List the differences to a key in words: `dtype is fp16 there and fp32 here`; `other` is the key here."""
        pairs = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return [
            f"{name} is {_short(there)} there and {_short(here)} here" for name, there, here in pairs if there != here
        ]

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
        content, known = json.loads(text), {field.name for field in fields(cls)}
        if not isinstance(content, dict) or not set(FIRST_FIELDS) <= set(content) <= known:
            raise ValueError("expected a JSON object with the fields of a cache's key")
        return parse(cls, content)


@dataclass(frozen=True)
class CacheSettings:
    """How outputs are stored.

    Attributes:
        signals: LOGITS, EMBEDDING or both.
        dtype: number format of a record; fp32 is bit-equal to the live teacher on a CPU, fp16 takes half the space.
        top_k: number of logits stored of each view; None stores all.
        shard_bytes: maximum size of a shard.
        precision: number format of the teacher's forward pass.
    """

    signals: Signal = STORABLE
    dtype: Dtype = "fp16"
    top_k: int | None = None
    shard_bytes: int = SHARD_BYTES
    precision: Literal["fp32", "bf16"] = "fp32"


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
    factor = 1.0 if views.teacher_size is None else views.teacher_size / splits.image_size
    spec = network.spec
    # Segmentation stores maps at the decoder's stride.
    grid = (
        ()
        if spec.logits_stride is None
        else tuple(math.ceil(side / spec.logits_stride) for side in scaled(size, factor))
    )
    return CacheKey(
        data=splits.fingerprint,
        split=splits.train.name,
        images=len(splits.seen),
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
        logits=(spec.num_classes, *grid) if Signal.LOGITS in signals else None,
        embedding=(spec.embedding_dim, *grid) if Signal.EMBEDDING in signals else None,
        top_k=settings.top_k,
        shard_bytes=settings.shard_bytes,
        teacher_size=views.teacher_size,
        fill=views.fill,
        precision=settings.precision,
    )


def _short(value: object) -> str:
    return value[:16] if isinstance(value, str) else str(list(value) if isinstance(value, tuple) else value)
