"""A training job on a TPU VM from start to end: node, trainer, log, preemption.

The job keeps no state of its own. Node, host and bucket show its progress, so the same command continues after any
interruption. `templates/tpu_host.sh` is the part of the job that runs on the host.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pipeline.errors import EXIT_TERMINATED, TryAgainError, UserError
from trainer.cloud.gcloud import (
    Command,
    Lines,
    NodeRequest,
    Tpu,
    ask,
    describe_failure,
    failure,
    find,
    succeed,
)
from trainer.run.child_runs import ended_by_signal

_T = TypeVar("_T")
_MARK = "view-distill: "  # prefix of the host script's answers in its output
_NOTHING = "this command has created nothing"
_TRIES = 5  # attempts to connect: the ssh server of a new machine starts late
_RESTARTS = 3  # of a terminated trainer on a machine that stayed
_SSH_FAILED = 255  # ssh's own exit code; others come from the host script

_SCRIPT = Path(__file__).parent / "templates" / "tpu_host.sh"
_CHECKOUT = Path(__file__).parents[2]
# Files that the installation of a wheel on the host needs.
INSTALL_FILES = tuple(
    _CHECKOUT / name for name in ("docker/install.sh", "requirements-tpu.lock", "pyproject.toml")
)

_WAIT = {"CREATING", "STARTING", "STOPPING", "RESTARTING", "REIMAGING", "DELETING", "REPAIRING"}
_ENDED = {"PREEMPTED", "TERMINATED"}
_QUEUE_WAIT = {
    "CREATING",
    "ACCEPTED",
    "WAITING_FOR_RESOURCES",
    "PROVISIONING",
    "ACTIVE",
    "SUSPENDING",
    "DELETING",
}


class _HostLostError(Exception):
    """The node is no longer ready."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A training job.

    Attributes:
      setup: Verb of the host script that prepares the trainer, and its argument.
      workdir: `gs://` URL of the work directory.
      inputs: `gs://` URLs of the inputs that are copied to the host's disk, by name.
      store_urls: `gs://` URLs of the stores, copied or streamed; empty if one of them is on a disk of the VM.
    """

    setup: tuple[str, str]
    files: tuple[Path, ...]
    workdir: str
    inputs: dict[str, str]
    flags: tuple[str, ...]
    save_seconds: int
    store_urls: tuple[str, ...] = ()
    fewest_replicas: int = 1

    def copied(self) -> list[Path]:
        """The files to copy to the host."""
        return [_SCRIPT, *self.files]

    def has_teacher(self) -> bool:
        """Whether the trainer has an online teacher."""
        return any(flag.startswith("--teacher=") for flag in self.flags)

    def start(self) -> str:
        """The shell command that starts the trainer on the host."""
        inputs = [f"{name}={url}" for name, url in self.inputs.items()]
        return host("start", self.workdir, str(self.save_seconds), *inputs, "--", *self.flags)


def host(*arguments: str) -> str:
    """A shell command that runs the host script."""
    return shlex.join(["bash", _SCRIPT.name, *arguments])


def marked(text: str) -> list[str]:
    """The host script's answers in its output, without their mark."""
    return [line.removeprefix(_MARK) for line in text.splitlines() if line.startswith(_MARK)]


