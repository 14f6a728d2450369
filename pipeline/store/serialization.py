"""Serializes views and encoded logits as tf.Example records in TFDS's layout, and parses them."""

from __future__ import annotations

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from pipeline.errors import DataError
from pipeline.store.codecs import Codec, Column, Encoded
from pipeline.views.records import ViewRecords


def record_features(codec: Codec) -> tfds.features.FeaturesDict:
    """TFDS features of a record. Labels are in the data set only."""
    return tfds.features.FeaturesDict(
        {
            "example": np.int64,
            "box": tfds.features.Tensor(shape=(4,), dtype=np.int32),
            "flip": np.bool_,
            "mixup_ratio": np.float32,
            "crop_hash": np.uint32,
            "source_hash": np.uint32,
            **codec.features(),
        }
    )


def serialize(records: ViewRecords, encoded: Encoded) -> list[bytes]:
    """Serializes n records, deterministically.

    TFDS's serializer does not fix the order of a message's map, but equal shards must have equal bytes.

    Args:
      records: n views with both fingerprints.
      encoded: columns of the encoded logits.
    """
    out = []
    for row in range(len(records.example)):
        example = tf.train.Example()
        feature = example.features.feature
        feature["example"].int64_list.value.append(int(records.example[row]))
        feature["box"].int64_list.value.extend(records.box[row].tolist())
        feature["flip"].int64_list.value.append(int(records.flip[row]))
        feature["mixup_ratio"].float_list.value.append(float(records.ratio[row]))
        feature["crop_hash"].int64_list.value.append(int(records.crop_hash[row]))
        feature["source_hash"].int64_list.value.append(int(records.source_hash[row]))
        for name, column in encoded.items():
            if column.ndim == 1:
                feature[name].float_list.value.append(float(column[row]))
            else:
                feature[name].bytes_list.value.append(column[row].tobytes())
        out.append(example.SerializeToString(deterministic=True))
    return out


_PARSE = {
    "example": tf.io.FixedLenFeature([], tf.int64),
    "box": tf.io.FixedLenFeature([4], tf.int64),
    "flip": tf.io.FixedLenFeature([], tf.int64),
    "mixup_ratio": tf.io.FixedLenFeature([], tf.float32),
    "crop_hash": tf.io.FixedLenFeature([], tf.int64),
    "source_hash": tf.io.FixedLenFeature([], tf.int64),
}


def parse(serialized: list[bytes], codec: Codec) -> ViewRecords:
    """Parses serialized records and decodes their logits.

    Raises:
      DataError: a record does not belong to a store with this codec.
    """
    wanted = _PARSE | {
        name: tf.io.FixedLenFeature([], tf.float32 if column.size is None else tf.string)
        for name, column in codec.columns.items()
    }
    try:
        columns = {
            k: v.numpy() for k, v in tf.io.parse_example(tf.constant(serialized, tf.string), wanted).items()
        }
        logits = codec.decode(
            {name: _values(columns[name], column) for name, column in codec.columns.items()}
        )
        ratio, box = columns["mixup_ratio"], columns["box"]
        crop_hash, source_hash = columns["crop_hash"], columns["source_hash"]
        if not ((ratio >= 0) & (ratio <= 1)).all() or not ((box >= 0) & (box < 2**31)).all():
            raise ValueError("mixup ratio or box out of range")
        # Beyond 32 bits are the marks of fingerprints that are not stored, which are not compared.
        if any(((column < 0) | (column >= 2**32)).any() for column in (crop_hash, source_hash)):
            raise ValueError("fingerprint out of range")
    except (tf.errors.InvalidArgumentError, ValueError) as error:
        raise DataError(f"not a record of {codec.num_classes} {codec.name} logits: {error}") from error
    return ViewRecords(
        example=columns["example"],
        box=box.astype(np.int32),
        flip=columns["flip"] != 0,
        ratio=ratio,
        crop_hash=crop_hash,
        source_hash=source_hash,
        stored=np.ones(len(serialized), bool),
        logits=logits,
    )


def _values(found: np.ndarray, column: Column) -> np.ndarray:
    """Converts a parsed column of n records to its values, [n] or [n, size]."""
    if column.size is None:
        return found
    if any(len(text) != column.bytes for text in found):
        raise ValueError(f"expected {column.bytes} bytes")
    return np.frombuffer(b"".join(found), column.dtype).reshape(len(found), column.size)
