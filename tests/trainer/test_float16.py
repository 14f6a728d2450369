"""`--precision=float16`: learns like float32, continues bit-equal, and reports the steps that it skipped."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import EXIT_USER_ERROR, UserError
from tests import stores
from tests.runs import arguments, checkpoint_weights, fail, losses, metrics, start_run
from tests.students import MINIMAL
from tests.trainer.test_resume import check_resume_at_every_step, without_workdir
from trainer.run import builder
from trainer.run.callbacks import DivergedError, _without_overflow
from trainer.step import loss_scaling
from trainer.step.optimizers import KerasAdamW, recipe_optimizer
from trainer.train import main

FLOAT16 = (f"--student={MINIMAL}", "--precision=float16")
# Relative tolerance of losses: rounding to float16 is 2^-11 of a number, and differences in the weights grow.
TOLERANCE = 0.005


@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the first steps of a run overflow, and later ones again, because the scale grows fast."""
    monkeypatch.setattr(loss_scaling, "INITIAL_SCALE", 2.0**23)
    monkeypatch.setattr(loss_scaling, "GROWTH_STEPS", 2)


@pytest.mark.usefixtures("overflowing")
def test_skipped_steps_are_reported(
    published_store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ("--steps=8", "--log_every=1", "--eval_every=8", f"--student={MINIMAL}")
    argv = arguments(published_store, tmp_path / "run", data_dir, *flags, "--precision=float16")
    assert main(argv) == 0
    lines = metrics(tmp_path / "run", "train")
    assert [line["step"] for line in lines] == [*range(1, 9)]
    # The views are those of the step, skipped or not.
    assert [line["first_view"] for line in lines] == [5 * step for step in range(8)]
    skipped = [line["step"] for line in lines if "gradient_norm" not in line]
    assert skipped[0] == 1
    assert [line["skipped_steps"] for line in lines] == [sum(s <= n for s in skipped) for n in range(1, 9)]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["skipped_steps"], result["loss_scale"]) == (len(skipped), lines[-1]["loss_scale"])
    assert f"{len(skipped)} of 8 steps" in capsys.readouterr().out
    # A repeated command keeps them.
    assert main(argv) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    # Plain TensorFlow runs the export, on float32.
    served = tf.saved_model.load(str(tmp_path / "run" / "student")).signatures["serving_default"]
    (logits,) = served(image=tf.zeros([2, stores.SIZE, stores.SIZE, 3])).values()
    assert logits.dtype == tf.float32


@pytest.mark.slow
def test_run_learns_like_the_float32_run(published_store: Path, data_dir: Path, tmp_path: Path):
    found = {}
    for precision in ("float16", "float32"):
        flags = (f"--student={MINIMAL}", f"--precision={precision}", "--log_every=1", "--learning_rate=0.01")
        run = start_run(arguments(published_store, tmp_path / precision, data_dir, *flags, "--eval_every=10"))
        run.train()
        found[precision] = np.array(list(losses(run.workdir).values()))
        if precision == "float16":
            dtypes = {array.dtype.name for array in checkpoint_weights(run.workdir).values()}
            assert dtypes == {"float32", "int64"}
    np.testing.assert_allclose(found["float16"], found["float32"], rtol=TOLERANCE)
    assert np.any(found["float16"] != found["float32"])
    assert found["float32"].max() > 1.2 * found["float32"].min()


@pytest.mark.slow
@pytest.mark.usefixtures("deterministic", "overflowing")
@pytest.mark.parametrize("adamw", ["this environment's", "keras"])
def test_run_resumed_at_every_step_ends_bit_equal(
    adamw: str, three_epochs: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if adamw == "keras":
        made = functools.partial(recipe_optimizer, adamw=KerasAdamW)
        monkeypatch.setattr(builder, "recipe_optimizer", made)
    argv = arguments(three_epochs, tmp_path, data_dir, *FLOAT16, "--steps=7", "--eval_every=7")
    check_resume_at_every_step(without_workdir(argv), tmp_path)
    lines = metrics(tmp_path / "whole", "train")
    assert {1, 2, 3} <= {
        line["skipped_steps"] for line in lines
    }  # at the start, and after the scale has grown
    assert "skipped/total/.ATTRIBUTES/VARIABLE_VALUE" in checkpoint_weights(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.usefixtures("overflowing")
@pytest.mark.parametrize("compiling", [(), ("--jit_compile",)])
def test_several_steps_per_call_are_the_single_steps(
    compiling: tuple[str, ...], published_store: Path, data_dir: Path, tmp_path: Path
):
    argv = arguments(
        published_store, tmp_path / "one", data_dir, *FLOAT16, "--log_every=1", "--eval_every=10"
    )
    start_run(argv).train()
    several = [*argv, f"--workdir={tmp_path / 'several'}", "--steps_per_execution=4", *compiling]
    start_run(several).train()
    one, found = metrics(tmp_path / "one", "train"), metrics(tmp_path / "several", "train")
    assert [line["step"] for line in found] == [4, 8, 10]
    for line in found:
        other = one[line["step"] - 1]
        assert (line["skipped_steps"], line["loss_scale"]) == (other["skipped_steps"], other["loss_scale"])
        assert line["loss"] == pytest.approx(other["loss"], rel=TOLERANCE)


@pytest.mark.slow
def test_teacher_whose_logits_are_not_finite_ends_the_run(
    one_epoch: Path, data_dir: Path, teacher_path: Path, tmp_path: Path
):
    argv = arguments(one_epoch, tmp_path, data_dir, *FLOAT16, "--steps=5", f"--teacher={teacher_path}")
    run = start_run([*argv, "--log_every=1"])
    run.distiller._codec = lambda logits: logits * math.inf
    with pytest.raises(UserError, match=r"step 4: the logits.*1 of the steps"):
        run.train()


SKIPPED = {
    "loss": math.nan,
    "gradient_norm": math.inf,
    "loss_scale": 8.0,
    "skipped_steps": 3,
    "unfit_steps": 0,
}


def test_figures_of_a_skipped_step_that_are_not_finite_are_left_out():
    assert _without_overflow(7, {**SKIPPED}) == {"loss_scale": 8.0, "skipped_steps": 3}


@pytest.mark.parametrize("changes", [{"loss_scale": 1.0}, {"unfit_steps": 1}])
def test_overflow_that_no_scale_helps_ends_the_run(changes: dict[str, Any]):
    with pytest.raises(DivergedError, match="step 7"):
        _without_overflow(7, SKIPPED | changes)


def test_float16_is_refused_on_a_tpu_before_anything_is_created(
    published_store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = arguments(published_store, tmp_path / "run", data_dir, "--precision=float16", "--strategy=tpu")
    code, message = fail([*argv, "--tpu=local"], capsys)
    assert code == EXIT_USER_ERROR
    assert "--precision=bfloat16" in message
    assert not (tmp_path / "run").exists()
