"""Flags that bound what a command copies from buckets and holds in memory."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.cli.parser import Parser, refuse_without_effect, whole
from pipeline.storage.bucket import is_url
from pipeline.storage.cache import DATA_CACHE_BYTES, SHARD_CACHE_BYTES


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


def check_cache_flags(given: Collection[str], *, store: str | None, data_dir: str | None) -> None:
    """Refuses bounds of copies from buckets where nothing comes from a bucket.

    Args:
      given: names of the flags that were given.
      store: None where the command reads none.
      data_dir: None where it is not known here.

    Raises:
      UserError: one of them has no effect.
    """
    if store is not None and not is_url(store):
        refuse_without_effect(given, ["shard_cache_bytes"], f"with --store={store}, which is not in a bucket")
    if data_dir is not None and not is_url(data_dir):
        refuse_without_effect(
            given, ["data_cache_bytes"], f"with --data_dir={data_dir}, which is not in a bucket"
        )
