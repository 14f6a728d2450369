"""Damages the files of a store at random, and checks that reading refuses it or returns the true records.

    python tests/campaigns/damaged_store.py --store=DIR --trials=1000          # uses a copy; minutes

Each trial flips a byte of one shard or metadata file, or truncates it, then opens the store and reads all records of all
splits. Allowed outcomes are `refused` (DataError or UserError) and `true` (no effect, for example in the provenance).
Faults are `wrong` records and `crashed` with another exception.
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
from pipeline.store.reader import StoreReader
from pipeline.views.records import ViewRecords

Records = dict[str, ViewRecords]


def read_all(path: Path) -> Records:
    """All records of a store by split, with the training views as `views`."""
    store = StoreReader(path)
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
    """Changes a byte, or truncates the file in one of four cases."""
    place = int(generator.integers(len(data)))
    if generator.random() < 0.25:
        return "cut", data[:place]
    return "flip", data[:place] + bytes([data[place] ^ int(generator.integers(1, 256))]) + data[place + 1 :]


def campaign(
    store: Path, *, trials: int, seed: int = 0, show: bool = False
) -> collections.Counter[tuple[str, str, str]]:
    """Damages the files of a store one after the other, and restores each.

    Args:
      store: Copy of a store that nothing else uses.
      trials: Number of trials.
      seed: Random seed of the positions.
      show: Show a progress bar.

    Returns:
      Counts by kind of file, kind of damage and outcome.
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
        except Exception as error:  # noqa: BLE001  # any exception is a finding
            outcome = f"crashed: {type(error).__name__}"
        path.write_bytes(whole)
        counts["shard" if "array_record" in path.name else path.name, kind, outcome] += 1
    if not same(read_all(store), truth):
        raise AssertionError("the store was not restored")
    return counts


def main(argv: list[str]) -> int:
    """Runs the campaign and prints a table."""
    parser = Parser(prog="python tests/campaigns/damaged_store.py")
    parser.add_argument(
        "--store", type=file_path, required=True, help="Store, which is copied and not changed."
    )
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
        raise DataError(f"{bad} of {flags.trials} trials returned wrong records or crashed")
    return 0


if __name__ == "__main__":
    run_command(main)
