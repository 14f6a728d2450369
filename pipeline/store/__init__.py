"""The store: its layout, spec, codecs, shards, metadata and reader."""
