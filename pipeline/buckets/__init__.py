"""Directories in buckets, `s3://` and `gs://`, by fsspec: read and written whole, copied, and held by one writer."""
