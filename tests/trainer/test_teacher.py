"""trainer.teacher: `convert` and `finetune`, as the commands are given."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import run_command
from pipeline.store.lock import writer_lock
from pipeline.teacher import Teacher
from tests import stores
from tests.bit import (
    CLASSES,
    UNITS,
    paper_names,
    pictures,
    random_arrays,
    reference,
    relative_error,
    save_npz,
    shapes_of,
)
from tests.runs import ROOT, environment
from trainer import models
from trainer.callbacks import RunCallback
from trainer.models.bit import BIT_MODELS, bit
from trainer.teacher import export, load_keras_model, main

COLOURS = "colours"
COLOURS_TRAIN, COLOURS_TEST = 25, 10


@pytest.fixture(autouse=True)
def bit_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A BiT of two small blocks, by name."""
    for table in (BIT_MODELS, models.STUDENTS):
        monkeypatch.setitem(table, "bit_small", functools.partial(bit, depth=UNITS))


@pytest.fixture(scope="module")
def colours_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that can be learnt in a few steps: each class is a colour; read only."""

    def picture(index: int) -> bytes:
        generator = np.random.default_rng(index)
        colour = np.array([[250, 20, 20], [20, 250, 20], [20, 20, 250], [230, 230, 20], [10, 10, 10]])
        pixels = colour[index % stores.CLASSES] + generator.integers(-10, 6, (30, 40, 3))
        return tf.io.encode_png(np.clip(pixels, 0, 255).astype(np.uint8)).numpy()

    splits = {
        "train": [picture(i) for i in range(COLOURS_TRAIN)],
        "test": [picture(100 + i) for i in range(COLOURS_TEST)],
    }
    return stores.prepare_dataset(tmp_path_factory.mktemp("colours"), splits, name=COLOURS)


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BiT with a head of 7 classes, in the layout of the paper's files; read only."""
    return save_npz(tmp_path_factory.mktemp("npz") / "bit.npz", paper_names(random_arrays(shapes_of(UNITS))))


