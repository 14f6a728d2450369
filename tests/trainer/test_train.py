"""trainer.train: whole runs, what they leave behind, how they go on, and what they refuse."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import EXIT_DATA_ERROR, EXIT_USER_ERROR, UserError
from pipeline.store.lock import writer_lock
from pipeline.store.metadata import MANIFEST_FILE
from pipeline.store.reader import Store
from pipeline.store.spec import SPEC_FILE, Spec
from tests import stores
from tests.runs import (
    ROOT,
    arguments,
    assert_same_weights,
    checkpoint_weights,
    command,
    environment,
    fail,
    forge_records,
    losses,
    metrics,
    run_process,
    start_run,
)
from tests.trainer.conftest import MakeStore
from trainer.checkpoints import Checkpoints
from trainer.train import Run, main

STEPS = 3 * stores.N // 5

# Only TensorFlow: what a stranger has who is given the student.
SERVE = """
import sys
import numpy as np
import tensorflow as tf
images = np.load(sys.argv[2])
student = tf.saved_model.load(sys.argv[1])
(logits,) = student.signatures["serving_default"](image=tf.constant(images)).values()
np.save(sys.argv[3], logits.numpy())
assert not {"trainer", "pipeline", "tensorflow_addons"} & set(sys.modules)
"""


# A whole run.


class Finished:
    """A run of the command in a process of its own, and everything that it said."""

    def __init__(self, argv: list[str], workdir: Path) -> None:
        self.argv, self.workdir = argv, workdir
        self.done = run_process(argv, "-X", "importtime")

    def read(self, name: str) -> dict[str, Any]:
        return json.loads((self.workdir / name).read_text())


@pytest.fixture(scope="module")
def finished(published_store: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    workdir = tmp_path_factory.mktemp("finished") / "deep" / "run"
    return Finished(arguments(published_store, workdir, data_dir, "--log_every=3", "--seed=4"), workdir)


def test_process_never_imports_beam_nor_the_precompute(finished: Finished):
    imported = [line.rsplit("|", 1)[1].strip() for line in finished.done.stderr.splitlines() if "|" in line]
    assert "trainer.optimizers" in imported
    assert [name for name in imported if name.startswith(("apache_beam", "pipeline.precompute"))] == []


def test_result_says_what_was_trained_and_how_good_it_is(finished: Finished, published_store: Path):
    result = finished.read("result.json")
    store = Store(published_store)
    assert result["steps"] == STEPS
    assert result["first_step"] == 0
    assert result["epochs"] == STEPS * 5 / stores.N
    assert result["teacher_forward_passes"] == 0
    assert result["spec"] == store.spec.digest()
    assert result["student"] == "tiny"
    assert result["store_bytes"] == sum(path.stat().st_size for path in published_store.glob("views.array*"))
    assert result["seconds"] > 0
    test = result["evaluation"]["test"]
    assert list(result["evaluation"]) == ["test"]
    assert test == {key: metrics(finished.workdir, "eval_test")[-1][key] for key in test}
    assert f"teacher {test['teacher_top1']:.2%}" in finished.done.stdout


def test_leftover_views_are_named(finished: Finished):
    assert "1 views of the last epoch fill no batch" in finished.done.stdout


def test_config_holds_what_was_asked(finished: Finished, published_store: Path):
    config = finished.read("config.json")
    assert config["flags"]["store"] == str(published_store)
    assert config["flags"]["seed"] == 4
    assert config["recipe"]["student"] == "tiny"
    assert config["length"]["steps"] == STEPS


def test_metrics_have_every_log_step_once(finished: Finished):
    assert list(losses(finished.workdir)) == [3, 6, 9, 10]
    assert [line["step"] for line in metrics(finished.workdir, "eval_test")] == list(range(1, STEPS + 1))


def test_tensorboard_file_is_there(finished: Finished):
    (events,) = (finished.workdir / "tensorboard").glob("events.out.tfevents.*")
    assert events.stat().st_size > 100


def test_exported_student_serves_the_trained_student_s_logits_without_our_code(
    finished: Finished, tmp_path: Path
):
    generator = np.random.default_rng(0)
    images = generator.uniform(0, 255, (6, stores.SIZE, stores.SIZE, 3)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    done = subprocess.run(
        [sys.executable, "-c", SERVE, finished.workdir / "student", "images.npy", "logits.npy"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = start_run(finished.argv)
    fresh = run.student(images, training=False).numpy()
    assert run.checkpoints.restore() == STEPS
    trained = run.student(images, training=False).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), trained, rtol=1e-5, atol=1e-6)
    assert np.abs(trained - fresh).max() > 1e-2


def test_finished_run_is_not_done_again(finished: Finished, capsys: pytest.CaptureFixture[str]):
    before = {name: (finished.workdir / name).read_bytes() for name in ("result.json", "metrics.jsonl")}
    assert main(finished.argv) == 0
    out = capsys.readouterr().out
    assert "nothing to do: the run there is finished" in out
    assert "test: student " in out
    assert before == {name: (finished.workdir / name).read_bytes() for name in before}


def test_workdir_that_holds_something_else_is_refused_and_left_alone(
    published_store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    thesis = tmp_path / "student" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    code, message = fail(arguments(published_store, tmp_path, data_dir), capsys)
    assert code == EXIT_USER_ERROR
    assert "not empty and not a run's directory" in message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [thesis]
    code, message = fail(arguments(published_store, published_store, data_dir), capsys)
    assert code == EXIT_USER_ERROR


def test_second_trainer_in_a_workdir_is_refused(finished: Finished):
    with (
        writer_lock(finished.workdir, flag="--workdir"),
        pytest.raises(UserError, match=f"--workdir={finished.workdir}: process .* is writing it"),
    ):
        main(finished.argv)


def test_nothing_temporary_is_left(finished: Finished):
    assert sorted(path.name for path in finished.workdir.iterdir()) == [
        ".lock",  # empty, unless a run holds it
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "result.json",
        "student",
        "tensorboard",
    ]


def test_finished_run_repeated_trains_nothing_and_a_refused_one_changes_nothing(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    workdir = Path(shutil.copytree(finished.workdir, tmp_path / "run"))
    again = [flag for flag in finished.argv if not flag.startswith("--workdir")] + [f"--workdir={workdir}"]
    before = checkpoint_weights(workdir)
    lines, config = (workdir / "metrics.jsonl").read_text(), (workdir / "config.json").read_text()
    code, message = fail([*again, "--batch_size=6"], capsys)
    assert code == EXIT_USER_ERROR
    assert "batch_size: 6 asked for, 5 in the checkpoint" in message
    assert (workdir / "config.json").read_text() == config
    code, message = fail([*again, "--steps=9"], capsys)
    assert code == EXIT_USER_ERROR
    assert "at step 10, past the 9 asked for" in message
    assert (workdir / "config.json").read_text() == config
    assert main(again) == 0
    after = checkpoint_weights(workdir)
    assert_same_weights([after[name] for name in before], list(before.values()))
    assert (workdir / "metrics.jsonl").read_text() == lines


# Going on.


class Snapshots:
    """Copies the work directory as it is after each checkpoint: what a kill at that step leaves."""

    def __init__(self, checkpoints: Checkpoints, workdir: Path, to: Path) -> None:
        self._checkpoints, self._workdir, self._to = checkpoints, workdir, to

    def restore(self) -> int:
        return self._checkpoints.restore()

    def save(self, step: int) -> None:
        self._checkpoints.save(step)
        shutil.copytree(self._workdir, self._to / str(step), dirs_exist_ok=True)


def check_resume_at_every_step(argv: list[str], root: Path) -> Run:
    """Trains without a break, then once from what each step left; all of them have to end alike."""
    argv = [*argv, "--log_every=1", "--checkpoint_every=1"]
    whole = start_run([*argv, f"--workdir={root / 'whole'}"])
    whole.checkpoints = Snapshots(whole.checkpoints, whole.workdir, root / "at")  # type: ignore[assignment]
    whole.train()
    expected = checkpoint_weights(whole.workdir)
    steps = whole.options.length.steps
    assert sorted(path.name for path in (root / "at").iterdir()) == [str(n) for n in range(1, steps + 1)]
    for step in range(1, steps):
        resumed = start_run([*argv, f"--workdir={root / 'at' / str(step)}"])
        assert resumed.train()["first_step"] == step
        found = checkpoint_weights(resumed.workdir)
        assert found.keys() == expected.keys()
        assert_same_weights([found[name] for name in expected], list(expected.values()))
        assert losses(resumed.workdir) == losses(whole.workdir)
    return whole


def without_workdir(argv: list[str]) -> list[str]:
    return [flag for flag in argv if not flag.startswith("--workdir")]


@pytest.mark.slow
@pytest.mark.usefixtures("deterministic")
def test_run_resumed_at_every_step_ends_bit_equal(three_epochs: Path, data_dir: Path, tmp_path: Path):
    argv = without_workdir(arguments(three_epochs, tmp_path, data_dir, "--batch_size=12", "--eval_every=3"))
    whole = check_resume_at_every_step(argv, tmp_path)
    assert whole.options.length.steps == 4  # of 17 views an epoch: 1 and 2 cross its end


@pytest.mark.usefixtures("deterministic")
def test_run_resumed_at_every_step_across_the_end_of_the_store_ends_bit_equal(
    one_epoch: Path, data_dir: Path, teacher_path: Path, tmp_path: Path
):
    argv = without_workdir(
        arguments(one_epoch, tmp_path, data_dir, "--batch_size=8", "--steps=4", f"--teacher={teacher_path}")
    )
    whole = check_resume_at_every_step(argv, tmp_path)
    assert whole.options.length.online_from == 2  # 16..23 straddles the end


def last_words(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()[:-1]] if path.exists() else []


@pytest.mark.slow
def test_run_killed_in_the_middle_goes_on_and_ends_bit_equal(
    published_store: Path, data_dir: Path, teacher_path: Path, tmp_path: Path
):
    steps = 150  # 10 of the store, the rest online
    flags = ("--deterministic", "--log_every=1", "--checkpoint_every=7", "--eval_every=20")
    flags += (f"--steps={steps}", f"--teacher={teacher_path}")
    argv = without_workdir(arguments(published_store, tmp_path, data_dir, *flags))
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run_process([*argv, f"--workdir={undisturbed}"])
    process = subprocess.Popen(
        command([*argv, f"--workdir={killed}"]),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(last_words(killed)) < 30 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    reached = last_words(killed)[-1]["step"]
    assert 25 <= reached < steps
    assert not (killed / "result.json").exists()
    done = run_process([*argv, f"--workdir={killed}"])
    assert "continuing at step" in done.stdout
    assert 0 < json.loads((killed / "result.json").read_text())["first_step"] <= reached + 1
    assert list(losses(killed)) == list(range(1, steps + 1))
    assert losses(killed) == losses(undisturbed)
    assert metrics(killed, "eval_test") == metrics(undisturbed, "eval_test")
    expected, found = checkpoint_weights(undisturbed), checkpoint_weights(killed)
    assert_same_weights([found[name] for name in expected], list(expected.values()))


def test_run_is_extended_past_the_store_with_the_online_teacher(
    one_epoch: Path, data_dir: Path, teacher_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = arguments(one_epoch, tmp_path / "run", data_dir, "--log_every=1", "--epochs=2")
    code, message = fail(argv, capsys)
    assert code == EXIT_USER_ERROR
    assert "6 steps of 5 need 30 views, the store holds 17 (1 epochs)" in message
    assert "--teacher" in message
    assert not (tmp_path / "run").exists()  # before anything was made
    run = start_run([*argv[:-1], "--epochs=1"])
    assert run.train()["steps"] == 3
    assert main([*argv, f"--teacher={teacher_path}"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["first_step"], result["steps"], result["teacher_forward_passes"]) == (3, 6, 15)
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]
    assert result["evaluation"] == {}  # the store has no evaluation logits


def test_teacher_that_is_not_needed_is_not_loaded(
    three_epochs: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = start_run(arguments(three_epochs, tmp_path, data_dir, f"--teacher={tmp_path}"))
    assert run.teacher is None
    assert "is not needed" in capsys.readouterr().out
    with pytest.raises(UserError, match="--teacher=nowhere: no such file"):
        start_run(arguments(three_epochs, tmp_path, data_dir, "--teacher=nowhere"))


# Refusals.


@pytest.mark.parametrize("cache", ["--image_cache_bytes=0", "--image_cache_bytes=1000000"])
def test_data_set_with_other_pixels_is_refused(
    three_epochs: Path, forged_data_dir: Path, tmp_path: Path, cache: str, capsys: pytest.CaptureFixture[str]
):
    record = Store(three_epochs).views.read(np.array([0]))
    code, message = fail(arguments(three_epochs, tmp_path / "run", forged_data_dir, cache), capsys)
    assert code == EXIT_DATA_ERROR
    assert f"view 0 (example {record.example[0]}): source fingerprint is " in message
    assert f"{record.source_hash[0]:08x} in the store" in message
    assert not (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_damaged_view_deep_in_a_run_is_named(
    store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    forge_records(store, 43, crop_hash=0xDEADBEEF)
    code, message = fail(
        arguments(store, tmp_path / "run", data_dir, "--log_every=1", "--eval_every=100"), capsys
    )
    assert code == EXIT_DATA_ERROR
    assert "view 43 " in message
    assert "crop fingerprint is" in message
    assert "deadbeef in the store" in message
    assert max(losses(tmp_path / "run")) <= 43 // 5  # the step of view 43 was not made


def test_data_set_with_other_metadata_is_refused(
    published_store: Path, other_data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stored = Store(published_store).spec.dataset["fingerprint"]
    code, message = fail(arguments(published_store, tmp_path, other_data_dir), capsys)
    assert code == EXIT_DATA_ERROR
    assert f"{stored} in the store" in message
    assert " here, " in message
    assert "--data_dir" in message


def test_swapped_teacher_is_refused(
    published_store: Path,
    data_dir: Path,
    keras_teacher_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    stored = Store(published_store).spec.teacher["fingerprint"]
    flags = (f"--teacher={keras_teacher_path}", "--epochs=4")
    code, message = fail(arguments(published_store, tmp_path, data_dir, *flags), capsys)
    assert code == EXIT_DATA_ERROR
    assert "is not the spec's teacher: fingerprint: " in message
    assert f"{stored} in the spec" in message


def test_flipped_byte_in_a_shard_is_refused(
    store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shard = store / "views.array_record-00001"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    stored = Store(store).views.manifest.shards[1].sha256
    code, message = fail(arguments(store, tmp_path / "run", data_dir), capsys)
    assert code == EXIT_DATA_ERROR
    assert f"{shard}: sha256 is " in message
    assert f"{stored[:16]} in the manifest" in message


def change_spec(store: Path, **changes: Any) -> tuple[str, str]:
    """Rewrites fields of a store's spec as if it had been made so; digests before and after."""
    path = store / SPEC_FILE
    before = Spec.load(store)
    whole = json.loads(path.read_text())
    whole["identity"] |= changes
    path.write_text(json.dumps(whole))
    identity = dict(whole["identity"])
    after = Spec(**identity | {"policy": before.policy, "eval_crop": before.eval_crop})
    return before.digest(), after.digest()


