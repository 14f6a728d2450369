"""pipeline.precompute on Dask: how shards are cut into tasks."""

from __future__ import annotations

from collections.abc import Iterator

import apache_beam as beam
import pytest
from apache_beam.utils.shared import Shared

from pipeline import precompute
from pipeline.flags.precompute import make_parser
from pipeline.store.shards import ShardTask

distributed = pytest.importorskip("distributed", reason="the extra `dask` is not installed")

RUNNER = "--runner=apache_beam.runners.dask.dask_runner.DaskRunner"
SHARDS = 10
TASKS: dict[int, str] = {}  # task of Dask by shard; global, because Beam pickles a DoFn


class RecordTask(beam.DoFn):
    """Takes the place of `ComputeShard`: notes which task of Dask has the shard."""

    def process(self, element: precompute.Element) -> Iterator[str]:
        TASKS[element[1]] = distributed.get_worker().get_current_task()
        yield element[0]


@pytest.fixture(scope="module")
def cluster() -> Iterator[distributed.LocalCluster]:
    """Two workers in this process."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        yield cluster


@pytest.mark.parametrize(
    ("flags", "expected"), [([], SHARDS), (["--dask_partition_size=5"], 2), (["--dask_npartitions=1"], 1)]
)
def test_each_shard_is_a_task_of_its_own_by_default(
    flags: list[str],
    expected: int,
    cluster: distributed.LocalCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    TASKS.clear()
    monkeypatch.setattr(precompute, "ComputeShard", lambda *_: RecordTask())
    shards = [ShardTask(split="views", number=n, first=n * 5, records=5) for n in range(SHARDS)]
    given = [RUNNER, f"--dask_client_address={cluster.scheduler_address}", *flags]
    options = precompute.beam_options(given, make_parser())
    assert precompute.run_pipeline(shards, None, shared=Shared(), options=options) is None  # type: ignore[arg-type]
    distributed.default_client().close()  # Beam leaves it open
    assert sorted(TASKS) == list(range(SHARDS))
    assert len(set(TASKS.values())) == expected
