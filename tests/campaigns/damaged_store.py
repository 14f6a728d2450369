"""Flips random bytes of a store's files, or cuts them, and reads it: refused or the true records, never wrong ones.

    python tests/campaigns/damaged_store.py --store=DIR --trials=1000          # of a copy; minutes

Each trial damages one file, shards and metadata alike, opens the store as any command does, and reads every record
of every split. Outcomes: `refused` (DataError or UserError), `true` (as before the damage: it was where nothing is
read from, such as in the provenance), and what must not be: `wrong` records, or `crashed` with another exception.
"""

from __future__ import annotations

import collections
import dataclasses
import shutil
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.cli.main import run_command
from pipeline.cli.parser import Parser, file_path, positive
from pipeline.errors import DataError, UserError
from pipeline.store.reader import Store
from pipeline.views.records import ViewRecords

Records = dict[str, ViewRecords]


def read_all(path: Path) -> Records:
    """Every record of a store by split; the training views as `views`."""
    store = Store(path)
    store.check_files()
    readers = {"views": store.views} | {split: store.eval_reader(split) for split in store.eval_splits}
    return {split: reader.read(np.arange(reader.num_records)) for split, reader in readers.items()}


def same(found: Records, truth: Records) -> bool:
    """Whether two stores have the same splits, records and values."""
    return found.keys() == truth.keys() and all(
        np.array_equal(getattr(found[split], field.name), getattr(truth[split], field.name))
        for split in truth
        for field in dataclasses.fields(ViewRecords)
    )


def damage(data: bytes, generator: np.random.Generator) -> tuple[str, bytes]:
    """Three times in four another byte, else the file cut short."""
    place = int(generator.integers(len(data)))
    if generator.random() < 0.25:
        return "cut", data[:place]
    return "flip", data[:place] + bytes([data[place] ^ int(generator.integers(1, 256))]) + data[place + 1 :]


def campaign(
    store: Path, *, trials: int, seed: int = 0, show: bool = False
) -> collections.Counter[tuple[str, str, str]]:
    """Damages a store's files in turn and leaves them as they were.

    Args:
      store: a copy; nobody else may use it.
      trials: how many times.
      seed: of the places.
      show: a progress bar.

    Returns:
      How often each (kind of file, kind of damage, outcome) was.
    """
    truth = read_all(store)
    files = sorted(path for path in store.rglob("*") if path.is_file() and path.name != ".lock")
    generator = np.random.default_rng(seed)
    counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for trial in tqdm(range(trials), unit=" trials", disable=not show):
        path = files[trial % len(files)]
        whole = path.read_bytes()
        kind, damaged = damage(whole, generator)
        path.write_bytes(damaged)
        try:
            outcome = "true" if same(read_all(store), truth) else "wrong"
        except (DataError, UserError):
            outcome = "refused"
        except Exception as error:  # noqa: BLE001  # whatever it is, it is a finding
            outcome = f"crashed: {type(error).__name__}"
        path.write_bytes(whole)
        counts["shard" if "array_record" in path.name else path.name, kind, outcome] += 1
    if not same(read_all(store), truth):
        raise AssertionError("the store was not left as it was")
    return counts


def main(argv: list[str]) -> int:
    """The command; see the module's docstring."""
    parser = Parser(prog="python tests/campaigns/damaged_store.py")
    parser.add_argument("--store", type=file_path, required=True, help="is copied, and stays as it is")
    parser.add_argument("--trials", type=positive, default=1000)
    flags = parser.parse_strictly(argv)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(flags.store, Path(scratch, "store")))
        counts = campaign(copy, trials=flags.trials, show=True)
    print("| file | damage | outcome | times |\n| --- | --- | --- | ---: |")
    for (file, kind, outcome), count in sorted(counts.items()):
        print(f"| {file} | {kind} | {outcome} | {count} |")
    bad = sum(count for (_, _, outcome), count in counts.items() if outcome not in ("refused", "true"))
    if bad:
        raise DataError(f"{bad} of {flags.trials} damages were neither refused nor without effect")
    return 0


if __name__ == "__main__":
    run_command(main)
