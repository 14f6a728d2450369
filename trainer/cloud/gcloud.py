"""Commands for `gcloud`, and their answers.

State is read as JSON. Only failures are classified by text, because gcloud prints no structured errors. Credentials are
gcloud's own: nothing here reads, stores or passes any.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.errors import TryAgainError, UserError

Command = list[str]

_UNREACHABLE = re.compile(
    r"unavailable|deadline_exceeded|timed out|connection (reset|aborted)|network is unreachable|"
    r"failed to establish a new connection|name resolution|name or service not known|http(error)? 50[0234]"
)
_DENIED = re.compile(r"httperror 40[13]|permission_denied|does not have permission")
# The message of the failed operation; gcloud does not print its code.
_NO_CAPACITY = "no more capacity"
_MAX_REASON = 300  # characters


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeRequest:
    """Configuration of a TPU VM to create.

    Attributes:
      type: Accelerator type, such as `v3-8`.
      capacity: `on-demand`, `spot` or `reserved`.
      service_account: Account with which the VM accesses buckets; None for the project's default.
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
        """The flags shared by both ways of creation."""
        out = [f"--accelerator-type={self.type}", "--labels=view-distill=trainer"]
        # The default scopes of a VM may exclude writing to buckets. The roles of the account are what limits it.
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
    """Commands for a TPU VM, and for the queued resource of the same name."""

    name: str
    zone: str
    project: str
    internal_ip: bool = False

    def _command(self, kind: str, verb: str, *arguments: str) -> Command:
        place = [f"--zone={self.zone}", f"--project={self.project}", "--quiet"]
        return ["gcloud", "compute", "tpus", kind, verb, *arguments, *place]

    def _list(self, kind: str) -> Command:
        # A list is empty where nothing has the name; `describe` would fail with a text.
        return self._command(kind, "list", f"--filter=name~/{self.name}$", "--format=json")

    def list_nodes(self) -> Command:
        """Lists the node: a JSON list of one entry or none."""
        return self._list("tpu-vm")

    def create(self, node: NodeRequest) -> Command:
        """Creates the node and waits until it is ready."""
        return self._command(
            "tpu-vm", "create", self.name, f"--version={node.runtime_version}", *node.flags()
        )

    def start(self) -> Command:
        """Starts a stopped node."""
        return self._command("tpu-vm", "start", self.name)

    def delete(self) -> Command:
        """Deletes the node."""
        return self._command("tpu-vm", "delete", self.name)

    def list_queued(self) -> Command:
        """Lists the queued resource: a JSON list of one entry or none."""
        return self._list("queued-resources")

    def create_queued(self, node: NodeRequest) -> Command:
        """Adds a request for the node to the queue."""
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
        """Deletes the queued resource together with its node."""
        return self._command("queued-resources", "delete", self.name, "--force")

    def copy(self, files: Sequence[Path]) -> Command:
        """Copies files to the home directory of the node."""
        return self._command("tpu-vm", "scp", *map(str, files), f"{self.name}:", *self._address())

    def run(self, command: str) -> Command:
        """Runs a shell command on the node."""
        return self._command("tpu-vm", "ssh", self.name, f"--command={command}", *self._address())

    def _address(self) -> list[str]:
        return ["--internal-ip"] if self.internal_ip else []


def list_objects(url: str) -> Command:
    """Lists an object below a URL, or the `.keras` file itself: a JSON list of one entry or none."""
    pattern = url if url.endswith(".keras") else f"{url}/**"
    return ["gcloud", "storage", "objects", "list", pattern, "--limit=1", "--format=json(name)", "--quiet"]


@dataclasses.dataclass(frozen=True)
class Answer:
    """Exit code and output of a command."""

    code: int
    stdout: str
    stderr: str

    @property
    def denied(self) -> bool:
        """Whether the account lacks a permission."""
        return self.code != 0 and _DENIED.search(self.stderr.lower()) is not None

    @property
    def no_capacity(self) -> bool:
        """Whether the zone has no capacity left."""
        return self.code != 0 and _NO_CAPACITY in self.stderr.lower()


def ask(command: Command) -> Answer:
    """Runs a command to its end.

    Raises:
      UserError: gcloud is not installed.
    """
    with _start(command) as process:
        stdout, stderr = process.communicate()
    return Answer(process.returncode, stdout, stderr)


def succeed(command: Command, answer: Answer | None = None) -> Answer:
    """Runs a command that must succeed.

    Args:
      answer: Its answer if it has run already.

    Raises:
      UserError: it failed.
      TryAgainError: the service did not respond.
    """
    answer = answer or ask(command)
    if answer.code != 0:
        raise failure(command, answer)
    return answer


def find(command: Command) -> dict[str, Any] | None:
    """The entry that a list command prints; None if the list is empty. Raises as `succeed` does."""
    entries: list[dict[str, Any]] = json.loads(succeed(command).stdout)
    return entries[0] if entries else None


def failure(command: Command, answer: Answer) -> UserError:
    """The error of a failed command; a TryAgainError if the service did not respond."""
    if _UNREACHABLE.search(answer.stderr.lower()):
        return TryAgainError(
            f"{describe_failure(command, answer)}; the service does not respond: rerun the same command later"
        )
    return UserError(describe_failure(command, answer))


def describe_failure(command: Command, answer: Answer) -> str:
    """The command and gcloud's own reason, with its remedy, in one line."""
    lines = [line.strip() for line in answer.stderr.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if line.startswith("ERROR")), 0)
    reason = " ".join(lines[first:]).removeprefix("ERROR: ") or f"exit code {answer.code}"
    remedy = "; try --queued, --spot or another --zone" if answer.no_capacity else ""
    what = " ".join(command[3:5] if command[1] == "compute" else command[1:3])
    return f"gcloud {what}: {reason[:_MAX_REASON]}{remedy}"


class Lines:
    """Output of a command, line by line.

    Attributes:
      answer: Exit code and standard error, without the lines; set when the command has ended.
    """

    answer: Answer

    def __init__(self, command: Command) -> None:
        self._command = command

    def __iter__(self) -> Iterator[str]:
        with tempfile.TemporaryFile("w+") as stderr, _start(self._command, stderr=stderr) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    yield line.rstrip("\n")
            except GeneratorExit:  # the caller stops before the end
                process.terminate()
                raise
            process.wait()
            stderr.seek(0)
            self.answer = Answer(process.returncode, "", stderr.read())


def _start(command: Command, *, stderr: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    except FileNotFoundError as error:
        raise UserError(
            "gcloud: command not found; install the Google Cloud SDK (cloud.google.com/sdk), then run `gcloud auth login`"
        ) from error
