"""`python -m pipeline.dataset import --from_tfds`: a TFDS data set as ArrayRecord, with its records as they are or with smaller images.

TFDS's own `convert_format` would lose the class names, and does not compare record counts.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import tensorflow as tf
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.core import file_adapters
from tqdm import tqdm

from pipeline.cli.choices import NO_LABELS
from pipeline.errors import DataError, UserError
from pipeline.errors.causes import first_line
from pipeline.inputs.builder import check_features, find_builder, find_features
from pipeline.inputs.image_files import DAMAGED, Changes, change
from pipeline.inputs.new_dataset import SizeChange, in_parallel, progress_bar, published
from pipeline.views.headers import has_16_bits

_RECORDS_AT_ONCE = 256


def import_tfds(
    name: str,
    from_data_dir: str | None,
    data_dir: Path,
    changes: Changes,
    *,
    image_feature: str | None = None,
) -> tuple[str, str]:
    """Makes the ArrayRecord data set; with `changes.short_side`, as a config of its own.

    Args:
      changes: only `short_side` and `quality` have an effect.
      image_feature: image that is scaled, of several; None for the supervised pair's or the only one.

    Returns:
      The name of the new data set, and one line that describes it.

    Raises:
      UserError: the data set is not prepared, is ArrayRecord already, or is in a format that TFDS cannot read.
      DataError: a file of the data set is damaged.
    """
    builder = find_builder(name, from_data_dir, parameter="from_tfds")
    info, source = builder.info, Path(builder.data_dir)
    file_format = info.file_format or file_adapters.DEFAULT_FILE_FORMAT
    is_array_record = file_format.value == "array_record"
    if is_array_record and not changes.config:
        raise UserError(f"--from_tfds={name}: is array_record in {source}; use it with --dataset={name}")
    if not is_array_record and file_format not in file_adapters.FileFormat.with_tf_data():
        raise UserError(
            f"--from_tfds={name}: is {file_format.value} in {source}, expected a format that tf.data can read, such as tfrecord"
        )
    if changes.config:
        image_key = find_features(info, image=image_feature, label=NO_LABELS).image
    else:
        check_features(info)  # refuses unsupported features early
    read = _array_records if is_array_record else functools.partial(_tf_records, file_format=file_format)
    config = "_".join(filter(None, [info.config_name, changes.config]))
    path = Path(info.name, config, str(info.version))
    total = sum(split.num_examples for split in info.splits.values())
    with published(data_dir, path) as aside, progress_bar(total, "convert") as bar:
        (aside / path).mkdir(parents=True)
        if not changes.config:
            sizes = _write_shards(aside / path, info, read, bar)
            _copy_metadata(source, aside / path, info)
            return name, f"{name}: {total:,} examples in {len(sizes)} files"
        tally = SizeChange()
        shrink = functools.partial(_shrunk, image_key=image_key, changes=changes, tally=tally)
        sizes = _write_shards(aside / path, info, read, bar, shrink)
        _write_metadata(aside / path, info, image_key, config, changes, sizes)
    made = f"{info.name}/{config}" + (f":{info.version}" if ":" in name else "")
    return made, f"{made}: {total:,} examples in {len(sizes)} files; {tally.text(changes)}"


def _tf_records(path: str, *, file_format: file_adapters.FileFormat) -> Iterator[bytes]:
    """Yields the serialized records of a file in a format of tf.data.

    Raises:
      DataError: the file is missing or damaged.
    """
    try:
        yield from file_adapters.ADAPTER_FOR_FORMAT[file_format].make_tf_data(path).as_numpy_iterator()
    except tf.errors.OpError as error:
        raise DataError(f"{path}: cannot read it: {first_line(error)}; prepare the data set again") from error


def _array_records(path: str) -> Iterator[bytes]:
    """Yields the serialized records of an ArrayRecord file.

    Raises:
      DataError: the file is missing or damaged.
    """
    try:
        reader = ArrayRecordReader(path)
        if not reader.ok():
            reader.close()  # raises the reason
        for start in range(0, reader.num_records(), _RECORDS_AT_ONCE):
            yield from reader.read(list(range(start, min(start + _RECORDS_AT_ONCE, reader.num_records()))))
    except (RuntimeError, IndexError, ValueError) as error:
        raise DataError(f"{path}: cannot read it: {first_line(error)}; prepare the data set again") from error


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A file that was written."""

    split: str
    records: int
    bytes: int


