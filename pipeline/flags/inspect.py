"""The flags of `pipeline.inspect`."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

from pipeline.cli.cache_flags import DATA_MAY_BE_IN_BUCKET, STORE_IN_BUCKET, add_cache_flags
from pipeline.cli.effects import Condition, parse_effective
from pipeline.cli.parser import Parser, check_exists, output_path, place, positive, whole
from pipeline.errors import UserError
from pipeline.store.layout import check_store

_MAX_VIEWS = 1000  # a longer page is too much for a browser
_WITH_PAGE = Condition(lambda flags: flags.html is not None, "without --html")

CONDITIONS = {
    "shard_cache_bytes": STORE_IN_BUCKET,
    **dict.fromkeys(("views", "seed", "data_dir"), _WITH_PAGE),
    "data_cache_bytes": Condition(
        lambda flags: _WITH_PAGE.holds(flags) and DATA_MAY_BE_IN_BUCKET.holds(flags),
        "without --html, or with a --data_dir that is not in a bucket",
    ),
}


def make_parser() -> Parser:
    """The command's parser."""
    parser = Parser(
        prog="python -m pipeline.inspect",
        description="Prints a summary of a store, and reports missing or damaged shards.",
        examples=[
            "python -m pipeline.inspect --store=runs/mnist_5k/store",
            "python -m pipeline.inspect --store=runs/flowers/store --checksums --html=store.html",
        ],
    )
    add = parser.group("data").add_argument
    add(
        "--data_dir",
        type=place,
        help="TFDS data directory for --html, or its URL (default: the precompute's).",
    )
    add = parser.group("store").add_argument
    add("--store", type=place, required=True, help="Directory of the store, or its URL in a bucket.")
    add("--checksums", action="store_true", help="Read every shard and compare its SHA-256.")
    add = parser.group("output").add_argument
    add("--json", type=output_path, help="File for all figures.")
    add("--html", type=output_path, help="File for a page with charts and a gallery of views.")
    add(
        "--card",
        type=output_path,
        help="File for a data set card: Markdown with a YAML header, for publishing the store on a hub.",
    )
    add("--views", type=positive, default=24, help="Number of views in the gallery.")
    add("--seed", type=whole, default=0, help="Random seed of the gallery and of the sampled statistics.")
    add_cache_flags(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's flags, and refuses what can be refused without TensorFlow.

    Raises:
      UserError: a flag is unknown, out of range or without effect, or a path does not exist.
    """
    flags = parse_effective(make_parser(), argv, CONDITIONS)
    if flags.views > _MAX_VIEWS:
        raise UserError(f"--views={flags.views}: expected at most {_MAX_VIEWS}, for the page to be usable")
    given = [(name, path) for name in ("json", "html", "card") if (path := getattr(flags, name)) is not None]
    for (name, path), (other, same) in itertools.combinations(given, 2):
        if path.resolve() == same.resolve():
            raise UserError(
                f"--{other}={same}: is the file of --{name}={path} as well; name two different files"
            )
    check_store(flags.store)
    check_exists("--data_dir", flags.data_dir)
    return flags
