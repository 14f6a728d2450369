"""pipeline.precomputing.value_range and .accuracy: labels reveal a wrong value range, and the teacher's top-1."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline import inspect
from pipeline.errors import EXIT_DATA_ERROR, EXIT_USER_ERROR, UserError
from pipeline.precompute import main
from pipeline.precomputing.value_range import RangeFigures, check_value_range
from pipeline.store.accuracy import read_accuracy
from pipeline.store.layout import ACCURACY_FILE
from pipeline.store.reader import StoreReader
from tests.runs import fail
from tests.stores import BATCH, SIZE, save_teacher
from tests.teachers import COLORS, COLORS_TEST, COLORS_TRAIN, prepare_colors

PROTOTYPES = np.array([[250, 20, 20], [20, 250, 20], [20, 20, 250], [230, 230, 20], [10, 10, 10]], np.float32)


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_colors(tmp_path_factory.mktemp("colors"))


@pytest.fixture(scope="module")
def color_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classifies images in 0..1 by the distance of their color; brighter values are white."""

    def call(image: tf.Tensor) -> dict[str, tf.Tensor]:
        mean = tf.clip_by_value(tf.reduce_mean(image, [1, 2]), 0, 1)[:, tf.newaxis]
        return {"logits": -tf.reduce_sum((mean - PROTOTYPES / 255) ** 2, -1)}

    return save_teacher(tmp_path_factory.mktemp("color") / "t", call, module=tf.Module())


def arguments(data_dir: Path, teacher: Path, store: Path, *extra: str) -> list[str]:
    return [
        "--runner=FnApiRunner",
        f"--dataset={COLORS}",
        f"--data_dir={data_dir}",
        f"--teacher={teacher}",
        f"--store={store}",
        f"--image_size={SIZE}",
        f"--teacher_batch_size={BATCH}",
        "--epochs=1",
        *extra,
    ]


def test_the_wrong_range_is_refused_and_the_right_one_is_measured(
    colors: Path, color_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    train_alone = arguments(colors, color_teacher, store, "--eval_splits=none")
    code, line = fail(train_alone, capsys, main=main)
    assert code == EXIT_USER_ERROR
    assert "--teacher_value_range=0..255" in line
    assert "100.0% with 0..1" in line
    assert "--assume_value_range" in line
    assert not (store / "spec.json").exists()

    argv = arguments(colors, color_teacher, store, "--teacher_value_range=0..1")
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "0..1 100.0%" in out
    assert f"test 100.00% of {COLORS_TEST} images, train 100.00% of {COLORS_TRAIN} images" in out
    found = read_accuracy(StoreReader(store))
    assert {name: (one.correct, one.labeled) for name, one in found.items()} == {
        "test": (COLORS_TEST, COLORS_TEST),
        "train": (COLORS_TRAIN, COLORS_TRAIN),
    }
    assert main(argv) == 0
    assert "test 100.00%" in capsys.readouterr().out
    assert inspect.main([f"--store={store}", f"--json={tmp_path}/contents.json"]) == 0
    assert capsys.readouterr().out.count("100.00%") == 2
    splits = json.loads((tmp_path / "contents.json").read_text())["splits"]
    assert [split["teacher_top1"] for split in splits] == [None, 1.0, 1.0]

    # A store of an earlier version has no such file; one that is damaged is reported.
    (store / ACCURACY_FILE).write_text('{"spec": "x", "splits": {"test": {"labeled": 1, "correct": 2}}}')
    code, line = fail([f"--store={store}"], capsys, main=inspect.main)
    assert code == EXIT_DATA_ERROR
    assert ACCURACY_FILE in line
    (store / ACCURACY_FILE).unlink()
    assert inspect.main([f"--store={store}"]) == 0
    assert "100.00%" not in capsys.readouterr().out


def test_a_constant_teacher_is_refused(
    colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save_teacher(
        tmp_path / "t",
        lambda image: {"logits": tf.tile([[1.0, -2.0, 3.0, 0.0, 1.0]], [tf.shape(image)[0], 1])},
        module=tf.Module(),
    )
    code, line = fail(arguments(colors, teacher, tmp_path / "store"), capsys, main=main)
    assert code == EXIT_USER_ERROR
    assert "same for" in line


def figures(requested: list[int], other: list[int]) -> RangeFigures:
    correct = {
        "0..255": np.array(requested, bool),
        "0..1": np.array(other, bool),
        "-1..1": np.zeros(len(requested), bool),
    }
    return RangeFigures(split="test", requested="0..255", correct=correct)


@pytest.mark.parametrize(
    ("requested", "other", "better"),
    [
        ([0] * 10, [1] * 10, "0..1"),
        ([0] * 9, [1] * 9, None),
        ([1] * 64, [1] * 64, None),
        ([1] * 40 + [0] * 24, [1] * 64, "0..1"),
        ([1, 0] * 32, [0, 1] * 32, None),
        ([0] * 11 + [1] * 245, [1] * 256, None),  # beyond doubt, but by less than 5 points
    ],
    ids=["ten_of_ten", "nine_of_nine", "equal", "24_of_24", "even", "small_lead"],
)
def test_what_is_clearly_better(requested: list[int], other: list[int], better: str | None) -> None:
    assert figures(requested, other).better() == better
    assert figures(other, requested).better() in (None, "0..1")


def test_a_user_may_state_that_the_range_is_right() -> None:
    found = figures([0] * 10, [1] * 10)
    with pytest.raises(UserError, match="`assume_value_range`"):
        check_value_range(found, assumed=False)
    check_value_range(found, assumed=True)


def test_a_range_is_worse_once_it_is_clear() -> None:
    found = figures([1] * 10, [0] * 10)
    assert found.is_worse("0..1")
    assert not found.is_worse("0..255")
    assert not figures([1] * 9, [0] * 9).is_worse("0..1")
