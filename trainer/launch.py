r"""Trains on a TPU VM: `python -m trainer.launch launch|status|logs|stop --tpu=NAME --zone=ZONE --project=ID`.

Drives the `gcloud` command, with the account that it is logged in with. `launch` creates the TPU VM, or takes the one
of that name, starts the trainer there, and shows its log; a preempted TPU is created again and the run continued. The
trainer goes on when this command or the connection ends; the same command finds it again. What follows `--` is
handed to `trainer.train`.

    python -m trainer.launch launch --tpu=flowers --zone=us-central1-a --project=PROJECT --type=v3-8 --spot \
        --image=us-central1-docker.pkg.dev/PROJECT/view-distill/trainer:tpu --store=gs://BUCKET/store \
        --data_dir=gs://BUCKET/data --workdir=gs://BUCKET/run --delete \
        -- --recipe=bit_flowers_fast --precision=bfloat16 --steps_per_execution=20
    python -m trainer.launch stop --tpu=flowers --zone=us-central1-a --project=PROJECT --delete

Exit codes: the trainer's own; 2 for a mistake or a refusal; 74 if the host cannot read or write the bucket; 75 if the
host or a service is out of reach (the same command goes on); 130 for Ctrl-C, which says what still runs. docs/tpu.md has the way from a laptop to here.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pipeline.cli.main import run_module

    run_module("trainer.launch")

import argparse
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.cli.parser import Parser, file_path, positive, whole
from pipeline.errors import EXIT_INTERRUPTED, Interrupted, UserError
from trainer.cloud.gcloud import Command, Lines, NodeRequest, Tpu, ask, ask_for, succeed
from trainer.cloud.preflight import check_job, check_trainer_flags, read_commands
from trainer.cloud.tpu_job import INSTALL_FILES, Job, TpuRun, delete_node, host, marked
from trainer.config.tpu_slices import check_type

RUNTIME_VERSION = "tpu-vm-tf-2.15.0-pjrt"
_LINES = 100


def make_parser() -> Parser:
    """Flags of the four subcommands."""
    parser = Parser(prog="python -m trainer.launch", description="Trains on a TPU VM, by gcloud.")
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=Parser)
    texts = {
        "launch": "create or reuse a TPU VM, start or find the trainer there, and follow it to its end",
        "status": "what the node and the trainer are doing",
        "logs": "the trainer's log",
        "stop": "end the trainer, which saves first; with --delete, delete the node too",
    }
    epilog = "What follows `--` is handed to trainer.train, such as -- --recipe=bit_flowers_fast"
    for verb, text in texts.items():
        sub = verbs.add_parser(verb, help=text, description=text, epilog=epilog if verb == "launch" else None)
        sub.add_argument("--tpu", required=True, help="name of the TPU VM, and of its queued resource")
        sub.add_argument("--zone", required=True)
        sub.add_argument("--project", required=True)
        sub.add_argument("--internal_ip", action="store_true", help="connect by the internal address")
        sub.add_argument("--dry_run", action="store_true", help="print the commands and run none")
        {"launch": _add_launch, "logs": _add_logs, "stop": _add_stop}.get(verb, lambda _: None)(sub)
    return parser


def _add_logs(sub: Parser) -> None:
    sub.add_argument("--lines", type=positive, help=f"lines from its end; by default {_LINES}")
    sub.add_argument("--follow", action="store_true", help="until the trainer ends")


def _add_stop(sub: Parser) -> None:
    sub.add_argument(
        "--delete", action="store_true", help="delete node and queued resource, which cost until then"
    )


def _add_launch(sub: Parser) -> None:
    add = sub.add_argument
    add("--type", required=True, help="accelerator type of one host, such as v3-8 or v5e-8")
    add("--runtime_version", default=RUNTIME_VERSION, help="software of the TPU VM")
    add("--queued", action="store_true", help="ask by a queued resource, which waits for capacity")
    add("--spot", action="store_true", help="cheaper, and may be taken away; is then created again")
    add("--reserved", action="store_true", help="from a reservation")
    add("--service_account", help="that the VM reads and writes the buckets as; by default the project's")
    add("--network")
    add("--subnetwork")
    add("--internal_ips", action="store_true", help="no external address for the VM; implies --internal_ip")
    add("--image", help="trainer image, to be pulled by the VM")
    add("--image_file", type=file_path, help="or a file of `docker save`, to be copied there")
    add("--wheel", type=file_path, help="or a wheel of this project, to be installed there")
    add("--store", required=True, help="gs:// URL, copied to the VM; or a directory on a disk of the VM")
    add(
        "--stream_store",
        action="store_true",
        help="have the trainer fetch the store's shards ahead of need, instead of copying all of it first",
    )
    add("--data_dir", required=True, help="TFDS data directory: as --store")
    add("--teacher", help="of online steps: as --store")
    add("--workdir", required=True, help="gs:// URL; copied to the VM and back")
    add(
        "--save_seconds",
        type=positive,
        default=300,
        help="between copies of the work directory to the bucket",
    )
    add(
        "--delete",
        action="store_true",
        help="delete the node when the trainer has ended, whatever its exit code",
    )
    add("--detach", action="store_true", help="return when the trainer has started")
    add("--poll_seconds", type=whole, default=30, help="between questions to what takes its time")


def read_flags(argv: list[str]) -> argparse.Namespace:
    """Arguments to flags; what follows `--` to `trainer_flags`."""
    place = argv.index("--") if "--" in argv else len(argv)
    ours, theirs = argv[:place], argv[place + 1 :]
    parser = make_parser()
    flags, unknown = parser.parse_known_args(ours)
    parser.refuse(unknown, also=[f"--{name}" for name in vars(flags) if name != "verb"])
    if theirs and flags.verb != "launch":
        raise UserError(f"{flags.verb} takes nothing after `--`: it is launch that hands it to the trainer")
    if getattr(flags, "detach", False) and flags.delete:
        raise UserError(
            "--delete: has no effect with --detach, which does not wait for the trainer's end; leave one of them out, and "
            "delete the node later by `stop --delete`"
        )
    if getattr(flags, "follow", False) and flags.lines is not None:
        raise UserError(
            f"--lines={flags.lines}: has no effect with --follow, which shows the whole log; leave it out"
        )
    flags.trainer_flags = theirs
    return flags


def make_tpu(flags: argparse.Namespace) -> Tpu:
    """The TPU that the flags name."""
    internal = flags.internal_ip or getattr(flags, "internal_ips", False)
    return Tpu(name=flags.tpu, zone=flags.zone, project=flags.project, internal_ip=internal)


def make_node(flags: argparse.Namespace) -> NodeRequest:
    """The node that the flags ask for.

    Raises:
      UserError: no such type, a slice of several hosts, or two kinds of capacity.
    """
    if flags.spot and flags.reserved:
        raise UserError("give either --spot or --reserved")
    return NodeRequest(
        type=check_type(flags.type),
        runtime_version=flags.runtime_version,
        queued=flags.queued,
        capacity="spot" if flags.spot else "reserved" if flags.reserved else "on-demand",
        service_account=flags.service_account,
        network=flags.network,
        subnetwork=flags.subnetwork,
        internal_ips=flags.internal_ips,
    )


def make_job(flags: argparse.Namespace) -> Job:
    """The job that the flags ask for.

    Raises:
      UserError: the trainer would refuse its flags, a file is missing, or a place is neither a bucket's nor a path on the
        VM.
    """
    setup, files = _trainer(flags)
    if not flags.workdir.startswith("gs://"):
        raise UserError(
            f"--workdir={flags.workdir}: expected a gs:// URL: the disk of a TPU VM ends with it, and a preempted run "
            "continues from the bucket"
        )
    if flags.stream_store and not flags.store.startswith("gs://"):
        raise UserError(f"--stream_store: --store={flags.store} is no gs:// URL; leave one of them out")
    inputs: dict[str, str] = {}
    places = {"store": flags.store, "data_dir": flags.data_dir, "teacher": flags.teacher}
    own = []
    for name, place in places.items():
        if place is not None:
            streamed = flags.stream_store and name == "store"
            own.append(f"--{name}={place if streamed else _on_host(name, place, inputs)}")
    own.append("--workdir=work")
    if not any(flag.split("=")[0] == "--strategy" for flag in flags.trainer_flags):
        own += ["--strategy=tpu", "--tpu=local"]
    replicas = check_trainer_flags(own, flags.trainer_flags, node_type=check_type(flags.type))
    return Job(
        setup=setup,
        files=files,
        workdir=flags.workdir.rstrip("/"),
        inputs=inputs,
        flags=(*own, *flags.trainer_flags),
        save_seconds=flags.save_seconds,
        store_url=flags.store.rstrip("/") if flags.store.startswith("gs://") else None,
        fewest_replicas=replicas,
    )


def _trainer(flags: argparse.Namespace) -> tuple[tuple[str, str], tuple[Path, ...]]:
    """How the host's script makes the trainer ready, and the files that it needs for that."""
    names = ("image", "image_file", "wheel")
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    if len(given) != 1:
        raise UserError("what is to run there? give one of --image, --image_file and --wheel")
    ((kind, value),) = given.items()
    if kind == "image":
        return ("pull", value), ()
    path = Path(value)
    verb, files = ("load", (path,)) if kind == "image_file" else ("install", (path, *INSTALL_FILES))
    for file in files:
        if not file.is_file():
            raise UserError(f"--{kind}={value}: no such file: {file}")
    return (verb, path.name), files


