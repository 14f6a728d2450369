"""The `gcloud` command: what is asked of it, word for word, and what its answers mean.

Credentials are its own business; nothing here reads, holds or passes any.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.errors import TryAgainError, UserError

Command = list[str]

# Part of what gcloud prints to standard error where a service does not answer: nothing is wrong with the command.
_UNREACHABLE = (
    *(
        "unavailable",
        "deadline_exceeded",
        "timed out",
        "connection reset",
        "connection aborted",
        "network is unreachable",
    ),
    *("failed to establish a new connection", "name resolution", "name or service not known"),
    *(
        "http 500",
        "http 502",
        "http 503",
        "http 504",
        "httperror 500",
        "httperror 502",
        "httperror 503",
        "httperror 504",
    ),
)
# Part of what gcloud prints to standard error, and what the user can do; the first that fits is told.
_REMEDIES = {
    "quota": "ask for quota in the console (IAM & Admin, Quotas, TPU), or take another --type or --zone",
    "no more capacity": "the zone has none left: try --queued, which waits for some, --spot, or another --zone",
    "already_exists": "the name is taken: `status` says by what; take another --tpu, or delete it with `stop --delete`",
    "already exists": "the name is taken: `status` says by what; take another --tpu, or delete it with `stop --delete`",
    "unauthenticated": "run `gcloud auth login`",
    "reauthentication": "run `gcloud auth login`",
    "do not currently have an active account": "run `gcloud auth login`",
    "permission_denied": "this account may not do that in --project; ask its owner for the role TPU Admin",
    "invalid_argument": "see `gcloud compute tpus tpu-vm create --help` for what the zone offers",
    "service_disabled": "run `gcloud services enable tpu.googleapis.com`",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeRequest:
    """What a TPU VM is created as.

    Attributes:
      type: accelerator type, such as `v3-8`.
      runtime_version: of the TPU VM's software.
      queued: ask by a queued resource, which waits for capacity.
      capacity: `on-demand`, `spot` or `reserved`.
      service_account: that the VM reads and writes buckets as; None for the project's default.
      network, subnetwork: None for gcloud's default.
      internal_ips: the VM gets no external address.
    """

    type: str
    runtime_version: str
    queued: bool
    capacity: str
    service_account: str | None
    network: str | None
    subnetwork: str | None
    internal_ips: bool

    def flags(self) -> list[str]:
        """What both ways of creation share."""
        out = [f"--accelerator-type={self.type}", "--labels=view-distill=trainer"]
        # Without it, the VM's own scopes may not let it write to a bucket; what it may do is its account's roles.
        out.append("--scopes=https://www.googleapis.com/auth/cloud-platform")
        if self.capacity != "on-demand":
            out.append(f"--{self.capacity}")
        for name in ("service_account", "network", "subnetwork"):
            if (value := getattr(self, name)) is not None:
                out.append(f"--{name.replace('_', '-')}={value}")
        if self.internal_ips:
            out.append("--internal-ips")
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpu:
    """A TPU VM, and the queued resource of the same name if it was asked for by one: commands about them.

    Attributes:
      name, zone, project: of the node.
      internal_ip: connect by the internal address.
    """

    name: str
    zone: str
    project: str
    internal_ip: bool = False

    def _command(self, kind: str, verb: str, *arguments: str) -> Command:
        place = [f"--zone={self.zone}", f"--project={self.project}", "--quiet"]
        return ["gcloud", "compute", "tpus", kind, verb, *arguments, *place]

    def describe(self) -> Command:
        """The node as JSON."""
        return self._command("tpu-vm", "describe", self.name, "--format=json")

    def create(self, node: NodeRequest) -> Command:
        """Creates the node, and waits until it is ready."""
        return self._command(
            "tpu-vm", "create", self.name, f"--version={node.runtime_version}", *node.flags()
        )

    def start(self) -> Command:
        """Starts a node that was stopped."""
        return self._command("tpu-vm", "start", self.name)

    def delete(self) -> Command:
        """Deletes the node."""
        return self._command("tpu-vm", "delete", self.name)

    def describe_queued(self) -> Command:
        """The queued resource as JSON."""
        return self._command("queued-resources", "describe", self.name, "--format=json")

    def create_queued(self, node: NodeRequest) -> Command:
        """Puts a request for the node into the queue."""
        return self._command(
            "queued-resources",
            "create",
            self.name,
            f"--node-id={self.name}",
            f"--runtime-version={node.runtime_version}",
            *node.flags(),
            "--async",
        )

    def delete_queued(self) -> Command:
        """Deletes the queued resource, and its node with it."""
        return self._command("queued-resources", "delete", self.name, "--force")

    def copy(self, files: Sequence[Path]) -> Command:
        """Copies files to the home directory on the node."""
        return self._command("tpu-vm", "scp", *map(str, files), f"{self.name}:", *self._address())

    def run(self, command: str) -> Command:
        """Runs a shell command on the node."""
        return self._command("tpu-vm", "ssh", self.name, f"--command={command}", *self._address())

    def _address(self) -> list[str]:
        return ["--internal-ip"] if self.internal_ip else []


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command ended in."""

    code: int
    stdout: str
    stderr: str

    @property
    def not_found(self) -> bool:
        """Whether there is no such thing."""
        text = self.stderr.lower()
        missing = ("not_found", "matched no objects", "httperror 404", "not found: 404")
        return self.code != 0 and any(part in text for part in missing)

    @property
    def denied(self) -> bool:
        """Whether this account may not do that."""
        text = self.stderr.lower()
        return self.code != 0 and any(
            part in text
            for part in ("httperror 403", "permission_denied", "does not have permission", "httperror 401")
        )


