"""Disturbs precomputes, and checks that the same command then makes the same store, byte for byte.

    python -m tests.campaigns.precompute_faults                    # 15 minutes on 2 cores
    python -m tests.campaigns.precompute_faults --kills=4 --every_step=9 --disks=2 --pairs=2 --orphans=0

- SIGKILL at random times, for new and for growing stores, and sometimes for the run that recovers from a kill. Kills
  before the first shard or after the end do not count.
- SIGKILL before every mkdir, link, rename, fsync and rmdir in the store during publishing.
- The same for a store in a bucket of a real S3 server on loopback, before every write and removal of an object.
- A disk that is full at random sizes, and one that becomes read-only (a small tmpfs, which needs root).
- Two simultaneous precomputes of one store, with the same spec and with different specs.
- SIGKILL of the main process, whose two worker processes keep running beside the run that continues.

Each kill is logged with the published and the unfinished shards. Runs are forks of this process with all imports done, so
that kills hit actual work. Runs with orphaned workers start the command itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.main import run_command
from pipeline.cli.parser import Parser, file_path, positive, whole
from pipeline.errors import DataError
from pipeline.storage.lock import LOCK_FILE
from pipeline.store.layout import ACCURACY_FILE
from tests import stores
from tests.buckets import BUCKET, get_object, list_objects, point_at, s3_server
from tests.campaigns.precompute_runs import (
    DisturbedError,
    check_same,
    content_of,
    end_of,
    finish,
    in_child,
    kill_after,
    start,
    state_of,
    watch_requests,
    watch_steps,
)
from tests.images import TEST_IMAGES
from tests.small_disk import resize, set_readonly, small_disk
from tests.stores import Asked

ROOT = Path(__file__).resolve().parents[2]
FEW, MANY = (2, 4), (100, 200)  # epochs of the new and of the grown store
LARGE = (
    "--views_per_shard=400",
    "--teacher_batch_size=32",
)  # with MANY: shards of about 0.25 s
WORKERS = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")
RECOVERY_KILLS = 0.3  # fraction of kills after which the recovering run is killed too


@dataclasses.dataclass(frozen=True)
class Campaign:
    """Directory, flags and expected stores of the campaign.

    Attributes:
      root: Directory of the campaign.
      asked: Flags without the store.
      expected: Content of the undisturbed store, by number of epochs.
      seconds: Seconds of the undisturbed run, by number of epochs.
    """

    root: Path
    asked: Asked
    expected: dict[int, dict[str, Any]]
    seconds: dict[int, float]

    def views(self, epochs: int) -> int:
        """Training views and evaluation crops of an undisturbed store."""
        return epochs * stores.N + len(TEST_IMAGES)

    @property
    def log(self) -> Path:
        """Output of the current run."""
        return self.root / "run.log"

    def flags(self, store: Path, epochs: int, *others: str) -> list[str]:
        """Flags of the command for a store."""
        large = LARGE if epochs in MANY else ()
        asked = dataclasses.replace(self.asked, store=store)
        return asked.flags(*large, f"--epochs={epochs}", *others)


def prepare(root: Path) -> Campaign:
    """Makes data set, teacher and undisturbed stores."""

    def make() -> None:
        stores.prepare_photos(root / "data")
        stores.save_teacher(root / "teacher")

    if end_of(in_child(make, log=root / "run.log")):
        raise DisturbedError((root / "run.log").read_text())
    campaign = Campaign(root, Asked(root / "data", root / "teacher", root / "none"), {}, {})
    for number, stages in enumerate((FEW, MANY)):
        for epochs in stages:
            store = root / f"undisturbed_{number}"
            started = time.monotonic()
            finish(campaign.flags(store, epochs), log=campaign.log)
            campaign.seconds[epochs] = time.monotonic() - started
            campaign.expected[epochs] = content_of(store)
    return campaign


def check_store(campaign: Campaign, store: Path, epochs: int) -> None:
    """Runs the command to its end and compares the store."""
    finish(campaign.flags(store, epochs), log=campaign.log)
    check_same(store, campaign.expected[epochs])


def random_kills(campaign: Campaign, *, kills: int, seed: int) -> dict[str, int]:
    """Kills runs at random times until `kills` of them count; returns counts."""
    generator, store = random.Random(seed), campaign.root / "killed"
    counts = {"random": 0, "growing": 0, "recovering": 0, "missed": 0, "published": 0}
    while counts["random"] < kills:
        for epochs in MANY:
            recovering = False
            while True:
                delay = generator.uniform(0, 1.1 * campaign.seconds[epochs])
                hit = kill_after(start(campaign.flags(store, epochs), log=campaign.log), delay)
                state = state_of(store)
                if not (hit and state.in_flight):
                    counts["missed"] += 1
                    break
                counts["random"] += 1
                counts["growing"] += epochs == MANY[1]
                counts["recovering"] += recovering
                counts["published"] += 0 < state.published < campaign.views(epochs)
                what = f"{'growing' if epochs == MANY[1] else 'new'}{', recovering' if recovering else ''}"
                print(f"kill {counts['random']} ({what}) after {delay:.2f} s: {state}", flush=True)
                recovering = True
                if counts["random"] == kills or generator.random() > RECOVERY_KILLS:
                    break
            check_store(campaign, store, epochs)
            if counts["random"] == kills:
                break
        shutil.rmtree(store)
    return counts


def step_kills(campaign: Campaign, *, every: int) -> dict[str, int]:
    """Kills runs before every `every`-th step of publishing; returns counts."""
    counts = {"steps": 0}
    steps = campaign.root / "steps.log"
    grown = campaign.root / "grown"
    finish(campaign.flags(grown, FEW[0]), log=campaign.log)
    for epochs in FEW:
        number, store = every, campaign.root / "stepped"
        while True:
            if epochs == FEW[1]:
                shutil.copytree(grown, store)
            steps.write_text("")

            def before(store: Path = store, number: int = number) -> None:
                watch_steps(store, steps, die_before=number)

            code = end_of(start(campaign.flags(store, epochs), log=campaign.log, before=before))
            taken = steps.read_text().splitlines()
            if code == 0:  # no steps are left
                check_same(store, campaign.expected[epochs])
                shutil.rmtree(store)
                break
            if code != -signal.SIGKILL or len(taken) != number:
                raise DisturbedError(
                    f"exit code {code} after {len(taken)} steps: {campaign.log.read_text()[-2000:]}"
                )
            counts["steps"] += 1
            what = "growing" if epochs == FEW[1] else "new"
            print(f"step {number} ({what}) before {taken[-1]}: {state_of(store)}", flush=True)
            check_store(campaign, store, epochs)
            shutil.rmtree(store)
            number += every
    shutil.rmtree(grown)
    return counts


def bucket_kills(campaign: Campaign, *, every: int) -> dict[str, int]:
    """Kills runs before every `every`-th write or removal of an object in a bucket; returns counts."""
    counts, steps = {"bucket": 0}, campaign.root / "requests.log"
    expected = {name: data for name, data in campaign.expected[FEW[0]].items() if name != "spec"}
    with s3_server() as port, pytest.MonkeyPatch.context() as patch:
        point_at(port, patch)
        number = every
        while True:
            prefix = f"killed_{number}"
            flags = [*campaign.flags(Path("none"), FEW[0]), f"--store=s3://{BUCKET}/{prefix}"]
            steps.write_text("")

            def before(number: int = number) -> None:
                watch_requests(steps, die_before=number)

            code = end_of(start(flags, log=campaign.log, before=before))
            taken = steps.read_text().splitlines()
            if code not in (0, -signal.SIGKILL):
                raise DisturbedError(f"exit code {code}: {campaign.log.read_text()[-2000:]}")
            if code:
                counts["bucket"] += 1
                print(f"request {number} to the bucket, before {taken[-1]}", flush=True)
                finish(flags, log=campaign.log)
            found = {name: get_object(port, f"{prefix}/{name}") for name in list_objects(port, prefix)}
            if {
                n: d for n, d in found.items() if n not in ("spec.json", LOCK_FILE, ACCURACY_FILE)
            } != expected:
                raise DisturbedError(f"{prefix}: differs from the undisturbed store: {sorted(found)}")
            if code == 0:
                return counts
            number += every


def refused(campaign: Campaign, flags: list[str], store: Path) -> bool:
    """Runs a command that may fail with exit code 2 and one line that names the store; returns whether it did.

    Raises:
      DisturbedError: it failed in another way.
    """
    code = end_of(start(flags, log=campaign.log))
    text = campaign.log.read_text().replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    if code == 0:
        return False
    if code != 2 or len(lines) != 1 or str(store) not in lines[0] or "Traceback" in text:
        raise DisturbedError(f"exit code {code}: {text[-2000:]}")
    return True


def full_disks(campaign: Campaign, *, disks: int, seed: int) -> dict[str, int]:
    """Runs on disks that are full at random sizes and on a read-only one, for new and for growing stores."""
    generator, counts = random.Random(seed), {"full": 0, "read_only": 0}
    need = {
        epochs: sum(len(v) for v in campaign.expected[epochs].values() if isinstance(v, bytes))
        for epochs in FEW
    }
    with small_disk(campaign.root / "disk", size=4 * need[FEW[1]]) as disk:
        store = disk / "store"
        while counts["full"] < disks:
            for epochs in FEW:
                least = need[FEW[0]] if epochs == FEW[1] else 0
                resize(disk, size=generator.randrange(least + 4096, need[epochs], 4096))
                if refused(campaign, campaign.flags(store, epochs), store):
                    counts["full"] += 1
                    print(f"full disk {counts['full']}, {epochs} epochs: {state_of(store)}", flush=True)
                resize(disk, size=4 * need[FEW[1]])
                check_store(campaign, store, epochs)
            set_readonly(disk, readonly=True)
            if not refused(campaign, campaign.flags(store, FEW[1] + 1), store):
                raise DisturbedError(f"{store}: no error on a read-only disk")
            counts["read_only"] += 1
            set_readonly(disk, readonly=False)
            check_same(store, campaign.expected[FEW[1]])
            shutil.rmtree(store)
    return counts


def at_once(campaign: Campaign, *, pairs: int, seed: int) -> dict[str, int]:
    """Starts two runs of one store together, with the same or with different specs; the store must be that of one run."""
    generator, counts = random.Random(seed), {"pairs": 0, "both": 0}
    other_seed = campaign.root / "other_seed"
    finish(campaign.flags(other_seed, FEW[0], "--seed=1"), log=campaign.log)
    either = {0: campaign.expected[FEW[0]], 1: content_of(other_seed)}
    shutil.rmtree(other_seed)
    for number in range(pairs):
        store, seeds = campaign.root / "shared", (0, number % 2)
        logs = [campaign.root / f"run_{side}.log" for side in (0, 1)]
        pids = []
        for seed_of_run, log in zip(seeds, logs, strict=True):
            pids.append(start(campaign.flags(store, FEW[0], f"--seed={seed_of_run}"), log=log))
            time.sleep(generator.uniform(0, 0.6) * number / pairs * campaign.seconds[FEW[0]])
        codes = [end_of(pid) for pid in pids]
        texts = [log.read_text() for log in logs]
        for code, text in zip(codes, texts, strict=True):
            if code and not (code in (2, 3) and text.count("error: ") == 1 and str(store) in text):
                raise DisturbedError(f"exit codes {codes}: {text[-2000:]}")
        if 0 not in codes:
            raise DisturbedError(f"exit codes {codes}: neither run made the store: {texts}")
        check_same(store, either[seeds[codes.index(0)]])
        counts["pairs"] += 1
        counts["both"] += codes == [0, 0]
        print(f"pair {number + 1}, seeds {seeds}: exit codes {codes}", flush=True)
        shutil.rmtree(store)
    return counts


def orphaned_workers(campaign: Campaign, *, orphans: int) -> dict[str, int]:
    """Kills the main process of a command with two workers, and runs the same command beside these workers."""
    counts, store = {"orphaned": 0}, campaign.root / "orphaned"
    for _ in range(orphans):
        flags = campaign.flags(store, MANY[0], *WORKERS)
        with subprocess.Popen(
            [sys.executable, "-m", "pipeline.precompute", *flags],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            while process.poll() is None and not state_of(store).half_written:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            if process.wait() != -signal.SIGKILL:
                raise DisturbedError("the command ended before the kill")
            print(f"main process killed, its workers keep running: {state_of(store)}", flush=True)
            finish(campaign.flags(store, MANY[0]), log=campaign.log)
            with contextlib.suppress(ProcessLookupError):  # they ended by themselves
                os.killpg(process.pid, signal.SIGKILL)
        # The next run removes the incomplete files of killed workers.
        check_store(campaign, store, MANY[0])
        counts["orphaned"] += 1
        shutil.rmtree(store)
    return counts


def main(argv: list[str]) -> int:
    """Runs the campaign."""
    parser = Parser(prog="python -m tests.campaigns.precompute_faults", description="Disturbs precomputes.")
    add = parser.add_argument
    add("--kills", type=whole, default=25, help="Number of kills at random times.")
    add(
        "--every_step",
        type=positive,
        default=1,
        help="Interval of the publishing steps before which runs are killed.",
    )
    add(
        "--every_request",
        type=positive,
        default=1,
        help="Interval of the bucket requests before which runs are killed.",
    )
    add("--disks", type=whole, default=8, help="Number of full disks.")
    add("--pairs", type=whole, default=8, help="Number of simultaneous pairs of precomputes.")
    add("--orphans", type=whole, default=2, help="Number of main processes killed beside their workers.")
    add("--seed", type=whole, default=0, help="Random seed of times and sizes.")
    add("--directory", type=file_path, help="Directory for the stores (default: a temporary one).")
    flags = parser.parse_strictly(argv)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(flags.directory or temporary).resolve()
        root.mkdir(parents=True, exist_ok=True)
        try:
            campaign = prepare(root)
            counts = random_kills(campaign, kills=flags.kills, seed=flags.seed)
            counts |= step_kills(campaign, every=flags.every_step)
            counts |= bucket_kills(campaign, every=flags.every_request)
            try:
                counts |= full_disks(campaign, disks=flags.disks, seed=flags.seed)
            except pytest.skip.Exception as reason:
                print(f"no full disks: {reason}", flush=True)
                counts |= {"full": 0, "read_only": 0}
            counts |= at_once(campaign, pairs=flags.pairs, seed=flags.seed)
            counts |= orphaned_workers(campaign, orphans=flags.orphans)
        except DisturbedError as error:
            raise DataError(str(error).replace("\n", " | ")) from error
    print(
        f"all stores are byte-equal to the undisturbed ones: {counts['random']} random kills ({counts['growing']} while growing, "
        f"{counts['recovering']} while recovering, {counts['published']} with some epochs published, {counts['missed']} more did "
        f"not count), {counts['steps']} kills between steps of publishing, {counts['bucket']} between requests to a bucket, {counts['full']} full disks, {counts['read_only']} read-only, {counts['pairs']} simultaneous "
        f"pairs, {counts['orphaned']} main processes killed beside their workers"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