def _on_host(name: str, place: str, inputs: dict[str, str]) -> str:
    """The place as the trainer finds it on the host; what has to be copied there is added to `inputs`."""
    if place.startswith("gs://"):
        inputs[name] = place.rstrip("/")
        file = f"/{Path(place).name}" if place.endswith(".keras") else ""
        return f"inputs/{name}{file}"
    if not place.startswith("/"):
        raise UserError(f"--{name}={place}: expected a gs:// URL, or an absolute path on a disk of the VM")
    return place


def stop_command(flags: argparse.Namespace) -> str:
    """What the user types to delete the node."""
    place = [f"--{name}={getattr(flags, name)}" for name in ("tpu", "zone", "project")]
    return shlex.join(["python", "-m", "trainer.launch", "stop", *place, "--delete"])


def plan(flags: argparse.Namespace) -> Iterator[tuple[str, Command]]:
    """The commands of a subcommand, each with what it is for, in the order in which an undisturbed run has them."""
    tpu = make_tpu(flags)
    ends = [
        ("is it from a queued resource?", tpu.describe_queued()),
        ("if so", tpu.delete_queued()),
        ("if not", tpu.delete()),
    ]
    if flags.verb == "status":
        yield "the node", tpu.describe()
        yield "its queued resource", tpu.describe_queued()
        yield "the trainer", tpu.run(host("status"))
    elif flags.verb == "logs":
        yield (
            "the log",
            tpu.run(host("follow", "1") if flags.follow else host("logs", str(flags.lines or _LINES))),
        )
    elif flags.verb == "stop":
        yield "end the trainer, which saves", tpu.run(host("stop"))
        yield from ends if flags.delete else ()
    else:
        node, job = make_node(flags), make_job(flags)
        for _, what, command in read_commands(job, "DIRECTORY"):
            yield f"{what} (before anything is created)", command
        yield "is it there? asked again until it is ready", tpu.describe()
        if node.queued:
            yield "is it in the queue?", tpu.describe_queued()
            yield "if neither", tpu.create_queued(node)
        else:
            yield "if not", tpu.create(node)
        yield "if it was stopped", tpu.start()
        yield "what the host needs", tpu.copy(job.copied())
        yield "make the trainer ready", tpu.run(host(*job.setup))
        yield "start it, detached", tpu.run(job.start())
        yield "its log, to its end", tpu.run(host("follow", "1"))
        for what, command in ends:
            yield f"after a preemption, before all of it again, and at the end with --delete: {what}", command


