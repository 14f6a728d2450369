"""`python -m pipeline.dataset import`: makes a TFDS data set of ArrayRecord files.

The source is a folder of images, whose JPEG and PNG files are kept byte for byte unless a flag requests a change, or a TFDS
data set in another file format. The result is written to a temporary directory and published by one rename.

TFDS's own `convert_format` would lose the class names and does not compare record counts; its `ImageFolder` reads the files
at training time, without random access.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import multiprocessing.pool
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.core import file_adapters
from tqdm import tqdm

from pipeline.cli.environment import usable_cpus
from pipeline.cli.parameters import with_flags
from pipeline.cli.parser import make_directory
from pipeline.errors import DataError, UserError
from pipeline.errors.causes import first_line
from pipeline.flags.dataset import CHANGES
from pipeline.inputs.builder import check_features, find_builder, load_builder, quiet_tfds
from pipeline.inputs.image_files import Changes, Examined, change, examine
from pipeline.inputs.image_folder import Folder, scan, shown
from pipeline.storage.files import move_directory, remove_directory
from pipeline.storage.lock import LOCK_FILE, writer_lock

VERSION = "1.0.0"
_NAME = re.compile(r"[a-z][a-z0-9_]*")  # names of TFDS


def check_images(folder: Folder, changes: Changes) -> list[Examined]:
    """Examines every image; returns the results in the order of the images."""
    paths = [path for images in folder.splits.values() for path, _ in images]
    found = []
    examine_one = functools.partial(examine, changes=changes)
    with multiprocessing.pool.ThreadPool(usable_cpus()) as pool, _bar(len(paths), "check") as bar:
        for one in pool.imap(examine_one, paths, chunksize=8):
            found.append(one)
            bar.update()
    return found


def notes(folder: Folder, examined: list[Examined], changes: Changes) -> list[str]:
    """Lines about files that were skipped, changed, or kept although they need a change."""
    lines = []
    if folder.skipped:
        names = ", ".join(f"{count:,} {name}" for name, count in sorted(folder.skipped.items()))
        lines.append(
            f"skipped files and folders of the operating system: {sum(folder.skipped.values()):,} ({names})"
        )
    if count := sum(one.oriented for one in examined):
        lines.append(
            f"images with an EXIF orientation: {count:,}, "
            + (
                "rotated"
                if changes.apply_orientation
                else "kept as stored. TensorFlow's decoders ignore the tag, so teacher and students see them rotated or "
                "mirrored; --apply_orientation corrects them"
            )
        )
    if count := sum(one.transparent for one in examined):
        lines.append(
            f"images with transparent pixels: {count:,}, "
            + (
                "put onto white"
                if changes.flatten_alpha
                else "kept as stored. The alpha channel is dropped, so teacher and students see the hidden color, often black; "
                "--flatten_alpha puts them onto white"
            )
        )
    if changes.convert_to_png and (count := sum(one.converted for one in examined)):
        lines.append(f"images converted to PNG: {count:,}")
    return lines


def _bar(total: int, what: str) -> tqdm:
    return tqdm(total=total, unit=" images", desc=what, dynamic_ncols=True)


def make_builder(
    name: str, folder: Folder, changes: Changes, on_image: Callable[[], Any]
) -> type[tfds.core.GeneratorBasedBuilder]:
    """Makes the TFDS builder of a folder of images, with features `image`, `label` and `filename` (`CLASS/FILE`).

    Args:
      changes: changes of the images.
      on_image: called after each image.
    """
    asked = "".join(f" --{change}" for change in CHANGES if getattr(changes, change))

    # For mypy the base class is Any, so it looks for the keyword in `object`.
    class Images(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """Images from a folder."""

        VERSION = tfds.core.Version(VERSION)

        def _info(self) -> tfds.core.DatasetInfo:
            return self.dataset_info_from_configs(
                description=f"Made from a folder of images by `pipeline.dataset import{asked}`.",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(None, None, 3)),
                        "label": tfds.features.ClassLabel(names=folder.classes),
                        "filename": tfds.features.Text(),
                    }
                ),
                supervised_keys=("image", "label"),
                disable_shuffling=True,  # examples in the order of their names
            )

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
            del dl_manager
            return {split: self._generate_examples(images) for split, images in folder.splits.items()}

        def _generate_examples(self, images: list[tuple[Path, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
            for key, (path, label) in enumerate(images):
                image = io.BytesIO(change(path.read_bytes(), changes))
                yield key, {"image": image, "label": label, "filename": f"{label}/{path.name}"}
                on_image()

    Images.name = name
    return Images


@contextlib.contextmanager
def published(data_dir: Path, path: Path) -> Iterator[Path]:
    """Yields a temporary directory; `path` in it is moved to `data_dir / path` unless the context raises.

    Args:
      data_dir: TFDS data directory; created if it does not exist.
      path: relative path of the data set: name, config if any, version.

    Raises:
      UserError: the path exists, or another process is writing it.
    """
    target = data_dir / path
    _check_absent(target, data_dir, path)
    aside = data_dir / f".{'-'.join(path.parts)}.partial"
    make_directory(data_dir, flag="--data_dir")
    aside.mkdir(exist_ok=True)
    with writer_lock(aside, flag="--data_dir"):
        try:
            _check_absent(target, data_dir, path)  # again: another import may have finished
            for leftover in aside.iterdir():  # of an interrupted run
                if leftover.name != LOCK_FILE:
                    remove_directory(leftover)
            yield aside
            target.parent.mkdir(parents=True, exist_ok=True)
            move_directory(aside / path, target)
        finally:
            remove_directory(aside)


def _check_absent(target: Path, data_dir: Path, path: Path) -> None:
    if target.exists():
        raise UserError(f"--data_dir={data_dir}: {path} exists; name another directory, or remove it first")


def import_folder(folder: Path, name: str, data_dir: Path, changes: Changes) -> str:
    """Makes the data set `name` from a folder; prints `notes`.

    Returns:
      One line that describes the data set.

    Raises:
      UserError: a file cannot be used, the name is taken, or the disk is full.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"--name={name}: expected a letter, followed by a-z, 0-9 and _")
    if name in tfds.list_builders(with_community_datasets=False):
        raise UserError(f"--name={name}: is a data set of TFDS; use another name")
    with published(data_dir, Path(name, VERSION)) as aside:
        found = scan(folder)
        examined = check_images(found, changes)
        paths = [path for images in found.splits.values() for path, _ in images]
        problems = found.problems + [
            f"{shown(path)}: {one.problem}"
            for path, one in zip(paths, examined, strict=True)
            if one.problem is not None
        ]
        for line in notes(found, examined, changes):
            print(line, file=sys.stderr)
        if problems:
            print(with_flags("\n".join(problems)), file=sys.stderr)
            raise UserError(
                f"--folder={folder}: {len(problems)} files or folders cannot be used, as listed above; fix or move them; nothing was "
                "written"
            )
        total = len(paths)
        with _bar(total, "write") as bar, quiet_tfds():
            make_builder(name, found, changes, bar.update)(data_dir=aside).download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    parts = ", ".join(f"{split} {len(images):,}" for split, images in found.splits.items())
    return f"{name}: {total:,} images of {len(found.classes):,} classes ({parts})"


