r"""Trains on a TPU VM: `python -m trainer.launch launch|status|logs|stop --tpu=NAME --zone=ZONE --project=ID`.

    python -m trainer.launch launch --tpu=flowers --zone=us-central1-a --project=PROJECT --type=v3-8 --spot \
        --image=us-central1-docker.pkg.dev/PROJECT/view-distill/trainer:tpu --store=gs://BUCKET/store \
        --data_dir=gs://BUCKET/data --workdir=gs://BUCKET/run --delete \
        -- --recipe=bit_flowers_fast --precision=bfloat16 --steps_per_execution=20
    python -m trainer.launch stop --tpu=flowers --zone=us-central1-a --project=PROJECT --delete

Runs `gcloud` commands with the account that it is logged in with. `launch` creates a TPU VM, or takes the existing one
of that name, starts the trainer there, and prints its log. A preempted VM is created again, and the run continues. The
trainer keeps running when this command or the connection ends; the same command attaches to it again. Flags after `--`
are passed to `trainer.train`. docs/tpu.md describes the whole way from a laptop to a TPU.

Exit codes: the trainer's own; 2 for a mistake or a refusal; 74 if the host cannot read or write the bucket; 75 if the
host or a service does not respond (rerun the same command); 130 after Ctrl-C, which prints what is still billed.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pipeline.cli.main import run_module

    run_module("trainer.launch")

import argparse
import shlex
from collections.abc import Iterator

from pipeline.cli.parser import Parser, file_path, positive, whole
from pipeline.errors import EXIT_INTERRUPTED, Interrupted, UserError
from pipeline.storage.bucket import is_url
from trainer.cloud.gcloud import Command, Lines, NodeRequest, Tpu, ask, find, succeed
from trainer.cloud.host_inputs import host_inputs, software
from trainer.cloud.preflight import check_job, check_trainer_flags, read_commands
from trainer.cloud.tpu_job import Job, TpuRun, delete_node, host, marked
from trainer.config.tpu_slices import check_type, runtime_version

_LINES = 100
_NODE_FLAGS = ("queued", "service_account", "network", "subnetwork", "internal_ips")
_PLACE = "--tpu=flowers --zone=us-central1-a --project=PROJECT"
_EXAMPLES = {
    "launch": [
        f"python -m trainer.launch launch {_PLACE} --type=v3-8 --spot --delete \\",
        "    --image=us-central1-docker.pkg.dev/PROJECT/view-distill/trainer:tpu --store=gs://BUCKET/store \\",
        "    --data_dir=gs://BUCKET/data --workdir=gs://BUCKET/run -- --recipe=bit_flowers_fast",
    ],
    "status": [f"python -m trainer.launch status {_PLACE}"],
    "logs": [f"python -m trainer.launch logs {_PLACE} {flag}" for flag in ("--lines=20", "--follow")],
    "stop": [f"python -m trainer.launch stop {_PLACE}", f"python -m trainer.launch stop {_PLACE} --delete"],
}
_VERBS = {
    "launch": "Creates or reuses a TPU VM, starts or finds the trainer there, and follows it to its end.",
    "status": "Prints the state of the TPU VM and of the trainer.",
    "logs": "Prints the log of the trainer.",
    "stop": "Ends the trainer, which saves first. With --delete, also deletes the TPU VM.",
}


def make_parser() -> Parser:
    """The flags of the four subcommands."""
    parser = Parser(
        prog="python -m trainer.launch",
        description="Trains on a TPU VM through gcloud. `launch --help` lists the flags of a subcommand.",
        examples=[*_EXAMPLES["launch"], _EXAMPLES["stop"][-1]],
    )
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=Parser)
    for verb, text in _VERBS.items():
        sub: Parser = verbs.add_parser(verb, help=text, description=text, examples=_EXAMPLES[verb])
        add = sub.group("TPU VM").add_argument
        add("--tpu", required=True, help="Name of the TPU VM and of its queued resource.")
        add("--zone", required=True, help="Zone of the TPU VM.")
        add("--project", required=True, help="ID of the project.")
        add("--internal_ip", action="store_true", help="Connect to the internal address.")
        {"launch": _add_launch, "logs": _add_logs, "stop": _add_stop}.get(verb, lambda _: None)(sub)
        sub.add_argument("--dry_run", action="store_true", help="Print the commands without running them.")
    return parser


def _add_logs(sub: Parser) -> None:
    sub.add_argument(
        "--lines", type=positive, help=f"Number of lines from the end of the log (default: {_LINES})."
    )
    sub.add_argument("--follow", action="store_true", help="Print new lines until the trainer ends.")


def _add_stop(sub: Parser) -> None:
    sub.add_argument(
        "--delete",
        action="store_true",
        help="Delete the TPU VM and its queued resource, which are billed until then.",
    )


def _add_launch(sub: Parser) -> None:
    add = sub.group("creation of the TPU VM").add_argument
    add("--type", required=True, help="Accelerator type with a single host, such as v3-8 or v6e-8.")
    add(
        "--runtime_version",
        help="Software version of the TPU VM. Default: the one that Google names for the type, without a framework.",
    )
    add(
        "--queued",
        action="store_true",
        help="Request the VM through a queued resource, which waits for capacity.",
    )
    add(
        "--spot",
        action="store_true",
        help="Use a spot VM, which is cheaper and created again after a preemption.",
    )
    add("--reserved", action="store_true", help="Use a reservation.")
    add("--service_account", help="Account of the VM for its buckets (default: the project's).")
    add("--network", help="Network of the VM (default: gcloud's).")
    add("--subnetwork", help="Subnetwork of the VM (default: gcloud's).")
    add(
        "--internal_ips",
        action="store_true",
        help="Create the VM without an external address; implies --internal_ip.",
    )

    add = sub.group("software, one of").add_argument
    add("--image", help="Image of the trainer in a registry.")
    add("--image_file", type=file_path, help="File written by `docker save`, to be copied to the VM.")
    add("--wheel", type=file_path, help="Wheel of this project, to be installed on the VM.")

    add = sub.group("data").add_argument
    add(
        "--store",
        action="append",
        required=True,
        help="gs:// URL, copied to the VM, or a directory on a disk of the VM. Give it several times to train on the mean "
        "logits of several teachers.",
    )
    add(
        "--stream_store",
        action="store_true",
        help="Fetch shards of the stores during training instead of copying them first.",
    )
    add("--data_dir", required=True, help="TFDS data directory, given like --store.")
    add(
        "--teacher",
        action="append",
        help="Teacher for online steps, given like --store; with several stores, one for each, in the same order.",
    )
    add("--workdir", required=True, help="gs:// URL of the work directory, copied to the VM and back.")
    add(
        "--save_seconds",
        type=positive,
        default=300,
        help="Seconds between copies of the work directory to the bucket.",
    )

    add = sub.group("lifetime").add_argument
    add("--delete", action="store_true", help="Delete the VM when the trainer has ended, with any exit code.")
    add("--detach", action="store_true", help="Return when the trainer has started.")
    add("--poll_seconds", type=whole, default=30, help="Seconds between requests for the state of the VM.")


def read_flags(argv: list[str]) -> argparse.Namespace:
    """Parses the arguments. Those after `--` are `trainer_flags`.

    Raises:
      UserError: a flag is unknown, missing or without effect.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    own, trainer_flags = argv[:end], argv[end + 1 :]
    parser = make_parser()
    flags, unknown = parser.parse_known_args(own)
    parser.refuse(unknown, also=[f"--{name}" for name in vars(flags) if name != "verb"])
    if trainer_flags and flags.verb != "launch":
        raise UserError(f"{trainer_flags[0]}: `{flags.verb}` takes no flags after `--`; only `launch` does")
    if getattr(flags, "detach", False) and flags.delete:
        raise UserError(
            "--delete: no effect with --detach, which does not wait for the end of the trainer; leave one of them out, and "
            "delete the VM later with `stop --delete`"
        )
    if getattr(flags, "follow", False) and flags.lines is not None:
        raise UserError(
            f"--lines={flags.lines}: no effect with --follow, which prints the whole log; leave one of them out"
        )
    flags.trainer_flags = trainer_flags
    return flags


