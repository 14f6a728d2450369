"""pipeline.dataset: the encoded images of a prepared data set by index, and what cannot be read."""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from pipeline.errors import DataError, UserError
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.labels import UNLABELED
from pipeline.views.headers import image_sizes
from pipeline.views.render import decode
from tests.images import KINDS, TEST_IMAGES, TRAIN_IMAGES, encode, encoded_images, photo
from tests.stores import CLASSES, DATASET, prepare_dataset

TRAIN, TEST = encoded_images(TRAIN_IMAGES), encoded_images(TEST_IMAGES, seed=50)


@pytest.fixture
def copy(data_dir: Path, tmp_path: Path) -> Path:
    """A data directory to be damaged; the data set is in `small_photos/1.0.0`."""
    return Path(shutil.copytree(data_dir, tmp_path / "data"))


def shard_of(data_dir: Path, split: str = "train") -> Path:
    (path,) = (data_dir / DATASET / "1.0.0").glob(f"*{split}.array_record*")
    return path


def test_images_are_the_encoded_bytes_in_the_order_asked_for(data_dir: Path) -> None:
    dataset = Dataset(DATASET, "train", data_dir=data_dir)
    assert dataset.num_examples == len(TRAIN)
    assert dataset.read(np.arange(17)) == TRAIN
    assert dataset.read(np.array([16, 3, 3, 0])) == [TRAIN[i] for i in (16, 3, 3, 0)]
    assert dataset.labels(np.array([16, 3, 4, 0])).tolist() == [1, 3, 4, 0]
    assert dataset.num_classes == CLASSES
    assert (dataset.name, dataset.split_names) == (f"{DATASET}:1.0.0", ["test", "train"])


