"""What `trainer.launch` checks before it creates anything: the trainer's flags, and that its inputs are there.

Most mistakes show without reading anything, and without TensorFlow. What depends on the store is resolved by a child
process (`trainer.cloud.check_store`), from a copy of the store's metadata.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import UserError
from trainer.cloud.gcloud import Command, ask, refusal, unreadable
from trainer.cloud.tpu_job import Job
from trainer.config.choices import DEFAULT_ARM
from trainer.config.tpu_slices import fewest_replicas
from trainer.run.child_runs import ChildError, exit_code

_SET_BEFORE = ("--store", "--workdir", "--data_dir", "--teacher")


def check_trainer_flags(own: Sequence[str], given: Sequence[str], *, node_type: str) -> int:
    """Checks the trainer's flags without reading anything.

    Args:
      own: flags that the launch makes itself.
      given: flags of the user.
      node_type: accelerator type of the node, as `check_type` returns it.

    Returns:
      The fewest replicas that the trainer will have.

    Raises:
      UserError: `trainer.train` would refuse them, or they cannot work on this node.
    """
    for flag in given:
        if flag.split("=")[0] in _SET_BEFORE:
            raise UserError(f"{flag}: give it before `--`: launch hands it on as the host sees it")
    from pipeline.cli.effects import parse_effective
    from trainer.flags.effects import TRAIN
    from trainer.flags.train import check_flags, make_parser

    flags = parse_effective(make_parser(), [*own, *given], TRAIN)
    check_flags(flags)
    if flags.strategy == "multiworker":
        raise UserError(
            "--strategy=multiworker: the node has one host; leave it out, the TPU's cores are used by default"
        )
    if flags.strategy == "tpu" and flags.tpu != "local":
        raise UserError(f"--tpu={flags.tpu}: the trainer runs on the TPU's own host; pass --tpu=local")
    replicas = fewest_replicas(node_type) if flags.strategy == "tpu" else 1
    _check_numbers(flags, replicas=replicas, node_type=node_type)
    _check_online(flags, replicas=replicas)
    return replicas


def _check_numbers(flags: argparse.Namespace, *, replicas: int, node_type: str) -> None:
    """Checks batch size and warm-up as far as they are known without the store."""
    from trainer.config.recipes import train_recipe

    recipe = None if flags.recipe is None else train_recipe(flags.recipe)
    batch_size = flags.batch_size or (None if recipe is None else recipe.batch_size)
    if batch_size is not None and batch_size % replicas:
        raise UserError(
            f"--batch_size={batch_size}: not a multiple of the {replicas} replicas that a {node_type} has at least"
        )
    warmup_steps = flags.warmup_steps
    if warmup_steps is None and recipe is not None:
        warmup_steps = recipe.warmup_steps
    short = flags.allow_short_run or (recipe is not None and recipe.allow_short_run)
    if flags.steps is not None and warmup_steps is not None and warmup_steps >= flags.steps and not short:
        raise UserError(
            f"--warmup_steps={warmup_steps}: the run has {flags.steps} steps and would never leave its warm-up; train "
            "longer, warm up shorter, or pass --allow_short_run"
        )


def _check_online(flags: argparse.Namespace, *, replicas: int) -> None:
    """Checks what goes on past the store's end."""
    if flags.epochs == math.inf and flags.teacher is None and flags.arm == DEFAULT_ARM:
        raise UserError("--epochs=inf: a run without an end goes on online, give --teacher before `--`")
    if not flags.write_back:
        return
    if replicas > 1:
        raise UserError(
            f"--write_back: with {replicas} replicas or more; it takes a step's logits in the order of its views, which one "
            "replica gives: leave it out, or precompute the epochs"
        )
    if not flags.store.startswith("/"):
        raise UserError(
            "--write_back: would append to the host's copy of the store, which ends with the node; leave it out, or give a "
            "--store on a disk of the VM"
        )


def read_commands(job: Job, directory: str) -> Iterator[tuple[str, str, Command]]:
    """Commands that read what the job needs from its buckets: flag, what for, command.

    Args:
      job: the job.
      directory: for the copy of the store's metadata.
    """
    storage = ["gcloud", "storage"]
    if (url := job.store_url) is not None:
        copy = [*storage, "rsync", url, directory, "--recursive", "--exclude=.+array_record.+", "--quiet"]
        yield f"--store={url}", "the store's metadata, against which the trainer's flags are resolved", copy
    for name, url in job.inputs.items():
        if name != "store":
            yield f"--{name}={url}", f"is --{name} there?", [*storage, "ls", url, "--quiet"]


def check_job(job: Job) -> None:
    """Checks that the job's inputs are there, and resolves the trainer's flags against the store's metadata.

    Raises:
      UserError: an input is missing, or the trainer would refuse its flags.
      ChildError: the store is damaged; exit code 3.
    """
    with tempfile.TemporaryDirectory() as directory:
        for flag, _, command in read_commands(job, directory):
            answer = ask(command)
            if answer.not_found:
                raise UserError(f"{flag}: there is nothing; {refusal(command, answer)}")
            if answer.code == 0 and command[2] == "rsync":
                _resolve(job, flag, directory)
            elif answer.code != 0 and not answer.denied:
                raise unreadable(command, answer)
            elif answer.code != 0:
                # The node's service account may read what this one may not.
                print(
                    f"{flag}: not checked, this account may not read it ({refusal(command, answer)})",
                    flush=True,
                )


def _resolve(job: Job, flag: str, directory: str) -> None:
    code, out, err = run_check(
        [*job.flags, f"--store={directory}", f"--fewest_replicas={job.fewest_replicas}"]
    )
    if code == 0:
        print(out.strip(), flush=True)
        return
    errors = [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]
    if not errors:
        print(err, file=sys.stderr)
    reason = errors[-1] if errors else f"cannot be checked, exit code {code}"
    url = flag.removeprefix("--store=")
    raise ChildError(reason.replace(str(Path(directory)), url), exit_code=code)


def run_check(argv: list[str]) -> tuple[int, str, str]:
    """Runs `trainer.cloud.check_store`: exit code, output, standard error."""
    command = [sys.executable, "-m", "trainer.cloud.check_store", *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return exit_code(done.returncode), done.stdout, done.stderr