def _records(path: str, file_format: file_adapters.FileFormat) -> Iterable[bytes]:
    """Yields the serialized records of a file in another format.

    Raises:
      DataError: the file is missing or damaged.
    """
    try:
        yield from file_adapters.ADAPTER_FOR_FORMAT[file_format].make_tf_data(path).as_numpy_iterator()
    except tf.errors.OpError as error:
        raise DataError(f"{path}: cannot read it: {first_line(error)}; prepare the data set again") from error


def _write_file(path: Path, records: Iterable[bytes], *, expected: int, source: str) -> None:
    """Writes an ArrayRecord file with TFDS's options, and counts its records.

    Raises:
      DataError: the number of records differs from the source's metadata.
    """
    count = 0
    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        for record in records:
            writer.write(record)
            count += 1
    finally:
        writer.close()
    reader = ArrayRecordReader(str(path))
    written = reader.num_records() if reader.ok() else 0
    if not count == written == expected:
        raise DataError(
            f"{source}: {count} records, {written} written, expected {expected}; prepare the data set again"
        )


def convert_tfds(name: str, from_data_dir: str | None, data_dir: Path) -> str:
    """Converts a data set in another file format to ArrayRecord, record by record.

    Returns:
      One line that describes the data set.

    Raises:
      UserError: the data set is not prepared, is ArrayRecord already, or is in a format that TFDS cannot read.
      DataError: a file of the data set is damaged.
    """
    builder = find_builder(name, from_data_dir, parameter="from_tfds")
    info, source = builder.info, Path(builder.data_dir)
    file_format = info.file_format or file_adapters.DEFAULT_FILE_FORMAT
    if file_format.value == "array_record":
        raise UserError(f"--from_tfds={name}: is array_record in {source}; use it with --dataset={name}")
    if file_format not in file_adapters.FileFormat.with_tf_data():
        raise UserError(
            f"--from_tfds={name}: is {file_format.value} in {source}, expected a format that tf.data can read, such as tfrecord"
        )
    check_features(info)  # refuses unsupported features early
    path = Path(info.name, info.config_name or "", str(info.version))
    shards = [
        (split.filename_template.replace(filetype_suffix="array_record"), split, number)
        for split in info.splits.values()
        for number in range(split.num_shards)
    ]
    total = sum(split.num_examples for split in info.splits.values())
    with published(data_dir, path) as aside, _bar(total, "convert") as bar:
        (aside / path).mkdir(parents=True)
        old_files = {Path(p).name for split in info.splits.values() for p in split.filepaths}
        for file in source.iterdir():
            if file.is_file() and file.name not in old_files:
                shutil.copyfile(file, aside / path / file.name)
        for template, split, number in shards:
            new = template.sharded_filepath(shard_index=number, num_shards=split.num_shards).name
            old = str(split.filepaths[number])
            counted = _counting(_records(old, file_format), bar)
            _write_file(aside / path / new, counted, expected=int(split.shard_lengths[number]), source=old)
        info_path = aside / path / "dataset_info.json"
        whole = json.loads(info_path.read_text())
        whole["fileFormat"] = "array_record"
        info_path.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")
    return f"{name}: {total:,} examples in {len(shards)} files"


def _counting(records: Iterable[bytes], bar: tqdm) -> Iterator[bytes]:
    for record in records:
        yield record
        bar.update()


def run_import(flags: argparse.Namespace) -> int:
    """Runs the import that the flags of `pipeline.flags.dataset` describe."""
    changes = Changes(**{name: getattr(flags, name) for name in CHANGES})
    if flags.folder is not None:
        name = flags.name
        made = import_folder(Path(flags.folder), name, Path(flags.data_dir), changes)
    else:
        made, name = convert_tfds(flags.from_tfds, flags.from_data_dir, Path(flags.data_dir)), flags.from_tfds
    load_builder(name, flags.data_dir)
    print(f"{made}; use it with --dataset={name} --data_dir={flags.data_dir}")
    return 0