def test_labels_are_read_a_few_at_a_time(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each comes with its image, and all of them might not fit."""
    monkeypatch.setattr("pipeline.inputs.dataset._LABELS_AT_ONCE", 5)
    dataset, held = Dataset(DATASET, "train", data_dir=data_dir), []
    read = dataset._features
    monkeypatch.setattr(dataset, "_features", lambda examples: held.append(len(examples)) or read(examples))
    examples = np.arange(17)[::-1]
    assert dataset.labels(examples).tolist() == (examples % CLASSES).tolist()
    assert held == [5, 5, 5, 2]
    assert dataset.labels(examples[:0]).tolist() == []


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[3:9]", TRAIN[3:9]),
        ("train[-2:]", TRAIN[-2:]),
        ("train[:5]+test[5:]", TRAIN[:5] + TEST[5:]),
        ("train+test", TRAIN + TEST),
    ],
)
def test_sub_splits(data_dir: Path, split: str, expected: list[bytes]) -> None:
    dataset = Dataset(DATASET, split, data_dir=data_dir)
    assert dataset.num_examples == len(expected)
    assert dataset.read(np.arange(len(expected))) == expected
    backwards = np.arange(len(expected))[::-1]
    assert dataset.read(backwards) == expected[::-1]


def test_several_files(data_dir: Path, copy: Path) -> None:
    """A split in two files of 10 and 7, as large data sets are."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    whole = shard_of(copy)
    reader = ArrayRecordReader(str(whole))
    records = reader.read(list(range(17)))
    reader.close()
    whole.unlink()
    for number, part in enumerate((records[:10], records[10:])):
        name = whole.name.replace("00000-of-00001", f"{number:05d}-of-00002")
        writer = ArrayRecordWriter(str(whole.with_name(name)), "group_size:1")
        for record in part:
            writer.write(record)
        writer.close()
    path = whole.parent / "dataset_info.json"
    info = json.loads(path.read_text())
    next(s for s in info["splits"] if s["name"] == "train")["shardLengths"] = ["10", "7"]
    path.write_text(json.dumps(info))
    dataset = Dataset(DATASET, "train", data_dir=copy)
    assert dataset.read(np.array([9, 10, 0, 16, 10])) == [TRAIN[i] for i in (9, 10, 0, 16, 10)]
    assert Dataset(DATASET, "train[8:12]", data_dir=copy).read(np.arange(4)) == TRAIN[8:12]
    assert dataset.identity() != Dataset(DATASET, "train", data_dir=data_dir).identity()


def test_all_files_of_a_large_data_set_can_be_open(data_dir: Path) -> None:
    """ImageNet has as many as systems allow a process by default."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    try:
        Dataset(DATASET, "train", data_dir=data_dir)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(1025, before[1]), before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_identity_tells_data_sets_and_splits_apart(data_dir: Path, other_data_dir: Path) -> None:
    same = Dataset(DATASET, "train", data_dir=data_dir).identity()
    assert same == Dataset(f"{DATASET}:1.0.0", "train", data_dir=data_dir).identity()
    others = [
        Dataset(DATASET, "test", data_dir=data_dir).identity(),
        Dataset(DATASET, "train[:16]", data_dir=data_dir).identity(),
        Dataset(DATASET, "train", data_dir=other_data_dir).identity(),
    ]
    assert len({same.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert same.name == f"{DATASET}:1.0.0"
    assert str(data_dir) not in json.dumps(same.to_json())


def test_identity_does_not_depend_on_where_the_data_set_lies(data_dir: Path, copy: Path) -> None:
    there, here = (Dataset(DATASET, "train", data_dir=d).identity() for d in (data_dir, copy))
    assert there == here


def test_an_unknown_name_is_refused_and_says_how_to_prepare(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Dataset("no_such_photos", "train", data_dir=tmp_path)
    message = str(caught.value)
    assert message.startswith("`dataset`=no_such_photos: ")
    assert str(tmp_path) in message
    assert "`tfds build no_such_photos --file_format=array_record" in message
    assert "\n" not in message


def test_a_known_name_that_is_not_prepared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Dataset("mnist", "train", data_dir=tmp_path)
    for word in ("`dataset`=mnist: ", str(tmp_path), "--file_format=array_record"):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", [f"{DATASET}:9.9.9", f"{DATASET}/config", "", "a b", "x:y:z"])
def test_a_name_that_means_nothing_is_refused(data_dir: Path, name: str) -> None:
    with pytest.raises(UserError, match="`dataset`="):
        Dataset(name, "train", data_dir=data_dir)


def test_another_file_format_is_refused_and_says_how_to_prepare(tmp_path: Path) -> None:
    prepare_dataset(tmp_path, {"train": TRAIN[:3]}, file_format="tfrecord")
    with pytest.raises(UserError) as caught:
        Dataset(DATASET, "train", data_dir=tmp_path)
    assert "prepared as tfrecord" in str(caught.value)
    assert f"--from_tfds={DATASET}" in str(caught.value)


@pytest.mark.parametrize("split", ["nope", "train[", "train[:200%]", "", "train[5:"])
def test_an_unknown_split_is_refused_with_the_known_ones(data_dir: Path, split: str) -> None:
    with pytest.raises(UserError, match=rf"^`split`=.*{DATASET}/1.0.0.* test, train$"):
        Dataset(DATASET, split, data_dir=data_dir)


def test_an_empty_sub_split_is_refused(data_dir: Path) -> None:
    with pytest.raises(UserError, match=r"`split`=train\[:0\]: "):
        Dataset(DATASET, "train[:0]", data_dir=data_dir)


@pytest.mark.parametrize("lengths", [[], ["0"]])
def test_an_empty_split_is_refused(copy: Path, lengths: list[str]) -> None:
    path = copy / DATASET / "1.0.0" / "dataset_info.json"
    info = json.loads(path.read_text())
    next(s for s in info["splits"] if s["name"] == "train")["shardLengths"] = lengths
    path.write_text(json.dumps(info))
    with pytest.raises(UserError, match="`split`=train"):
        Dataset(DATASET, "train", data_dir=copy)


def test_a_missing_file_is_refused(copy: Path) -> None:
    shard_of(copy).unlink()
    with pytest.raises(UserError, match=r"train\.array_record.*tfds build"):
        Dataset(DATASET, "train", data_dir=copy).read(np.array([0]))


@pytest.mark.parametrize("kept", [0, 1000, 70_000])
def test_a_truncated_file_is_refused(copy: Path, kept: int) -> None:
    path = shard_of(copy)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=re.escape(path.name)):
        Dataset(DATASET, "train", data_dir=copy).read(np.array([0]))


def test_a_damaged_file_is_refused(copy: Path) -> None:
    path = shard_of(copy)
    data = bytearray(path.read_bytes())
    data[200:20_000] = bytes(19_800)
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{path.name}"):
        Dataset(DATASET, "train", data_dir=copy).read(np.arange(17))


def test_a_file_with_fewer_records_than_stated_is_refused(copy: Path) -> None:
    shutil.copy(shard_of(copy, "test"), shard_of(copy, "train"))
    with pytest.raises(DataError, match=r"train.*\b16\b"):
        Dataset(DATASET, "train", data_dir=copy).read(np.array([16]))


def prepare_other(
    data_dir: Path,
    features: dict[str, Any],
    keys: tuple[str, str] | None,
    *,
    image: Any = None,
    labels: tuple[int, ...] = (1,),
) -> None:
    """Prepares `other`, whose split `train` has an example for each label."""
    if image is None:
        image = np.full([4, 4, 3], 7, np.uint8)

    class Other(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "other"

        def _info(self) -> tfds.core.DatasetInfo:
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features), supervised_keys=keys
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            for key, label in enumerate(labels):
                second = 255 - image if "second" in features else None
                values = {"image": image, "second": second, "label": label, "kind": 2, "text": "a"}
                yield key, {name: values[name] for name in features}

    Other(data_dir=data_dir).download_and_prepare(
        file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


IMAGE, LABEL = tfds.features.Image(shape=(4, 4, 3)), tfds.features.ClassLabel(num_classes=3)


def test_image_and_label_are_found_without_supervised_keys(tmp_path: Path) -> None:
    prepare_other(tmp_path, {"text": tfds.features.Text(), "image": IMAGE, "label": LABEL}, None)
    dataset = Dataset("other", "train", data_dir=tmp_path)
    assert dataset.labels(np.array([0])).tolist() == [1]
    assert image_sizes(dataset.read(np.array([0]))).tolist() == [[4, 4]]


@pytest.mark.parametrize(
    ("features", "keys", "message"),
    [
        ({"image": IMAGE, "second": IMAGE, "label": LABEL}, None, "second"),
        ({"text": tfds.features.Text(), "label": LABEL}, None, "label"),
        ({"text": tfds.features.Text(), "label": LABEL}, ("text", "label"), "text: Text"),
        ({"image": IMAGE, "label": LABEL, "kind": LABEL}, None, "kind"),
    ],
    ids=["two_images", "no_image", "text", "two_labels"],
)
def test_another_kind_of_data_set_is_refused(
    tmp_path: Path, features: dict[str, Any], keys: tuple[str, str] | None, message: str
) -> None:
    prepare_other(tmp_path, features, keys)
    with pytest.raises(UserError, match=f"other/1.0.0.*{message}"):
        Dataset("other", "train", data_dir=tmp_path)


@pytest.mark.parametrize("keys", [None, ("image", "text")], ids=["none_supervised", "text_supervised"])
def test_a_data_set_without_a_label_feature_has_no_labels(tmp_path: Path, keys: Any) -> None:
    prepare_other(tmp_path, {"image": IMAGE, "text": tfds.features.Text()}, keys)
    dataset = Dataset("other", "train", data_dir=tmp_path)
    assert (dataset.num_classes, dataset.class_names) == (0, [])
    assert dataset.labels(np.array([0, 0])).tolist() == [UNLABELED, UNLABELED]


def test_features_by_name(tmp_path: Path) -> None:
    features = {"image": IMAGE, "second": IMAGE, "label": LABEL, "kind": LABEL, "text": tfds.features.Text()}
    prepare_other(tmp_path, features, ("image", "label"))

    def opened(**names: str) -> Dataset:
        return Dataset("other", "train", data_dir=tmp_path, **names)

    default, first = opened(), np.array([0])
    assert default.identity() == opened(image_feature="image", label_feature="none").identity()
    assert "image_feature" not in default.identity().to_json()
    second = opened(image_feature="second", label_feature="kind")
    assert second.identity() == dataclasses.replace(default.identity(), image_feature="second")
    assert second.read(first) != default.read(first)
    assert second.select("train").read(first) == second.read(first)
    assert (default.labels(first)[0], second.labels(first)[0]) == (1, 2)
    assert opened(label_feature="none").labels(first)[0] == UNLABELED
    for names in ({"image_feature": "text"}, {"label_feature": "image"}, {"image_feature": "third"}):
        ((parameter, name),) = names.items()
        with pytest.raises(UserError) as caught:
            opened(**names)
        kind = ("image", "second") if parameter == "image_feature" else ("label", "kind")
        for word in (f"`{parameter}`={name}", *kind):
            assert word in str(caught.value)


SHAPE = (None, None, 3)


@pytest.mark.parametrize(
    ("feature", "image", "named"),
    [
        (
            tfds.features.Image(shape=(4, 4, 1), dtype=np.float32),
            np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4, 1),
            "float32",
        ),
        (
            tfds.features.Image(shape=SHAPE, dtype=np.uint16, encoding_format="png"),
            np.full([4, 4, 3], 4095, np.uint16),
            "uint16",
        ),
        (
            tfds.features.Image(shape=(4, 4, 2), encoding_format="png"),
            np.full([4, 4, 2], 7, np.uint8),
            "(4, 4, 2)",
        ),
        (
            tfds.features.LabeledImage(labels=3, shape=(4, 4, 1)),
            np.ones([4, 4, 1], np.uint8),
            "LabeledImage",
        ),
    ],
    ids=["float32", "uint16", "two_channels", "mask"],
)
def test_image_features_that_would_be_rendered_as_noise_are_refused(
    tmp_path: Path, feature: Any, image: np.ndarray, named: str
) -> None:
    prepare_other(tmp_path, {"image": feature, "label": LABEL}, ("image", "label"), image=image)
    with pytest.raises(UserError) as caught:
        Dataset("other", "train", data_dir=tmp_path)
    for word in ("other/1.0.0", "image", named, "uint8", "1, 3, 4 or None channels"):
        assert word in str(caught.value)


@pytest.mark.parametrize("channels", [1, 4, None])
def test_images_of_uint8_are_taken_with_these_channels(tmp_path: Path, channels: int | None) -> None:
    feature = tfds.features.Image(shape=(None, None, channels))
    image = np.full([4, 4, channels or 3], 7, np.uint8)
    prepare_other(tmp_path, {"image": feature, "label": LABEL}, ("image", "label"), image=image)
    (encoded,) = Dataset("other", "train", data_dir=tmp_path).read(np.array([0]))
    assert (decode(tf.constant(encoded)).numpy() == 7).all()


def test_a_16_bit_png_behind_a_uint8_feature_is_refused(tmp_path: Path) -> None:
    png = encode(photo(9, 7, seed=0), "png_16")
    prepare_other(tmp_path, {"image": tfds.features.Image(), "label": LABEL}, None, image=png)
    dataset = Dataset("other", "train", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"example 0 of train .*16 bits"):
        dataset.read(np.array([0]))


def test_a_label_feature_without_a_number_of_classes_is_refused(tmp_path: Path) -> None:
    prepare_other(tmp_path, {"image": IMAGE, "label": LABEL}, ("image", "label"))
    path = tmp_path / "other" / "1.0.0" / "features.json"
    features = json.loads(path.read_text())
    features["featuresDict"]["features"]["label"]["classLabel"].pop("numClasses")
    path.write_text(json.dumps(features))
    with pytest.raises(UserError, match=r"other/1\.0\.0: .*\blabel\b.*num_classes"):
        Dataset("other", "train", data_dir=tmp_path)


def test_unlabeled_examples_are_told_apart_from_labels_that_are_no_class(tmp_path: Path) -> None:
    prepare_other(tmp_path, {"image": IMAGE, "label": LABEL}, None, labels=(2, -1, 0))
    dataset = Dataset("other", "train", data_dir=tmp_path)
    assert dataset.labels(np.arange(3)).tolist() == [2, UNLABELED, 0]
    path = tmp_path / "other" / "1.0.0" / "features.json"  # as another version of the data set would have it
    path.write_text(path.read_text().replace('"numClasses": "3"', '"numClasses": "2"'))
    with pytest.raises(DataError, match=r"example 0 of train .*\b2\b.*\b1\b"):
        Dataset("other", "train", data_dir=tmp_path).labels(np.arange(3))


def test_sizes_from_headers_are_the_decoded_ones() -> None:
    """Of every kind; TensorFlow does not turn a picture by its EXIF tag, and neither does this."""
    encoded = [encode(photo(31, 17, seed=0), kind) for kind in KINDS]
    import io

    from PIL import Image

    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    Image.fromarray(photo(31, 17, seed=0)).save(turned, "JPEG", exif=exif)
    encoded.append(turned.getvalue())
    decoded = [tf.io.decode_image(e, channels=3, expand_animations=False).shape[:2] for e in encoded]
    np.testing.assert_array_equal(image_sizes(encoded), np.array(decoded))
    assert (image_sizes(encoded) == [31, 17]).all()
