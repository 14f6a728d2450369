"""`python -m pipeline.dataset import`: makes a data set that `--dataset=NAME` takes.

Of a folder of class folders, in split folders or not, whose JPEG and PNG files are kept byte for byte; or of a TFDS
data set that is prepared in a format without random access. It is written aside and published by one rename: there
is the whole data set under its name, or none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import multiprocessing.pool
import os
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

from pipeline.dataset import COMMAND, find_builder, image_sizes, load_builder, without_announcements
from pipeline.errors import DataError, UserError, first_line
from pipeline.flags import Parser, file_path, make_directory
from pipeline.store.files import put_directory, remove_directory
from pipeline.store.lock import LOCK_FILE, writer_lock
from pipeline.views.render import decode

VERSION = "1.0.0"
_NAME = re.compile(r"[a-z][a-z0-9_]*")  # as TFDS spells names
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
# A split's usual name where a folder has another; commands look for `validation`.
_SPLIT_NAMES = {"val": "validation", "valid": "validation"}
_TF_DECORATION = re.compile(r"\{\{.*?\}\}|\[Op:\w+\]|, size \d+ +name:")


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a folder of images holds.

    Attributes:
      classes: names, sorted; an image's label is its class's place.
      splits: by name, the images' (path, class), sorted by path below the split.
      problems: what cannot be used, one line each.
    """

    classes: list[str]
    splits: dict[str, list[tuple[Path, str]]]
    problems: list[str]


def _entries(directory: Path) -> list[Path]:
    """What is in a directory, sorted by name; hidden files are the system's, not the user's."""
    return sorted(path for path in directory.iterdir() if not path.name.startswith("."))


def scan(folder: Path) -> Folder:
    """Finds images by split and class, without opening them: `CLASS/FILE`, or `SPLIT/CLASS/FILE`.

    Raises:
      UserError: there is no such folder, or no class folder in it.
    """
    if not folder.is_dir():
        raise UserError(f"--folder={folder}: no such directory")
    problems = [f"{path}: not in a class folder" for path in _entries(folder) if not path.is_dir()]
    directories = [path for path in _entries(folder) if path.is_dir()]
    # Most files lie below classes; what lies elsewhere is told.
    inside = [path for directory in directories for path in _entries(directory)]
    below = [file for path in inside if path.is_dir() for file in _entries(path) if not file.is_dir()]
    has_splits = len(below) > sum(not path.is_dir() for path in inside)
    roots = {_SPLIT_NAMES.get(d.name, d.name): d for d in directories} if has_splits else {"train": folder}
    if not directories:
        raise UserError(
            f"--folder={folder}: no class folders in it; expected CLASS/IMAGE.jpg or SPLIT/CLASS/IMAGE.jpg"
        )
    if has_splits and len(roots) < len(directories):
        raise UserError(
            f"--folder={folder}: two folders of one split, {', '.join(d.name for d in directories)}"
        )
    splits: dict[str, list[tuple[Path, str]]] = {}
    for split, root in roots.items():
        splits[split] = []
        if has_splits:
            problems += [f"{path}: not in a class folder" for path in _entries(root) if not path.is_dir()]
        for class_folder in filter(Path.is_dir, _entries(root)):
            files = _entries(class_folder)
            problems += [f"{path}: a folder in a class folder" for path in files if path.is_dir()]
            found = [(path, class_folder.name) for path in files if not path.is_dir()]
            if not found:
                problems.append(f"{class_folder}: a class folder without images")
            splits[split] += found
        if not splits[split]:
            problems.append(f"{root}: a split folder without images")
    trained = {name for _, name in splits.get("train", itertools.chain(*splits.values()))}
    classes = sorted({name for images in splits.values() for _, name in images})
    problems += [f"{name}: a class without images in train" for name in classes if name not in trained]
    return Folder(classes, splits, problems)


def what_is_wrong(path: Path) -> str | None:
    """Why an image cannot be used, or None; decodes it as it will be decoded."""
    try:
        data = path.read_bytes()
        if not data.startswith(_MAGIC):
            return "neither JPEG nor PNG"
        image_sizes([data])
        decode(tf.constant(data))
    except OSError as error:
        return error.strerror or str(error)
    except DataError as error:
        return first_line(error.__cause__ or error)
    except tf.errors.InvalidArgumentError as error:
        return _TF_DECORATION.sub("", first_line(error)).strip()
    return None


def check_images(folder: Folder) -> list[str]:
    """Opens every image; what is wrong, one line a file, in their order."""
    paths = [path for images in folder.splits.values() for path, _ in images]
    problems = []
    with multiprocessing.pool.ThreadPool(os.cpu_count()) as pool, _bar(len(paths), "check") as bar:
        for path, reason in zip(paths, pool.imap(what_is_wrong, paths, chunksize=8), strict=True):
            if reason is not None:
                problems.append(f"{path}: {reason}")
            bar.update()
    return problems


def _bar(total: int, what: str) -> tqdm:
    return tqdm(total=total, unit=" images", desc=what, dynamic_ncols=True)


