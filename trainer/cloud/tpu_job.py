"""The life of a training job on a TPU VM: node, trainer, log, preemption, end.

Nothing is remembered here: the node, the host and the bucket say how far the job has come, so the same command
after any interruption goes on from there. `templates/tpu_host.sh` is the part of it that runs on the host.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any, NoReturn

from pipeline.errors import EXIT_TERMINATED, TryAgainError, UserError
from trainer.cloud.gcloud import Command, Lines, NodeRequest, Tpu, ask, ask_for, refusal, succeed
from trainer.run.child_runs import ended_by_signal

_MARK = "view-distill: "  # begins what the host's script says to us
_TRIES = 5  # of a connection: a new machine's ssh server takes a while
_RESTARTS = 3  # of a trainer that was terminated, on a machine that stayed

_SCRIPT = Path(__file__).parent / "templates" / "tpu_host.sh"
_CHECKOUT = Path(__file__).parents[2]
# What installing a wheel on the host takes beside it.
INSTALL_FILES = tuple(
    _CHECKOUT / name for name in ("docker/install.sh", "requirements.lock", "pyproject.toml")
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
    """The node is not ready any more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is run on the host.

    Attributes:
      setup: verb of the host's script that makes the trainer ready, and of what.
      files: to be copied there for it.
      workdir: `gs://` URL.
      inputs: name to `gs://` URL of what is copied to the host's disk first.
      flags: of the trainer, all of them.
      save_seconds: between copies of the work directory to the bucket.
      store_url: `gs://` URL of the store, copied or streamed; None where it lies on a disk of the VM.
      fewest_replicas: that the trainer will have.
    """

    setup: tuple[str, str]
    files: tuple[Path, ...]
    workdir: str
    inputs: dict[str, str]
    flags: tuple[str, ...]
    save_seconds: int
    store_url: str | None = None
    fewest_replicas: int = 1

    def copied(self) -> list[Path]:
        """What is copied to the host."""
        return [_SCRIPT, *self.files]

    def start(self) -> str:
        """The host's command that starts the trainer."""
        inputs = [f"{name}={url}" for name, url in self.inputs.items()]
        return host("start", self.workdir, str(self.save_seconds), *inputs, "--", *self.flags)


def host(*arguments: str) -> str:
    """A shell command for the host's script."""
    return shlex.join(["bash", _SCRIPT.name, *arguments])


def marked(text: str) -> list[str]:
    """What the host's script says to us in its output: the words after each mark."""
    return [line.removeprefix(_MARK) for line in text.splitlines() if line.startswith(_MARK)]


