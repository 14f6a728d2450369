"""trainer.teacher: the command `convert`, and both commands' flags."""

from __future__ import annotations

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

from pipeline.cli.main import run_command
from pipeline.inputs.teacher import Teacher
from pipeline.inputs.teacher_checks import trial_crops
from tests import stores
from tests.bit import (
    CLASSES,
    UNITS,
    pictures,
    random_arrays,
    reference,
    relative_error,
    save_npz,
    shapes_of,
)
from tests.runs import ROOT, environment
from tests.teachers import convert_arguments, fail
from trainer import models
from trainer.flags.teacher import make_parser
from trainer.models.keras_model import load_keras_model
from trainer.teacher import export, main

pytestmark = pytest.mark.usefixtures("bit_small")

# convert


def test_converted_checkpoint_is_a_teacher_with_the_published_logits(npz: Path, tmp_path: Path):
    output = tmp_path / "new" / "teacher"
    assert main(convert_arguments(npz, output)) == 0
    function = tf.saved_model.load(str(output)).signatures["serving_default"]
    assert list(function.structured_input_signature[1]) == ["image"]
    assert list(function.structured_outputs) == ["logits"]
    teacher = Teacher(output, image_size=33, num_classes=CLASSES)
    teacher.check_rows(trial_crops(4, 33))
    crops = np.rint(pictures(3, 33)).astype(np.uint8)
    logits = teacher.logits(tf.constant(crops), tf.range(3), tf.ones(3))
    expected = reference(random_arrays(shapes_of(UNITS)), crops, UNITS)
    assert relative_error(logits, expected) < 1e-4
    assert [path.name for path in output.parent.iterdir()] == ["teacher"]


def test_keras_loads_a_converted_checkpoint(npz: Path, tmp_path: Path):
    main(convert_arguments(npz, tmp_path / "teacher"))
    model = load_keras_model(str(tmp_path / "teacher"), parameter="teacher")
    assert type(model.get_layer("block1/unit01/gn1")).__name__ == "GroupNorm"
    images = pictures(2, 33)
    expected = reference(random_arrays(shapes_of(UNITS)), images, UNITS)
    assert relative_error(model(images).numpy(), expected) < 1e-4


def test_new_head_is_zero_and_of_the_classes_asked_for(npz: Path, tmp_path: Path):
    main(convert_arguments(npz, tmp_path / "teacher", "--num_classes=11", "--new_head"))
    teacher = Teacher(tmp_path / "teacher", image_size=33, num_classes=11)
    logits = teacher.logits(tf.zeros([1, 33, 33, 3], tf.uint8), tf.constant([0]), tf.ones(1))
    np.testing.assert_array_equal(logits, np.zeros((1, 11)))


def test_existing_saved_model_is_replaced_as_a_whole(npz: Path, tmp_path: Path):
    output = tmp_path / "teacher"
    main(convert_arguments(npz, output, "--num_classes=3", "--new_head"))
    (output / "leftover").write_text("previous")
    main(convert_arguments(npz, output))
    assert not (output / "leftover").exists()
    Teacher(output, image_size=33, num_classes=CLASSES)


def test_crash_while_writing_leaves_the_previous_saved_model(
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
        (["--num_classes=9"], "--num_classes=9.*7 classes.*--new_head"),
        (["--new_head"], "--num_classes.*--new_head"),
        (["--model=tiny"], "--model=tiny.*bit_r50x1"),
        (["--model=bit_r50x1"], "bit_r50x1.*block1/unit02/gn1/scale"),
        (["--npz=/none.npz"], "/none.npz"),
        (["--image_size=0"], "--image_size: 0"),
        (["--imagesize=3"], "--imagesize=3.*--image_size"),
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
    assert code == 2
    assert "--num_classes" in line
    assert str(npz) in line
    code, line = fail(convert_arguments(npz, tmp_path / "teacher", "--num_classes=4"), capsys)
    assert code == 2
    assert "--num_classes=4" in line
    assert "--new_head" in line
    main(convert_arguments(npz, tmp_path / "teacher", "--num_classes=4", "--new_head"))
    Teacher(tmp_path / "teacher", image_size=33, num_classes=4)


def test_damaged_checkpoint_exits_3(npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = bytearray(npz.read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "bad.npz").write_bytes(data)
    code, line = fail(convert_arguments(tmp_path / "bad.npz", tmp_path / "teacher"), capsys)
    assert code == 3
    assert str(tmp_path / "bad.npz") in line


@pytest.mark.parametrize("command", ["convert", "finetune"])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_output_that_is_not_a_saved_model_is_not_touched(
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
    assert code == 2
    assert f"--output={tmp_path / 'keep'}" in line
    assert (tmp_path / "keep").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [([], "convert|finetune"), (["train"], "'train'"), (["--x"], "convert|finetune")],
)
def test_unknown_command_is_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    code, line = fail(argv, capsys)
    assert code == 2
    assert message in line


@pytest.mark.parametrize("command", ["convert", "finetune"])
def test_help_groups_the_flags_and_shows_two_examples(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    groups = {
        "convert": ["network", "output"],
        "finetune": ["data", "network", "views", "training", "output"],
    }
    assert re.findall(r"^(\w+):$", text, re.MULTILINE) == [
        *("options", *groups[command]),
        *(["performance"] if command == "finetune" else []),
        "examples",
    ]
    examples = text.split("examples:")[1].strip().splitlines()
    assert len(examples) == 2
    for example in examples:
        make_parser()[1][command].parse_strictly(example.split()[4:])


# At full size

_PEAK = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    print("peak KiB:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow  # takes about four minutes on 2 cores and 7 GB of memory
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("beam")
def test_r101x3_is_exported_and_precomputes_a_shard(tmp_path: Path):
    """382,416,678 parameters with random weights; one shard of 256 views at 128 in batches of 16."""
    classes = 102
    noise = [tf.io.encode_jpeg(np.uint8(pictures(1, 160, seed=i)[0])).numpy() for i in range(256)]
    data_dir = stores.prepare_dataset(tmp_path / "data", {"train": noise}, name="noise", classes=classes)
    begun = time.monotonic()
    model = models.build_student("bit_r101x3", num_classes=classes, image_size=128)
    assert model.count_params() == 382_416_678
    kernel = np.random.default_rng(0).normal(size=(6144, classes)) / 78
    model.layers[-1].set_weights([kernel, np.zeros(classes)])
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