def make_tpu(flags: argparse.Namespace) -> Tpu:
    """The TPU VM that the flags name."""
    internal = flags.internal_ip or getattr(flags, "internal_ips", False)
    return Tpu(name=flags.tpu, zone=flags.zone, project=flags.project, internal_ip=internal)


def make_node(flags: argparse.Namespace) -> NodeRequest:
    """The configuration of the TPU VM.

    Raises:
      UserError: unknown type, type with several hosts, or two kinds of capacity.
    """
    if flags.spot and flags.reserved:
        raise UserError("--spot and --reserved: expected at most one of them")
    node_type = check_type(flags.type)
    return NodeRequest(
        type=node_type,
        runtime_version=flags.runtime_version or runtime_version(node_type),
        capacity="spot" if flags.spot else "reserved" if flags.reserved else "on-demand",
        **{name: getattr(flags, name) for name in _NODE_FLAGS},
    )


def make_job(flags: argparse.Namespace) -> Job:
    """The job that the flags describe.

    Raises:
      UserError: the trainer would refuse its flags, a file is missing, or a place is neither in a bucket nor on the VM.
    """
    setup, files = software(flags)
    if not flags.workdir.startswith("gs://"):
        raise UserError(
            f"--workdir={flags.workdir}: expected a gs:// URL; the disk of a TPU VM is deleted with it, and a preempted run "
            "continues from the bucket"
        )
    own, inputs = host_inputs(flags)
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
        store_urls=tuple(flags.store) if all(map(is_url, flags.store)) else (),
        fewest_replicas=replicas,
    )