class TpuRun:
    """Brings a job to its end.

    Args:
      tpu: where.
      node: what it is created as.
      job: what runs there.
      poll_seconds: between questions to something that takes its time.
      delete: the node when the trainer has ended.
      stop_command: what the user types to delete the node.

    Attributes:
      left: what is left behind if this ends now, in words for the user.
    """

    def __init__(
        self, tpu: Tpu, node: NodeRequest, job: Job, *, poll_seconds: float, delete: bool, stop_command: str
    ) -> None:
        self._tpu, self._node, self._job = tpu, node, job
        self._poll_seconds, self._delete = poll_seconds, delete
        self._stop_command = stop_command
        self._has_been_ready = False
        self._recreating = False  # after a preemption
        self.left = "nothing was created"

    def go(self, *, detach: bool) -> int:
        """From wherever the job is to its end, or with `detach` until it has started; the trainer's exit code.

        Raises:
          UserError: gcloud refuses something, or the host cannot be reached.
        """
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
                        f"--tpu={self._tpu.name}: the trainer was lost without an exit code {restarts} times in a row; see "
                        f"`logs`; {self.left}"
                    )
            elif code == EXIT_TERMINATED and restarts <= _RESTARTS:
                # By whoever takes the machine away; what became of it will be seen.
                print(f"the trainer was terminated and has saved; looking at {self._tpu.name}", flush=True)
            else:
                return self._finish(abs(code))
            self._sleep()

    def provide_node(self) -> None:
        """Creates the node, or takes the one that is there; returns when it is ready."""
        tpu, said = self._tpu, ""
        while True:
            node = ask_for(tpu.describe())
            request = ask_for(tpu.describe_queued()) if self._node.queued else None
            state = "absent" if node is None else str(node.get("state"))
            queue_state = None if request is None else _queue_state(request)
            if state == "READY":
                self._check_type(node)
                self._has_been_ready, self._recreating = True, False
                self._running("the trainer is not started yet")
                return
            if text := f"{tpu.name}: {state.lower()}" + (
                f", in the queue: {queue_state}" if queue_state else ""
            ):
                if text != said:
                    print(text, flush=True)
                said = text
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
                raise UserError(f"--tpu={tpu.name}: its state is {state}; {self.left}")

    def start_trainer(self) -> None:
        """Copies what is needed, and starts the trainer unless it runs already."""
        name = self._tpu.name
        print(f"{name}: ready; setting up the trainer", flush=True)
        self._connected(self._tpu.copy(self._job.copied()))
        self._connected(self._tpu.run(host(*self._job.setup)))
        words = marked(self._connected(self._tpu.run(self._job.start())))
        said = words[-1] if words else "nothing"
        if said.startswith("other "):
            raise UserError(
                f"--tpu={name}: another job runs there: {said.removeprefix('other ')}; stop it with `stop`, or take another "
                "--tpu"
            )
        if said not in ("started", "already"):
            raise UserError(
                f"--tpu={name}: the host's script answers {said!r}, expected `started`; {self.left}"
            )
        self._running("the trainer goes on there")
        print(
            f"{name}: the trainer {'was running already' if said == 'already' else 'is started'}", flush=True
        )

    def follow(self) -> int | None:
        """Shows the log until the trainer ends.

        Returns:
          Its exit code, negative if `stop` has ended it; None if the trainer is lost.

        Raises:
          _HostLostError: its machine is.
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
                    f"{self._tpu.name}: the trainer is gone without an exit code; starting it again",
                    flush=True,
                )
                return None
            self._check_ready()
            failures += 1
            assert stream.answer is not None
            if failures == _TRIES:
                self._unreachable(self._tpu.run(host("follow")), stream.answer.stderr)
            print(f"{self._tpu.name}: connection lost; connecting again", flush=True)
            self._sleep()

    def _check_ready(self) -> None:
        node = ask_for(self._tpu.describe())
        if node is None or node.get("state") != "READY":
            raise _HostLostError

    def _check_type(self, node: dict[str, Any]) -> None:
        if (found := node.get("acceleratorType")) not in (None, self._node.type):
            raise UserError(
                f"--tpu={self._tpu.name}: the name is taken by a {found}, asked for {self._node.type}; take another --tpu, "
                f"or delete it: {self._stop_command}"
            )

    def _create(self) -> None:
        tpu, node = self._tpu, self._node
        if self._has_been_ready and not self._recreating:
            raise TryAgainError(
                f"--tpu={tpu.name}: it is gone: somebody has deleted it; the work directory is whole up to its last copy, "
                "and the same command continues on a new node"
            )
        print(f"creating {tpu.name}: {node.type}, {node.capacity}, in {tpu.zone}", flush=True)
        self.left = (
            f"{tpu.name} was asked for and may come into being, and then costs; what became of it: `status`; delete "
            f"it: {self._stop_command}"
        )
        command = tpu.create_queued(node) if node.queued else tpu.create(node)
        answer = ask(command)
        if answer.code == 0:
            return
        if self._recreating and "no more capacity" in answer.stderr.lower():
            print(f"{tpu.zone} has no more capacity; nothing costs meanwhile; trying again", flush=True)
            self._sleep()
            return
        self.left = "nothing was created"
        succeed(command, answer)

    def _refuse_failed(self, request: dict[str, Any]) -> NoReturn:
        error = request["state"].get("failedData", {}).get("error", {}).get("message", "no reason is given")
        raise UserError(
            f"--tpu={self._tpu.name}: the queued resource has failed: {error}; it stays in the queue until it is deleted: "
            f"{self._stop_command}"
        )

    def _delete_node(self) -> None:
        print(f"deleting what is left of {self._tpu.name}", flush=True)
        self._recreating = True
        delete_node(self._tpu)

    def _connected(self, command: Command) -> str:
        """Output of a command that needs a connection to the host."""
        for attempt in range(1, _TRIES + 1):
            answer = ask(command)
            if answer.code == 0:
                return answer.stdout
            if answer.code != 255 or attempt == _TRIES:  # 255 is ssh's own; others are the host's script's
                break
            self._check_ready()
            self._sleep()
        if answer.code == 255:
            self._unreachable(command, answer.stderr)
        raise UserError(f"{refusal(command, answer)}; {self.left}")

    def _unreachable(self, command: Command, stderr: str) -> NoReturn:
        reason = (stderr.strip().splitlines() or ["no reason is given"])[-1]
        raise TryAgainError(
            f"gcloud {command[3]} {command[4]}: {self._tpu.name} is ready, but ssh does not get through in {_TRIES} tries: "
            f"{reason}; is port 22 open to this machine (--internal_ip inside the network)? {self.left}"
        )

    def _finish(self, code: int) -> int:
        name = self._tpu.name
        how = ended_by_signal(code, less_memory="hand the trainer a smaller --image_cache_bytes")
        print(
            f"{name}: the trainer was {how}; its files: {self._job.workdir}"
            if how
            else f"{name}: the trainer has ended with exit code {code}; its files: {self._job.workdir}",
            flush=True,
        )
        if self._delete:
            delete_node(self._tpu)
            self.left = "nothing is left running"
            print(f"{name} is deleted", flush=True)
        else:
            print(f"{name} is still there and costs; delete it: {self._stop_command}", flush=True)
        return code

    def _running(self, what: str) -> None:
        self.left = f"{self._tpu.name} is there and costs, {what}; delete it: {self._stop_command}"

    def _sleep(self) -> None:
        time.sleep(self._poll_seconds)


def _queue_state(request: dict[str, Any]) -> str:
    return str(request.get("state", {}).get("state"))


def delete_node(tpu: Tpu) -> bool:
    """Deletes a node, by its queued resource if it has one; whether there was anything."""
    if ask_for(tpu.describe_queued()) is not None:
        succeed(tpu.delete_queued())
        return True
    if ask_for(tpu.describe()) is None:
        return False
    succeed(tpu.delete())
    return True