def main(argv: list[str]) -> int:
    """The command; see the module's docstring."""
    flags = read_flags(argv)
    if flags.dry_run:
        for what, command in plan(flags):
            print(f"# {what}\n{shlex.join(command)}")
        return 0
    verbs: dict[str, Callable[[argparse.Namespace], int]] = {
        "launch": launch,
        "status": status,
        "logs": logs,
        "stop": stop,
    }
    return verbs[flags.verb](flags)


def launch(flags: argparse.Namespace) -> int:
    """Brings the job to its end; the trainer's exit code."""
    node, job = make_node(flags), make_job(flags)
    run = TpuRun(
        make_tpu(flags),
        node,
        job,
        poll_seconds=flags.poll_seconds,
        delete=flags.delete,
        stop_command=stop_command(flags),
    )
    try:
        check_job(job)
        return run.go(detach=flags.detach)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: {run.left}", exit_code=EXIT_INTERRUPTED) from None


def status(flags: argparse.Namespace) -> int:
    """Prints what is there and what it is doing."""
    tpu = make_tpu(flags)
    node: dict[str, Any] | None = ask_for(tpu.describe())
    request: dict[str, Any] | None = ask_for(tpu.describe_queued())
    if request is not None:
        print(f"queued resource: {request.get('state', {}).get('state')}")
    if node is None:
        print("node: there is none, and nothing costs")
        return 0
    print(
        f"node: {node.get('state')}, {node.get('acceleratorType')}, {node.get('health', 'health not known')}"
    )
    if node.get("state") == "READY":
        answer = ask(tpu.run(host("status")))
        words = marked(answer.stdout)
        told = "cannot be asked: " + (answer.stderr.strip().splitlines() or ["no reason is given"])[-1]
        print(f"trainer: {words[0] if words else told}")
        print("\n".join(line for line in answer.stdout.splitlines() if not line.startswith("view-distill: ")))
        print(f"it costs until it is deleted: {stop_command(flags)}")
    return 0


