"""The programs that XLA compiles, on one CPU device: the train step, and the loop over a stack of batches.

A program for an accelerator has static shapes and no calls to the host. A run has one program, and another one once the
online teacher takes over.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import EXIT_USER_ERROR, UserError
from pipeline.inputs.teacher import Teacher
from pipeline.precomputing.worker import ShardWorker
from pipeline.store.reader import StoreReader
from pipeline.store.spec import Spec
from tests import stores
from tests.runs import (
    arguments,
    command,
    environment,
    fail,
    losses,
    options,
    start_run,
)
from trainer import models
from trainer.config.recipes import TrainRecipe
from trainer.step.distiller import Distiller
from trainer.step.optimizers import recipe_optimizer
from trainer.step.schedules import WarmupCosine
from trainer.targets.online_teacher import BatchedTeacher

CLASSES, SIZE, BATCH, STACK = stores.CLASSES, stores.SIZE, 6, 3

# In HLO text: a dimension with a bound instead of a size, and instructions that leave the device or resize an array.
_DYNAMIC = re.compile(r"\[[^\]]*<=")
_FORBIDDEN = re.compile(
    r" ((?:custom-call|infeed|outfeed|send|recv|(?:set|get)-dimension-size|dynamic-reshape)(?:-\w+)?)\("
)

Batch = dict[str, tf.Tensor]


def check_program(hlo: str) -> None:
    assert "ENTRY" in hlo
    assert _DYNAMIC.findall(hlo) == []
    assert _FORBIDDEN.findall(hlo) == []


def hlo_of(function: Any, *inputs: Any, stage: str = "hlo") -> str:
    """The program before XLA optimizes it for the processor, or at another stage."""
    text: str = function.experimental_get_compiler_ir(*inputs)(stage=stage)
    return text


@pytest.fixture(scope="module")
def online(keras_teacher_path: Path, spec: Spec) -> dict[str, Any]:
    """A Keras SavedModel, in batches of a size that does not divide the student's, and the store's codec."""
    teacher = Teacher(keras_teacher_path, image_size=SIZE, num_classes=CLASSES)
    return {"teacher": BatchedTeacher(teacher, 4), "round_trip": spec.make_codec().round_trip}


def make_batch(seed: int, *, size: int = SIZE, online: bool = False) -> Batch:
    generator = np.random.default_rng(seed)
    batch = {
        "views": tf.range(seed * BATCH, (seed + 1) * BATCH, dtype=tf.int64),
        "crops": tf.constant(generator.integers(0, 256, (BATCH + 2, size, size, 3), np.uint8)),
        "partner": tf.range(1, BATCH + 1),
        "ratio": tf.constant(generator.random(BATCH, np.float32)),
        "logits": tf.constant(generator.normal(0, 3, (BATCH, CLASSES)).astype(np.float32)),
    }
    return batch | ({"stored": tf.range(BATCH) < 2} if online else {})


def stack_of(batches: list[Batch]) -> Batch:
    return {name: tf.stack([batch[name] for batch in batches]) for name in batches[0]}


def make_distiller(
    student: str = "tiny",
    *,
    size: int = SIZE,
    clip: Any = "global",
    precision: str = "float32",
    **arguments: Any,
) -> Distiller:
    tf.keras.utils.set_random_seed(0)
    distiller = Distiller(
        models.build_student(student, num_classes=CLASSES, image_size=size, precision=precision),
        temperature=2.0,
        temperature_squared=True,
        **arguments,
    )
    optimizer = recipe_optimizer(
        TrainRecipe(learning_rate=0.003, weight_decay=1e-3, clip=clip), WarmupCosine(100, 1)
    )
    optimizer._create_all_weights(distiller.student.trainable_variables)  # as in a run, for checkpoints
    distiller.compile(optimizer=optimizer)
    return distiller


# The check.


def test_check_sees_dynamic_shapes_and_the_host():
    positive = tf.function(lambda x: tf.reduce_sum(tf.boolean_mask(x, x > 0)), jit_compile=True)
    with pytest.raises(AssertionError):
        check_program(hlo_of(positive, tf.constant([1.0, -1.0])))
    on_host = tf.function(lambda x: tf.numpy_function(np.sort, [x], tf.float32), jit_compile=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="No registered 'PyFunc'"):
        on_host(tf.constant([1.0, -1.0]))
    for line in ("x.1 = f32[2]{0} custom-call(y.1)", "x.1 = (f32[], token[]) recv-done(y.1)"):
        with pytest.raises(AssertionError):
            check_program(f"ENTRY {line}")


# Step and loop.


@pytest.mark.parametrize(
    ("source", "precision", "clip"),
    [("replay", "bfloat16", "per_variable"), ("online", "float32", "global")],
)
def test_step_and_loop_are_static_programs_that_stay_on_the_device(
    online: dict[str, Any], source: str, precision: str, clip: str
):
    distiller = make_distiller(precision=precision, clip=clip, **(online if source == "online" else {}))
    batches = [make_batch(seed, online=source == "online") for seed in range(STACK)]
    step = tf.function(distiller.train_step, jit_compile=True)
    loop = tf.function(distiller.train_steps, jit_compile=True)
    for hlo in (hlo_of(step, batches[0]), hlo_of(loop, stack_of(batches), tf.constant(STACK, tf.int64))):
        check_program(hlo)
        assert ("bf16[" in hlo) == (precision == "bfloat16")


@pytest.mark.parametrize("codec", stores.CODECS)
def test_every_codec_stays_on_the_device(spec: Spec, codec: str):
    round_trip = dataclasses.replace(spec, codec=codec).make_codec().round_trip
    # The optimized program, because TensorFlow's top_k sets a dimension to the size that it already has.
    compiled = tf.function(round_trip, jit_compile=True)
    check_program(hlo_of(compiled, tf.zeros([BATCH, CLASSES]), stage="optimized_hlo"))


# For weights of 0.1 to 1 and Adam's moments after three steps. XLA fuses operations and therefore rounds in another order.
# Adam divides a gradient by its own size: if the gradient is only rounding noise, a weight moves by up to the rate, 0.003.
TOLERANCE: dict[str, float] = {"rtol": 1e-3, "atol": 1e-4}


def test_compiled_steps_and_compiled_loop_are_the_plain_steps(online: dict[str, Any]):
    batches = [make_batch(seed, online=True) for seed in range(STACK)]
    # The stack is not full: its last batch is not trained on.
    stack = stack_of([*batches, make_batch(9, online=True)])
    results, functions = [], []
    for kind in ("plain", "compiled", "loop"):
        distiller = make_distiller(**online)
        if kind == "loop":
            functions.append(tf.function(distiller.train_steps, jit_compile=True))
            figures = functions[-1](stack, tf.constant(STACK, tf.int64))
        else:
            functions.append(tf.function(distiller.train_step, jit_compile=kind == "compiled"))
            figures = [functions[-1](batch) for batch in batches][-1]
        assert distiller.optimizer.iterations == STACK
        variables = distiller.student.weights + distiller.optimizer.weights
        results.append((figures, [variable.numpy() for variable in variables]))
    (figures, weights), *others = results
    for other_figures, other_weights in others:
        assert other_figures.keys() == figures.keys() == {"loss", "agreement", "gradient_norm", "views"}
        for name, value in figures.items():
            np.testing.assert_allclose(other_figures[name], value, rtol=1e-4, err_msg=name)
        for ours, theirs in zip(other_weights, weights, strict=True):
            np.testing.assert_allclose(ours, theirs, **TOLERANCE)
    # Another number of steps does not cause another trace.
    for count in (1, STACK + 1, 2):
        views = functions[-1](stack, tf.constant(count, tf.int64))["views"]
        np.testing.assert_array_equal(views, stack["views"][count - 1])
    assert [function.experimental_get_tracing_count() for function in functions] == [1, 1, 1]


# `--jit_compile`.


@pytest.fixture(scope="module")
def compiled_run(
    one_epoch: Path, data_dir: Path, teacher_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path, Path]:
    """Flags, work directory and XLA's programs of a run of 3 replayed and 7 online steps, 2 per call."""
    root = tmp_path_factory.mktemp("compiled")
    flags = ["--steps=10", "--log_every=1", "--eval_every=10", f"--teacher={teacher_path}"]
    argv = arguments(one_epoch, root / "run", data_dir, *flags, "--steps_per_execution=2", "--jit_compile")
    dump = {"XLA_FLAGS": f"--xla_dump_to={root / 'xla'} --xla_dump_hlo_as_text"}
    done = subprocess.run(command(argv), env=environment() | dump, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return flags, root / "run", root / "xla"


def test_run_is_one_program_and_another_one_with_the_online_teacher(
    compiled_run: tuple[list[str], Path, Path],
):
    """Calls of 2 and 1 steps, then of 2, 2, 2 and 1."""
    programs = sorted(compiled_run[2].glob("*.before_optimizations.txt"))
    steps = [path for path in programs if "train_steps" in path.name]
    assert len(steps) == 2
    assert len(programs) == 3  # the third is the teacher's, which runs once before the first step
    for path in programs:
        check_program(path.read_text())


def test_compiled_run_is_the_plain_run(
    compiled_run: tuple[list[str], Path, Path], one_epoch: Path, data_dir: Path, tmp_path: Path
):
    flags, workdir, _ = compiled_run
    plain = start_run(arguments(one_epoch, tmp_path, data_dir, *flags))
    plain.train()
    every = losses(plain.workdir)
    compiled = losses(workdir)
    assert list(compiled) == [2, 3, 5, 7, 9, 10]
    np.testing.assert_allclose(list(compiled.values()), [every[step] for step in compiled], rtol=1e-3)
    assert max(every.values()) > 1.2 * min(every.values())


def test_run_is_continued_with_another_way_of_compiling(
    published_store: Path, data_dir: Path, tmp_path: Path
):
    argv = arguments(published_store, tmp_path, data_dir, "--warmup_steps=0", "--eval_every=2")
    compiled = start_run([*argv, "--jit_compile", "--steps=4"])
    compiled.train()
    assert compiled.distiller.train_tf_function.experimental_get_tracing_count() == 1
    assert start_run([*argv, "--steps=6"]).checkpoints.restore() == 4


# What cannot be compiled.


def test_teacher_that_xla_cannot_compile_is_refused_before_the_first_step(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    module = stores.PlainTeacher()

    def in_words(image: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"logits": tf.strings.to_number(tf.strings.as_string(module(image)))}

    path = stores.save_teacher(tmp_path / "teacher", in_words, module=module)
    store = tmp_path / "store"
    job = stores.job_for(store, stores.make_spec(data_dir, path), data_dir, path)
    stores.write_store(ShardWorker(job), epochs=1, eval_splits=())
    argv = arguments(store, tmp_path / "run", data_dir, f"--teacher={path}", "--steps=5")
    code, message = fail([*argv, "--jit_compile"], capsys)
    assert code == EXIT_USER_ERROR
    for text in (f"--teacher={path}", "4 views", f"{SIZE} x {SIZE}", "--jit_compile", "AsString"):
        assert text in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    start_run(argv).train()  # without XLA, the teacher runs


def test_only_one_device_is_compiled_for(published_store: Path, data_dir: Path, tmp_path: Path):
    argv = arguments(published_store, tmp_path, data_dir, "--jit_compile", "--strategy=mirrored")
    with pytest.raises(UserError, match=r"--jit_compile.*--strategy=mirrored"):
        options(argv, StoreReader(published_store))


# At size.


@pytest.mark.slow
def test_bit_r50x1_compiles_as_a_step_and_as_a_loop():
    distiller = make_distiller("bit_r50x1", size=128)
    batches = [make_batch(seed, size=128) for seed in range(2)]
    step = tf.function(distiller.train_step, jit_compile=True)
    check_program(hlo_of(step, batches[0]))
    single = [step(batch) for batch in batches]
    assert step.experimental_get_tracing_count() == 1
    looping = make_distiller("bit_r50x1", size=128)
    loop = tf.function(looping.train_steps, jit_compile=True)
    stack, count = stack_of(batches), tf.constant(2, tf.int64)
    check_program(hlo_of(loop, stack, count))
    figures = loop(stack, count)
    assert loop.experimental_get_tracing_count() == 1
    for name in ("loss", "agreement", "gradient_norm"):
        np.testing.assert_allclose(figures[name], single[-1][name], rtol=1e-3, err_msg=name)
