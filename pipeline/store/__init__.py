"""The store: ArrayRecord shards of views and teacher logits, a spec, a manifest, and TFDS's metadata."""
