"""trainer.train --epochs=inf: trains until SIGTERM, continues, and is finished with a number of steps."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline.cli.main import run_command
from pipeline.errors import EXIT_DATA_ERROR, EXIT_TERMINATED, EXIT_USER_ERROR, DataError
from pipeline.inputs.dataset import Dataset
from pipeline.precomputing.worker import ShardWorker
from pipeline.store.reader import StoreReader
from pipeline.views.mix import mix
from tests import stores
from tests.runs import (
    ROOT,
    arguments,
    assert_same_weights,
    checkpoint_weights,
    command,
    environment,
    fail,
    losses,
    metrics,
    start_run,
)
from trainer.targets.batches import Targets
from trainer.train import main

STORED = 10  # steps of 5 views in the three epochs of the published store


def wait_for_step(workdir: Path, step: int, *, seconds: float = 120) -> None:
    """Waits until a step is in metrics.jsonl."""
    path, deadline = workdir / "metrics.jsonl", time.monotonic() + seconds
    while not (path.exists() and re.search(rf'"step": {step}, "kind": "train"', path.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run_until(step: int, argv: list[str], workdir: Path) -> int:
    """Runs the command in this process, sends SIGTERM after a step, and returns the exit code."""

    def terminate() -> None:
        wait_for_step(workdir, step)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(SystemExit) as exit_info:
        run_command(main, argv)
    thread.join()
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code


@pytest.fixture
def endless(published_store: Path, data_dir: Path, teacher_path: Path, tmp_path: Path) -> list[str]:
    """Flags of an endless run, without its length."""
    flags = ("--log_every=1", "--eval_every=4", "--warmup_steps=3", "--deterministic")
    return arguments(published_store, tmp_path / "run", data_dir, *flags, f"--teacher={teacher_path}")


@pytest.mark.slow
@pytest.mark.usefixtures("deterministic")
def test_endless_run_is_stopped_continued_and_finished(
    endless: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    workdir = tmp_path / "run"
    assert run_until(STORED + 2, [*endless, "--epochs=inf"], workdir) == EXIT_TERMINATED
    out, err = capsys.readouterr()
    assert "endlessly many steps of 5 views" in out
    assert "3 steps" in out
    (line,) = [line for line in err.splitlines() if line.startswith("SIGTERM: saved at step")]
    reached = int(re.findall(r"\d+", line)[0])
    assert reached >= STORED + 2
    assert f"--steps={reached} finishes the run" in out
    assert "%" not in err  # the progress bar has no total
    assert not (workdir / "result.json").exists()
    config = json.loads((workdir / "config.json").read_text(), parse_constant=pytest.fail)
    assert config["flags"]["epochs"] == "inf"
    # The student is exported as trained so far.
    student = tf.saved_model.load(str(workdir / "student"))
    views = tf.zeros([1, stores.SIZE, stores.SIZE, 3])
    before = student(views).numpy()

    assert run_until(reached + 3, [*endless, "--epochs=inf"], workdir) == EXIT_TERMINATED
    out, err = capsys.readouterr()
    assert f"continuing at step {reached} of endlessly many" in out
    stopped = int(re.findall(r"saved at step (\d+)", err)[0])
    assert stopped >= reached + 3
    assert not np.array_equal(tf.saved_model.load(str(workdir / "student"))(views), before)
    rates = {line["step"]: line["learning_rate"] for line in metrics(workdir, "train")}
    assert list(rates) == list(range(1, stopped + 1))
    assert rates[1] == 0 < rates[2] < rates[3] < rates[4]
    assert {rates[step] for step in range(4, stopped + 1)} == {rates[4]}
    evaluated = [line["step"] for line in metrics(workdir, "eval_test")]
    assert (
        evaluated
        == sorted({*range(4, stopped, 4), STORED} | ({stopped} if stopped % 4 == 0 else set()))[
            : len(evaluated)
        ]
    )

    # A number of steps finishes the run.
    weights = checkpoint_weights(workdir)
    assert main([*endless, f"--steps={stopped}"]) == 0
    result = json.loads((workdir / "result.json").read_text())
    assert (result["first_step"], result["steps"], result["teacher_forward_passes"]) == (stopped, stopped, 0)
    assert result["evaluation"].keys() == {"test"}
    found = checkpoint_weights(workdir)
    assert_same_weights([found[name] for name in weights], list(weights.values()))


@pytest.mark.slow
def test_endless_process_equals_a_run_in_this_process(
    endless: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    process = subprocess.Popen(
        command([*endless, "--epochs=inf"]), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_for_step(tmp_path / "run", STORED + 1)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=120)
    assert process.returncode == EXIT_TERMINATED, text[-2000:]
    assert (tmp_path / "run" / "student" / "saved_model.pb").exists()
    elsewhere = [*endless, f"--workdir={tmp_path / 'elsewhere'}", "--epochs=inf"]
    assert run_until(STORED + 1, elsewhere, tmp_path / "elsewhere") == EXIT_TERMINATED
    there, here = losses(tmp_path / "run"), losses(tmp_path / "elsewhere")
    both = there.keys() & here.keys()
    assert len(both) > STORED
    assert {step: there[step] for step in both} == {step: here[step] for step in both}


def test_finite_run_continues_an_endless_one_with_its_own_schedule(
    endless: list[str],
):
    offline = [flag for flag in endless if not flag.startswith("--teacher")]
    run = start_run([*offline, "--steps=6"])
    run.train()
    again = start_run([*endless, "--epochs=inf"])
    assert again.checkpoints.restore() == 6
    assert float(again.learning_rate(10**9)) == pytest.approx(0.003)
    longer = start_run([*endless, "--steps=12"])
    assert longer.checkpoints.restore() == 6
    assert float(longer.learning_rate(12)) == 0


class LoudTeacher(tf.Module):
    """Returns a logit outside the range of float16 for views that are darker than any of the first epoch."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.plain = stores.PlainTeacher()
        self.limit = limit

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        loud = tf.reduce_mean(images, [1, 2, 3]) < self.limit
        return tf.where(loud[:, tf.newaxis], 1e5 * tf.ones([1, stores.CLASSES]), self.plain(images))


