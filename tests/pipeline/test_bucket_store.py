"""Precompute into a bucket: same bytes as on a disk, failing links, kills, and two runs at once."""

from __future__ import annotations

import dataclasses
import functools
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline import inspect, verify
from pipeline.errors import DataError, UserError
from pipeline.precompute import main
from pipeline.precomputing import store_session as session
from pipeline.storage.bucket import BucketDirectory
from pipeline.storage.lock import LOCK_FILE
from pipeline.store.reader import StoreReader
from tests.buckets import BUCKET, Fault, FaultyLink, get_object, point_at, put_object, upload_tree
from tests.runs import fail
from tests.stores import Asked

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIEW_DISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def remote(asked: Asked, s3: str) -> Asked:
    """Flags of the published store, for a store in the bucket."""
    return dataclasses.replace(asked, store=s3)


def content(url: str, port: int) -> dict[str, bytes]:
    """Objects of a store by name, without its lock and its spec, which has another command line."""
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    names = set(BucketDirectory(url).objects()) - {"spec.json", LOCK_FILE}
    return {name: get_object(port, f"{prefix}/{name}") for name in names}


def files(store: Path) -> dict[str, bytes]:
    """Files of a store by name, without its lock and its spec."""
    paths = [p for p in store.rglob("*") if p.is_file() and p.name not in ("spec.json", LOCK_FILE)]
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_a_store_in_a_bucket_has_the_bytes_of_one_on_a_disk(
    remote: Asked,
    asked: Asked,
    s3_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Data set and teacher are in the bucket too, the link drops every fifth answer, and the store is extended."""
    url = str(remote.store)
    prefix = f"other/{url.removeprefix(f's3://{BUCKET}/')}"
    places = {}
    for name, directory in (("data_dir", asked.data_dir), ("teacher", asked.teacher)):
        upload_tree(s3_port, directory, f"{prefix}/{name}")
        places[name] = f"s3://{BUCKET}/{prefix}/{name}"
    faraway = dataclasses.replace(remote, **places)
    with FaultyLink(s3_port, lambda m, p, n: Fault(drop=n % 5 == 2)) as link:
        point_at(link.port, monkeypatch)
        assert main(faraway.flags("--epochs=1")) == 0
        assert main(faraway.flags()) == 0
        assert main(faraway.flags()) == 0
        assert "nothing to do" in capsys.readouterr().out
    point_at(s3_port, monkeypatch)
    for epochs in (1, 3):
        assert main(asked.flags(f"--epochs={epochs}")) == 0
    assert content(url, s3_port) == files(asked.store)
    assert StoreReader(url).spec.provenance["data_dir"] == places["data_dir"]
    capsys.readouterr()
    # Finds the data set by the spec.
    assert verify.main([f"--store={url}", f"--teacher={places['teacher']}", "--fraction=1"]) == 0
    assert "0 differing crops, largest logit difference 0 " in capsys.readouterr().out
    assert inspect.main([f"--store={url}", "--checksums"]) == 0
    assert f"store       {url}, format 1" in (text := capsys.readouterr().out)
    assert "complete: each of 4 shards matches the manifest" in text


def test_repair_of_a_shard_in_a_bucket(
    remote: Asked, s3_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = remote.flags("--eval_splits=train[12:]")
    assert main(flags) == 0
    before = content(str(remote.store), s3_port)
    assert StoreReader(remote.store).eval_reader("train[12:]").read(np.array([4])).example == 4
    name = f"{str(remote.store).removeprefix(f's3://{BUCKET}/')}/views.array_record-00001"
    put_object(s3_port, name, b"x" + before["views.array_record-00001"][1:])
    assert main([*flags, "--repair"]) == 0
    assert "to be computed again: " in capsys.readouterr().out
    assert content(str(remote.store), s3_port) == before


def test_a_second_writer_and_a_foreign_directory_are_refused(
    remote: Asked, s3_port: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.lease.RENEWAL", 0.2)
    with session.open_session(str(remote.store)):
        monkeypatch.setattr("pipeline.storage.lease.is_dead", lambda owner: False)
        code, line = fail(remote.flags(), capsys, main=main)
    assert code == 2
    assert str(remote.store) in line
    BucketDirectory(str(remote.store)).write("photo.jpg", b"")
    code, line = fail(remote.flags(), capsys, main=main)
    assert code == 2
    assert "photo.jpg" in line


def test_another_spec_is_refused_with_both_sides(remote: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(remote.flags("--epochs=1")) == 0
    code, line = fail(remote.flags("--seed=3"), capsys, main=main)
    assert code == 3
    for part in (f"--store={remote.store}", "seed: 3 "):
        assert part in line


def test_a_run_that_lost_the_lock_writes_nothing(
    remote: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = BucketDirectory(str(remote.store))
    write_spec = session.StoreSession.write_spec

    def steal(self: session.StoreSession, spec: object) -> None:
        write_spec(self, spec)  # type: ignore[arg-type]
        bucket.write(LOCK_FILE, b'{"lease": "another"}')

    monkeypatch.setattr(session.StoreSession, "write_spec", steal)
    code, line = fail(remote.flags(), capsys, main=main)
    assert code == 75
    assert str(remote.store) in line
    assert sorted(bucket.objects()) == [LOCK_FILE, "spec.json"]


def test_damaged_metadata_are_named_by_their_url(remote: Asked) -> None:
    assert main(remote.flags("--epochs=1")) == 0
    BucketDirectory(str(remote.store)).write("manifest.json", b"{")
    with pytest.raises(DataError, match=rf"{remote.store}/manifest.json: "):
        StoreReader(str(remote.store))
    BucketDirectory(str(remote.store)).remove("spec.json")
    with pytest.raises(UserError, match=rf"{remote.store}: .*spec.json"):
        StoreReader(str(remote.store))


@pytest.fixture
def slow_link(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyLink]:
    """A link that delays each write by half a second, so that a kill interrupts one."""

    def faults(method: str, path: str, number: int) -> Fault:
        return Fault(latency=0.5 if method == "PUT" else 0.0)

    with FaultyLink(s3_port, faults) as link:
        point_at(link.port, monkeypatch)
        yield link


def puts(link: FaultyLink) -> int:
    """Number of written objects, without the lock."""
    return link.count("PUT", "") - link.count("PUT", LOCK_FILE)


@pytest.mark.slow
def test_killed_at_each_step_it_is_finished_by_the_same_command(
    remote: Asked, asked: Asked, s3_port: int, slow_link: FaultyLink
) -> None:
    """SIGKILL before each written object; the same command continues after each kill."""
    assert main(asked.flags()) == 0
    command = [sys.executable, "-m", "pipeline.precompute", *remote.flags()]
    kills = 0
    for _ in range(40):
        begun = puts(slow_link)
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            # Each run gets one write further than the run before it, so that the store is finished in the end.
            while process.poll() is None and puts(slow_link) < begun + 1 + kills:
                time.sleep(0.02)
            time.sleep(0.3)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
                continue
            assert process.returncode == 0, process.stderr and process.stderr.read().decode()[-2000:]
        break
    assert kills >= 4
    assert content(str(remote.store), s3_port) == files(asked.store)


@pytest.mark.slow
@pytest.mark.parametrize("at", ["spec.json", "manifest.json"])
def test_a_writer_that_wakes_up_after_its_lock_was_taken_writes_nothing_more(
    remote: Asked, asked: Asked, s3_port: int, slow_link: FaultyLink, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """SIGSTOP to a run, another run takes its store over and finishes, SIGCONT to the first one."""
    assert main(asked.flags()) == 0
    command = [sys.executable, "-m", "pipeline.precompute", *remote.flags()]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while not slow_link.count("PUT", at):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)
        point_at(s3_port, monkeypatch)
        monkeypatch.setattr(session, "hold_lease", functools.partial(session.hold_lease, patience=1.0))
        assert main(remote.flags()) == 0
        finished = content(str(remote.store), s3_port)
        lock = BucketDirectory(str(remote.store)).read(LOCK_FILE, limit=1000)
        process.send_signal(signal.SIGCONT)
        assert process.stderr is not None
        error = process.stderr.read().decode()
        assert process.wait() == 75, error[-2000:]
    assert str(remote.store) in error.splitlines()[-1]
    assert content(str(remote.store), s3_port) == finished == files(asked.store)
    assert BucketDirectory(str(remote.store)).read(LOCK_FILE, limit=1000) == lock
