"""Prints the costs of each codec as a Markdown table: bytes per view, KL, and rate of reading.

    python tests/benchmarks/codecs.py                      # synthetic logits of 1,000 classes; one minute
    python tests/benchmarks/codecs.py --store=DIR          # logits of a store, preferably a float32 one

Two published layouts are measured on the same logits:

- TinyViT (microsoft/Cream, `dataset_wrapper.py`): a record has a seed, K int16 classes and K float16 probabilities; the
  other classes share the rest evenly. K is 10 for 1,000 classes and 100 for 21,841.
- ml-dr (apple/ml-dr, `reinforce.py`): one pickle per image, with parameters and the 10 largest probabilities of each view
  as lists of numbers; the other classes share the rest evenly (`densify="smooth"`).

Both store probabilities at temperature 1. At other temperatures their logarithms replace the logits, with 2**-24, the
smallest float16, for a probability of 0. Bytes include the whole record with the parameters of the view. Rates are those
of batches of 512 consecutive views on one thread with a warm file cache, decoded to float32 [512, C].
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from alternate import measure, median

from pipeline.cli.main import run_command
from pipeline.cli.parser import Parser, positive
from pipeline.store.codecs import make_codec
from pipeline.store.metadata import SplitManifest
from pipeline.store.openers import DiskOpener
from pipeline.store.reader import SplitReader, StoreReader
from pipeline.store.serialization import serialize
from pipeline.store.shards import ShardInfo, shard_name, write_shard
from pipeline.store.softmax import fidelity, log_softmax
from pipeline.views.records import ViewRecords
from tests.stores import ANY_DATASET

BATCH = 512
VIEWS_PER_IMAGE = 16  # in the files of ml-dr, whose own have 400
LEAST = 2.0**-24
Decode = Callable[[np.ndarray], np.ndarray]  # views int [n] to logits float32 [n, C]


def synthetic_logits(views: int, classes: int, *, seed: int = 0) -> np.ndarray:
    """Logits similar to those of a good teacher on mixed views: noise of deviation 1.5 and one to five large classes."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 1.5, (views, classes))
    rows = np.arange(views)
    for rank in range(5):
        heights = generator.uniform(4, 14, views) * 0.7**rank * (generator.random(views) < 0.8**rank)
        logits[rows, generator.integers(0, classes, views)] += heights
    return logits.astype(np.float32)


def views_of(logits: np.ndarray, *, seed: int = 0) -> ViewRecords:
    """Records with parameters similar to those of `inception`."""
    count, generator = len(logits), np.random.default_rng(seed)
    size = generator.integers(40, 500, (count, 2))
    return ViewRecords(
        example=generator.integers(0, 1_281_167, count),
        box=np.concatenate([generator.integers(0, 200, (count, 2)), size], axis=1).astype(np.int32),
        flip=generator.random(count) < 0.5,
        ratio=generator.random(count).astype(np.float32),
        crop_hash=generator.integers(0, 2**32, count),
        source_hash=generator.integers(0, 2**32, count),
        stored=np.ones(count, bool),
        logits=logits,
    )


def ours(name: str, records: ViewRecords, directory: Path, *, temperature: float) -> tuple[float, Decode]:
    """Bytes per view, and the reader, of one of the store's codecs."""
    count, classes = records.logits.shape
    codec = make_codec(name, classes, temperature=temperature)
    directory.mkdir()
    chunks = [serialize(records, codec.encode(records.logits))]
    size, sha256 = write_shard(directory / shard_name("views", 0), chunks, count)
    shard = ShardInfo(records=count, bytes=size, sha256=sha256, kl=0.0, max_error=0.0)
    reader = SplitReader(
        "views",
        SplitManifest(dataset=ANY_DATASET, shards=(shard,)),
        DiskOpener(directory, "views", [shard]),
        codec=codec,
        num_examples=count,
    )
    return size / count, lambda views: reader.read(views).logits


