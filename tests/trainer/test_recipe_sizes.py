"""The documented commands of the recipe `bit_i1k` for teachers and students of other sizes, run on a few photos."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tensorflow as tf

from pipeline import precompute
from tests import stores, students
from tests.documents import ROOT, python_commands
from trainer import train

# Values of the documented flags for the photos; later flags override earlier ones.
SMALL = {
    "pipeline.precompute": [
        "--runner=FnApiRunner",
        f"--dataset={stores.DATASET}",
        "--split=train",
        "--eval_splits=test",
        "--epochs=1",
        "--teacher_batch_size=4",
    ],
    "trainer.train": [f"--student={students.MINIMAL}", "--batch_size=4", "--steps=5", "--warmup_steps=1"],
}


@pytest.mark.slow
def test_commands_of_bit_i1k_are_accepted(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (224, 384):
        spec = tf.TensorSpec([None, size, size, 3], tf.float32)
        module = stores.PlainTeacher()
        module.weights[3].assign_add([float(size), 0, 0, 0, 0])
        stores.save_teacher(tmp_path / f"TEACHER_{size}", module=module, inputs={"image": spec})
    commands = [
        (module, argv)
        for module, *argv in python_commands(ROOT / "docs" / "recipes.md")
        if "--recipe=bit_i1k" in argv
    ]
    monkeypatch.chdir(tmp_path)
    sizes = {}
    for module, argv in commands:
        given = [*argv, *SMALL[module]]
        if module == "pipeline.precompute":
            assert precompute.main([*given, f"--data_dir={data_dir}"]) == 0
            continue
        assert train.main(given) == 0
        run = next(argument for argument in argv if argument.startswith("--workdir=")).partition("=")[2]
        result = json.loads((tmp_path / run / "result.json").read_text())
        exported = tf.saved_model.load(str(tmp_path / run / "student")).signatures["serving_default"]
        (taken,) = exported.structured_input_signature[1].values()
        sizes[run] = taken.shape[1], len(result["evaluation"]["test"].get("teachers", [None]))
    assert sizes == {"RUN_384_224": (224, 2), "RUN_384": (224, 1), "RUN_160": (160, 1)}
