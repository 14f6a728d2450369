"""The flags of `pipeline.verify`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pipeline.cli.cache_flags import add_cache_flags, check_cache_flags
from pipeline.cli.parser import Parser, check_exists, number, place, whole
from pipeline.errors import UserError
from pipeline.store.layout import check_store


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser(prog="python -m pipeline.verify", description="Verifies a store against its teacher.")
    add = parser.add_argument
    add("--store", type=place, required=True, help="directory of the store, or its URL in a bucket")
    add(
        "--teacher",
        type=place,
        help="SavedModel or .keras file; by default where the precompute found it",
    )
    add("--data_dir", type=place, help="TFDS data directory; by default the precompute's")
    add_cache_flags(parser)
    add("--fraction", type=number, default=0.01, help="of the views that are run again, 0 to 1")
    add("--seed", type=whole, default=0, help="of the sample")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's flags, and refuses what can be refused without TensorFlow.

    Raises:
      UserError: a flag is unknown or out of range, or a path is missing.
    """
    parser = make_parser()
    flags, given = parser.parse_strictly(argv), parser.given(argv)
    if flags.fraction > 1:
        raise UserError(f"--fraction={flags.fraction}: expected 0 to 1")
    check_store(flags.store)
    check_exists("--data_dir", flags.data_dir)
    check_exists("--teacher", flags.teacher)
    check_cache_flags(given, store=flags.store, data_dir=flags.data_dir)
    return flags
