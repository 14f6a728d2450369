"""Shows the contents of a store and checks that it is complete: `python -m pipeline.inspect --store=DIR`.

    python -m pipeline.inspect --store=runs/mnist_5k/store                       # seconds: opens no shard
    python -m pipeline.inspect --store=runs/mnist_5k/store --checksums           # reads every shard
    python -m pipeline.inspect --store=runs/mnist_5k/store --html=store.html     # half a minute: replays 24 views
    python -m pipeline.inspect --store=runs/mnist_5k/store --card=card.md        # seconds: for publishing the store

The page has a gallery of replayed views with the teacher's outputs, and histograms over a seeded sample of bounded size.
Exit code 3 if a published shard does not match the manifest; all such shards are listed.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.cli.main import run_module

    run_module("pipeline.inspect", flags="pipeline.flags.inspect")

from pipeline.errors import DataError
from pipeline.flags.inspect import parse
from pipeline.inputs.locate import open_dataset
from pipeline.pages.card import TODO, write_card
from pipeline.pages.summary import contents_text, find_contents, find_problems
from pipeline.pages.template import report_extra
from pipeline.storage.files import write_json
from pipeline.store.reader import StoreReader


def main(argv: list[str]) -> int:
    """Runs the command; see the module docstring."""
    flags = parse(argv)
    store = StoreReader(flags.store, shard_cache_bytes=flags.shard_cache_bytes, in_order=False)
    contents = find_contents(store)
    problems = find_problems(store, checksums=flags.checksums)
    contents |= {"whole": not problems, "checksums": flags.checksums, "problems": problems}
    print(contents_text(contents), flush=True)
    if flags.html is not None and not problems:
        with report_extra("the page"):
            from pipeline.pages.store_page import write_store_page
        dataset = open_dataset(
            store, "views", data_dir=flags.data_dir, data_cache_bytes=flags.data_cache_bytes
        )
        write_store_page(store, dataset, contents, flags.html, views=flags.views, seed=flags.seed)
        print(f"page: {flags.html}")
    if flags.card is not None and not problems:
        write_card(store, contents, flags.card)
        print(f"card: {flags.card}; add what is marked {TODO}")
    if flags.json is not None:
        write_json(flags.json, contents)
    if problems:
        given = [
            f"--{name}={path}" for name in ("html", "card") if (path := getattr(flags, name)) is not None
        ]
        page = f"; {' and '.join(given)} not written" if given else ""
        raise DataError(
            f"{flags.store}: {len(problems)} of {contents['shards']} shards do not match the manifest, first {problems[0]}"
            f"{page}; restore them from a copy, or run the precompute again with --repair"
        )
    return 0
