"""Data sets in stores and in shards: their index, their copy on a node, and shards that `heterokd data push` makes."""
