"""Health check of both images: writes a small store and replays it, with both fingerprints checked.

    python healthcheck.py          # a few seconds; exit code 0 if the image works

In the trainer image it also trains two steps. It needs no data, teacher or network: it makes a data set of six images and
a teacher of one layer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf

from pipeline.flags.dataset import parse
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.dataset_import import run_import
from pipeline.inputs.teacher import Teacher
from pipeline.precomputing.publishing import publish_results
from pipeline.precomputing.shard_tasks import cut_shards
from pipeline.precomputing.worker import PrecomputeJob, ShardWorker
from pipeline.storage.files import write_text
from pipeline.store.layout import VIEWS_SPLIT
from pipeline.store.reader import StoreReader
from pipeline.store.spec import SPEC_FILE, Spec
from pipeline.views.input import ViewInput
from pipeline.views.policies.inception import Inception
from pipeline.views.render import EvalCrop, render_probe
from pipeline.views.source import ImageSource

SIZE = 16


def make_images(folder: Path) -> None:
    """Writes two classes of three JPEG files each."""
    generator = np.random.default_rng(0)
    for number in range(6):
        pixels = generator.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        path = folder / f"class_{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_jpeg(pixels).numpy())


def save_teacher(path: Path) -> None:
    """Saves a SavedModel of one random linear layer with two classes."""
    weights = tf.Variable(np.random.default_rng(0).normal(size=(SIZE * SIZE * 3, 2)).astype(np.float32))
    module = tf.Module()
    module.weights = weights

    @tf.function(input_signature=[tf.TensorSpec([None, SIZE, SIZE, 3], tf.float32)])
    def logits(image: tf.Tensor) -> tf.Tensor:
        return tf.reshape(image, [-1, SIZE * SIZE * 3]) @ weights

    tf.saved_model.save(module, str(path), signatures=logits)


def make_store(directory: Path) -> tuple[Path, Path]:
    """Writes a store of two epochs of six images with a `ShardWorker`; returns the store and the data directory."""
    make_images(directory / "images")
    data_dir, teacher, store = directory / "data", directory / "teacher", directory / "store"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run_import(
            parse(["import", f"--folder={directory / 'images'}", "--name=health", f"--data_dir={data_dir}"])
        )
    save_teacher(teacher)
    dataset = Dataset("health", "train", data_dir=data_dir)
    policy = Inception(image_size=SIZE)
    loaded = Teacher(teacher, image_size=SIZE, num_classes=dataset.num_classes)
    spec = Spec(
        dataset=dataset.identity(),
        seed=0,
        policy=policy,
        eval_crop=EvalCrop(),
        teacher=loaded.identity(batch_size=4),
        num_classes=dataset.num_classes,
        codec="float16",
        temperature=2.0,
        render_probe=render_probe(),
        provenance={"command": "health check"},
    )
    store.mkdir()
    write_text(store / SPEC_FILE, spec.to_json())
    job = PrecomputeJob(
        store=str(store),
        spec=spec.to_json(),
        data_dir=str(data_dir),
        teacher=str(teacher),
        image_cache_bytes=0,
    )
    worker = ShardWorker(job)
    tasks = cut_shards(VIEWS_SPLIT, published=[], total=2 * dataset.num_examples, views_per_shard=6)
    results = [worker.run(task) for task in tasks]
    publish_results(store, spec, results=results, identities={VIEWS_SPLIT: spec.dataset})
    return store, data_dir


def replay(store: Path, data_dir: Path) -> int:
    """Renders every view of the store and returns their number. Raises DataError if a fingerprint differs."""
    opened = StoreReader(store)
    opened.check_files()
    source = ImageSource(Dataset("health", "train", data_dir=data_dir), opened.spec.policy.renderer())
    views = opened.views.num_records
    return len(list(ViewInput(opened.views, source, 4).batches(np.arange(0, views, 4)))) * 4


def main() -> int:
    """Runs the check."""
    with tempfile.TemporaryDirectory() as name:
        store, data_dir = make_store(Path(name))
        print(f"replayed {replay(store, data_dir)} views", flush=True)
        if importlib.util.find_spec("apache_beam") is None:  # the trainer
            run = [f"--store={store}", f"--data_dir={data_dir}", f"--workdir={name}/run", "--student=tiny"]
            command = [sys.executable, "-m", "trainer.train", *run]
            return subprocess.call([*command, "--batch_size=4", "--steps=2", "--warmup_steps=1"])
        importlib.import_module("pipeline.precompute")
    return 0


if __name__ == "__main__":
    sys.exit(main())
