"""Images, teachers and stores for `accelerator.py`, made by the project's own commands."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.errors import UserError
from tests.images import encode, photo
from trainer.models import build_student

# Those of Flowers102 have 546 x 611 pixels and 43 kB on average; noise of 2.5 levels makes files of that size.
_SIDES, _GRAIN, _KIND = (546, 611), 2.5, "jpeg_420"


def in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a function in a process of its own, so that its device memory is its own; returns its result."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def hide_gpus() -> None:
    tf.config.set_visible_devices([], "GPU")


def _make_teacher(path: Path, model: str, size: int, classes: int) -> None:
    """Saves an architecture whose random logits differ between views and classes; BiT's own head is 0 at first."""
    hide_gpus()
    tf.keras.utils.set_random_seed(1)
    teacher = build_student(model, num_classes=classes, image_size=size)
    kernel = teacher.layers[-1].kernel
    kernel.assign(np.random.default_rng(0).normal(0, 1 / math.sqrt(kernel.shape[0]), kernel.shape))
    teacher.save(path, include_optimizer=False)


def _command(*arguments: str) -> None:
    """Runs a command of the project; its last line on standard error is the reason if it fails."""
    done = subprocess.run([sys.executable, "-m", *arguments], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [""]
        raise UserError(f"{arguments[0]}: exit code {done.returncode}: {lines[-1]}")


def _make_images(folder: Path, count: int, *, small: bool) -> int:
    """Writes `count` JPEG files in class folders; returns the number of classes."""
    classes = max(2, min(102, count // 5))
    height, width = (48, 64) if small else _SIDES
    for index in range(count):
        place = folder / "train" / f"class_{index % classes:03}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = photo(height, width, seed=index, grain=_GRAIN)
        place.joinpath(f"{index:05}.jpg").write_bytes(encode(pixels, _KIND))
    return classes


def _classes_of(dataset: str, data_dir: Path) -> int:
    import tensorflow_datasets as tfds

    hide_gpus()
    info = tfds.builder(dataset, data_dir=data_dir, try_gcs=False).info
    return int(info.features["label"].num_classes)


def make_stores(flags: argparse.Namespace, root: Path) -> dict[int, list[str]]:
    """Makes data, teachers and stores; returns the trainer's flags of each image size."""
    dataset, data_dir = flags.dataset, flags.data_dir
    if dataset is None:
        dataset, data_dir = "accelerator_photos", root / "data"
        classes = _make_images(root / "photos", flags.examples, small=flags.small)
        _command(
            *("pipeline.dataset", "import", f"--folder={root / 'photos'}"),
            *(f"--name={dataset}", f"--data_dir={data_dir}"),
        )
    else:
        classes = in_own_process(_classes_of, dataset, Path(data_dir))
    found = {}
    for size in flags.image_sizes:
        teacher, store = root / f"teacher_{size}", root / f"store_{size}"
        in_own_process(_make_teacher, teacher, flags.model, size, classes)
        _command(
            *(
                "pipeline.precompute",
                "--runner=DirectRunner",
                f"--dataset={dataset}",
                f"--data_dir={data_dir}",
            ),
            *(f"--teacher={teacher}", f"--store={store}", "--recipe=bit", f"--image_size={size}"),
            *(f"--epochs={flags.epochs}", f"--teacher_batch_size={flags.batch_size}", "--eval_splits=none"),
        )
        found[size] = [
            *(f"--store={store}", f"--data_dir={data_dir}", f"--student={flags.model}", "--recipe=default"),
            *(f"--batch_size={flags.batch_size}", "--allow_recipe_mismatch", "--warmup_steps=0"),
        ]
    return found
