"""tests.benchmarks.tpu_estimate: counts against those of TensorFlow and published ones; the arithmetic of the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from pipeline.errors import UserError
from tests.benchmarks.tpu_estimate import SLICES, StepCost, count, estimate, main, step_cost

IMAGES, KERNEL = (4, 17, 15, 6), (3, 3, 6, 8)


def counted(function: Any, *shapes: tuple[int, ...]) -> tuple[float, float]:
    specs = [tf.TensorSpec(shape) for shape in shapes]
    compiled = tf.function(function, jit_compile=True)
    return count(compiled.experimental_get_compiler_ir(*specs)(stage="hlo"))


def counted_by_tensorflow(function: Any, *shapes: tuple[int, ...]) -> int:
    """By the graph profiler, which knows a Conv2D's and a MatMul's arithmetic."""
    graph = tf.function(function).get_concrete_function(*[tf.TensorSpec(shape) for shape in shapes]).graph
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    options["output"] = "none"
    return int(tf.compat.v1.profiler.profile(graph, options=options).total_float_ops)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_are_counted_as_tensorflow_counts_them(stride: int):
    def convolve(images: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        return tf.nn.conv2d(images, kernel, stride, "VALID")

    flops, size = counted(convolve, IMAGES, KERNEL)
    assert flops == counted_by_tensorflow(convolve, IMAGES, KERNEL)
    height, width = (15, 13) if stride == 1 else (8, 7)
    assert size == 4 * (4 * 17 * 15 * 6 + 3 * 3 * 6 * 8 + 4 * height * width * 8)


def test_padding_is_not_counted():
    flops, _ = counted(lambda x, k: tf.nn.conv2d(x, k, 1, "SAME"), (1, 5, 5, 1), (3, 3, 1, 1))
    assert flops == 2 * (3 * 3 + 2 * 2) ** 2  # windows at an edge meet two elements, the others three


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_are_each_as_much_as_the_convolution(stride: int):
    def gradients(images: tf.Tensor, kernel: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch([images, kernel])
            out = tf.reduce_sum(tf.nn.conv2d(images, kernel, stride, "VALID") ** 2)
        return tuple(tape.gradient(out, [images, kernel]))

    forward, _ = counted(lambda x, k: tf.nn.conv2d(x, k, stride, "VALID"), IMAGES, KERNEL)
    assert counted(gradients, IMAGES, KERNEL)[0] == 3 * forward


def test_matrix_products_are_counted():
    flops, size = counted(lambda a, b: tf.matmul(a, b, transpose_b=True), (4, 6), (5, 6))
    assert (flops, size) == (2 * 4 * 5 * 6, 4 * (24 + 30 + 20))


def test_estimate_is_the_slower_of_arithmetic_and_memory():
    def of(cost: StepCost, utilization: float) -> Any:
        milliseconds = {"replay": 1.0, "cached": 0.25}
        return estimate(
            cost, "v5litepod-8", image_size=10, classes=5, utilization=utilization, milliseconds=milliseconds
        )

    busy = of(StepCost(flops=197e12, bytes=819e7, parameters=0, batch_size=64, crops=66), 0.5)
    assert (busy.bound, busy.step_seconds) == ("arithmetic", 2.0)
    assert (busy.batch_size, busy.images_per_second) == (512, 256.0)
    assert busy.cores == {
        "replay": pytest.approx(8 * 66 / 2 / 1000),
        "cached": pytest.approx(8 * 66 / 2 / 4000),
    }
    assert busy.link_bytes_per_second == 8 * (66 * 300 + 64 * (8 + 20)) / 2
    waiting = of(StepCost(flops=197e10, bytes=819e9, parameters=0, batch_size=64, crops=66), 0.5)
    assert (waiting.bound, waiting.step_seconds) == ("memory", 1.0)


def test_command_prints_a_row_for_each_slice_and_size(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    figures = tmp_path / "figures.json"
    argv = ["--student=tiny", "--sizes=16,24", "--classes=5", "--batch_size=16", f"--json={figures}"]
    assert main([*argv, "--precision=float32"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("v3", "v5"))]
    assert [(row[0], row[1]) for row in rows] == [(kind, size) for size in ("16", "24") for kind in SLICES]
    written = json.loads(figures.read_text())
    assert written[0]["images_per_second"] == pytest.approx(16 / written[0]["step_seconds"])
    assert written[2]["gflops_an_image"] > written[0]["gflops_an_image"] > 0


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--types=v3-32"], "v3-32"),
        (["--types=v4-8"], "--types=v4-8"),
        (["--student=nonsense"], "nonsense"),
        (["--utilization=2"], "--utilization=2"),
        (["--batch_size=12", "--student=tiny"], "--batch_size=12"),
    ],
)
def test_mistakes_are_refused(argv: list[str], expected: str):
    with pytest.raises(UserError, match=expected):
        main(argv)


@pytest.mark.slow
def test_bit_r50x1_has_the_published_arithmetic():
    # ResNet-50 at 224: 4.1e9 multiply-adds forward (torchvision's table), the v2 order, BiT's stride in the 3 x 3
    # convolution; a step is three times that, without the gradient of the first convolution's input.
    cost = step_cost("bit_r50x1", 224, classes=1000, batch_size=2, precision="bfloat16")
    forward = 2 * 4.1e9
    assert cost.flops / 2 == pytest.approx(3 * forward, rel=0.05)
    assert cost.parameters == pytest.approx(25.5e6, rel=0.01)