def dense(probabilities: np.ndarray, classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Log-probabilities float32 [n, C] of K given classes, with an even rest for the others."""
    kept = classes.shape[1]
    rest = (1 - probabilities.sum(axis=1, keepdims=True)) / (num_classes - kept)
    out = np.repeat(np.maximum(rest, 0), num_classes, axis=1)
    np.put_along_axis(out, classes.astype(np.int64), probabilities, axis=1)
    return np.log(np.maximum(out, LEAST), dtype=np.float32)


def largest(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The K largest probabilities at temperature 1, float64 [n, K], with their classes."""
    classes = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    return np.exp(np.take_along_axis(log_softmax(logits, 1.0), classes, axis=1)), classes


def tinyvit(count: int, records: ViewRecords, path: Path) -> tuple[float, Decode]:
    """TinyViT's file of fixed-size records."""
    classes = records.logits.shape[1]
    values, indices = largest(records.logits, count)
    layout = np.dtype([("seed", "<i4"), ("classes", "<i2", count), ("values", "<f2", count)])
    table = np.zeros(len(values), layout)
    table["classes"], table["values"] = indices, values
    path.write_bytes(table.tobytes())
    descriptor = os.open(path, os.O_RDONLY)

    def read(views: np.ndarray) -> np.ndarray:
        raw = b"".join(
            os.pread(descriptor, layout.itemsize, view * layout.itemsize) for view in views.tolist()
        )
        rows = np.frombuffer(raw, layout)
        return dense(rows["values"].astype(np.float64), rows["classes"], classes)

    return layout.itemsize, read


def ml_dr(records: ViewRecords, directory: Path) -> tuple[float, Decode]:
    """ml-dr's pickles, one per image."""
    directory.mkdir()
    classes, count = records.logits.shape[1], len(records.logits)
    values, indices = largest(records.logits, 10)
    for image in range(0, count, VIEWS_PER_IMAGE):
        samples = [
            {
                "params": [
                    *records.box[v].tolist(),
                    bool(records.flip[v]),
                    float(records.ratio[v]),
                    int(records.example[v]),
                ],
                "prob": (values[v].astype(np.float32).tolist(), indices[v].tolist()),
            }
            for v in range(image, min(image + VIEWS_PER_IMAGE, count))
        ]
        (directory / f"{image}").write_bytes(pickle.dumps((image, samples), protocol=4))
    size = sum(path.stat().st_size for path in directory.iterdir())

    def read(views: np.ndarray) -> np.ndarray:
        found = []
        for view in views.tolist():
            offset = view % VIEWS_PER_IMAGE
            found.append(pickle.loads((directory / f"{view - offset}").read_bytes())[1][offset]["prob"])
        return dense(np.array([f[0] for f in found]), np.array([f[1] for f in found]), classes)

    return size / count, read


def work(read: Decode, views: int) -> Callable[[], int]:
    """Reads all views in batches."""

    def run() -> int:
        for start in range(0, views, BATCH):
            read(np.arange(start, min(start + BATCH, views)))
        return views

    return run


def table(logits: np.ndarray, *, temperature: float, rounds: int, title: str) -> str:
    """The Markdown table of all layouts on the same logits."""
    records, (views, classes) = views_of(logits), logits.shape
    wide = [count for count in (10, 16, 100) if count < classes]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        layouts: dict[str, tuple[float, Decode]] = {
            f"`{name}`": ours(name, records, root / name.replace(":", ""), temperature=temperature)
            for name in ("float32", "float16", "bfloat16", "int8", *(f"topk:{count}" for count in wide))
        }
        for count in wide:
            if count != 16:
                layouts[f"TinyViT, K = {count}"] = tinyvit(count, records, root / f"tinyvit{count}")
        layouts["ml-dr, K = 10"] = ml_dr(records, root / "ml_dr")
        sys.stdout, shown = sys.stderr, sys.stdout  # keeps the rounds out of the table
        rates = measure({name: work(read, views) for name, (_, read) in layouts.items()}, rounds=rounds)
        sys.stdout = shown
        lines = [
            f"{title}: {views:,} views of {classes:,} classes, KL at T = {temperature:g}",
            "",
            "| layout | bytes a view | bytes a class | mean KL, nats | largest logit error | views/s read |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name, (size, read) in layouts.items():
            kl, error = 0.0, 0.0
            for start in range(0, views, BATCH):
                part = logits[start : start + BATCH]
                decoded = read(np.arange(start, start + len(part)))
                cost, worst = fidelity(part, decoded, temperature)
                kl, error = kl + cost, max(error, worst)
            worst_text = f"{error:.2g}" if name.startswith("`") else "-"  # others decode to log-probabilities
            lines.append(
                f"| {name} | {size:,.1f} | {size / classes:.3f} | {max(kl, 0.0) / views:.1e} | {worst_text} | "
                f"{median(rates[name]):,.0f} |"
            )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Runs the benchmark."""
    parser = Parser(prog="python tests/benchmarks/codecs.py")
    parser.add_argument("--store", help="Store whose decoded logits are used.")
    parser.add_argument("--views", type=positive, default=16_384)
    parser.add_argument("--classes", type=positive, default=1000)
    parser.add_argument("--temperature", type=float, help="Temperature (default: that of the store, or 10).")
    parser.add_argument("--rounds", type=positive, default=3)
    flags = parser.parse_strictly(argv)
    if flags.store is None:
        logits, temperature, title = synthetic_logits(flags.views, flags.classes), 10.0, "Synthetic logits"
    else:
        store = StoreReader(flags.store)
        count = min(flags.views, store.views.num_records)
        logits = store.views.read(np.arange(count)).logits
        temperature, title = (
            store.spec.temperature,
            f"{store.spec.dataset.name} ({store.spec.codec} store)",
        )
    print(table(logits, temperature=flags.temperature or temperature, rounds=flags.rounds, title=title))
    return 0


if __name__ == "__main__":
    run_command(main)
