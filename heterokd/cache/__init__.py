"""Teacher outputs on disk, keyed by view: computed once, shared by all trials through the page cache.

`key` names a cache, `shards` lays records out, `computing` makes them, `building` writes them, `reading` maps and
audits them, `teacher` serves them, `use` says who is at it, `upkeep` lists, verifies and prunes.
"""

from heterokd.cache.building import build_shard, build_shards, check_space, finish, missing
from heterokd.cache.computing import Compute, SteadyTeacher, view_outputs
from heterokd.cache.key import CacheKey, make_key
from heterokd.cache.reading import Records, open_records, read_key
from heterokd.cache.shards import cache_bytes, layout_of
from heterokd.cache.teacher import CachedTeacher, CacheSettings, open_or_build
from heterokd.cache.upkeep import CacheCard, list_caches, mend_cache, prune_caches, verify_cache
from heterokd.cache.use import Hold, hold

__all__ = [
    "CacheCard",
    "CacheKey",
    "CacheSettings",
    "CachedTeacher",
    "Compute",
    "Hold",
    "Records",
    "SteadyTeacher",
    "build_shard",
    "build_shards",
    "cache_bytes",
    "check_space",
    "finish",
    "hold",
    "layout_of",
    "list_caches",
    "make_key",
    "mend_cache",
    "missing",
    "open_or_build",
    "open_records",
    "prune_caches",
    "read_key",
    "verify_cache",
    "view_outputs",
]
