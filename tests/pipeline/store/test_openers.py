"""pipeline.store.openers: shards of a store in a bucket, fetched ahead of need into a bounded cache."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError, UserError
from pipeline.precomputing.worker import ShardWorker
from pipeline.storage.bucket import BucketDirectory
from pipeline.store import openers
from pipeline.store.metadata import SplitManifest
from pipeline.store.openers import DOWNLOADS, BucketOpener, ShardCache
from pipeline.store.reader import StoreReader
from pipeline.store.shards import ShardInfo, shard_name
from pipeline.store.spec import Spec
from tests import stores
from tests.buckets import BUCKET, Fault, FaultyLink, delete_object, point_at, put_object, upload_tree
from tests.stores import N

EPOCHS, VIEWS_PER_SHARD = 6, 10
SHARDS = -(-EPOCHS * N // VIEWS_PER_SHARD)


@pytest.fixture(scope="module")
def many_shards(
    tmp_path_factory: pytest.TempPathFactory, spec: Spec, data_dir: Path, teacher_path: Path
) -> Path:
    """Six epochs in shards of ten views, of the least size that a shard has; read only."""
    store = tmp_path_factory.mktemp("many_shards") / "store"
    worker = ShardWorker(stores.job_for(store, spec, data_dir, teacher_path))
    stores.write_store(worker, epochs=EPOCHS, views_per_shard=VIEWS_PER_SHARD)
    return store


@pytest.fixture
def uploaded(s3: str, s3_port: int, many_shards: Path) -> str:
    """Its URL."""
    upload_tree(s3_port, many_shards, s3.removeprefix(f"s3://{BUCKET}/"))
    return s3


def shard_bytes(store: Path) -> int:
    return StoreReader(store).views.manifest.shards[0].bytes


def nameless_files(directory: str) -> int:
    """Files of this process that have no name, below a directory."""
    found = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile, by another thread
            target = str(path.readlink())
            found += target.startswith(directory) and "(deleted)" in target
    return found


def test_a_store_larger_than_the_cache_is_replayed_whole(
    uploaded: str, many_shards: Path, s3_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the order of training, with partners, over a link of all kinds of faults."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kinds = [Fault(drop=True), Fault(truncate=True), Fault(flip=True), Fault(latency=0.2), Fault(status=503)]

    def faults(method: str, path: str, number: int) -> Fault:
        is_shard = method == "GET" and "array_record" in path
        return kinds[number % len(kinds)] if is_shard and number % 3 == 0 else Fault()

    capacity = 3 * shard_bytes(many_shards)
    local = StoreReader(many_shards).views
    with FaultyLink(s3_port, faults) as link:
        point_at(link.port, monkeypatch)
        store = StoreReader(uploaded, shard_cache_bytes=capacity)
        held = []
        for start in range(0, EPOCHS * N, 5):
            views = np.arange(start, min(start + 5, EPOCHS * N))
            views = np.append(views, (views[-1] // N) * N)  # the first of the epoch: a partner
            here, there = store.views.read(views), local.read(views)
            for name in ("example", "box", "flip", "ratio", "crop_hash", "source_hash", "logits"):
                np.testing.assert_array_equal(getattr(here, name), getattr(there, name), err_msg=name)
            held.append(nameless_files(str(tmp_path)))
    # Three in the cache; one more may be on its way out, and as many be fetched as there is room for.
    assert max(held) <= 5
    assert sorted(p.name for p in tmp_path.iterdir()) == [store.path.name]  # the metadata


def test_what_comes_next_is_fetched_before_it_is_asked_for(
    uploaded: str, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyLink(s3_port, lambda *_: Fault()) as link:
        point_at(link.port, monkeypatch)
        store = StoreReader(uploaded)
        store.views.read(np.arange(3))
        for number in range(4):  # waits for those under way
            store.views.opener.open(number)
        asked = link.count("GET", "array_record")
        store.views.read(np.arange(30, 33))  # of the fourth
        assert asked >= 4
        fetched = {name for method, name in link.requests if method == "GET" and "views.array" in name}
        assert {int(name[-5:]) for name in fetched} >= {0, 1, 2, 3}


def test_each_shard_is_fetched_once_where_all_fit(
    uploaded: str, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyLink(s3_port, lambda *_: Fault()) as link:
        point_at(link.port, monkeypatch)
        store = StoreReader(uploaded)
        for _ in range(3):
            for start in range(0, EPOCHS * N, 7):
                store.views.read(np.arange(start, min(start + 7, EPOCHS * N)))
        gets = [name for method, name in link.requests if method == "GET" and "views.array_record" in name]
        assert len(gets) == len(set(gets)) == SHARDS


def test_open_files_are_bounded_where_all_fit(
    uploaded: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(openers, "_KEPT_SHARDS", 5)
    store = StoreReader(uploaded)
    for number in range(SHARDS):
        store.views.opener.open(number)
        assert nameless_files(str(tmp_path)) <= 5 + DOWNLOADS  # some may be on their way out


def test_a_cache_that_three_shards_do_not_fit_into_is_refused(uploaded: str, many_shards: Path) -> None:
    size = shard_bytes(many_shards)
    with pytest.raises(UserError, match=rf"`shard_cache_bytes`={3 * size - 1}: .*\b{size} .*\b{3 * size}\b"):
        StoreReader(uploaded, shard_cache_bytes=3 * size - 1)


def test_a_missing_and_a_damaged_shard_are_fatal_with_both_sides(
    uploaded: str, many_shards: Path, s3_port: int
) -> None:
    prefix = uploaded.removeprefix(f"s3://{BUCKET}/")
    name = shard_name("views", 2)
    content = (many_shards / name).read_bytes()
    put_object(s3_port, f"{prefix}/{name}", content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=rf"{uploaded}/{name}: .*sha256 \w+"):
        StoreReader(uploaded).views.read(np.array([25]))
    put_object(s3_port, f"{prefix}/{name}", content[:-1])
    with pytest.raises(
        DataError, match=rf"{name}: {len(content) - 1} bytes here, {len(content)} in the manifest"
    ):
        StoreReader(uploaded).check_files()
    delete_object(s3_port, f"{prefix}/{name}")
    with pytest.raises(DataError, match=f"{name}: no "):
        StoreReader(uploaded).check_files()
    with pytest.raises(DataError, match=f"{uploaded}/{name}: .*manifest"):
        StoreReader(uploaded).views.read(np.array([25]))


def test_a_shard_that_could_not_be_fetched_is_tried_again(
    uploaded: str, many_shards: Path, s3_port: int
) -> None:
    prefix, name = uploaded.removeprefix(f"s3://{BUCKET}/"), shard_name("views", 1)
    delete_object(s3_port, f"{prefix}/{name}")
    store = StoreReader(uploaded)
    store.views.read(np.array([0]))
    with pytest.raises(DataError, match=name):
        store.views.read(np.array([15]))
    put_object(s3_port, f"{prefix}/{name}", (many_shards / name).read_bytes())
    store.views.read(np.array([15]))


def test_threads_that_take_each_others_room_all_get_what_they_want(uploaded: str, many_shards: Path) -> None:
    """Eight threads all over a store of which three shards fit: what one waits for, another may have to evict."""
    local = StoreReader(many_shards).views
    store = StoreReader(uploaded, shard_cache_bytes=3 * shard_bytes(many_shards))

    def read(seed: int) -> None:
        for view in np.random.default_rng(seed).integers(0, EPOCHS * N, 12):
            np.testing.assert_array_equal(
                store.views.read(np.array([view])).logits, local.read(np.array([view])).logits
            )

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(read, seed) for seed in range(8)]:
            done.result(timeout=120)


def test_nothing_is_fetched_ahead_of_a_sample(
    uploaded: str, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyLink(s3_port, lambda *_: Fault()) as link:
        point_at(link.port, monkeypatch)
        store = StoreReader(uploaded, in_order=False)
        store.views.read(np.array([3, 55]))
        gets = [name for method, name in link.requests if method == "GET" and "array_record" in name]
        assert sorted(name[-5:] for name in gets) == ["00000", "00005"]


def test_a_shard_that_is_waited_for_is_not_given_up_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """One download at a time, room for one shard, and three threads that want one each."""
    begun, end = threading.Event(), threading.Event()

    def fetch(bucket: BucketDirectory, split: str, number: int, *_: object) -> int:
        begun.set()
        assert end.wait(30)
        return number

    monkeypatch.setattr(openers, "DOWNLOADS", 1)
    monkeypatch.setattr(openers, "fetch_shard", fetch)
    shards = [ShardInfo(records=10, bytes=10, sha256="0" * 64, kl=0.0, max_error=0.0) for _ in range(3)]
    cache, bucket = ShardCache(10), BucketDirectory("s3://b/x")
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = []
        for number in range(3):
            found.append(pool.submit(cache.get, bucket, "views", shards, [number]))
            assert begun.wait(30)
            time.sleep(0.2)  # it waits, too
        end.set()
        assert [future.result(30) for future in found] == [0, 1, 2]


def test_a_process_ends_while_shards_are_fetched(
    uploaded: str, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow the link is on which they come."""
    code = f"""
from pipeline.store.reader import StoreReader
import numpy as np
StoreReader({uploaded!r}).views.read(np.arange(3))
print("read", flush=True)
"""
    seconds = 30

    def faults(method: str, path: str, number: int) -> Fault:
        return Fault(latency=seconds if "views.array_record-0000" in path and path[-1] in "12" else 0.0)

    with FaultyLink(s3_port, faults) as link:
        point_at(link.port, monkeypatch)
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "read\n"
            begun = time.monotonic()
            assert process.wait() == 0
            assert time.monotonic() - begun < seconds / 2


