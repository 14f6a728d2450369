"""Calls of `trainer.teacher` in tests, and a data set that a network learns in a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests import runs, stores
from trainer.models.keras_model import load_keras_model
from trainer.teacher import main

COLORS = "colors"
COLORS_TRAIN, COLORS_TEST = 25, 10


def prepare_colors(data_dir: Path) -> Path:
    """A TFDS data set whose classes are colors: `train` of 25 and `test` of 10 examples."""

    def picture(index: int) -> bytes:
        generator = np.random.default_rng(index)
        color = np.array([[250, 20, 20], [20, 250, 20], [20, 20, 250], [230, 230, 20], [10, 10, 10]])
        pixels = color[index % stores.CLASSES] + generator.integers(-10, 6, (30, 40, 3))
        return tf.io.encode_png(np.clip(pixels, 0, 255).astype(np.uint8)).numpy()

    splits = {
        "train": [picture(i) for i in range(COLORS_TRAIN)],
        "test": [picture(100 + i) for i in range(COLORS_TEST)],
    }
    return stores.prepare_dataset(data_dir, splits, name=COLORS)


def convert_arguments(npz: Path, output: Path, *extra: str) -> list[str]:
    """Arguments of `convert` for a small BiT at 33 x 33."""
    return ["convert", f"--npz={npz}", "--model=bit_small", "--image_size=33", f"--output={output}", *extra]


def finetune_arguments(
    colors_dir: Path, tmp_path: Path, *extra: str, network: str = "--model=tiny"
) -> list[str]:
    """Arguments of `finetune` for a short run on colors; a later flag replaces an earlier one."""
    return [
        "finetune",
        f"--dataset={COLORS}",
        f"--data_dir={colors_dir}",
        network,
        "--image_size=24",
        "--batch_size=10",
        "--steps=12",
        "--learning_rate=5",
        "--log_every=1",
        f"--output={tmp_path}/teacher",
        f"--workdir={tmp_path}/run",
        *extra,
    ]


def fail(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and the one line on standard error of a command that must fail."""
    return runs.fail(argv, capsys, main=main)


def losses(tmp_path: Path) -> list[float]:
    """Losses of the run of `finetune_arguments`, by step."""
    return list(runs.losses(tmp_path / "run").values())


def weights_of(path: Path) -> list[np.ndarray]:
    """Weights of a saved Keras model."""
    return load_keras_model(str(path), parameter="teacher").get_weights()
