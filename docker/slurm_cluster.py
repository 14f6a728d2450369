"""A Dask cluster of SLURM jobs for `pipeline.precompute`, one worker per job; runs until Ctrl-C, which ends the jobs.

    python docker/slurm_cluster.py --jobs=8 --queue=gpu --gpus=1 --scheduler_file=/shared/dask.json

Runs on a login node, in an environment with the extra `dask` on a file system that every node sees. A job that is lost or
reaches its time limit is submitted again. `--print_job` prints the job script and submits nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import time

from dask_jobqueue import SLURMCluster


def make_parser() -> argparse.ArgumentParser:
    """The flags; those without a value here are SLURM's own defaults."""
    parser = argparse.ArgumentParser(description="Runs a Dask cluster of SLURM jobs.", allow_abbrev=False)
    parser.add_argument("--jobs", type=int, default=8, help="Number of jobs.")
    parser.add_argument("--scheduler_file", default="dask.json", help="File for the scheduler's address.")
    parser.add_argument("--queue", help="Partition.")
    parser.add_argument("--account", help="Account.")
    parser.add_argument("--walltime", default="08:00:00", help="Time limit of a job.")
    parser.add_argument("--cpus", type=int, default=4, help="Cores per job.")
    parser.add_argument(
        "--memory", default="16GB", help="Memory per job; Dask restarts a worker that uses 95 %% of it."
    )
    parser.add_argument("--gpus", type=int, default=0, help="GPUs per job.")
    parser.add_argument("--interface", help="Network interface of all nodes, such as ib0.")
    parser.add_argument("--print_job", action="store_true", help="Print the job script only.")
    return parser


def make_cluster(flags: argparse.Namespace) -> SLURMCluster:
    """Starts the scheduler in this process; no job is submitted yet."""
    return SLURMCluster(
        queue=flags.queue,
        account=flags.account,
        walltime=flags.walltime,
        interface=flags.interface,
        job_cpu=flags.cpus,
        memory=flags.memory,
        # One shard at a time: a thread has its own tasks, but a process has one teacher.
        processes=1,
        cores=1,
        job_extra_directives=[f"--gres=gpu:{flags.gpus}"] if flags.gpus else [],
        # Login nodes are shared, so the usual port of the dashboard may be taken.
        scheduler_options={"scheduler_file": flags.scheduler_file, "dashboard_address": ":0"},
    )


def main() -> None:
    """Runs the cluster."""
    flags = make_parser().parse_args()
    with make_cluster(flags) as cluster, contextlib.suppress(KeyboardInterrupt):
        if flags.print_job:
            print(cluster.job_script())
            return
        cluster.adapt(minimum_jobs=flags.jobs, maximum_jobs=flags.jobs)  # replaces lost jobs
        print(f"scheduler: {cluster.scheduler_address}; {flags.jobs} jobs; Ctrl-C ends them", flush=True)
        while True:
            time.sleep(60)


if __name__ == "__main__":
    main()
