"""Small data sets, teachers and stores, made by the real code and without Beam's graph."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from pipeline.inputs.dataset import Dataset
from pipeline.inputs.teacher import Teacher
from pipeline.precomputing.publishing import publish_results
from pipeline.precomputing.shard_tasks import cut_shards
from pipeline.precomputing.store_session import remove_notes
from pipeline.precomputing.worker import PrecomputeJob, ShardResult, ShardWorker
from pipeline.storage.files import write_text
from pipeline.store.identity import DatasetIdentity
from pipeline.store.layout import PENDING, VIEWS_SPLIT, split_directory
from pipeline.store.metadata import INFO_FILE, MANIFEST_FILE, load_manifest
from pipeline.store.reader import StoreReader
from pipeline.store.spec import SPEC_FILE, Spec
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.policies.inception import Inception
from pipeline.views.records import ViewRecords
from pipeline.views.render import render_probe
from tests.images import TEST_IMAGES, TRAIN_IMAGES, encoded_images

DATASET = "small_photos"
CLASSES = 5
# For shards without a data set.
ANY_DATASET = DatasetIdentity(name="d:1.0.0", split="train", num_examples=10, fingerprint="f")
CODECS = ("float32", "bfloat16", "float16", "int8", "topk:3")  # one per kind
SIZE = 24
BATCH = 4
POLICY = Inception(image_size=SIZE)
N = len(TRAIN_IMAGES)


def prepare_dataset(
    data_dir: Path,
    splits: dict[str, list[bytes]],
    *,
    name: str = DATASET,
    file_format: str = "array_record",
    unlabeled: Collection[int] = (),
    classes: int | Sequence[str] = CLASSES,
    second_image: bool = False,
) -> Path:
    """Prepares encoded images as a TFDS data set. Labels are index modulo `CLASSES`, or -1 for `unlabeled` indices.

    Args:
      data_dir: TFDS data directory.
      splits: images by split.
      name: name of the data set.
      file_format: format of its files.
      unlabeled: indices without a label.
      classes: number or names of the classes; 0 for no label feature.
      second_image: whether there is a second image feature, with the images in reverse, and no supervised pair.
    """
    features: dict[str, Any] = {"image": tfds.features.Image(shape=(None, None, 3))}
    if classes:
        count = {"num_classes": classes} if isinstance(classes, int) else {"names": classes}
        features["label"] = tfds.features.ClassLabel(**count)
    if second_image:
        features["second"] = features["image"]

    class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label") if classes and not second_image else None,
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
            del dl_manager
            return {split: self._generate_examples(images) for split, images in splits.items()}

        def _generate_examples(self, images: list[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
            for key, image in enumerate(images):
                number = -1 if key in unlabeled else key % CLASSES
                values = {"image": io.BytesIO(image), "label": number, "second": io.BytesIO(images[-1 - key])}
                yield key, {feature: values[feature] for feature in features}

    Photos.name = name
    with contextlib.redirect_stdout(io.StringIO()):
        Photos(data_dir=data_dir).download_and_prepare(
            file_format=file_format,
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    return data_dir


def prepare_photos(data_dir: Path, *, seed: int = 0) -> Path:
    """Prepares the test data set: 17 examples in `train`, 7 in `test`, of mixed image kinds."""
    return prepare_dataset(
        data_dir,
        {
            "train": encoded_images(TRAIN_IMAGES, seed=seed),
            "test": encoded_images(TEST_IMAGES, seed=seed + 50),
        },
    )


def teacher_weights(classes: int = CLASSES) -> list[np.ndarray]:
    """Kernel and bias of a 5 x 5 convolution with stride 2 and of a dense layer, float32."""
    generator = np.random.default_rng(7)
    shapes = {(5, 5, 3, 6): 1.0, (6,): 0.1, (6, classes): 3.0, (classes,): 0.1}
    return [(scale * generator.normal(size=shape)).astype(np.float32) for shape, scale in shapes.items()]


class PlainTeacher(tf.Module):
    """A convolution and a dense layer without Keras; takes views in 0..255."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.weights = [tf.Variable(weight) for weight in teacher_weights(classes)]

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        kernel, bias, dense, dense_bias = self.weights
        hidden = tf.nn.relu(tf.nn.conv2d(images / 255.0, kernel, 2, "SAME") + bias)
        return tf.reduce_mean(hidden, [1, 2]) @ dense + dense_bias


def save_teacher(
    path: Path,
    call: Any = None,
    *,
    module: tf.Module | None = None,
    inputs: dict[str, tf.TensorSpec] | None = None,
    signature: str = "serving_default",
) -> Path:
    """Saves a SavedModel with one signature; a `PlainTeacher` by default."""
    if module is None:
        module = PlainTeacher()
    function = tf.function(call or (lambda image: {"logits": module(image)}))
    inputs = inputs or {"image": tf.TensorSpec([None, SIZE, SIZE, 3], tf.float32)}
    tf.saved_model.save(module, str(path), signatures={signature: function.get_concrete_function(**inputs)})
    return path


