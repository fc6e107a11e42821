"""Teacher outputs on disk by view: computed once, shared by all trials through the page cache.

`key` identifies a cache, `shards` defines the file format, `compute` runs the teacher, `build` writes the shards,
`records` maps and verifies them, `cached_teacher` serves them, `locks` protects a cache in use, `maintenance` lists,
verifies, repairs and deletes caches.
"""