def fail(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """Exit code and the one line on standard error of a command that has to fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run_command(main, argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return exit_info.value.code, lines[0]


# convert


def convert_arguments(npz: Path, output: Path, *extra: str) -> list[str]:
    return ["convert", f"--npz={npz}", "--model=bit_small", "--image_size=33", f"--output={output}", *extra]


def test_converted_checkpoint_is_a_teacher_with_the_published_logits(npz: Path, tmp_path: Path):
    output = tmp_path / "new" / "teacher"
    assert main(convert_arguments(npz, output)) == 0
    function = tf.saved_model.load(str(output)).signatures["serving_default"]
    assert list(function.structured_input_signature[1]) == ["image"]
    assert list(function.structured_outputs) == ["logits"]
    teacher = Teacher(output, image_size=33, num_classes=CLASSES)
    crops = np.rint(pictures(3, 33)).astype(np.uint8)
    logits = teacher.logits(tf.constant(crops), tf.range(3), tf.ones(3))
    expected = reference(random_arrays(shapes_of(UNITS)), crops, UNITS)
    assert relative_error(logits, expected) < 1e-4
    assert [path.name for path in output.parent.iterdir()] == ["teacher"]


def test_converted_checkpoint_is_loaded_by_keras_again(npz: Path, tmp_path: Path):
    main(convert_arguments(npz, tmp_path / "teacher"))
    model = load_keras_model(str(tmp_path / "teacher"), flag="--teacher")
    assert type(model.get_layer("block1/unit01/gn1")).__name__ == "GroupNorm"
    images = pictures(2, 33)
    expected = reference(random_arrays(shapes_of(UNITS)), images, UNITS)
    assert relative_error(model(images).numpy(), expected) < 1e-4


def test_new_head_is_zero_and_of_the_classes_asked_for(npz: Path, tmp_path: Path):
    main(convert_arguments(npz, tmp_path / "teacher", "--num_classes=11", "--new_head"))
    teacher = Teacher(tmp_path / "teacher", image_size=33, num_classes=11)
    logits = teacher.logits(tf.zeros([1, 33, 33, 3], tf.uint8), tf.constant([0]), tf.ones(1))
    np.testing.assert_array_equal(logits, np.zeros((1, 11)))


def test_saved_model_in_the_way_is_replaced_whole(npz: Path, tmp_path: Path):
    output = tmp_path / "teacher"
    main(convert_arguments(npz, output, "--num_classes=3", "--new_head"))
    (output / "leftover").write_text("of the one before")
    main(convert_arguments(npz, output))
    assert not (output / "leftover").exists()
    Teacher(output, image_size=33, num_classes=CLASSES)


def test_crash_while_writing_leaves_the_one_before(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "teacher"
    main(convert_arguments(npz, output))
    before = (output / "saved_model.pb").read_bytes()

    def crash(self: tf.keras.Model, path: Path, **options: Any) -> None:
        path.mkdir()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(tf.keras.Model, "save", crash)
    with pytest.raises(SystemExit) as exit_info:
        run_command(main, convert_arguments(npz, output))
    assert exit_info.value.code == 2
    assert (output / "saved_model.pb").read_bytes() == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--num_classes=9"], r"--num_classes=9: .* has a head of 7 classes; pass --new_head"),
        (["--new_head"], "--num_classes is missing: --new_head needs it"),
        (["--model=tiny"], "--model=tiny: expected one of bit_r50x1"),
        (["--model=bit_r50x1"], "does not fit bit_r50x1: block1/unit02/gn1/scale is not there"),
        (["--npz=/none.npz"], "/none.npz: no such file"),
        (["--image_size=0"], "--image_size: 0: expected 1 or more"),
        (["--imagesize=3"], r"unknown flag --imagesize=3; did you mean --image_size\?"),
    ],
)
def test_mistakes_in_convert_exit_2(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
):
    code, line = fail(convert_arguments(npz, tmp_path / "teacher", *extra), capsys)
    assert code == 2
    assert re.search(message, line)
    assert not (tmp_path / "teacher").exists()


def test_checkpoint_without_a_head_needs_a_new_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    npz = save_npz(tmp_path / "body.npz", random_arrays(shapes_of(UNITS, num_classes=None)))
    code, line = fail(convert_arguments(npz, tmp_path / "teacher"), capsys)
    assert (code, "has no head to take it from" in line) == (2, True)
    code, line = fail(convert_arguments(npz, tmp_path / "teacher", "--num_classes=4"), capsys)
    assert (code, "has no head; pass --new_head" in line) == (2, True)
    main(convert_arguments(npz, tmp_path / "teacher", "--num_classes=4", "--new_head"))
    Teacher(tmp_path / "teacher", image_size=33, num_classes=4)


def test_damaged_checkpoint_exits_3(npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = bytearray(npz.read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "bad.npz").write_bytes(data)
    code, line = fail(convert_arguments(tmp_path / "bad.npz", tmp_path / "teacher"), capsys)
    assert (code, "is damaged" in line) == (3, True)


@pytest.mark.parametrize("command", ["convert", "finetune"])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_output_that_is_no_saved_model_is_not_touched(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
):
    if kind == "file":
        (tmp_path / "keep").write_text("mine")
    else:
        (tmp_path / "keep").mkdir()
        (tmp_path / "keep" / "mine").write_text("mine")
    argv = {
        "convert": convert_arguments(npz, tmp_path / "keep"),
        "finetune": ["finetune", "--model=tiny", f"--output={tmp_path}/keep", f"--workdir={tmp_path}/run"],
    }[command]
    code, line = fail(argv, capsys)
    assert (code, "exists and is no SavedModel" in line) == (2, True)
    assert (tmp_path / "keep").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [([], "required: convert|finetune"), (["train"], "invalid choice: 'train'"), (["--x"], "required")],
)
def test_unknown_command_is_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    code, line = fail(argv, capsys)
    assert code == 2
    assert message in line


@pytest.mark.parametrize("command", ["convert", "finetune"])
def test_help_lists_the_flags_and_an_example(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "--output" in text
    assert f"python -m trainer.teacher {command} --" in " ".join(text.split())


# finetune


def finetune_arguments(
    colours_dir: Path, tmp_path: Path, *extra: str, network: str = "--model=tiny"
) -> list[str]:
    """A short run on colours; a later flag replaces an earlier one."""
    return [
        "finetune",
        f"--dataset={COLOURS}",
        f"--data_dir={colours_dir}",
        network,
        "--image_size=24",
        "--batch_size=10",
        "--steps=12",
        "--learning_rate=5",
        "--log_every=1",
        f"--output={tmp_path}/teacher",
        f"--workdir={tmp_path}/run",
        *extra,
    ]


def result(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run" / "result.json").read_text())


def losses(tmp_path: Path) -> list[float]:
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights_of(path: Path) -> list[np.ndarray]:
    return load_keras_model(str(path), flag="--teacher").get_weights()


@pytest.mark.parametrize("policy", ["light", "inception"])
def test_finetuning_learns_and_writes_a_teacher(colours_dir: Path, tmp_path: Path, policy: str):
    assert main(finetune_arguments(colours_dir, tmp_path, "--steps=60", f"--policy={policy}")) == 0
    found = losses(tmp_path)
    assert len(found) == 60
    assert np.mean(found[-5:]) < 0.5 * found[0]
    assert result(tmp_path)["top1"]["test"] >= 0.8
    teacher = Teacher(tmp_path / "teacher", image_size=24, num_classes=stores.CLASSES)
    red = np.full((1, 24, 24, 3), [250, 20, 20], np.uint8)
    logits = teacher.logits(tf.constant(red), tf.constant([0]), tf.ones(1))
    assert logits.argmax() == 0


def test_interrupted_run_ends_like_an_undisturbed_one(
    colours_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: None
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(finetune_arguments(colours_dir, whole, "--steps=7"))
    original = RunCallback.on_train_batch_end
    for stop in (3, 6):

        def interrupt(self: RunCallback, batch: int, logs: Any = None, *, stop: int = stop) -> None:
            original(self, batch, logs)
            if self.step == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(RunCallback, "on_train_batch_end", interrupt)
        with pytest.raises(SystemExit) as exit_info:
            run_command(main, finetune_arguments(colours_dir, cut, "--steps=7", "--checkpoint_every=2"))
        assert exit_info.value.code == 130
        assert not (cut / "teacher").exists()
    monkeypatch.setattr(RunCallback, "on_train_batch_end", original)
    main(finetune_arguments(colours_dir, cut, "--steps=7", "--checkpoint_every=2"))
    assert result(cut)["first_step"] == 6
    assert losses(cut) == losses(whole)
    for ours, theirs in zip(weights_of(cut / "teacher"), weights_of(whole / "teacher"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_finished_run_is_only_evaluated_and_exported_again(colours_dir: Path, tmp_path: Path):
    main(finetune_arguments(colours_dir, tmp_path, "--steps=2"))
    before = weights_of(tmp_path / "teacher")
    main(finetune_arguments(colours_dir, tmp_path, "--steps=2"))
    assert result(tmp_path)["first_step"] == 2
    for ours, theirs in zip(weights_of(tmp_path / "teacher"), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_run_with_other_flags_is_not_continued(
    colours_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main(finetune_arguments(colours_dir, tmp_path, "--steps=2"))
    code, line = fail(finetune_arguments(colours_dir, tmp_path, "--steps=3", "--policy=inception"), capsys)
    assert code == 2
    assert "steps: 3 asked for, 2 in the checkpoint" in line
    assert "policy.name: inception asked for, light in the checkpoint" in line


def test_head_of_a_keras_saved_model_is_replaced_and_trained_alone(
    colours_dir: Path, tmp_path: Path, keras_teacher_path: Path
):
    network = f"--teacher={keras_teacher_path}"
    main(finetune_arguments(colours_dir, tmp_path, "--head_only", "--steps=30", network=network))
    found, before = weights_of(tmp_path / "teacher"), weights_of(keras_teacher_path)
    for ours, theirs in zip(found[:2], before[:2], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert losses(tmp_path)[0] == pytest.approx(np.log(stores.CLASSES), rel=1e-5)  # of a zero head
    assert losses(tmp_path)[-1] < 0.8 * np.log(stores.CLASSES)


def test_whole_keras_saved_model_is_trained(colours_dir: Path, tmp_path: Path, keras_teacher_path: Path):
    network = f"--teacher={keras_teacher_path}"
    main(finetune_arguments(colours_dir, tmp_path, "--steps=3", network=network))
    for ours, theirs in zip(weights_of(tmp_path / "teacher"), weights_of(keras_teacher_path), strict=True):
        assert (ours != theirs).any()


def test_teacher_with_a_softmax_and_another_value_range_takes_0_to_255(colours_dir: Path, tmp_path: Path):
    layers = tf.keras.layers
    image = tf.keras.Input([None, None, 3], name="picture")
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(8, 3, name="first")(image))
    x = layers.Softmax()(layers.Dense(3, name="classes")(x))
    tf.keras.Model(image, x, name="other").save(tmp_path / "other", include_optimizer=False)
    network = f"--teacher={tmp_path}/other"
    extra = ["--teacher_value_range=-1..1", "--steps=3", "--learning_rate=0"]
    main(finetune_arguments(colours_dir, tmp_path, *extra, network=network))
    model = load_keras_model(str(tmp_path / "teacher"), flag="--teacher")
    assert model.output_shape == (None, stores.CLASSES)
    grey = tf.fill([1, 24, 24, 3], 127.5)  # 0 to the network, whose convolution has no bias yet
    body = tf.keras.Model(model.input, model.layers[-1].input)
    np.testing.assert_allclose(body(grey), np.zeros((1, 8)), atol=1e-6)
    assert np.abs(body(grey + 100)).max() > 0.01


class Doubled(tf.keras.layers.Layer):
    """Not registered with Keras, which has to make it again from its trace."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.factor = self.add_weight("factor", [], initializer=tf.keras.initializers.Constant(2.0))

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return x * self.factor


def test_teacher_with_a_layer_of_an_unknown_class(colours_dir: Path, tmp_path: Path):
    layers = tf.keras.layers
    image = tf.keras.Input([24, 24, 3])
    x = Doubled()(layers.GlobalAveragePooling2D()(layers.Rescaling(1 / 255.0)(image)))
    tf.keras.Model(image, layers.Dense(3)(x)).save(tmp_path / "custom", include_optimizer=False)
    network = f"--teacher={tmp_path}/custom"
    main(finetune_arguments(colours_dir, tmp_path, "--steps=30", network=network))
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    Teacher(tmp_path / "teacher", image_size=24, num_classes=stores.CLASSES)
    assert load_keras_model(str(tmp_path / "teacher"), flag="--init").count_params() == 1 + 4 * stores.CLASSES


@pytest.mark.parametrize("given", ["npz", "saved_model", "teacher"])
def test_bit_begins_with_the_weights_of_a_checkpoint(
    colours_dir: Path, tmp_path: Path, npz: Path, given: str
):
    main(convert_arguments(npz, tmp_path / "converted"))
    network, extra = {
        "npz": ("--model=bit_small", [f"--init={npz}"]),
        "saved_model": ("--model=bit_small", [f"--init={tmp_path}/converted"]),
        "teacher": (f"--teacher={tmp_path}/converted", []),
    }[given]
    extra += ["--steps=1", "--learning_rate=0", "--image_size=33"]
    main(finetune_arguments(colours_dir, tmp_path, *extra, network=network))
    found, before = weights_of(tmp_path / "teacher"), weights_of(tmp_path / "converted")
    for ours, theirs in zip(found[:-2], before[:-2], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found[-2].shape == (512, stores.CLASSES)
    assert not found[-2].any()


def test_other_initial_weights_do_not_continue_a_run(
    colours_dir: Path, tmp_path: Path, npz: Path, capsys: pytest.CaptureFixture[str]
):
    extra = ["--steps=1", "--image_size=33"]
    main(finetune_arguments(colours_dir, tmp_path, *extra, network="--model=bit_small"))
    argv = finetune_arguments(colours_dir, tmp_path, *extra, f"--init={npz}", network="--model=bit_small")
    code, line = fail(argv, capsys)
    assert code == 2
    assert re.search(r"init: [0-9a-f]{64} asked for, None in the checkpoint", line)


def test_second_run_in_a_work_directory_is_refused(
    colours_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "run").mkdir()
    with writer_lock(tmp_path / "run", flag="--workdir"):
        code, line = fail(finetune_arguments(colours_dir, tmp_path), capsys)
    assert (code, "is writing it" in line) == (2, True)


def test_split_without_another_to_evaluate_on_is_said(
    colours_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main(finetune_arguments(colours_dir, tmp_path, "--steps=1", "--split=test"))
    assert result(tmp_path)["top1"] == {}
    assert "not evaluated: colours:1.0.0 has no split validation or test" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("network", "extra", "message"),
    [
        ("--model=vgg", [], "--model=vgg: expected one of .*resnet50v2"),
        ("--seed=1", [], "got neither of --model and --teacher"),
        ("--model=tiny", ["--teacher=/none"], "got both of --model and --teacher"),
        ("--teacher=/none", [], "--teacher=/none: no such file or directory; expected a Keras SavedModel"),
        ("--teacher=/none", ["--init=/none"], "--init=/none: needs --model"),
        ("--model=tiny", ["--init=a.npz"], r"--init=a.npz: a .npz is of a BiT; --model=tiny is none"),
        ("--model=bit_small", ["--init=/none.npz"], "/none.npz: no such file"),
        ("--model=tiny", ["--init=/none"], "--init=/none: no such file"),
        ("--model=tiny", ["--teacher_value_range=0..2"], "expected one of 0..255"),
        ("--model=tiny", ["--steps=0"], "--steps: 0: expected 1 or more"),
        ("--model=tiny", ["--learning_rate=-1"], "--learning_rate=-1.0: expected a finite number, 0 or more"),
        ("--model=tiny", ["--policy=heavy"], "--policy=heavy: expected one of inception, light"),
        ("--model=tiny", ["--recipe=soup"], "--recipe=soup: expected one of keras_example"),
        ("--model=tiny", ["--workdir=/etc/passwd"], "--workdir=/etc/passwd: a file is in the way"),
        ("--model=tiny", ["--split=dev"], "--split=dev: .* has splits test, train"),
        ("--model=tiny", ["--dataset=nothing"], "--dataset=nothing: not found"),
        ("--model=tiny", ["--step=3"], r"unknown flag --step=3; did you mean --steps\?"),
    ],
)
def test_mistakes_in_finetune_exit_2(
    colours_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    network: str,
    extra: list[str],
    message: str,
):
    code, line = fail(finetune_arguments(colours_dir, tmp_path, *extra, network=network), capsys)
    assert code == 2
    assert re.search(message, line)
    assert not (tmp_path / "teacher").exists()


def test_teachers_that_cannot_be_finetuned_exit_2(
    colours_dir: Path,
    tmp_path: Path,
    teacher_path: Path,
    keras_teacher_path: Path,
    npz: Path,
    capsys: pytest.CaptureFixture[str],
):
    layers = tf.keras.layers
    pool = tf.keras.Sequential([layers.Input([24, 24, 3]), layers.GlobalAveragePooling2D(name="last")])
    pool.save(tmp_path / "pool.keras")
    main(convert_arguments(npz, tmp_path / "bit"))
    for network, extra, message in (
        (f"--teacher={teacher_path}", [], "a SavedModel that Keras did not write"),
        (f"--teacher={colours_dir}", [], "Keras cannot load it"),
        (f"--teacher={npz}", [], "Keras cannot load it"),
        (f"--teacher={tmp_path}/pool.keras", [], "ends in last, a GlobalAveragePooling2D; expected a Dense"),
        (f"--teacher={keras_teacher_path}", ["--image_size=20"], r"takes \(None, 24, 24, 3\), but views are"),
        ("--model=small", [f"--init={keras_teacher_path}"], r"--init does not fit small: .* there, .* here"),
        ("--model=tiny", [f"--init={tmp_path}/bit"], r"--init does not fit tiny: .* there, .* here"),
    ):
        code, line = fail(finetune_arguments(colours_dir, tmp_path, *extra, network=network), capsys)
        assert code == 2
        assert re.search(message, line), line


def test_damaged_image_exits_3_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    image = tf.io.encode_png(np.full((30, 30, 3), 9, np.uint8)).numpy()
    splits = {"train": [image, image, image[:60], image], "test": [image]}
    data_dir = stores.prepare_dataset(tmp_path / "data", splits, name=COLOURS)
    code, line = fail(finetune_arguments(data_dir, tmp_path, "--image_cache_bytes=0"), capsys)
    assert (code, "example 2: 60 bytes that are not a whole image" in line) == (3, True)


def test_embedded_default_needs_no_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["finetune", "--model=tiny", "--steps=2", "--batch_size=8"]
    main([*argv, f"--output={tmp_path}/teacher", f"--workdir={tmp_path}/run"])
    assert capsys.readouterr().out.startswith("Embedded default: 5,000 MNIST digits")
    Teacher(tmp_path / "teacher", image_size=32, num_classes=10)


# At full size

_PEAK = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    print("peak KiB:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow  # about four minutes on 2 cores, and 7 GB of memory
@pytest.mark.timeout(1800)
def test_r101x3_is_exported_and_precomputes_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """382,416,678 parameters with random weights; one shard of 256 views at 128 in batches of 16."""
    monkeypatch.setattr(stores, "CLASSES", 102)
    noise = [tf.io.encode_jpeg(np.uint8(pictures(1, 160, seed=i)[0])).numpy() for i in range(256)]
    data_dir = stores.prepare_dataset(tmp_path / "data", {"train": noise}, name="noise")
    begun = time.monotonic()
    model = models.build("bit_r101x3", num_classes=stores.CLASSES, image_size=128)
    assert model.count_params() == 382_416_678
    kernel = np.random.default_rng(0).normal(size=(6144, stores.CLASSES)) / 78
    model.layers[-1].set_weights([kernel, np.zeros(stores.CLASSES)])
    export(model, tmp_path / "teacher", image_size=128)
    exported = time.monotonic() - begun
    del model
    flags = [
        "--runner=DirectRunner",
        "--dataset=noise",
        f"--data_dir={data_dir}",
        f"--teacher={tmp_path}/teacher",
        f"--store={tmp_path}/store",
        "--epochs=1",
        "--views_per_shard=256",
        "--teacher_batch_size=16",
        "--eval_splits=none",
    ]
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, "pipeline.precompute", *flags],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seconds = time.monotonic() - begun
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert [shard["records"] for shard in manifest["splits"]["views"]["shards"]] == [256]
    peak = int(done.stdout.split("peak KiB:")[1]) * 1024
    assert peak < 6 << 30
    print(
        f"\nR101x3: built and exported in {exported:.0f} s; one shard of 256 views in {seconds:.0f} s, peak "
        f"{peak / 2**30:.2f} GiB\n{done.stdout}"
    )
