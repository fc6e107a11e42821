"""Which split the name of a folder, of a shard or in a table means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from heterokd.datasets.io.split import SplitName

SPLIT_WORDS: Mapping[str, SplitName] = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "valset", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "testset"), "test"),
}

# Say nothing about the split: `train_images`, `seg_test`, `val2017`.
OTHER_WORDS = frozenset(("", "set", "data", "dataset", "split", "seg", "image", "images", "img", "imgs", "folder"))


@lru_cache(4096)
def split_named(name: str) -> SplitName | None:
    """Return the split that a name means, in any case: `Train`, `val2017`, `test_set`; None if it means none."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word not in OTHER_WORDS]
    return SPLIT_WORDS.get(words[0]) if len(words) == 1 else None
