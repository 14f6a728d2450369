"""What a store holds, and whether it is whole: `python -m pipeline.inspect --store=DIR`.

    python -m pipeline.inspect --store=runs/mnist_5k/store                       # seconds: opens no shard
    python -m pipeline.inspect --store=runs/mnist_5k/store --checksums           # reads every shard
    python -m pipeline.inspect --store=runs/mnist_5k/store --html=store.html     # half a minute: replays 24 views

The page needs no network: a gallery of replayed views with what the teacher made of them, and histograms over a
seeded sample that is bounded, however large the store is. Exit code 3 if a published shard is not as the manifest
says; all of them are listed.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.cli.main import run_module

    run_module("pipeline.inspect", flags="pipeline.flags.inspect")

from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.errors import DataError
from pipeline.flags.inspect import parse
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.locate import open_dataset
from pipeline.pages.summary import Contents, contents_text, find_contents, find_problems
from pipeline.pages.template import report_extra
from pipeline.precomputing.sample import IMAGES, count_areas, count_records, sample_views, spread
from pipeline.storage.files import write_json, write_text
from pipeline.store.reader import Store


def write_page(
    store: Store, dataset: Dataset, contents: Contents, path: Path, *, views: int, seed: int
) -> None:
    """Samples and replays, adds `sample` and `gallery` to the contents, and writes the page.

    Raises:
      UserError: the data set is not there, or the packages of the extra `report` are not installed.
      DataError: a shard is damaged, or the data set is another.
    """
    with report_extra("the page"):
        from pipeline.pages import charts, store_page  # noqa: F401  # Matplotlib is missed before the work
    store.spec.check_renderer()
    sampled = sample_views(store.views, seed=seed)
    shown = spread(np.concatenate(sampled), views, seed=seed, stream="gallery")
    total = sum(map(len, sampled))
    with tqdm(
        total=total + min(total, IMAGES) + len(shown), unit=" views", desc="sample", dynamic_ncols=True
    ) as bar:
        contents["sample"] = {
            "seed": seed,
            **count_records(store, sampled, on_views=bar.update),
            "area": count_areas(store, dataset, sampled, seed=seed, on_views=bar.update),
        }
        gallery = store_page.make_gallery(store, dataset, shown, on_views=bar.update)
    contents["gallery"] = [view.facts for view in gallery]
    write_text(path, store_page.render_store(contents, gallery))


def main(argv: list[str]) -> int:
    """The command; see the module's docstring."""
    flags = parse(argv)
    store = Store(flags.store, shard_cache_bytes=flags.shard_cache_bytes, in_order=False)
    contents = find_contents(store)
    problems = find_problems(store, checksums=flags.checksums)
    contents |= {"whole": not problems, "checksums": flags.checksums, "problems": problems}
    print(contents_text(contents), flush=True)
    if flags.html is not None and not problems:
        dataset = open_dataset(
            store, "views", data_dir=flags.data_dir, data_cache_bytes=flags.data_cache_bytes
        )
        write_page(store, dataset, contents, flags.html, views=flags.views, seed=flags.seed)
        print(f"page: {flags.html}")
    if flags.json is not None:
        write_json(flags.json, contents)
    if problems:
        page = f"; --html={flags.html} was not written" if flags.html is not None else ""
        raise DataError(
            f"{flags.store}: {len(problems)} of {contents['shards']} shards are not as the manifest says, first "
            f"{problems[0]}{page}; bring them back from a copy, or run the precompute again with --repair"
        )
    return 0
