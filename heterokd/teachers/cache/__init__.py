"""Teacher outputs on disk, keyed by view: computed once, shared by all trials through the page cache.

`key` names a cache, `shards` lays records out, `computing` makes them, `building` writes them, `reading` maps and
audits them, `teacher` serves them, `use` says who is at it, `upkeep` lists, verifies and prunes.
"""