def test_online_logit_outside_the_codec_is_refused_like_in_the_precompute(
    published_store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    dataset = Dataset(stores.DATASET, "train", data_dir=data_dir)
    views = 3 * stores.N
    view_input = Targets(StoreReader(published_store), dataset, batch_size=views).input
    batch = next(view_input.batches(np.array([0])))
    brightness = tf.reduce_mean(mix(batch["crops"], batch["partner"], batch["ratio"][:views]), [1, 2, 3])
    limit = float(tf.reduce_min(brightness[: stores.N])) - 0.1
    first_loud = int(np.argmax(brightness < limit))
    assert stores.N < first_loud < views

    teacher = stores.save_teacher(tmp_path / "loud", module=LoudTeacher(limit))
    spec = stores.make_spec(data_dir, teacher)
    worker = ShardWorker(stores.job_for(tmp_path / "store", spec, data_dir, teacher))
    stores.write_store(worker, epochs=1, eval_splits=())
    expected = f"view {first_loud}: "
    with pytest.raises(DataError, match=expected):
        stores.write_store(worker, epochs=3, eval_splits=())
    argv = arguments(tmp_path / "store", tmp_path / "run", data_dir, "--steps=10", f"--teacher={teacher}")
    code, line = fail(argv, capsys)
    assert code == EXIT_DATA_ERROR
    assert expected in line
    assert "float16" in line
    # Here the student diverges, not the teacher.
    argv = arguments(tmp_path / "store", tmp_path / "other", data_dir, "--steps=3", "--learning_rate=1e38")
    code, line = fail([*argv, "--warmup_steps=0", "--log_every=1"], capsys)
    assert code == EXIT_USER_ERROR
    assert re.search(r"step \d.*(inf|nan).*--learning_rate", line)
