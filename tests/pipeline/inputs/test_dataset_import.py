"""pipeline.dataset import: folders of images and TFDS data sets of other formats; whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from pipeline.cli.main import run_command
from pipeline.dataset import main
from pipeline.errors import EXIT_DATA_ERROR, EXIT_USER_ERROR, DataError, UserError
from pipeline.inputs import dataset_import
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.image_files import Changes, Examined
from pipeline.inputs.image_folder import Folder, scan
from pipeline.storage.lock import writer_lock
from pipeline.views.render import decode
from tests.images import TRAIN_IMAGES, encode, encoded_images, photo
from tests.runs import fail
from tests.stores import DATASET, prepare_dataset

IMAGES = {
    "tulip/b.jpg": ("jpeg_420", 30, 40),
    "tulip/a.png": ("png_rgb", 12, 9),
    "daisy/1.jpeg": ("jpeg_grey", 20, 21),
    "daisy/10.jpg": ("jpeg_progressive", 25, 22),
    "daisy/2.jpg": ("png_palette", 18, 16),  # what a file is its content says
    "a rose/x.jpg": ("jpeg_cmyk", 15, 15),
}
ORDER = ["a rose/x.jpg", "daisy/1.jpeg", "daisy/10.jpg", "daisy/2.jpg", "tulip/a.png", "tulip/b.jpg"]


def make_folder(root: Path, *prefixes: str) -> dict[str, bytes]:
    """Writes the images, below each of the prefixes; their bytes by path."""
    files = {}
    for prefix in prefixes or ("",):
        for seed, (name, (kind, height, width)) in enumerate(IMAGES.items()):
            path = root / prefix / name
            path.parent.mkdir(parents=True, exist_ok=True)
            files[f"{prefix}{name}"] = encode(photo(height, width, seed=seed), kind)
            path.write_bytes(files[f"{prefix}{name}"])
    return files


def flags(root: Path) -> list[str]:
    return ["import", f"--folder={root / 'images'}", "--name=my_flowers", f"--data_dir={root / 'data'}"]


def left(root: Path) -> list[str]:
    """What is in the data directory."""
    return sorted(str(path.relative_to(root / "data")) for path in (root / "data").rglob("*"))


def test_a_folder_of_class_folders_becomes_a_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = make_folder(tmp_path / "images")
    (tmp_path / "images" / ".DS_Store").write_text("the system's")
    assert main(flags(tmp_path)) == 0
    out, err = capsys.readouterr()
    made = "my_flowers: 6 images of 3 classes (train 6); use it with --dataset=my_flowers --data_dir="
    assert out.startswith(made)
    assert out.count("\n") == 1
    assert "write: 100%" in err
    assert "1 .DS_Store" in err
    dataset = Dataset("my_flowers", "train", data_dir=tmp_path / "data")
    assert dataset.read(np.arange(6)) == [files[name] for name in ORDER]
    assert dataset.class_names == ["a rose", "daisy", "tulip"]
    assert dataset.labels(np.arange(6)).tolist() == [0, 1, 1, 1, 2, 2]
    record = tfds.builder("my_flowers", data_dir=tmp_path / "data").as_data_source("train")[5]
    assert (record["image"].shape, record["filename"]) == ((30, 40, 3), b"tulip/b.jpg")
    assert [path for path in left(tmp_path) if "partial" in path] == []


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        make_folder(tmp_path / name / "images", "train/", "val/")
        assert main(flags(tmp_path / name)) == 0
        shards = sorted((tmp_path / name / "data").rglob("*.array_record*"))
        contents.append([path.read_bytes() for path in shards])
        assert len(shards) == 2
    assert contents[0] == contents[1]


def test_split_folders_become_splits_with_one_list_of_classes(tmp_path: Path) -> None:
    files = make_folder(tmp_path / "images", "train/", "val/")
    (tmp_path / "images" / "val" / "tulip" / "a.png").unlink()
    (tmp_path / "images" / "val" / "tulip" / "b.jpg").unlink()
    (tmp_path / "images" / "val" / "tulip").rmdir()
    assert main(flags(tmp_path)) == 0
    dataset = Dataset("my_flowers", "validation", data_dir=tmp_path / "data")
    assert dataset.split_names == ["train", "validation"]
    assert dataset.class_names == ["a rose", "daisy", "tulip"]
    assert dataset.read(np.arange(4)) == [files[f"val/{name}"] for name in ORDER[:4]]


def test_all_that_cannot_be_used_is_listed_at_once_and_nothing_is_prepared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    files = make_folder(images)
    jpeg, png = files["tulip/b.jpg"], files["tulip/a.png"]
    bad = {
        "tulip/cut.jpg": jpeg[:-200],
        "tulip/cut.png": png[: len(png) // 2],
        "daisy/empty.jpg": b"",
        "daisy/notes.txt": b"text",
        "daisy/picture.gif": encode(photo(9, 9, seed=0), "gif"),
        "daisy/header.jpg": jpeg[:20],
        "labels.csv": b"a,b",
    }
    for name, data in bad.items():
        (images / name).write_bytes(data)
    folders = ["lily", "tulip/more"]
    for name in folders:
        (images / name).mkdir()
    with pytest.raises(SystemExit) as exit_info:
        run_command(main, flags(tmp_path))
    assert exit_info.value.code == EXIT_USER_ERROR
    *listed, line = [text for text in capsys.readouterr().err.splitlines() if str(images) in text]
    assert f"--folder={images}: {len(bad) + 2} " in line
    assert {text.split(": ")[0] for text in listed} == {str(images / name) for name in [*bad, *folders]}
    assert not any("{{" in text for text in listed)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--name": "My-Flowers"}, "--name=My-Flowers"),
        ({"--name": "mnist"}, "--name=mnist"),
        ({"--folder": "nowhere"}, "--folder=nowhere"),
        ({"--folder": None}, "--from_tfds"),
        ({"--name": None}, "--name"),
        ({"--data_dir": None}, "--data_dir"),
        ({"--from_tfds": "x"}, "--folder"),
        ({"--nme": "x"}, "unknown flag --nme=x; did you mean --name?"),
    ],
    ids=str,
)
def test_mistakes_are_refused(tmp_path: Path, changes: dict[str, str | None], message: str) -> None:
    (tmp_path / "images").mkdir()
    given = dict(flag.split("=") for flag in flags(tmp_path)[1:]) | changes
    with pytest.raises(UserError) as caught:
        main(["import", *(f"{flag}={value}" for flag, value in given.items() if value is not None)])
    assert message in str(caught.value)


def test_another_command_is_refused() -> None:
    for argv in ([], ["export"]):
        with pytest.raises(UserError, match="import"):
            main(argv)


def test_what_would_surprise_is_counted_and_changed_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    make_folder(images)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(photo(20, 30, seed=1))
    picture.save(images / "tulip" / "turned.jpg", exif=exif)
    Image.new("RGBA", (8, 8)).save(images / "tulip" / "drawing.png")
    assert main(flags(tmp_path)) == 0
    err = capsys.readouterr().err
    assert "EXIF orientation: 1, kept" in err
    assert "transparent pixels: 1, kept" in err
    dataset = Dataset("my_flowers", "train", data_dir=tmp_path / "data")
    kept = dataset.read(np.arange(8))
    assert (images / "tulip" / "turned.jpg").read_bytes() in kept
    picture.save(images / "tulip" / "photo.webp", lossless=True)
    shutil.rmtree(tmp_path / "data")
    code, line = fail(flags(tmp_path), capsys, main=main)
    assert (code, f"--folder={images}: 1 " in line) == (EXIT_USER_ERROR, True)
    asked = ["--apply_orientation", "--flatten_alpha", "--convert_to_png"]
    assert main([*flags(tmp_path), *asked]) == 0
    err = capsys.readouterr().err
    assert "EXIF orientation: 1, " in err
    assert "transparent pixels: 1, " in err
    assert "kept" not in err
    assert "converted to PNG: 1" in err
    builder = tfds.builder("my_flowers", data_dir=tmp_path / "data")
    assert all(flag in builder.info.description for flag in asked)
    dataset = Dataset("my_flowers", "train", data_dir=tmp_path / "data")
    changed = dataset.read(np.arange(9))
    assert len(set(changed) & set(kept)) == 6
    names = [
        record["filename"]
        for record in tfds.builder("my_flowers", data_dir=tmp_path / "data").as_data_source("train")
    ]
    drawing, turned, photo_webp = (
        changed[names.index(f"tulip/{name}".encode())] for name in ("drawing.png", "turned.jpg", "photo.webp")
    )
    assert (decode(tf.constant(drawing)).numpy() == 255).all()
    assert decode(tf.constant(turned)).shape == (30, 20, 3)
    np.testing.assert_array_equal(decode(tf.constant(photo_webp)).numpy(), photo(20, 30, seed=1))


def test_nothing_is_said_to_be_converted_that_was_refused() -> None:
    found = [Examined(problem="neither JPEG nor PNG", converted=True)]
    assert dataset_import.notes(Folder([], {}, [], {}), found, Changes()) == []


def test_a_change_of_records_that_are_copied_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--flatten_alpha.*--from_tfds"):
        main(["import", "--from_tfds=x", f"--data_dir={tmp_path}", "--flatten_alpha"])


def test_a_file_name_that_is_not_utf8_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "images")
    path = tmp_path / "images" / "tulip" / os.fsdecode(b"caf\xe9.jpg")
    (tmp_path / "images" / "tulip" / "b.jpg").rename(path)
    code, line = fail(flags(tmp_path), capsys, main=main)
    assert (code, f"--folder={tmp_path / 'images'}: 1 " in line) == (EXIT_USER_ERROR, True)
    assert left(tmp_path) == []


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"CLASS/IMAGE\.jpg or train/CLASS"):
        main(flags(tmp_path))


def test_a_class_that_no_training_image_has_is_told(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", "train/", "test/")
    (tmp_path / "images" / "test" / "tulip").rename(tmp_path / "images" / "test" / "Tulip")
    (problem,) = scan(tmp_path / "images").problems
    assert problem.startswith("Tulip: ")


def test_a_data_set_that_is_there_stays(tmp_path: Path) -> None:
    make_folder(tmp_path / "images")
    assert main(flags(tmp_path)) == 0
    before = left(tmp_path)
    with pytest.raises(UserError, match=r"my_flowers/1\.0\.0"):
        main(flags(tmp_path))
    assert left(tmp_path) == before


def test_an_import_that_finished_just_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between this one's look at the target and its lock."""
    there = tmp_path / "data" / "my_flowers" / "1.0.0" / "dataset_info.json"
    lock = dataset_import.writer_lock

    @contextlib.contextmanager
    def late(directory: Path, *, flag: str) -> Iterator[None]:
        there.parent.mkdir(parents=True)
        there.touch()
        with lock(directory, flag=flag):
            yield

    monkeypatch.setattr(dataset_import, "writer_lock", late)
    make_folder(tmp_path / "images")
    with pytest.raises(UserError, match=r"my_flowers/1\.0\.0"):
        main(flags(tmp_path))
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == [there]


