"""pipeline.dataset import --from_tfds: other file formats and smaller images; whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from pipeline.dataset import main
from pipeline.errors import EXIT_DATA_ERROR, DataError, UserError
from pipeline.inputs import tfds_import
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.image_files import Changes
from pipeline.inputs.tfds_import import import_tfds
from pipeline.views.render import decode
from tests.images import TRAIN_IMAGES, encoded_images
from tests.runs import fail
from tests.stores import DATASET, prepare_dataset


@pytest.fixture(scope="module")
def tfrecords(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_photos` as TFRecord; read only."""
    splits = {"train": encoded_images(TRAIN_IMAGES), "test": encoded_images(TRAIN_IMAGES[:3])}
    return prepare_dataset(tmp_path_factory.mktemp("tfrecords"), splits, file_format="tfrecord")


def test_a_tfrecord_data_set_is_converted(
    tfrecords: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as caught:
        Dataset(DATASET, "train", data_dir=tfrecords)
    (command,) = [part for part in str(caught.value).split("`") if part.startswith("python -m")]
    assert command == (
        f"python -m pipeline.dataset import --from_tfds={DATASET} --from_data_dir={tfrecords} --data_dir=DIR"
    )
    argv = command.replace("=DIR", f"={tmp_path}").split()[3:]
    assert main(argv) == 0
    assert f"{DATASET}: 20 examples in 2 files; use it with --dataset={DATASET}" in capsys.readouterr().out
    images = encoded_images(TRAIN_IMAGES)
    dataset = Dataset(DATASET, "train", data_dir=tmp_path)
    assert dataset.read(np.arange(17)) == images
    assert dataset.labels(np.arange(17)).tolist() == [i % 5 for i in range(17)]
    assert Dataset(DATASET, "test", data_dir=tmp_path).read(np.arange(3)) == images[:3]
    assert not list(tmp_path.rglob("*tfrecord*"))
    with pytest.raises(UserError, match=f"--data_dir={tmp_path}: {DATASET}/1.0.0"):
        main(argv)
    with pytest.raises(UserError, match=f"--from_tfds={DATASET}: .*array_record"):
        main(["import", f"--from_tfds={DATASET}", f"--from_data_dir={tmp_path}", f"--data_dir={tmp_path}/x"])


@pytest.mark.parametrize("damage", ["truncated", "missing", "short"])
def test_a_damaged_tfrecord_is_refused_and_nothing_is_prepared(
    tfrecords: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    source = Path(shutil.copytree(tfrecords, tmp_path / "source"))
    (path,) = source.rglob("*train.tfrecord*")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "missing":
        path.unlink()
    else:
        records = list(tf.data.TFRecordDataset(str(path)).take(16))
        with tf.io.TFRecordWriter(str(path)) as writer:
            for record in records:
                writer.write(record.numpy())
    argv = [
        "import",
        f"--from_tfds={DATASET}",
        f"--from_data_dir={source}",
        f"--data_dir={tmp_path / 'data'}",
    ]
    code, line = fail(argv, capsys, main=main)
    assert code == EXIT_DATA_ERROR
    assert path.name in line
    assert not list((tmp_path / "data").iterdir())


def test_a_data_set_that_could_not_be_used_is_not_converted(tmp_path: Path) -> None:
    class Depths(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "depths"

        def _info(self) -> tfds.core.DatasetInfo:
            image = tfds.features.Image(shape=(4, 4, 1), dtype=np.float32)
            label = tfds.features.ClassLabel(num_classes=2)
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict({"image": image, "label": label})
            )

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, object]:
            return {"train": iter([(0, {"image": np.zeros([4, 4, 1], np.float32), "label": 1})])}

        def _generate_examples(self) -> None:
            raise NotImplementedError

    Depths(data_dir=tmp_path).download_and_prepare(
        file_format="tfrecord", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    with pytest.raises(UserError, match="float32"):
        import_tfds("depths", str(tmp_path), tmp_path / "data", Changes())
    assert not (tmp_path / "data").exists()


def test_an_unknown_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`from_tfds`=no_such_photos: "):
        main(
            ["import", "--from_tfds=no_such_photos", f"--from_data_dir={tmp_path}", f"--data_dir={tmp_path}"]
        )


def test_metadata_are_the_source_s_but_for_the_format(tfrecords: Path, tmp_path: Path) -> None:
    import_tfds(DATASET, str(tfrecords), tmp_path, Changes())
    old, new = (json.loads(next(d.rglob("dataset_info.json")).read_text()) for d in (tfrecords, tmp_path))
    assert new == old | {"fileFormat": "array_record"}
    with pytest.raises(DataError, match=r"\b3\b.*\b4\b"):
        tfds_import._write_file(tmp_path / "file", [b"a", b"b", b"c"], expected=4, source="x")


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_a_copy_with_smaller_images_is_a_config_of_its_own(
    tfrecords: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file_format: str
) -> None:
    images = encoded_images(TRAIN_IMAGES)
    source = tfrecords
    if file_format == "array_record":
        source = tmp_path / "source"
        import_tfds(DATASET, str(tfrecords), source, Changes())
    data = tmp_path / "data"
    assert (
        main(
            [
                "import",
                f"--from_tfds={DATASET}",
                f"--from_data_dir={source}",
                f"--data_dir={data}",
                "--short_side=40",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert f"--dataset={DATASET}/short_side_40 " in out
    assert "short side of 40 pixels: " in out
    small = Dataset(f"{DATASET}/short_side_40", "train", data_dir=data)
    assert small.split_names == ["test", "train"]
    assert small.labels(np.arange(17)).tolist() == [i % 5 for i in range(17)]
    for (_, height, width), before, after in zip(
        TRAIN_IMAGES, images, small.read(np.arange(17)), strict=True
    ):
        assert (after == before) == (min(height, width) <= 40)
        assert min(decode(tf.constant(after)).shape[:2]) == min(height, width, 40)
    import_tfds(DATASET, str(tfrecords), data, Changes())
    original = Dataset(DATASET, "train", data_dir=data)
    assert small.identity().fingerprint != original.identity().fingerprint
    info = tfds.builder(f"{DATASET}/short_side_40", data_dir=data).info
    assert "--short_side=40 --quality=95" in info.description
    assert [
        record["label"] for record in tfds.data_source(f"{DATASET}/short_side_40", data_dir=data)["test"]
    ] == [0, 1, 2]


def test_a_record_whose_image_is_damaged_ends_a_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = encoded_images(TRAIN_IMAGES[:3])
    images[1] = images[1][:300]
    source = prepare_dataset(tmp_path / "source", {"train": images})
    data = tmp_path / "data"
    argv = [
        "import",
        f"--from_tfds={DATASET}",
        f"--from_data_dir={source}",
        f"--data_dir={data}",
        "--short_side=40",
    ]
    code, line = fail(argv, capsys, main=main)
    assert (code, "record 1: " in line) == (EXIT_DATA_ERROR, True)
    assert not list(data.iterdir())


def test_one_image_feature_is_scaled_whatever_its_shape_was(tmp_path: Path) -> None:
    class Icons(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "icons"

        def _info(self) -> tfds.core.DatasetInfo:
            image = tfds.features.Image(shape=(20, 30, 4), encoding_format="png")
            mask = tfds.features.Image(shape=(None, None, 1))
            label = tfds.features.ClassLabel(names=["a", "b"])
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict({"image": image, "mask": mask, "label": label})
            )

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, object]:
            image, mask = np.full([20, 30, 4], 200, np.uint8), np.zeros([20, 30, 1], np.uint8)
            return {"train": iter([(0, {"image": image, "mask": mask, "label": "b"})])}

        def _generate_examples(self) -> None:
            raise NotImplementedError

    Icons(data_dir=tmp_path).download_and_prepare(
        file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    changes = Changes(short_side=10, quality=80)
    with pytest.raises(UserError, match="`image_feature`"):
        import_tfds("icons:1.0.0", str(tmp_path), tmp_path / "data", changes)
    name, _ = import_tfds("icons:1.0.0", str(tmp_path), tmp_path / "data", changes, image_feature="image")
    assert name == "icons/short_side_10_q80:1.0.0"
    builder = tfds.builder(name, data_dir=tmp_path / "data")
    (record,) = builder.as_data_source("train")
    assert (record["image"].shape, int(record["image"].max()), record["label"]) == ((10, 15, 3), 200, 1)
    assert record["mask"].shape == (20, 30, 1)
    assert builder.info.features["label"].names == ["a", "b"]