class TpuRun:
    """Runs a job to its end.

    Attributes:
      left: Description of what exists and is billed if the command ends now.
    """

    def __init__(
        self, tpu: Tpu, node: NodeRequest, job: Job, *, poll_seconds: float, delete: bool, stop_command: str
    ) -> None:
        self._tpu, self._node, self._job = tpu, node, job
        self._poll_seconds, self._delete = poll_seconds, delete
        self._stop_command = stop_command
        self._has_been_ready = False
        self._recreating = False  # after a preemption
        self.left = _NOTHING

    def go(self, *, detach: bool) -> int:
        """Continues the job from its present state to its end, or with `detach` to its start.

        Returns:
          Exit code of the trainer; 0 with `detach`.

        Raises:
          UserError: gcloud refuses a command; the message includes `left`.
          TryAgainError: a service or the host does not respond; the message includes `left`.
        """
        try:
            return self._go(detach=detach)
        except UserError as error:
            raise type(error)(f"{error}; {self.left}") from error

    def _go(self, *, detach: bool) -> int:
        restarts = 0
        while True:
            self.provide_node()
            try:
                self.start_trainer()
                if detach:
                    print(self.left, flush=True)
                    return 0
                code = self.follow()
            except _HostLostError:
                restarts = 0
                continue
            restarts += 1
            if code is None:
                if restarts > _RESTARTS:
                    raise TryAgainError(
                        f"--tpu={self._tpu.name}: the trainer ended {restarts} times in a row without an exit code; see `logs`"
                    )
            elif code == EXIT_TERMINATED and restarts <= _RESTARTS:
                # Not by `stop`, so probably by a shutdown of the machine.
                print(f"the trainer was terminated and has saved; checking {self._tpu.name}", flush=True)
            else:
                return self._finish(abs(code))
            self._sleep()

    def provide_node(self) -> None:
        """Creates the node or takes the existing one; returns when it is ready."""
        tpu, printed = self._tpu, ""
        while True:
            node = self._find(tpu.list_nodes())
            request = self._find(tpu.list_queued()) if self._node.queued else None
            state = "absent" if node is None else str(node.get("state"))
            queue_state = None if request is None else str(request.get("state", {}).get("state"))
            if state == "READY":
                self._check_type(node)
                self._has_been_ready, self._recreating = True, False
                self._set_left("the trainer has not been started")
                return
            text = f"{tpu.name}: {state.lower()}" + (f", in the queue: {queue_state}" if queue_state else "")
            if text != printed:
                print(text, flush=True)
            printed = text
            if state in _ENDED or (node is None and queue_state == "SUSPENDED"):
                self._delete_node()
            elif node is None and request is not None and queue_state == "FAILED":
                self._refuse_failed(request)
            elif node is None and request is None:
                self._create()
            elif state == "STOPPED":
                succeed(tpu.start())
            elif state in _WAIT or (node is None and queue_state in _QUEUE_WAIT):
                self._sleep()
            else:
                raise UserError(f"--tpu={tpu.name}: unexpected state {state}")

    def start_trainer(self) -> None:
        """Copies the files to the host and starts the trainer, unless it is running."""
        name = self._tpu.name
        print(f"{name}: ready; setting up the trainer", flush=True)
        self._connected(self._tpu.copy(self._job.copied()))
        self._connected(self._tpu.run(host(*self._job.setup)))
        answers = marked(self._connected(self._tpu.run(self._job.start())))
        answer = answers[-1] if answers else "nothing"
        if answer.startswith("other "):
            raise UserError(
                f"--tpu={name}: another job is running there: {answer.removeprefix('other ')}; stop it with `stop`, or use "
                "another --tpu"
            )
        if answer not in ("started", "already"):
            raise UserError(f"--tpu={name}: the host script answered {answer!r}, expected `started`")
        self._set_left("the trainer keeps running there")
        how = "was already running" if answer == "already" else "has started"
        print(f"{name}: the trainer {how}", flush=True)

    def follow(self) -> int | None:
        """Prints the log until the trainer ends.

        Returns:
          Exit code of the trainer, negative after `stop`; None if it ended without one.
        """
        line, failures = 1, 0
        while True:
            ending = None
            stream = Lines(self._tpu.run(host("follow", str(line))))
            for text in stream:
                if text.startswith(_MARK):
                    ending = text.removeprefix(_MARK).split()
                else:
                    print(text, flush=True)
                    line, failures = line + 1, 0
            if ending is not None and ending[0] == "exit":
                return -int(ending[1]) if ending[2:] == ["stopped"] else int(ending[1])
            if ending is not None:
                print(
                    f"{self._tpu.name}: the trainer ended without an exit code; restarting it",
                    flush=True,
                )
                return None
            self._check_ready()
            failures += 1
            if failures == _TRIES:
                self._refuse_connection(self._tpu.run(host("follow")), stream.answer.stderr)
            print(f"{self._tpu.name}: connection lost; reconnecting", flush=True)
            self._sleep()

    def _find(self, command: Command) -> dict[str, Any] | None:
        """The entry that a list command prints; waits for the service."""
        return self._patiently(lambda: find(command))

    def _patiently(self, work: Callable[[], _T]) -> _T:
        """Repeats commands while the service does not respond."""
        for _ in range(_TRIES - 1):
            try:
                return work()
            except TryAgainError as error:
                print(f"{error}; trying again", flush=True)
                self._sleep()
        return work()

    def _check_ready(self) -> None:
        node = self._find(self._tpu.list_nodes())
        if node is None or node.get("state") != "READY":
            raise _HostLostError

    def _check_type(self, node: dict[str, Any] | None) -> None:
        found = None if node is None else node.get("acceleratorType")
        if found not in (None, self._node.type):
            raise UserError(
                f"--tpu={self._tpu.name}: exists with type {found}, expected {self._node.type}; use another --tpu, or delete "
                f"it: {self._stop_command}"
            )

    def _create(self) -> None:
        tpu, node = self._tpu, self._node
        if self._has_been_ready and not self._recreating:
            self.left = "nothing is billed"
            raise TryAgainError(
                f"--tpu={tpu.name}: was deleted by someone else; the work directory is complete up to its last copy, and the "
                "same command continues on a new node"
            )
        print(f"creating {tpu.name}: {node.type}, {node.capacity}, in {tpu.zone}", flush=True)
        self.left = (
            f"{tpu.name} was requested and may still be created and billed; check it with `status`; delete it: "
            f"{self._stop_command}"
        )
        command = tpu.create_queued(node) if node.queued else tpu.create(node)
        answer = ask(command)
        if answer.code == 0:
            return
        if self._recreating and answer.no_capacity:
            print(f"{tpu.zone} has no capacity; nothing is billed meanwhile; trying again", flush=True)
            self._sleep()
            return
        error = failure(command, answer)
        if not isinstance(error, TryAgainError):  # otherwise the request may have arrived
            self.left = _NOTHING
        raise error

    def _refuse_failed(self, request: dict[str, Any]) -> NoReturn:
        error = request["state"].get("failedData", {}).get("error", {}).get("message", "no reason is given")
        self.left = f"it stays in the queue until it is deleted: {self._stop_command}"
        raise UserError(f"--tpu={self._tpu.name}: the queued resource has failed: {error}")

    def _delete_node(self) -> None:
        print(f"deleting the remains of {self._tpu.name}", flush=True)
        self._recreating = True
        self._patiently(lambda: delete_node(self._tpu))

    def _connected(self, command: Command) -> str:
        """Output of a command that needs a connection to the host."""
        for attempt in range(1, _TRIES + 1):
            answer = ask(command)
            if answer.code == 0:
                return answer.stdout
            if answer.code != _SSH_FAILED or attempt == _TRIES:
                break
            self._check_ready()
            self._sleep()
        if answer.code == _SSH_FAILED:
            self._refuse_connection(command, answer.stderr)
        raise UserError(describe_failure(command, answer))

    def _refuse_connection(self, command: Command, stderr: str) -> NoReturn:
        reason = (stderr.strip().splitlines() or ["no reason is given"])[-1]
        raise TryAgainError(
            f"gcloud {command[3]} {command[4]}: {self._tpu.name} is ready, but ssh failed {_TRIES} times: {reason}; check that "
            "port 22 is open to this machine, or use --internal_ip inside the network"
        )

    def _finish(self, code: int) -> int:
        name = self._tpu.name
        killed = ended_by_signal(code, less_memory="use a smaller --image_cache_bytes")
        how = f"was {killed}" if killed else f"has ended with exit code {code}"
        print(f"{name}: the trainer {how}; its files: {self._job.workdir}", flush=True)
        self._set_left("the trainer has ended")
        if self._delete:
            self._patiently(lambda: delete_node(self._tpu))
            self.left = "nothing is billed"
            print(f"{name} is deleted", flush=True)
        else:
            print(f"{name} still exists and is billed; delete it: {self._stop_command}", flush=True)
        return code

    def _set_left(self, trainer: str) -> None:
        self.left = f"{self._tpu.name} exists and is billed, {trainer}; delete it: {self._stop_command}"

    def _sleep(self) -> None:
        time.sleep(self._poll_seconds)


def delete_node(tpu: Tpu) -> bool:
    """Deletes a node together with its queued resource, if it has one; returns whether anything existed."""
    if find(tpu.list_queued()) is not None:
        succeed(tpu.delete_queued())
        return True
    if find(tpu.list_nodes()) is None:
        return False
    succeed(tpu.delete())
    return True