def test_changed_spec_is_refused(
    store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before, after = change_spec(store, temperature=3.0)
    code, message = fail(arguments(store, tmp_path / "run", data_dir), capsys)
    assert code == EXIT_DATA_ERROR
    assert (
        f"{store / SPEC_FILE}: digest is {after[:16]} for what it says, {before[:16]} as written" in message
    )


def test_spec_of_another_store_is_refused(
    store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before, after = change_spec(store, seed=1)
    path = store / SPEC_FILE
    path.write_text(path.read_text().replace(before, after))
    code, message = fail(arguments(store, tmp_path / "run", data_dir), capsys)
    assert code == EXIT_DATA_ERROR
    assert f"belongs to spec {before[:16]}, this store's spec is {after[:16]}" in message


def test_machine_that_renders_differently_is_refused(
    store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    here = Spec.load(store).render_probe
    before, after = change_spec(store, render_probe="0123abcd")
    for path in (store / SPEC_FILE, store / MANIFEST_FILE, store / "eval" / MANIFEST_FILE):
        path.write_text(path.read_text().replace(before, after))
    code, message = fail(arguments(store, tmp_path / "run", data_dir), capsys)
    assert code == EXIT_DATA_ERROR
    assert "this machine's TensorFlow renders differently" in message
    assert f"{here} here, 0123abcd in the spec" in message


def test_checkpoint_of_another_store_is_refused(
    finished: Finished,
    make_store: MakeStore,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    other = make_store("other_seed", epochs=1, seed=1)
    workdir = Path(shutil.copytree(finished.workdir, tmp_path / "run"))
    code, message = fail(arguments(other, workdir, data_dir, "--seed=4", "--steps=3"), capsys)
    assert code == EXIT_DATA_ERROR
    assert f"spec: {Store(other).spec.digest()} asked for, " in message
    assert f"{finished.read('result.json')['spec']} in the checkpoint" in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--epoch=3"], ["--epoch=3", "did you mean --epochs?"]),
        (["--epochs=-1"], ["--epochs", "-1", "expected"]),
        (["--epochs=1", "--steps=1"], ["either --epochs or --steps"]),
        (["--student=resnet5"], ["--student=resnet5", "tiny"]),
        (["--recipe=demo"], ["policy.image_size: 32 in the recipe, 24 in the store"]),
        (["--warmup_steps=10"], ["--warmup_steps=10", "10 steps", "--allow_short_run"]),
        (["--store=nowhere"], ["--store=nowhere", "pipeline.precompute"]),
        (["--temperature=0"], ["temperature", "0"]),
        (["--data_dir=nowhere"], ["nowhere", "--data_dir"]),
        (["--epochs=4", "--teacher=nowhere"], ["--teacher=nowhere", "no such file or directory"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_mistake_ends_in_one_line(
    flags: list[str],
    words: list[str],
    published_store: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    code, message = fail(arguments(published_store, tmp_path / "run", data_dir, *flags), capsys)
    assert code == EXIT_USER_ERROR
    for word in words:
        assert word in message
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("below", ["", "run"], ids=["file_is_the_workdir", "file_is_its_parent"])
def test_file_in_the_way_of_the_workdir_is_named(
    below: str, published_store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("mine")
    code, message = fail(arguments(published_store, tmp_path / "file" / below, data_dir), capsys)
    assert code == EXIT_USER_ERROR
    assert str(tmp_path / "file") in message
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_mistake_in_a_process_has_no_traceback(published_store: Path, tmp_path: Path):
    done = subprocess.run(
        command([f"--store={published_store}", f"--workdir={tmp_path / 'run'}", "--epoch=3"]),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr == "error: unknown flag --epoch=3; did you mean --epochs?\n"


def test_what_is_surely_a_mistake_may_be_allowed_by_name(three_epochs: Path, data_dir: Path, tmp_path: Path):
    mismatch, short = ["--recipe=demo", "--allow_recipe_mismatch"], ["--warmup_steps=99", "--allow_short_run"]
    argv = arguments(three_epochs, tmp_path, data_dir, "--steps=2", "--log_every=1", *mismatch, *short)
    start_run(argv).train()
    assert list(losses(tmp_path)) == [1, 2]