def test_what_a_dead_run_left_is_replaced_and_a_live_one_is_not_disturbed(tmp_path: Path) -> None:
    make_folder(tmp_path / "images")
    aside = tmp_path / "data" / ".my_flowers-1.0.0.partial"
    (aside / "my_flowers" / "1.0.0").mkdir(parents=True)
    (aside / "my_flowers" / "1.0.0" / "junk").write_text("half")
    with writer_lock(aside), pytest.raises(UserError, match=f"process {os.getpid()}"):
        main(flags(tmp_path))
    assert main(flags(tmp_path)) == 0
    assert not aside.exists()
    assert not list((tmp_path / "data").rglob("junk"))


# From another format.


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
    assert left(tmp_path) == []


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
        dataset_import.convert_tfds("depths", str(tmp_path), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_an_unknown_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`from_tfds`=no_such_photos: "):
        main(
            ["import", "--from_tfds=no_such_photos", f"--from_data_dir={tmp_path}", f"--data_dir={tmp_path}"]
        )


def test_metadata_are_the_source_s_but_for_the_format(tfrecords: Path, tmp_path: Path) -> None:
    dataset_import.convert_tfds(DATASET, str(tfrecords), tmp_path)
    old, new = (json.loads(next(d.rglob("dataset_info.json")).read_text()) for d in (tfrecords, tmp_path))
    assert new == old | {"fileFormat": "array_record"}
    with pytest.raises(DataError, match=r"\b3\b.*\b4\b"):
        dataset_import._write_file(tmp_path / "file", [b"a", b"b", b"c"], expected=4, source="x")