def logs(flags: argparse.Namespace) -> int:
    """Prints the log."""
    tpu = make_tpu(flags)
    if not flags.follow:
        print(succeed(tpu.run(host("logs", str(flags.lines or _LINES)))).stdout, end="")
        return 0
    stream = Lines(tpu.run(host("follow", "1")))
    for line in stream:
        print(line, flush=True)
    assert stream.answer is not None
    succeed(tpu.run(host("follow", "1")), stream.answer)
    return 0


def stop(flags: argparse.Namespace) -> int:
    """Ends the trainer, and with `--delete` the node."""
    tpu = make_tpu(flags)
    node = ask_for(tpu.describe())
    left = "" if flags.delete else f"; {tpu.name} is there and costs; delete it: {stop_command(flags)}"
    try:
        if node is not None and node.get("state") == "READY":
            print(f"{tpu.name}: ending the trainer, which saves first", flush=True)
            answer = ask(tpu.run(host("stop")))
            words = marked(answer.stdout)
            if not words and not flags.delete:
                succeed(tpu.run(host("stop")), answer)
            print(f"trainer: {words[-1] if words else 'cannot be reached'}{left}", flush=True)
        elif not flags.delete:
            print("there is no running node" if node is None else f"the node is {node.get('state')}{left}")
        if flags.delete:
            print(
                f"{tpu.name} is deleted"
                if delete_node(tpu)
                else "there is nothing to delete, and nothing costs"
            )
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted: {tpu.name} may still be there and cost; see `status`; delete it: {stop_command(flags)}",
            exit_code=EXIT_INTERRUPTED,
        ) from None
    return 0
