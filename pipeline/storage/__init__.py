"""Bytes on disks and in buckets: atomic files, locks, checked JSON, local copies, retries."""
