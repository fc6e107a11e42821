"""Teacher outputs on disk, keyed by view: computed once, shared by all trials through the page cache.

`key` identifies a cache, `shards` defines the file format, `compute` runs the teacher, `build` writes the shards,
`records` maps and audits them, `cached_teacher` serves them, `locks` guards a cache in use, `maintenance` lists,
verifies and prunes caches.
"""