def ask(command: Command) -> Answer:
    """Runs a command to its end.

    Raises:
      UserError: there is no gcloud.
    """
    with _start(command) as process:
        stdout, stderr = process.communicate()
    return Answer(process.returncode, stdout, stderr)


def ask_for(command: Command) -> Any:
    """The JSON that a command answers; None where there is no such thing.

    Raises:
      UserError: it failed in any other way.
      TryAgainError: the service does not answer.
    """
    answer = ask(command)
    if answer.not_found:
        return None
    return json.loads(succeed(command, answer).stdout)


def succeed(command: Command, answer: Answer | None = None) -> Answer:
    """Runs a command that has to end well.

    Raises:
      UserError: it did not; in one line, with what to do.
    """
    answer = answer or ask(command)
    if answer.code != 0:
        raise unreadable(command, answer)
    return answer


def unreadable(command: Command, answer: Answer) -> UserError:
    """The error of a command that failed: to be tried again where the service did not answer."""
    text = answer.stderr.lower()
    if any(part in text for part in _UNREACHABLE):
        return TryAgainError(
            f"{refusal(command, answer)}; the service does not answer, run the same command again"
        )
    return UserError(refusal(command, answer))


class Lines:
    """Output of a command, line by line as it comes.

    Attributes:
      answer: how it ended, without the lines; None before.
    """

    def __init__(self, command: Command) -> None:
        self._command = command
        self.answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        with tempfile.TemporaryFile("w+") as stderr, _start(self._command, stderr=stderr) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    yield line.rstrip("\n")
            except GeneratorExit:  # not listened to until the end
                process.terminate()
                raise
            process.wait()
            stderr.seek(0)
            self.answer = Answer(process.returncode, "", stderr.read())


def refusal(command: Command, answer: Answer) -> str:
    """One line: what was asked, gcloud's own reason, and what to do."""
    told = [line.strip() for line in answer.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in told if line.startswith("ERROR")]
    reason = (errors or told or [f"exit code {answer.code}"])[0][:300]
    text = answer.stderr.lower()
    remedy = next((words for part, words in _REMEDIES.items() if part in text), None)
    what = " ".join(command[3:5] if command[1] == "compute" else command[1:3])
    return f"gcloud {what}: {reason}" + (f"; {remedy}" if remedy else "")


def _start(command: Command, *, stderr: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    except FileNotFoundError as error:
        raise UserError(
            "gcloud: no such command; install the Google Cloud SDK (cloud.google.com/sdk), then `gcloud auth login`"
        ) from error