def _write_shards(
    directory: Path,
    info: tfds.core.DatasetInfo,
    read: Callable[[str], Iterator[bytes]],
    bar: tqdm,
    change_records: Callable[[str, Iterable[bytes]], Iterator[bytes]] | None = None,
) -> list[_Shard]:
    """Writes one file for each file of the source, with the same records or changed ones."""
    out = []
    for split in info.splits.values():
        template = split.filename_template.replace(filetype_suffix="array_record")
        for number, (length, old) in enumerate(zip(split.shard_lengths, split.filepaths, strict=True)):
            new = template.sharded_filepath(shard_index=number, num_shards=split.num_shards).name
            records = read(str(old))
            if change_records is not None:
                records = change_records(str(old), records)
            size = _write_file(
                directory / new, _counting(records, bar), expected=int(length), source=str(old)
            )
            out.append(_Shard(split.name, int(length), size))
    return out


def _write_file(path: Path, records: Iterable[bytes], *, expected: int, source: str) -> int:
    """Writes an ArrayRecord file with TFDS's options, and counts its records; returns their size in bytes.

    Raises:
      DataError: the number of records differs from the source's metadata.
    """
    count = size = 0
    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        for record in records:
            writer.write(record)
            count += 1
            size += len(record)
    finally:
        writer.close()
    reader = ArrayRecordReader(str(path))
    written = reader.num_records() if reader.ok() else 0
    if not count == written == expected:
        raise DataError(
            f"{source}: {count} records, {written} written, expected {expected}; prepare the data set again"
        )
    return size


def _counting(records: Iterable[bytes], bar: tqdm) -> Iterator[bytes]:
    for record in records:
        yield record
        bar.update()


def _shrunk(
    path: str, records: Iterable[bytes], *, image_key: str, changes: Changes, tally: SizeChange
) -> Iterator[bytes]:
    """Yields the records of a file with smaller images.

    Raises:
      DataError: a record has no image that can be decoded.
    """

    def change_one(item: tuple[int, bytes]) -> tuple[bytes, bytes, bytes]:
        number, record = item
        example = tf.train.Example.FromString(record)
        values = example.features.feature[image_key].bytes_list.value
        try:
            if len(values) != 1 or has_16_bits(values[0]):
                raise ValueError("expected one image of 8 bits per channel")
            before, after = values[0], change(values[0], changes)
        except (OSError, *DAMAGED) as error:
            raise DataError(
                f"{path}: record {number}: cannot decode its image: {first_line(error)}; prepare the data set again"
            ) from error
        if after == before:
            return record, before, before
        values[0] = after
        return example.SerializeToString(deterministic=True), before, after

    for record, before, after in in_parallel(change_one, enumerate(records)):
        tally.add(before, after)
        yield record


def _copy_metadata(source: Path, target: Path, info: tfds.core.DatasetInfo) -> None:
    """Copies all files but the shards, and changes the file format in dataset_info.json."""
    shards = {Path(path).name for split in info.splits.values() for path in split.filepaths}
    for file in source.iterdir():
        if file.is_file() and file.name not in shards:
            shutil.copyfile(file, target / file.name)
    whole = json.loads((target / "dataset_info.json").read_text())
    whole["fileFormat"] = "array_record"
    (target / "dataset_info.json").write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")


def _write_metadata(
    target: Path,
    info: tfds.core.DatasetInfo,
    image_key: str,
    config: str,
    changes: Changes,
    shards: list[_Shard],
) -> None:
    """Writes TFDS's metadata of a data set with smaller images: another config, and images of any size and encoding."""
    channels = info.features[image_key].shape[2]
    image = tfds.features.Image(shape=(None, None, 3 if channels == 4 else channels))
    made = f"{info.full_name} with images scaled down by `pipeline.dataset import {changes.text()}`."
    new = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            name=info.name,
            version=tfds.core.Version(str(info.version)),
            data_dir=str(target),
            module_name="",
            config_name=config,
            config_description=made,
            release_notes={},
        ),
        features=tfds.features.FeaturesDict({**info.features, image_key: image}),
        supervised_keys=info.supervised_keys,
        description=f"{made}\n\n{info.description or ''}".strip(),
        homepage=info.homepage,
        citation=info.citation,
        license=info.as_proto.redistribution_info.license or None,
    )
    new.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
    splits = [
        tfds.core.SplitInfo(
            name=split.name,
            shard_lengths=[shard.records for shard in shards if shard.split == split.name],
            num_bytes=sum(shard.bytes for shard in shards if shard.split == split.name),
            filename_template=split.filename_template.replace(
                filetype_suffix="array_record", data_dir=target
            ),
        )
        for split in info.splits.values()
    ]
    new.set_splits(tfds.core.splits.SplitDict(splits))
    new.write_to_directory(target)
