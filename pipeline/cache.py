"""Where this project keeps what it can make or fetch again, and how much of it."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.flags import Parser, whole

SHARD_CACHE_BYTES = 16 << 30
DATA_CACHE_BYTES = 256 << 30


def add_cache_flags(parser: Parser) -> None:
    """Bounds of what is fetched from buckets, for commands that read a store."""
    add = parser.add_argument
    add(
        "--shard_cache_bytes",
        type=whole,
        default=SHARD_CACHE_BYTES,
        help="for shards of a store in a bucket, which are fetched ahead of need",
    )
    add_data_cache_flag(parser)


def add_data_cache_flag(parser: Parser) -> None:
    """Bound of the copies of data sets, for commands that write a store as well."""
    parser.add_argument(
        "--data_cache_bytes",
        type=whole,
        default=DATA_CACHE_BYTES,
        help="for data sets in a bucket, which are copied to this machine once",
    )


def add_input_buffer_flag(parser: Parser) -> None:
    """Bound of what an input pipeline holds, for commands that render many batches."""
    parser.add_argument(
        "--input_buffer_bytes",
        type=whole,
        help="for batches that are rendered ahead, per process; bounds how many are rendered at a time; by default a "
        "quarter of the memory",
    )


def cache_dir() -> Path:
    """Where the embedded default and copies of buckets are kept.

    Returns:
      `$VIEW_DISTILL_CACHE`, else `$XDG_CACHE_HOME/view-distill`, else `~/.cache/view-distill`. An empty
      variable counts as unset. The directory need not exist.
    """
    if own := os.environ.get("VIEW_DISTILL_CACHE"):
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg).expanduser() if xdg else Path.home() / ".cache") / "view-distill"