def stop_command(flags: argparse.Namespace) -> str:
    """The command line that deletes the TPU VM."""
    place = [f"--{name}={getattr(flags, name)}" for name in ("tpu", "zone", "project")]
    return shlex.join(["python", "-m", "trainer.launch", "stop", *place, "--delete"])


def plan(flags: argparse.Namespace) -> Iterator[tuple[str, Command]]:
    """The commands of an undisturbed subcommand in their order, each with its purpose."""
    tpu = make_tpu(flags)
    deletion = [
        ("look for a queued resource", tpu.list_queued()),
        ("if there is one", tpu.delete_queued()),
        ("otherwise", tpu.delete()),
    ]
    if flags.verb == "status":
        yield "state of the node", tpu.list_nodes()
        yield "state of its queued resource", tpu.list_queued()
        yield "state of the trainer", tpu.run(host("status"))
    elif flags.verb == "logs":
        verb = ("follow", "1") if flags.follow else ("logs", str(flags.lines or _LINES))
        yield "print the log", tpu.run(host(*verb))
    elif flags.verb == "stop":
        yield "end the trainer, which saves", tpu.run(host("stop"))
        yield from deletion if flags.delete else ()
    else:
        node, job = make_node(flags), make_job(flags)
        for _, purpose, command in read_commands(job, "DIRECTORY"):
            yield f"{purpose} (before anything is created)", command
        yield "look for the node, repeated until it is ready", tpu.list_nodes()
        if node.queued:
            yield "look for its queued resource", tpu.list_queued()
            yield "if neither exists", tpu.create_queued(node)
        else:
            yield "if it does not exist", tpu.create(node)
        yield "if it is stopped", tpu.start()
        yield "copy files to the host", tpu.copy(job.copied())
        yield "prepare the trainer", tpu.run(host(*job.setup))
        yield "start the trainer, detached", tpu.run(job.start())
        yield "print the log to its end", tpu.run(host("follow", "1"))
        for purpose, command in deletion:
            yield f"after a preemption, and at the end with --delete: {purpose}", command


def main(argv: list[str]) -> int:
    """Runs a subcommand, or prints its commands with `--dry_run`."""
    flags = read_flags(argv)
    if flags.dry_run:
        for purpose, command in plan(flags):
            print(f"# {purpose}\n{shlex.join(command)}")
        return 0
    return {"launch": launch, "status": status, "logs": logs, "stop": stop}[flags.verb](flags)


def launch(flags: argparse.Namespace) -> int:
    """Runs the job to its end; returns the exit code of the trainer."""
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
    """Prints the state of the queued resource, the node and the trainer."""
    tpu = make_tpu(flags)
    node, request = find(tpu.list_nodes()), find(tpu.list_queued())
    if request is not None:
        print(f"queued resource: {request.get('state', {}).get('state')}")
    if node is None:
        print("no such node; nothing is billed")
        return 0
    print(f"node: {node.get('state')}, {node.get('acceleratorType')}, {node.get('health', 'health unknown')}")
    if node.get("state") == "READY":
        answer = ask(tpu.run(host("status")))
        answers = marked(answer.stdout)
        reason = (answer.stderr.strip().splitlines() or ["no reason is given"])[-1]
        print(f"trainer: {answers[0] if answers else f'no connection: {reason}'}")
        print("\n".join(line for line in answer.stdout.splitlines() if not line.startswith("view-distill: ")))
        print(f"the node is billed until it is deleted: {stop_command(flags)}")
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
    succeed(tpu.run(host("follow", "1")), stream.answer)
    return 0


def stop(flags: argparse.Namespace) -> int:
    """Ends the trainer, and with `--delete` deletes the node."""
    tpu = make_tpu(flags)
    node = find(tpu.list_nodes())
    left = "" if flags.delete else f"; {tpu.name} exists and is billed; delete it: {stop_command(flags)}"
    try:
        if node is not None and node.get("state") == "READY":
            print(f"{tpu.name}: ending the trainer, which saves first", flush=True)
            answer = ask(tpu.run(host("stop")))
            answers = marked(answer.stdout)
            if not answers and not flags.delete:
                succeed(tpu.run(host("stop")), answer)
            print(f"trainer: {answers[-1] if answers else 'no connection'}{left}", flush=True)
        elif not flags.delete:
            print("no running node" if node is None else f"the node is {node.get('state')}{left}")
        if flags.delete:
            deleted = delete_node(tpu)
            print(f"{tpu.name} is deleted" if deleted else "nothing to delete; nothing is billed")
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted: {tpu.name} may still exist and be billed; check it with `status`; delete it: {stop_command(flags)}",
            exit_code=EXIT_INTERRUPTED,
        ) from None
    return 0