def make_builder(
    name: str, folder: Folder, on_image: Callable[[], Any]
) -> type[tfds.core.GeneratorBasedBuilder]:
    """The TFDS builder of a folder of images: `image`, `label`, and `filename`, which is `CLASS/FILE`.

    Args:
      name: of the data set.
      folder: what it is made of.
      on_image: called after each.
    """

    # mypy looks for the keyword in `object`: to it, the base class is Any.
    class Images(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """Images of one's own."""

        VERSION = tfds.core.Version(VERSION)

        def _info(self) -> tfds.core.DatasetInfo:
            return self.dataset_info_from_configs(
                description="Made of a folder of images by pipeline.dataset.",
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
                yield key, {"image": path, "label": label, "filename": f"{label}/{path.name}"}
                on_image()

    Images.name = name
    return Images


@contextlib.contextmanager
def published(data_dir: Path, path: Path) -> Iterator[Path]:
    """Gives an empty directory in `data_dir`; the one that `path` names in it moves there if nothing is raised.

    Args:
      data_dir: made if it is absent.
      path: of the data set below it: name, perhaps config, version.

    Raises:
      UserError: there is something at the path, or somebody else is writing it.
    """
    target = data_dir / path
    if target.exists():
        raise UserError(f"--data_dir={data_dir}: {path} is there already; name another, or remove it first")
    aside = data_dir / f".{'-'.join(path.parts)}.partial"
    make_directory(data_dir, flag="--data_dir")
    aside.mkdir(exist_ok=True)
    with writer_lock(aside, flag="--data_dir"):
        for leftover in aside.iterdir():  # of a run that died
            if leftover.name != LOCK_FILE:
                remove_directory(leftover)
        try:
            yield aside
            target.parent.mkdir(parents=True, exist_ok=True)
            put_directory(aside / path, target)
        finally:
            remove_directory(aside)


def import_folder(folder: Path, name: str, data_dir: Path) -> str:
    """Makes the data set `name` of a folder.

    Returns:
      One line on what it holds.

    Raises:
      UserError: a file cannot be used, the name is taken, or the disk is full.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"--name={name}: expected a-z, 0-9 and _, a letter first")
    if name in tfds.list_builders(with_community_datasets=False):
        raise UserError(
            f"--name={name}: TFDS has a data set of that name, which would be taken; name another"
        )
    with published(data_dir, Path(name, VERSION)) as aside:
        found = scan(folder)
        if problems := found.problems + check_images(found):
            print("\n".join(problems), file=sys.stderr)
            raise UserError(
                f"--folder={folder}: {len(problems)} files or folders cannot be used, listed above; mend them or move "
                "them away, nothing was prepared"
            )
        total = sum(map(len, found.splits.values()))
        with _bar(total, "write") as bar, without_announcements():
            make_builder(name, found, bar.update)(data_dir=aside).download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    parts = ", ".join(f"{split} {len(images):,}" for split, images in found.splits.items())
    return f"{name}: {total:,} images of {len(found.classes):,} classes ({parts})"


def _records(path: str, file_format: file_adapters.FileFormat) -> Iterable[bytes]:
    """The records of a file of another format, undecoded.

    Raises:
      DataError: it is missing or damaged.
    """
    try:
        yield from file_adapters.ADAPTER_FOR_FORMAT[file_format].make_tf_data(path).as_numpy_iterator()
    except tf.errors.OpError as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}; prepare the data set again") from error


def _write_file(path: Path, records: Iterable[bytes], *, expected: int, source: str) -> None:
    """Writes an ArrayRecord file as TFDS does.

    Raises:
      DataError: the source has another number of records than its metadata say.
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
    """Makes a data set that is prepared in another format one of ArrayRecord files, record by record.

    Returns:
      One line on what it holds.

    Raises:
      UserError: there is none, or nothing to convert.
      DataError: a file of it is damaged.
    """
    builder = find_builder(name, from_data_dir, flag="--from_tfds")
    info, source = builder.info, Path(builder.data_dir)
    file_format = info.file_format or file_adapters.DEFAULT_FILE_FORMAT
    if file_format.value == "array_record":
        raise UserError(f"--from_tfds={name}: is array_record already in {source}; --dataset={name} takes it")
    if file_format not in file_adapters.FileFormat.with_tf_data():
        raise UserError(f"--from_tfds={name}: prepared as {file_format.value}, which cannot be converted")
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


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser(prog=COMMAND, description="Makes a TFDS data set of ArrayRecord files.")
    add = parser.add_argument
    add("--folder", type=file_path, help="class folders of JPEG and PNG images, or split folders of those")
    add("--name", help="of the data set that is made of a folder")
    add("--from_tfds", metavar="NAME", help="data set prepared in another format, NAME[/CONFIG][:VERSION]")
    add("--from_data_dir", type=file_path, help="TFDS data directory of that; by default TFDS's own")
    add("--data_dir", type=file_path, required=True, help="TFDS data directory to write to")
    return parser


def run_import(argv: list[str]) -> int:
    """The command; `argv` is what follows `import`."""
    flags = make_parser().parse_strictly(argv)
    if (flags.folder is None) == (flags.from_tfds is None):
        raise UserError("give either --folder and --name, or --from_tfds")
    if (flags.folder is None) != (flags.name is None):
        raise UserError("--name goes with --folder: it names what is made of it")
    if flags.folder is not None:
        made, name = import_folder(Path(flags.folder), flags.name, Path(flags.data_dir)), flags.name
    else:
        made, name = convert_tfds(flags.from_tfds, flags.from_data_dir, Path(flags.data_dir)), flags.from_tfds
    load_builder(name, flags.data_dir)
    print(f"{made}; use it with --dataset={name} --data_dir={flags.data_dir}")
    return 0
