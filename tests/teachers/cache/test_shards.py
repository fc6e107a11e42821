"""Records: where they lie, what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from cached_views import built, made_up, small_key
from hypothesis import given, settings
from hypothesis import strategies as st

from heterokd.errors import CacheError
from heterokd.storage.filesystem import open_folder
from heterokd.teachers.cache.shards import cache_bytes, decode, encode, layout_of


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5000))
def test_every_record_has_one_place(images: int, views: int, shard_bytes: int) -> None:
    layout = layout_of(small_key(images=images, views=views, shard_bytes=shard_bytes))
    seen = set()
    for number in range(layout.shards):
        index, view = layout.records(number)
        shards, rows = layout.locate(index, view)
        assert (shards == number).all()
        assert rows.tolist() == list(range(len(index)))
        assert len(index) * 64 <= max(shard_bytes, 64)
        seen |= set(zip(index.tolist(), view.tolist(), strict=True))
    assert len(seen) == images * views
    assert not layout.records(0)[1].min()


SHAPES = {
    "fp32": {},
    "fp16": {"dtype": "fp16"},
    "logits alone": {"embedding": None},
    "embedding alone": {"logits": None},
    "maps": {"logits": (10, 2, 3), "embedding": (6, 2, 3)},
    "top-k": {"top_k": 3},
    "top-k maps": {"logits": (10, 2, 3), "embedding": None, "top_k": 2, "dtype": "fp16"},
    "one shard": {"shard_bytes": 2**20},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_a_random_batch_is_what_was_computed(changes: dict[str, Any], tmp_path: Path) -> None:
    key = small_key(**changes)
    records = built(open_folder(tmp_path), key)
    random = np.random.default_rng(0)
    index, view = random.integers(0, key.images, 64), random.integers(0, key.views, 64)
    computed = made_up(key)(index, view)
    arrays = records.gather(index, view)
    assert arrays is not None
    read = decode(key, arrays)
    assert set(read) == set(computed)
    for name, tensor in computed.items():
        expected = tensor.half().float() if key.dtype == "fp16" else tensor
        if name == "logits" and key.top_k is not None:
            kept = tensor.topk(key.top_k, dim=1).indices
            assert torch.allclose(
                read[name].softmax(1).gather(1, kept), tensor.softmax(1).gather(1, kept), atol=2e-3, rtol=1e-3
            )
            assert read[name].shape == tensor.shape
        else:
            assert torch.equal(read[name], expected)
    size = sum(file.size for file in records.folder.files())
    assert size <= cache_bytes(key)


def test_top_k_in_fp32_keeps_masses_and_spreads_the_rest_evenly() -> None:
    key = small_key(top_k=3, embedding=None)
    logits = made_up(key)(np.arange(17), np.zeros(17, np.int64))["logits"]
    read = decode(key, encode(key, {"logits": logits}))["logits"]
    kept = logits.topk(3, dim=1).indices
    mass = read.softmax(1)
    torch.testing.assert_close(mass.gather(1, kept), logits.softmax(1).gather(1, kept))
    rest = mass.scatter(1, kept, torch.nan)
    spread = rest[~rest.isnan()].view(17, 7)
    torch.testing.assert_close(spread, spread.mean(1, keepdim=True).expand(-1, 7))


def test_shards_are_read_by_any_arrow(tmp_path: Path) -> None:
    records = built(open_folder(tmp_path), small_key(dtype="fp16", logits=(10, 2, 2)))
    with pa.ipc.open_file(str(records.folder.local / "shards/000000.arrow")) as reader:  # type: ignore[operator]
        table = reader.read_all()
    assert table.schema.field("logits").type == pa.fixed_shape_tensor(pa.float16(), [10, 2, 2])
    index, view = records.layout.records(0)
    column = table.column("logits").combine_chunks().to_numpy_ndarray()
    assert (column == made_up(records.key)(index, view)["logits"].half().numpy()).all()


def test_many_mapped_shards_hold_no_file_descriptors(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    records = built(open_folder(tmp_path), small_key(images=60, views=2, shard_bytes=64), verify="full")
    assert records.layout.shards == 120
    assert descriptors() - before < 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_what_does_not_fit_is_refused(value: float) -> None:
    key = small_key(dtype="fp16")
    outputs = {"logits": torch.full((2, 10), value), "embedding": torch.zeros(2, 6)}
    with pytest.raises(CacheError, match=r"logits hold a value that .* fp16 \(at most 65504\); store fp32"):
        encode(key, outputs)
    with pytest.raises(CacheError, match=r"embedding of a view have shape \[7\], the cache stores \[6\]"):
        encode(key, {"logits": torch.zeros(2, 10), "embedding": torch.zeros(2, 7)})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"top_k": 10}, "keep 1 to 9 of 10"),
        ({"top_k": 1, "logits": None}, "stores no logits"),
        ({"logits": None, "embedding": None}, "neither was requested"),
        ({"views": 0}, "views=0"),
    ],
)
def test_impossible_keys_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CacheError, match=said):
        small_key(**changes)


def test_views_that_are_not_stored_are_refused(tmp_path: Path) -> None:
    records = built(open_folder(tmp_path), small_key())
    with pytest.raises(CacheError, match="give the loader views=5"):
        records.gather(np.array([0]), np.array([5]))
