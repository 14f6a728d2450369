"""The flags of `pipeline.inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pipeline.cli.cache_flags import add_cache_flags, check_cache_flags
from pipeline.cli.parser import (
    Parser,
    check_exists,
    output_path,
    place,
    positive,
    refuse_without_effect,
    whole,
)
from pipeline.errors import UserError
from pipeline.store.layout import check_store

_MOST_VIEWS = 1000  # a page of more is too long for a browser


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser(
        prog="python -m pipeline.inspect", description="Says what a store holds, and whether it is whole."
    )
    add = parser.add_argument
    add("--store", type=place, required=True, help="directory of the store, or its URL in a bucket")
    add("--checksums", action="store_true", help="read every shard and compare its SHA-256")
    add("--json", type=output_path, help="file to write all of it to")
    add("--html", type=output_path, help="file to write a page with a gallery of views to")
    add("--views", type=positive, default=24, help="in the gallery")
    add("--seed", type=whole, default=0, help="of the sample and the gallery")
    add("--data_dir", type=place, help="TFDS data directory, for --html; by default the precompute's")
    add_cache_flags(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's flags, and refuses what can be refused without TensorFlow.

    Raises:
      UserError: a flag is unknown or out of range, or a path is missing.
    """
    parser = make_parser()
    flags, given = parser.parse_strictly(argv), parser.given(argv)
    if flags.views > _MOST_VIEWS:
        raise UserError(f"--views={flags.views}: expected {_MOST_VIEWS} or less, a page of more is too long")
    check_store(flags.store)
    check_exists("--data_dir", flags.data_dir)
    check_cache_flags(given, store=flags.store, data_dir=flags.data_dir)
    if flags.html is None:
        refuse_without_effect(given, ["views", "seed", "data_dir", "data_cache_bytes"], "without --html")
    return flags
