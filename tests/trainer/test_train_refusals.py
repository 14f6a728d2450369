"""trainer.train: corrupt and mismatched data and mistakes are refused before training."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import EXIT_DATA_ERROR, EXIT_USER_ERROR
from pipeline.store.metadata import MANIFEST_FILE
from pipeline.store.reader import StoreReader
from pipeline.store.spec import SPEC_FILE, Spec
from tests.runs import (
    ROOT,
    arguments,
    command,
    fail,
    forge_records,
    losses,
)


@pytest.mark.parametrize("cache", ["--image_cache_bytes=0", "--image_cache_bytes=1000000"])
def test_data_set_with_other_pixels_is_refused(
    three_epochs: Path, forged_data_dir: Path, tmp_path: Path, cache: str, capsys: pytest.CaptureFixture[str]
):
    record = StoreReader(three_epochs).views.read(np.array([0]))
    code, message = fail(arguments(three_epochs, tmp_path / "run", forged_data_dir, cache), capsys)
    assert code == EXIT_DATA_ERROR
    assert f"view 0 (example {record.example[0]})" in message
    assert f"{record.source_hash[0]:08x}" in message
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
    assert "deadbeef" in message
    assert max(losses(tmp_path / "run")) <= 43 // 5  # the step of view 43 was not made


def test_data_set_with_other_metadata_is_refused(
    published_store: Path, other_data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stored = StoreReader(published_store).spec.dataset.fingerprint
    code, message = fail(arguments(published_store, tmp_path, other_data_dir), capsys)
    assert code == EXIT_DATA_ERROR
    assert str(stored) in message
    assert "--data_dir" in message


def test_swapped_teacher_is_refused(
    published_store: Path,
    data_dir: Path,
    keras_teacher_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    stored = StoreReader(published_store).spec.teacher.fingerprint
    flags = (f"--teacher={keras_teacher_path}", "--epochs=4")
    code, message = fail(arguments(published_store, tmp_path, data_dir, *flags), capsys)
    assert code == EXIT_DATA_ERROR
    assert str(stored) in message


def test_flipped_byte_in_a_shard_is_refused(
    store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shard = store / "views.array_record-00001"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    stored = StoreReader(store).views.manifest.shards[1].sha256
    code, message = fail(arguments(store, tmp_path / "run", data_dir), capsys)
    assert code == EXIT_DATA_ERROR
    assert str(shard) in message
    assert stored[:16] in message


def change_spec(store: Path, **changes: Any) -> tuple[str, str]:
    """Rewrites fields of a store's spec consistently; returns the digests before and after."""
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
    for text in (str(store / SPEC_FILE), before[:16], after[:16]):
        assert text in message


def test_spec_of_another_store_is_refused(
    store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before, after = change_spec(store, seed=1)
    path = store / SPEC_FILE
    path.write_text(path.read_text().replace(before, after))
    code, message = fail(arguments(store, tmp_path / "run", data_dir), capsys)
    assert code == EXIT_DATA_ERROR
    assert before[:16] in message
    assert after[:16] in message


def test_machine_that_renders_differently_is_refused(
    store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    here = Spec.load(store).render_probe
    before, after = change_spec(store, render_probe="0123abcd")
    for path in (store / SPEC_FILE, store / MANIFEST_FILE, store / "eval" / MANIFEST_FILE):
        path.write_text(path.read_text().replace(before, after))
    code, message = fail(arguments(store, tmp_path / "run", data_dir), capsys)
    assert code == EXIT_DATA_ERROR
    assert str(here) in message
    assert "0123abcd" in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--epoch=3"], ["--epoch=3", "did you mean --epochs?"]),
        (["--epochs=-1"], ["--epochs", "-1", "expected"]),
        (["--epochs=1", "--steps=1"], ["--epochs=1", "--steps=1"]),
        (["--student=resnet5"], ["--student=resnet5", "tiny"]),
        (["--recipe=demo"], ["--recipe=demo", "policy.image_size", "32", "24"]),
        (["--warmup_steps=10"], ["--warmup_steps=10", "10 steps", "--allow_short_run"]),
        (["--store=nowhere"], ["--store=nowhere", "pipeline.precompute"]),
        (["--temperature=0"], ["temperature", "0"]),
        (["--data_dir=nowhere"], ["nowhere", "--data_dir"]),
        (["--epochs=4", "--teacher=nowhere"], ["--teacher=nowhere"]),
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
