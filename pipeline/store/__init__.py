"""The store: layout, spec, codecs, shards, metadata and reader."""