def keras_teacher() -> tf.keras.Model:
    """The network of `PlainTeacher` with the same weights, in Keras."""
    layers = tf.keras.layers
    image = tf.keras.Input([SIZE, SIZE, 3])
    x = layers.Rescaling(1 / 255.0)(image)
    x = layers.Conv2D(6, 5, strides=2, padding="same", activation="relu")(x)
    x = layers.GlobalAveragePooling2D()(x)
    model = tf.keras.Model(image, layers.Dense(CLASSES)(x))
    model.set_weights(teacher_weights())
    return model


def make_spec(data_dir: Path, teacher: Path, *, batch_size: int = BATCH, **changes: Any) -> Spec:
    """The spec of a small store."""
    dataset = Dataset(DATASET, "train", data_dir=data_dir)
    policy = changes.pop("policy", POLICY)
    loaded = Teacher(teacher, image_size=policy.image_size, num_classes=dataset.num_classes)
    spec = Spec(
        dataset=dataset.identity(),
        seed=0,
        policy=policy,
        eval_crop=EvalCrop(),
        teacher=loaded.identity(batch_size=batch_size),
        num_classes=dataset.num_classes,
        codec="float16",
        temperature=2.0,
        render_probe=render_probe(),
        provenance={"command": "python -m pipeline.precompute (a test)"},
    )
    return dataclasses.replace(spec, **changes)


def job_for(store: Path, spec: Spec, data_dir: Path, teacher: Path, *, cache_bytes: int = 0) -> PrecomputeJob:
    """The job of a worker."""
    return PrecomputeJob(
        store=str(store),
        spec=spec.to_json(),
        data_dir=str(data_dir),
        teacher=str(teacher),
        image_cache_bytes=cache_bytes,
    )


def write_store(
    worker: ShardWorker, *, epochs: int, views_per_shard: int = 20, eval_splits: tuple[str, ...] = ("test",)
) -> list[ShardResult]:
    """Writes or extends the store of a worker's job and publishes it, without Beam."""
    store, spec = Path(worker.job.store), worker.spec
    (store / "eval").mkdir(parents=True, exist_ok=True)
    if not (store / SPEC_FILE).exists():
        write_text(store / SPEC_FILE, spec.to_json())
    identities, totals = {VIEWS_SPLIT: spec.dataset}, {}
    for split in eval_splits:
        dataset = Dataset(spec.dataset.name, split, data_dir=worker.job.data_dir)
        identities[split], totals[split] = dataset.identity(), dataset.num_examples
    totals[VIEWS_SPLIT] = epochs * spec.num_examples
    results = []
    for split, total in totals.items():
        manifest = load_manifest(split_directory(store, split), digest=spec.digest())
        published = [shard.records for shard in manifest[split].shards] if split in manifest else []
        tasks = cut_shards(split, published=published, total=total, views_per_shard=views_per_shard)
        results += [worker.run(task) for task in tasks]
    for directory in publish_results(store, spec, results=results, identities=identities):
        remove_notes(directory)
    return results


def shard_files(store: Path) -> dict[str, bytes]:
    """Content of each shard of a store, by relative path."""
    return {
        str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*.array_record-*"))
    }


def published_files(store: Path) -> dict[str, bytes]:
    """Content of each published file, by relative path."""
    metadata = {name: (store / name).read_bytes() for name in (MANIFEST_FILE, INFO_FILE, "features.json")}
    shards = shard_files(store)
    return {**{name: data for name, data in shards.items() if not name.startswith(PENDING)}, **metadata}


def assert_same_store(got: Path, expected: Path) -> None:
    ours, theirs = published_files(got), published_files(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []


def assert_whole(store: Path, expected: Path) -> int:
    """Asserts that a store is a verified prefix of a longer one; returns its number of epochs."""
    opened, longer = StoreReader(store), StoreReader(expected)
    opened.check_files()
    for number in range(len(opened.views.manifest.shards)):
        opened.views.verify(number)
    views = np.arange(opened.views.num_records)
    ours, theirs = opened.views.read(views), longer.views.read(views)
    for field in dataclasses.fields(ViewRecords):
        np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name))
    return opened.epochs


@dataclasses.dataclass(frozen=True)
class Asked:
    """Flags of a precompute of the published store."""

    data_dir: Path
    teacher: Path
    store: Path

    def flags(self, *others: str) -> list[str]:
        """Arguments of the command; `others` come last and take precedence."""
        return [
            "--runner=FnApiRunner",
            f"--dataset={DATASET}",
            f"--data_dir={self.data_dir}",
            f"--teacher={self.teacher}",
            f"--store={self.store}",
            f"--image_size={SIZE}",
            f"--teacher_batch_size={BATCH}",
            "--temperature=2",
            "--views_per_shard=20",
            "--eval_splits=test",
            "--epochs=3",
            *others,
        ]