def test_nothing_is_left_when_the_store_is_closed(
    uploaded: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = StoreReader(uploaded)
    store.views.read(np.arange(12))
    for number in range(SHARDS):
        store.views.opener.open(number)
    del store
    gc.collect()
    assert os.listdir(tmp_path) == []  # noqa: PTH208
    assert nameless_files(str(tmp_path)) == 0


@pytest.mark.parametrize(
    ("epoch", "number", "wanted"),
    [
        (1000, 3, [3, 4, 5, 6]),  # no epoch ends near
        (40, 2, [2, 3, 0, 4, 5]),  # the last view of epoch 0 is in the fourth: its partner in the first
        (45, 7, [7, 8, 4, 9]),  # view 89, in the ninth shard, is mixed with view 45, in the fifth
        (5, 8, [8, 9]),  # epochs inside of shards
        (0, 8, [8, 9]),
    ],
)
def test_which_shards_are_fetched_ahead(epoch: int, number: int, wanted: list[int]) -> None:
    shards = [ShardInfo(records=10, bytes=1, sha256="0" * 64, kl=0.0, max_error=0.0) for _ in range(10)]
    SplitManifest(dataset=stores.ANY_DATASET, shards=tuple(shards))
    opener = BucketOpener(BucketDirectory("s3://b/x"), "views", shards, cache=ShardCache(100), epoch=epoch)
    assert opener._wanted(number) == wanted
