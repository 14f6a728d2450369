"""The flags of `pipeline.verify`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pipeline.cli.cache_flags import DATA_MAY_BE_IN_BUCKET, STORE_IN_BUCKET, add_cache_flags
from pipeline.cli.effects import parse_effective
from pipeline.cli.parser import Parser, check_exists, check_model, number, place, whole
from pipeline.errors import UserError
from pipeline.store.layout import check_store

CONDITIONS = {"shard_cache_bytes": STORE_IN_BUCKET, "data_cache_bytes": DATA_MAY_BE_IN_BUCKET}


def make_parser() -> Parser:
    """The command's parser."""
    parser = Parser(
        prog="python -m pipeline.verify",
        description="Verifies a store: checks all shards against the manifest, and recomputes a sample of views with the "
        "teacher.",
        examples=[
            "python -m pipeline.verify --store=runs/mnist_5k/store",
            "python -m pipeline.verify --store=gs://bucket/flowers --data_dir=data --teacher=teacher --fraction=0.1",
        ],
    )
    add = parser.group("data").add_argument
    add("--data_dir", type=place, help="TFDS data directory, or its URL (default: the precompute's).")
    add = parser.group("teacher").add_argument
    add(
        "--teacher",
        type=place,
        help="SavedModel directory or .keras file, or its URL (default: the precompute's).",
    )
    add = parser.group("store").add_argument
    add("--store", type=place, required=True, help="Directory of the store, or its URL in a bucket.")
    add("--fraction", type=number, default=0.01, help="Share of views to recompute, 0 to 1.")
    add("--seed", type=whole, default=0, help="Random seed of the sample.")
    add_cache_flags(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's flags, and refuses what can be refused without TensorFlow.

    Raises:
      UserError: a flag is unknown, out of range or without effect, or a path does not exist.
    """
    flags = parse_effective(make_parser(), argv, CONDITIONS)
    if flags.fraction > 1:
        raise UserError(f"--fraction={flags.fraction}: expected 0 to 1")
    check_store(flags.store)
    check_exists("--data_dir", flags.data_dir)
    check_model("--teacher", flags.teacher)
    return flags
