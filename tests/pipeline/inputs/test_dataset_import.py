"""pipeline.dataset import: folders of images; whole or not at all."""

from __future__ import annotations

import contextlib
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
from pipeline.errors import EXIT_USER_ERROR, UserError
from pipeline.inputs import dataset_import, new_dataset
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.image_files import Changes, Examined
from pipeline.inputs.image_folder import Folder, scan
from pipeline.storage.lock import writer_lock
from pipeline.views.render import decode
from tests.images import encode, photo
from tests.runs import fail

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


@pytest.mark.parametrize(
    "flag", ["--short_side=0", "--short_side=160 --quality=101", "--holdout=0", "--holdout=1", "--quality=90"]
)
def test_a_value_out_of_range_is_refused(tmp_path: Path, flag: str) -> None:
    make_folder(tmp_path / "images")
    with pytest.raises(UserError, match=flag.rsplit(maxsplit=1)[-1].split("=", maxsplit=1)[0]):
        main([*flags(tmp_path), *flag.split()])
    assert not (tmp_path / "data").exists()


def test_scaled_images_are_a_config_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = make_folder(tmp_path / "images")
    assert main(flags(tmp_path)) == 0
    assert main([*flags(tmp_path), "--short_side=15"]) == 0
    assert "--dataset=my_flowers/short_side_15 " in capsys.readouterr().out
    original = Dataset("my_flowers", "train", data_dir=tmp_path / "data")
    small = Dataset("my_flowers/short_side_15", "train", data_dir=tmp_path / "data")
    for name, before, after in zip(ORDER, original.read(np.arange(6)), small.read(np.arange(6)), strict=True):
        height, width = IMAGES[name][1:]
        assert before == files[name]
        if min(height, width) <= 15:
            assert after == before
        else:
            assert after.startswith(b"\xff\xd8\xff")
            assert min(decode(tf.constant(after)).shape[:2]) == 15
    ours, theirs = small.identity(), original.identity()
    assert (ours.name, theirs.name) == ("my_flowers/short_side_15:1.0.0", "my_flowers:1.0.0")
    assert ours.fingerprint != theirs.fingerprint
    assert small.labels(np.arange(6)).tolist() == original.labels(np.arange(6)).tolist()
    builder = tfds.builder("my_flowers/short_side_15", data_dir=tmp_path / "data")
    assert "--short_side=15 --quality=95" in builder.info.description


def test_all_images_of_a_folder_are_taken_without_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = make_folder(tmp_path / "images", "", "2019/summer/")
    (tmp_path / "images" / "first.jpg").write_bytes(files["tulip/b.jpg"])
    assert main([*flags(tmp_path), "--unlabeled"]) == 0
    assert "13 images of 7 folders, without labels" in capsys.readouterr().out
    records = list(tfds.builder("my_flowers", data_dir=tmp_path / "data").as_data_source("train"))
    assert {record["filename"].decode() for record in records} == {*files, "first.jpg"}
    assert {*records[0]} == {"image", "filename"}


def test_holdout_is_a_test_split_that_does_not_depend_on_names(tmp_path: Path) -> None:
    contents = []
    for root, pattern in ((tmp_path / "one", "{}.jpg"), (tmp_path / "two", "photo-{}.jpeg")):
        for name in ("daisy", "tulip"):
            (root / "images" / name).mkdir(parents=True)
            for seed in range(10):
                data = encode(photo(9, 9, seed=seed + 100 * len(name)), "jpeg_420")
                number = seed if root.name == "one" else 9 - seed
                (root / "images" / name / pattern.format(number)).write_bytes(data)
        assert main([*flags(root), "--holdout=0.2"]) == 0
        splits = {s: Dataset("my_flowers", s, data_dir=root / "data") for s in ("train", "test")}
        assert {split: data.num_examples for split, data in splits.items()} == {"train": 16, "test": 4}
        assert np.bincount(splits["test"].labels(np.arange(4))).tolist() == [2, 2]
        contents.append(set(splits["test"].read(np.arange(4))))
        assert not contents[-1] & set(splits["train"].read(np.arange(16)))
    assert contents[0] == contents[1]


def test_holdout_of_a_folder_with_splits_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", "train/", "val/")
    with pytest.raises(UserError, match=r"`holdout`=0\.5: .*train, validation"):
        main([*flags(tmp_path), "--holdout=0.5"])
    assert left(tmp_path) == []


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
    lock = new_dataset.writer_lock

    @contextlib.contextmanager
    def late(directory: Path, *, flag: str) -> Iterator[None]:
        there.parent.mkdir(parents=True)
        there.touch()
        with lock(directory, flag=flag):
            yield

    monkeypatch.setattr(new_dataset, "writer_lock", late)
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
