"""Flags for the size of local copies and of caches in memory."""

from __future__ import annotations

import argparse

from pipeline.cli.effects import Condition
from pipeline.cli.parser import Parser, whole
from pipeline.storage.bucket import is_url
from pipeline.storage.cache import DATA_CACHE_BYTES, SHARD_CACHE_BYTES

GROUP = "performance"


def add_cache_flags(parser: Parser) -> None:
    """Adds the bounds of what is fetched from buckets, for commands that read a store."""
    parser.group(GROUP).add_argument(
        "--shard_cache_bytes",
        type=whole,
        default=SHARD_CACHE_BYTES,
        help="Size limit of local copies of shards from a bucket, which are fetched ahead.",
    )
    add_data_cache_flag(parser)


def add_data_cache_flag(parser: Parser) -> None:
    """Adds the bound of copies of data sets, for commands that read a data set."""
    parser.group(GROUP).add_argument(
        "--data_cache_bytes",
        type=whole,
        default=DATA_CACHE_BYTES,
        help="Size limit of local copies of data sets from a bucket.",
    )


def add_image_cache_flag(parser: Parser) -> None:
    """Adds the bound of decoded images in memory, for commands that render many views."""
    parser.group(GROUP).add_argument(
        "--image_cache_bytes",
        type=whole,
        default=2 << 30,
        help="Memory for decoded images, per process.",
    )


def add_input_buffer_flag(parser: Parser) -> None:
    """Adds the bound of an input pipeline's memory, for commands that render many batches."""
    parser.group(GROUP).add_argument(
        "--input_buffer_bytes",
        type=whole,
        help="Memory for batches rendered ahead, per process; limits how many are rendered in parallel (default: a "
        "quarter of the memory).",
    )


def _data_dir_is_in_a_bucket(flags: argparse.Namespace) -> bool:
    return is_url(flags.data_dir or "")


STORE_IN_BUCKET = Condition(lambda flags: is_url(flags.store or ""), "without a --store in a bucket")
DATA_IN_BUCKET = Condition(_data_dir_is_in_a_bucket, "without a --data_dir in a bucket")
# For commands whose default is the precompute's data directory, which is not known before the store is open.
DATA_MAY_BE_IN_BUCKET = Condition(
    lambda flags: flags.data_dir is None or _data_dir_is_in_a_bucket(flags),
    "with a --data_dir that is not in a bucket",
)
