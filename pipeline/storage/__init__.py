"""Bytes on disks and in buckets: atomic files, locks, checked JSON, copies."""
