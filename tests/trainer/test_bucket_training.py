"""Training from a store in a bucket: the same weights, over a failing link, from a cache smaller than the store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.store.reader import StoreReader
from tests.buckets import BUCKET, Fault, FaultyLink, point_at, upload_tree
from tests.runs import arguments, fail
from tests.trainer.conftest import MakeStore
from trainer.train import main


def final_losses(workdir: Path) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if line["kind"] == "train"]


@pytest.mark.slow
def test_weights_and_losses_are_those_of_a_local_store(
    make_store: MakeStore,
    data_dir: Path,
    s3: str,
    s3_port: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    deterministic: None,
) -> None:
    local = make_store("shards", epochs=5, views_per_shard=10)
    monkeypatch.setenv("VIEW_DISTILL_CACHE", str(tmp_path / "cache"))
    prefix = s3.removeprefix(f"s3://{BUCKET}/")
    upload_tree(s3_port, local, f"{prefix}/store")
    upload_tree(s3_port, data_dir, f"{prefix}/data")
    capacity = 3 * StoreReader(local).views.manifest.shards[0].bytes
    more = ["--deterministic", "--log_every=1"]
    with FaultyLink(s3_port, lambda m, p, n: Fault(drop=m == "GET" and n % 4 == 1, latency=0.01)) as link:
        point_at(link.port, monkeypatch)
        argv = [*arguments(Path("x"), tmp_path / "remote", None, *more)[1:], f"--store={s3}/store"]
        assert main([*argv, f"--data_dir={s3}/data", f"--shard_cache_bytes={capacity}"]) == 0
        assert link.count("GET", "/store/views.array_record") >= 9
        assert link.count("GET", "/data/") > 0
    assert main(arguments(local, tmp_path / "local", data_dir, *more)) == 0
    assert final_losses(tmp_path / "remote") == final_losses(tmp_path / "local")
    assert len(final_losses(tmp_path / "local")) == 17
    assert np.isfinite(final_losses(tmp_path / "local")).all()


def test_write_back_into_a_bucket_is_refused(
    s3: str, tmp_path: Path, teacher_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        *arguments(Path("x"), tmp_path, None, "--write_back", f"--teacher={teacher_path}")[1:],
        f"--store={s3}",
    ]
    code, line = fail(argv, capsys, main=main)
    assert code == 2
    assert "--write_back: " in line
    assert f"--store={s3}" in line


def test_a_workdir_in_a_bucket_is_refused(
    s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = fail([f"--store={tmp_path}", f"--workdir={s3}"], capsys, main=main)
    assert code == 2
    assert f"--workdir: {s3}" in line
