"""pipeline.precompute: early, named errors that lose no published data."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import resource
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline.cli.main import run_command
from pipeline.errors import DataError, UserError
from pipeline.errors.causes import find_error
from pipeline.flags.precompute import announce_demo, make_parser
from pipeline.inputs.locate import open_dataset
from pipeline.pages.views import replay_views
from pipeline.precompute import main
from pipeline.precomputing.options import resolve
from pipeline.precomputing.reports import work_text
from pipeline.store.reader import StoreReader
from pipeline.store.shards import ShardTask
from pipeline.store.spec import SPEC_FILE
from tests.images import TRAIN_IMAGES, encoded_images
from tests.stores import BATCH, SIZE, Asked, PlainTeacher, prepare_dataset, save_teacher, shard_files

# --- the teacher, before the store is opened


def input_of(side: int, channels: int = 3, dtype: tf.DType = tf.float32) -> dict[str, tf.TensorSpec]:
    return {"image": tf.TensorSpec([None, side, side, channels], dtype)}


def refusal(asked: Asked, teacher: Path) -> UserError | DataError:
    """The error of a run with an unusable teacher, which writes no spec."""
    with pytest.raises((UserError, DataError)) as caught:
        main(dataclasses.replace(asked, teacher=teacher).flags())
    assert not (asked.store / SPEC_FILE).exists()
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_teacher_whose_output_has_another_shape(asked: Asked, tmp_path: Path) -> None:
    module = PlainTeacher()
    teacher = save_teacher(tmp_path / "t", lambda image: {"logits": module(image)[:, None]}, module=module)
    error = refusal(asked, teacher)
    for part in ("(None, 1, 5)", "[B, C]"):
        assert part in str(error)


def test_a_teacher_whose_logits_are_not_finite(asked: Asked, tmp_path: Path) -> None:
    module = PlainTeacher()
    bias = module.weights[-1]
    bias.assign(tf.fill(bias.shape, np.nan))
    error = refusal(asked, save_teacher(tmp_path / "t", module=module))
    assert isinstance(error, DataError)
    assert re.search(r"logit 0 of view 0 \(example \d+, .*nan", str(error))


def test_a_teacher_that_gives_probabilities(asked: Asked, tmp_path: Path) -> None:
    module = PlainTeacher()
    teacher = save_teacher(tmp_path / "t", lambda image: {"p": tf.nn.softmax(module(image))}, module=module)
    assert "probabilities" in str(refusal(asked, teacher))


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        (input_of(SIZE + 8), "float32 (None, 32, 32, 3)"),
        (input_of(SIZE, channels=1), "float32 (None, 24, 24, 1)"),
        (input_of(SIZE, dtype=tf.uint8), "uint8 (None, 24, 24, 3)"),
    ],
    ids=["size", "channels", "type"],
)
def test_a_teacher_of_another_input(
    asked: Asked, tmp_path: Path, inputs: dict[str, tf.TensorSpec], found: str
) -> None:
    teacher = save_teacher(
        tmp_path / "t",
        lambda image: {"logits": tf.reduce_mean(tf.cast(image, tf.float32), [1, 2])},
        module=tf.Module(),
        inputs=inputs,
    )
    error = refusal(asked, teacher)
    assert found in str(error)
    assert "24, 24, 3]" in str(error)


# --- images


def huge_png(side: int) -> bytes:
    """A PNG with `side` x `side` in its header and no pixels; decoders fail earlier."""
    content = {b"IHDR": struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT": b"", b"IEND": b""}
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in content.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
@pytest.mark.parametrize("kind", ["cut", "no_image", "huge"])
def test_an_image_that_cannot_be_decoded_is_named(
    asked: Asked, tmp_path: Path, kind: str, cache_bytes: int
) -> None:
    images = encoded_images(TRAIN_IMAGES)
    broken = {"cut": images[5][: len(images[5]) // 2], "no_image": b"GIF or so", "huge": huge_png(20_000)}
    data_dir = prepare_dataset(tmp_path / "data", {"train": [*images[:5], broken[kind], *images[6:]]})
    flags = dataclasses.replace(asked, data_dir=data_dir).flags("--eval_splits=none")
    with pytest.raises(Exception, match="example 5: ") as caught:
        main([*flags, f"--image_cache_bytes={cache_bytes}"])
    found = find_error(caught.value)
    assert isinstance(found, DataError)
    assert str(found).startswith("example 5: ")
    if kind == "huge" and not cache_bytes:
        assert "pixels" in str(found)
    assert not list(asked.store.rglob("dataset_info.json"))
    assert not list(asked.store.rglob(".tmp-*"))


def test_an_image_of_one_pixel_is_its_only_box(asked: Asked, tmp_path: Path) -> None:
    """No box with a valid area and shape exists, so the whole image is the box, as in TensorFlow."""
    images = encoded_images(TRAIN_IMAGES)
    pixel = tf.io.encode_png(np.array([[[250, 30, 7]]], np.uint8)).numpy()
    data_dir = prepare_dataset(tmp_path / "data", {"train": [*images[:5], pixel, *images[6:]]})
    asked = dataclasses.replace(asked, data_dir=data_dir)
    assert main(asked.flags("--eval_splits=train")) == 0
    store = StoreReader(asked.store)
    records = store.views.read(np.arange(store.views.num_records))
    (of_pixel,) = np.nonzero(records.example == 5)
    assert records.box[of_pixel].tolist() == [[0, 0, 1, 1]] * len(of_pixel) == [[0, 0, 1, 1]] * 3
    views = of_pixel[:1]
    ((shown, _),) = replay_views(store, open_dataset(store, "views", data_dir=str(data_dir)), views)
    assert (shown.crop == [250, 30, 7]).all()


# --- time and room


def test_a_shard_of_more_than_ten_teacher_minutes_is_announced(asked: Asked) -> None:
    flags, _ = make_parser().parse_known_args(asked.flags())
    options = resolve(flags, is_demo=announce_demo(flags))
    tasks = [ShardTask(split="views", number=n, first=n * 4800, records=4800) for n in range(3)]
    # 4 views a batch: at a second a batch 1,200 s a shard, at half of it exactly ten minutes.
    assert BATCH == 4
    amount, warning = work_text(tasks, seconds_per_batch=1.0, options=options).splitlines()
    for part in ("14,400 views", "3 shards", "4 images/s", "60.0 min"):
        assert part in amount
    for part in ("20 min", "--views_per_shard=2400 "):
        assert part in warning
    assert len(work_text(tasks, seconds_per_batch=0.5, options=options).splitlines()) == 1


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limits the size of files of this process; writes beyond it fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_loses_nothing(
    asked: Asked, published_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice, for the shards of new epochs."""
    assert main(asked.flags("--epochs=1")) == 0
    before = shard_files(asked.store)
    for _ in range(2):
        capsys.readouterr()
        with largest_file(90_000), pytest.raises(SystemExit) as caught:  # the smallest shard has 128 KiB
            run_command(main, asked.flags())
        assert caught.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert f"{asked.store}/views.array_record-0000" in line
        assert "File too large" in line
        assert shard_files(asked.store) == before
        assert not list(asked.store.rglob(".tmp-*"))
    assert main(asked.flags()) == 0
    assert before.items() <= shard_files(asked.store).items()
