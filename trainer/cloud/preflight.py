"""Checks of `trainer.launch` before it creates anything: the trainer's flags, and the existence of its inputs.

Most mistakes are found from the flags alone, without TensorFlow. A child process (`trainer.cloud.check_store`) resolves
those that depend on the store, from a copy of the store's metadata.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.storage.bucket import is_url
from trainer.cloud.gcloud import Command, ask, describe_failure, failure, list_objects
from trainer.cloud.tpu_job import Job
from trainer.config.choices import DEFAULT_ARM, student_kind
from trainer.config.tpu_slices import fewest_replicas
from trainer.run.child_runs import ChildError, exit_code

_RSYNC = ["gcloud", "storage", "rsync"]
_WORKDIR = "--workdir="
_FLAGS_OF_LAUNCH = ("--store", "--workdir", "--data_dir", "--teacher")


def check_trainer_flags(own: Sequence[str], given: Sequence[str], *, node_type: str) -> int:
    """Checks the trainer's flags without reading anything.

    Args:
      own: Flags made by the launch.
      given: Flags of the user.
      node_type: Accelerator type of the node, as returned by `check_type`.

    Returns:
      The minimum number of replicas of the trainer.

    Raises:
      UserError: `trainer.train` would refuse the flags, or they cannot work on this node.
    """
    for flag in given:
        if flag.split("=")[0] in _FLAGS_OF_LAUNCH:
            raise UserError(
                f"{flag}: pass it before `--`; launch translates it to a path or URL for the TPU VM"
            )
    from pipeline.cli.effects import parse_effective
    from trainer.flags.effects import TRAIN
    from trainer.flags.train import check_flags, make_parser

    flags = parse_effective(make_parser(), [*own, *given], TRAIN)
    check_flags(flags)
    if flags.strategy == "multiworker":
        raise UserError(
            "--strategy=multiworker: the node has a single host; leave the flag out to use all cores of the TPU"
        )
    if flags.strategy == "tpu" and flags.tpu != "local":
        raise UserError(f"--tpu={flags.tpu}: the trainer runs on the host of the TPU; pass --tpu=local")
    replicas = fewest_replicas(node_type) if flags.strategy == "tpu" else 1
    _check_student(flags)
    _check_numbers(flags, replicas=replicas)
    _check_growth(flags, replicas=replicas)
    return replicas


def _check_student(flags: argparse.Namespace) -> None:
    """Checks that a file of the student is on the VM. A module may be part of the image."""
    paths = {"init": flags.init}
    if flags.student is not None and student_kind(flags.student) == "path":
        paths["student"] = flags.student
    for name, path in paths.items():
        if path is not None and not path.startswith("/"):
            raise UserError(
                f"--{name}={path}: is not copied to the TPU VM; expected an absolute path on a disk of the VM"
            )


def _check_numbers(flags: argparse.Namespace, *, replicas: int) -> None:
    """Checks batch size and warm-up as far as they are known without the store."""
    from trainer.config.recipes import TrainRecipe, train_recipe
    from trainer.config.run_length import check_warmup, replica_batch_size

    recipe = TrainRecipe() if flags.recipe is None else train_recipe(flags.recipe)
    replica_batch_size(flags.batch_size or recipe.batch_size, replicas)
    warmup_steps = recipe.warmup_steps if flags.warmup_steps is None else flags.warmup_steps
    if flags.steps is not None and warmup_steps is not None:
        allowed = flags.allow_short_run or recipe.allow_short_run
        check_warmup(warmup_steps, steps=flags.steps, allow_short_run=allowed)


def _check_growth(flags: argparse.Namespace, *, replicas: int) -> None:
    """Checks runs that go past the end of the store, or whose store grows."""
    if flags.epochs == math.inf and flags.teacher is None and flags.arm == DEFAULT_ARM:
        raise UserError("--epochs=inf: an endless run continues online; pass --teacher before `--`")
    copied = [store for store in flags.store if not is_url(store) and not store.startswith("/")]
    if flags.follow and copied:
        raise UserError(
            "--follow: a store is copied to the TPU VM once, and the copy does not grow; add --stream_store before `--`, or "
            "leave --follow out"
        )
    if not flags.write_back:
        return
    if replicas > 1:
        raise UserError(
            f"--write_back: requires a single replica, which has the logits of a step in the order of its views; this node "
            f"has at least {replicas}; leave the flag out, or precompute the epochs"
        )
    if not flags.store[0].startswith("/"):  # a single one, see `check_flags`
        raise UserError(
            "--write_back: would append to a copy of the store that is deleted with the node; leave the flag out, or pass a "
            "--store on a disk of the TPU VM"
        )


def read_commands(job: Job, directory: str) -> Iterator[tuple[str, str, Command]]:
    """Commands that check the job's inputs in buckets.

    Args:
      directory: Target directory for the metadata of the stores; each gets a subdirectory, see `_copies`.

    Yields:
      The flag with its value, the purpose of the command, and the command.
    """
    for url, copy in _copies(job, directory).items():
        yield (
            f"--store={url}",
            "copy the store's metadata, to check the trainer's flags against it",
            [*_RSYNC, url, copy, "--recursive", "--exclude=.+array_record.+", "--quiet"],
        )
    for name, url in job.inputs.items():
        if url not in job.store_urls:
            flag = f"--{name.rstrip('_0123456789')}"
            yield f"{flag}={url}", f"check that {flag} exists", list_objects(url)
    if job.has_teacher():
        yield (
            f"{_WORKDIR}{job.workdir}",
            "look for a checkpoint; a new run has to need --teacher",
            list_objects(f"{job.workdir}/checkpoints"),
        )


def _copies(job: Job, directory: str) -> dict[str, str]:
    """Directory for the metadata of each store, by URL. None is the beginning of another."""
    return {url: f"{directory}/{number:03d}" for number, url in enumerate(job.store_urls)}


def check_job(job: Job) -> None:
    """Checks that the job's inputs exist, and the trainer's flags against the metadata of the stores.

    Raises:
      UserError: an input is missing, or the trainer would refuse its flags.
      TryAgainError: the service does not respond.
      ChildError: a store is damaged; exit code 3.
    """
    with tempfile.TemporaryDirectory() as directory:
        copies = _copies(job, directory)
        for copy in copies.values():
            Path(copy).mkdir()
        is_new, denied = False, False
        for flag, _, command in read_commands(job, directory):
            answer = ask(command)
            if answer.denied:
                # The service account of the node may have access.
                print(f"{flag}: not checked, no access ({describe_failure(command, answer)})", flush=True)
                denied = denied or command[:3] == _RSYNC
            elif answer.code != 0:
                error = failure(command, answer)
                raise type(error)(f"{flag}: {error}")
            elif command[:3] != _RSYNC and not json.loads(answer.stdout):
                if not flag.startswith(_WORKDIR):
                    raise UserError(f"{flag}: no such object or directory in the bucket")
                is_new = True
        if copies and not denied:
            _resolve(job, copies, is_new=is_new)


def _resolve(job: Job, copies: dict[str, str], *, is_new: bool) -> None:
    """Resolves the trainer's flags in a child process; `copies` as in `_copies`."""
    flags = [text for text in job.flags if not text.startswith("--store=")]
    flags += [f"--store={copy}" for copy in copies.values()]
    if is_new:
        flags.append("--new_run")
    code, out, err = run_check([*flags, f"--fewest_replicas={job.fewest_replicas}"])
    if code == 0:
        print(out.strip(), flush=True)
        return
    errors = [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]
    if not errors:
        print(err, file=sys.stderr)
    reason = errors[-1] if errors else f"cannot be checked, exit code {code}"
    for url, copy in copies.items():
        reason = reason.replace(copy, url)
    raise ChildError(reason, exit_code=code)


def run_check(argv: list[str]) -> tuple[int, str, str]:
    """Runs `trainer.cloud.check_store`; returns exit code, output and standard error."""
    command = [sys.executable, "-m", "trainer.cloud.check_store", *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return exit_code(done.returncode), done.stdout, done.stderr
