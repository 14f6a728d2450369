"""Training runs on the small stores of `tests.stores`, started like the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline.cli.main import run_command
from pipeline.store.combination import open_stores
from pipeline.store.metadata import MANIFEST_FILE
from pipeline.store.reader import StoreReader
from pipeline.store.serialization import serialize
from pipeline.store.shards import shard_name, write_shard
from trainer.flags.train import make_parser
from trainer.run.builder import build_run
from trainer.run.options import TrainOptions, resolve
from trainer.run.run_schedule import previous_schedule
from trainer.run.training import Run
from trainer.targets.batches import Targets
from trainer.train import main

ROOT = Path(__file__).resolve().parents[1]
Batch = dict[str, np.ndarray]


def arguments(store: Path, workdir: Path, data_dir: Path | None, *extra: str) -> list[str]:
    """Arguments of a short run of the student `tiny` with batch size 5."""
    found = [] if data_dir is None else [f"--data_dir={data_dir}"]
    return [f"--store={store}", f"--workdir={workdir}", *found, "--student=tiny", "--batch_size=5", *extra]


def options(argv: list[str], store: StoreReader) -> TrainOptions:
    """Resolves arguments to options, like `main`."""
    return resolve(make_parser().parse_strictly(argv), store)


def start_run(argv: list[str]) -> Run:
    """Builds a run like the command, with initial weights."""
    flags = make_parser().parse_strictly(argv)
    store = open_stores(flags.store, weights=flags.store_weights, image_size=flags.image_size)
    Path(flags.workdir).mkdir(parents=True, exist_ok=True)
    tf.keras.utils.set_random_seed(flags.seed)
    previous = previous_schedule(Path(flags.workdir), needed=False)
    return build_run(resolve(flags, store, previous=previous), store)


def fail(
    argv: list[str], capsys: pytest.CaptureFixture[str], *, main: Callable[[list[str]], int] = main
) -> tuple[int, str]:
    """Runs a command that has to fail; returns its exit code and its line on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run_command(main, argv)
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code, lines[0]


def command(argv: list[str], *options: str) -> list[str]:
    """Arguments of the command as a separate process."""
    return [sys.executable, *options, "-m", "trainer.train", *argv]


def run_process(argv: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a separate process; prints the end of its standard error if it fails."""
    done = subprocess.run(
        command(argv, *options), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def environment() -> dict[str, str]:
    """Environment of this process, without TensorFlow's notices."""
    return {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}


def metrics(workdir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Objects of metrics.jsonl, of one kind or all."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def losses(workdir: Path) -> dict[int, float]:
    """Loss per step; asserts that each step occurs once."""
    lines = metrics(workdir, "train")
    out = {line["step"]: line["loss"] for line in lines}
    assert len(out) == len(lines)
    return out


def numpy_batches(targets: Targets, start: int, stop: int) -> list[Batch]:
    """Batches of the steps `start .. stop - 1`."""
    return list(targets.batches(start, stop).as_numpy_iterator())


def assert_same_batches(got: list[Batch], expected: list[Batch]) -> None:
    """Asserts that batches are bit-equal, with the same keys and types."""
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert ours[name].dtype == theirs[name].dtype, name
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def assert_same_weights(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Asserts that weights are bit-equal."""
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def scalars(workdir: Path) -> dict[str, dict[int, float]]:
    """TensorBoard scalars by tag and step; asserts that each step occurs once."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    board = EventAccumulator(str(workdir / "tensorboard"), tensor_size_guidance={"scalars": 0})
    board.Reload()
    out: dict[str, dict[int, float]] = {}
    for tag in board.Tags()["tensors"]:
        events = board.Tensors(tag)
        out[tag] = {event.step: float(tf.make_ndarray(event.tensor_proto)) for event in events}
        assert len(out[tag]) == len(events), tag
    return out


def checkpoint_weights(workdir: Path, name: str = "checkpoints") -> dict[str, np.ndarray]:
    """Variables of the latest checkpoint in a directory by name, with the optimizer state."""
    path = tf.train.latest_checkpoint(str(workdir / name))
    assert path is not None
    reader = tf.train.load_checkpoint(path)
    names = [name for name in reader.get_variable_to_shape_map() if "VARIABLE_VALUE" in name]
    return {name: reader.get_tensor(name) for name in names if not name.startswith("save_counter")}


def forge_records(path: Path, view: int, **columns: Any) -> None:
    """Rewrites columns of one record of a store and the checksum in its manifest."""
    store = StoreReader(path)
    codec = store.spec.make_codec()
    lengths = [shard.records for shard in store.views.manifest.shards]
    ends = np.cumsum(lengths)
    number = int(np.searchsorted(ends, view, side="right"))
    first = int(ends[number]) - lengths[number]
    records = store.views.read(np.arange(first, ends[number]))
    for name, value in columns.items():
        getattr(records, name)[view - first] = value
    shard = path / shard_name("views", number)
    chunks = [serialize(records, codec.encode(records.logits))]
    size, digest = write_shard(shard, chunks, lengths[number], replace=True)
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    manifest["splits"]["views"]["shards"][number] |= {"bytes": size, "sha256": digest}
    (path / MANIFEST_FILE).write_text(json.dumps(manifest))


def forge_smallest_logit(store: Path, factor: float) -> None:
    """Scales the smallest logit of view 16."""
    logits = StoreReader(store).views.read(np.array([16])).logits[0]
    logits[int(np.argmin(np.abs(logits)))] *= factor
    forge_records(store, 16, logits=logits)
