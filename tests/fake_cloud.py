"""Replaces `gcloud`, and `sudo` and `docker` on its machines: records each command and simulates a cloud.

A TPU VM is a home directory with real processes; a bucket is a directory. Tests use `Cloud`. Faults are in `plan.json`, a
list of objects. The first one whose `match` is part of a command is removed from the list and takes effect, after
`after` other matching commands have succeeded:

  {"match": TEXT, "code": N, "stderr": TEXT}   the command fails
  {"match": TEXT, "interrupt": true}           Ctrl-C during the command
  {"match": TEXT, "line": TEXT, "saved": NAME, "then": "preempt" | "terminate" | "delete" | "drop" | "interrupt"}
                                               happens when the command has printed a line with this prefix and the bucket
                                               contains a file NAME; then the trainer may pass step 5
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROGRAMS = ("gcloud", "sudo", "docker")
CLOUD = "FAKE_CLOUD"  # the environment variable with its directory


class Cloud:
    """A cloud in a directory.

    Attributes:
      root: Directory with `node.json`, `queue.json`, `vm/`, `bucket/`, `bin/` and `calls.jsonl`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def build(self) -> Cloud:
        """Creates an empty cloud with its programs."""
        (self.root / "bin").mkdir(parents=True)
        (self.root / "bucket").mkdir()
        for name in PROGRAMS:
            program = self.root / "bin" / name
            # -S -E: faster start; the environment is not needed.
            program.write_text(
                f'#!/bin/sh\nexec {sys.executable} -S -E {Path(__file__).resolve()} {name} "$@"\n'
            )
            program.chmod(0o755)
        return self

    def expect(self, *events: dict[str, Any]) -> None:
        """Sets the faults."""
        self.write("plan.json", list(events))

    def calls(self) -> list[list[str]]:
        """All gcloud commands, from this machine and from the VM."""
        path = self.root / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """The commands from this machine in short form, such as `tpu-vm create`; ssh with the host script's verb."""
        out = []
        for call in self.calls():
            if call[1:3] == ["compute", "tpus"]:
                text = " ".join(call[3:5])
                shell = next((a for a in call if a.startswith("--command=")), None)
                out.append(text if shell is None else f"{text} {shell.split()[2]}")
        return out

    def read(self, name: str) -> Any:
        """Reads a JSON file; None if it does not exist."""
        path = self.root / name
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, name: str, value: Any) -> None:
        """Writes a JSON file atomically."""
        path = self.root / f"{name}.{os.getpid()}"
        path.write_text(json.dumps(value))
        path.rename(self.root / name)

    def bucket(self, url: str) -> Path:
        """The path of an object or directory of a bucket."""
        return self.root / "bucket" / url.removeprefix("gs://").rstrip("/")

    def create_node(self, kind: str) -> None:
        """Creates a ready node with an empty disk."""
        (self.root / "vm").mkdir()
        self.write("node.json", {"state": "READY", "acceleratorType": kind, "health": "HEALTHY"})

    def end_machine(self, *, state: str | None) -> None:
        """Kills the processes of the node and deletes its disk; without a state, also the node."""
        home = f"HOME={self.root / 'vm'}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if home in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
            except OSError:  # ended, or of another user
                continue
        shutil.rmtree(self.root / "vm", ignore_errors=True)
        node = self.read("node.json")
        if state is None:
            (self.root / "node.json").unlink(missing_ok=True)
        elif node is not None:
            self.write("node.json", {**node, "state": state})

    def preempt(self) -> None:
        """Preempts the machine: the node of a queued resource disappears, another one stays as PREEMPTED."""
        queue = self.read("queue.json")
        self.end_machine(state=None if queue else "PREEMPTED")
        if queue:
            self.write("queue.json", {**queue, "states": ["SUSPENDED"]})

    # --- the programs ---------------------------------------------------------------------------------------

    def due(self, text: str) -> dict[str, Any]:
        """The fault of a command, removed from the plan; empty if there is none."""
        events = self.read("plan.json") or []
        for event in events:
            if event["match"] in text:
                if event.get("after", 0) > 0:
                    event["after"] -= 1
                    self.write("plan.json", events)
                    return {}
                events.remove(event)
                self.write("plan.json", events)
                return event
        return {}

    def gcloud(self, argv: list[str]) -> int:
        """Runs a gcloud command."""
        with (self.root / "calls.jsonl").open("a") as file:
            file.write(json.dumps(["gcloud", *argv]) + "\n")
        event = self.due(" ".join(argv))
        if event.get("interrupt"):
            os.kill(os.getppid(), signal.SIGINT)
            return 130
        if "code" in event:
            print(event["stderr"], file=sys.stderr)
            return int(event["code"])
        flags = dict(a.removeprefix("--").partition("=")[::2] for a in argv if a.startswith("--"))
        plain = [a for a in argv if not a.startswith("--")]
        if plain[:3] == ["storage", "objects", "list"]:
            return self.list_objects(plain[3], flags)
        if plain[0] == "storage":
            return self.storage(plain[1], plain[2:], flags)
        if plain[:2] == ["auth", "configure-docker"]:
            return 0
        kind, verb, *rest = plain[2:]
        return self.tpus(kind, verb, rest, flags, event)

    def tpus(
        self, kind: str, verb: str, rest: list[str], flags: dict[str, str], event: dict[str, Any]
    ) -> int:
        """Runs a command of `gcloud compute tpus`."""
        name = "queue.json" if kind == "queued-resources" else "node.json"
        found = self.read(name)
        if verb in ("ssh", "scp"):
            return self.connect(verb, rest, flags, event)
        if verb == "create" and found is not None:
            print(f"ERROR: (gcloud.compute.tpus.{kind}.create) ALREADY_EXISTS: Resource 'x'", file=sys.stderr)
            return 1
        if verb == "create" and kind == "tpu-vm":
            self.create_node(flags["accelerator-type"])
        elif verb == "create":
            states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
            self.write(name, {"states": states, "type": flags["accelerator-type"]})
        elif verb == "list" and (found is None or kind == "tpu-vm"):
            print(json.dumps([] if found is None else [found]))
        elif verb == "list":
            state, *later = found["states"]
            self.write(name, {**found, "states": later or [state]})
            if state == "ACTIVE" and self.read("node.json") is None:
                self.create_node(found["type"])
            print(json.dumps([{"state": {"state": state, **found.get("data", {})}}]))
        elif found is None:
            print(f"ERROR: (gcloud.compute.tpus.{kind}.{verb}) NOT_FOUND: Resource 'x'", file=sys.stderr)
            return 1
        elif verb == "start":
            self.create_node(found["acceleratorType"])
        elif verb == "delete":
            self.end_machine(state=None)
            (self.root / name).unlink(missing_ok=True)
        return 0

    def connect(self, verb: str, rest: list[str], flags: dict[str, str], event: dict[str, Any]) -> int:
        """Runs a shell command on the machine, or copies files to it."""
        if (self.read("node.json") or {}).get("state") != "READY":
            print("ERROR: ssh: connect to host port 22: No route to host", file=sys.stderr)
            return 255
        home = self.root / "vm"
        if verb == "scp":
            for path in rest[:-1]:
                shutil.copy(path, home)
            return 0
        environment = {**os.environ, "HOME": str(home), "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}"}
        with subprocess.Popen(
            ["bash", "-c", flags["command"]], cwd=home, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                if "line" in event and line.startswith(event["line"]):
                    while event.get("saved") and not self.bucket(event["saved"]).exists():
                        time.sleep(0.05)
                    process.kill()
                    return self.happen(event["then"])
        return process.returncode

    def happen(self, what: str) -> int:
        """Ends a connection with an event; returns the exit code of gcloud."""
        if what == "preempt":
            self.preempt()
        if what == "terminate":  # by a shutdown of the machine
            os.kill(int((self.root / "container").read_text()), signal.SIGTERM)
            os.kill(int((self.root / "vm" / "view-distill" / "pid").read_text()), signal.SIGTERM)
        if what == "delete":
            self.end_machine(state=None)
        (self.root / "go").touch()
        if what == "interrupt":
            os.kill(os.getppid(), signal.SIGINT)
            return 130
        return 255

    def list_objects(self, url: str, flags: dict[str, str]) -> int:
        """Runs `gcloud storage objects list`, which succeeds without output if nothing matches."""
        path = self.bucket(url.removesuffix("/**"))
        found = path.is_file() or (path.is_dir() and any(path.iterdir()))
        names = [path.name] if found else []
        print(json.dumps([{"name": name} for name in names]) if "json" in flags["format"] else "".join(names))
        return 0

    def storage(self, verb: str, places: list[str], flags: dict[str, str]) -> int:
        """Runs a copying command of `gcloud storage`."""
        paths = [self.bucket(p) if p.startswith("gs://") else Path(p) for p in places]
        source, target = paths
        if not source.exists():
            print(f"ERROR: (gcloud.storage.{verb}) {places[0]} matched no objects", file=sys.stderr)
            return 1
        if verb == "cp":
            shutil.copy(source, target)
            return 0
        wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
        if "exclude" in flags:
            # gcloud matches from the beginning of the path (`storage/regex_util.py`).
            wanted = {path for path in wanted if not re.match(flags["exclude"], str(path))}
        for path in wanted:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / path, target / path)
        if "delete-unmatched-destination-objects" in flags:
            for path in [p for p in target.rglob("*") if p.is_file()]:
                if path.relative_to(target) not in wanted:
                    path.unlink()
        return 0

    def docker(self, argv: list[str]) -> int:
        """Runs a docker command; a container is a process in the mounted directory."""
        with (self.root / "docker.jsonl").open("a") as file:
            file.write(json.dumps(argv) + "\n")
        pid = self.root / "container"
        if argv[0] == "load":
            print("Loaded image: trainer:copied")
        elif argv[0] == "stop" and pid.exists():
            os.kill(int(pid.read_text()), signal.SIGTERM)
        elif argv[0] == "run":
            flags = [a for a in argv if a.startswith("--")]
            mounts = dict(a.removeprefix("--volume=").split(":") for a in flags if a.startswith("--volume="))
            os.chdir(next(host for host, there in mounts.items() if there == "/job"))
            pid.write_text(str(os.getpid()))
            command = argv[argv.index("python") :]
            os.execvp(command[0], command)
        return 0


def main(program: str, argv: list[str]) -> int:
    """Runs one of the programs."""
    cloud = Cloud(Path(os.environ[CLOUD]))
    if program == "sudo":
        os.execvp(argv[0], argv)
    return cloud.docker(argv) if program == "docker" else cloud.gcloud(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
