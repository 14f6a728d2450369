"""Stands in front of `gcloud`, and of `sudo` and `docker` on its machines: records each command, and plays a cloud.

A TPU VM is a home directory whose processes are real; a bucket is a directory. `Cloud` is the test's side. What is to
go wrong is in `plan.json`: a list of objects, of which the first whose `match` is part of a command is taken out
and happens, once `after` others like it went well:

  {"match": TEXT, "code": N, "stderr": TEXT}   the command is refused
  {"match": TEXT, "interrupt": true}           Ctrl-C, while the command is under way
  {"match": TEXT, "line": TEXT, "saved": NAME, "then": "preempt" | "terminate" | "delete" | "drop" | "interrupt"}
                                               when the command has printed a line that begins so, and the bucket has a file NAME;
                                               the trainer is let go on then
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
      root: with `node.json`, `queue.json`, `vm/`, `bucket/`, `bin/` and `calls.jsonl`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def build(self) -> Cloud:
        """An empty cloud with its programs."""
        (self.root / "bin").mkdir(parents=True)
        (self.root / "bucket").mkdir()
        for name in PROGRAMS:
            program = self.root / "bin" / name
            # -S -E: nothing of the environment is needed, and starting is most of what it does.
            program.write_text(
                f'#!/bin/sh\nexec {sys.executable} -S -E {Path(__file__).resolve()} {name} "$@"\n'
            )
            program.chmod(0o755)
        return self

    def expect(self, *events: dict[str, Any]) -> None:
        """Sets what is to go wrong."""
        self.write("plan.json", list(events))

    def calls(self) -> list[list[str]]:
        """Every command that gcloud was asked for, from this machine and from the VM."""
        path = self.root / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """The commands from this machine, in short, such as `tpu-vm create`; ssh with the host script's verb."""
        out = []
        for call in self.calls():
            if call[1:3] == ["compute", "tpus"]:
                text = " ".join(call[3:5])
                shell = next((a for a in call if a.startswith("--command=")), None)
                out.append(text if shell is None else f"{text} {shell.split()[2]}")
        return out

    def read(self, name: str) -> Any:
        """A JSON file; None where there is none."""
        path = self.root / name
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, name: str, value: Any) -> None:
        """A JSON file, by rename."""
        path = self.root / f"{name}.{os.getpid()}"
        path.write_text(json.dumps(value))
        path.rename(self.root / name)

    def bucket(self, url: str) -> Path:
        """Where an object or a directory of a bucket is."""
        return self.root / "bucket" / url.removeprefix("gs://").rstrip("/")

    def create_node(self, kind: str) -> None:
        """A ready node with an empty disk."""
        (self.root / "vm").mkdir()
        self.write("node.json", {"state": "READY", "acceleratorType": kind, "health": "HEALTHY"})

    def end_machine(self, *, state: str | None) -> None:
        """Kills what runs on the node and removes its disk; without a state, the node too."""
        home = f"HOME={self.root / 'vm'}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if home in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
            except OSError:  # ended meanwhile, or not ours
                continue
        shutil.rmtree(self.root / "vm", ignore_errors=True)
        node = self.read("node.json")
        if state is None:
            (self.root / "node.json").unlink(missing_ok=True)
        elif node is not None:
            self.write("node.json", {**node, "state": state})

    def preempt(self) -> None:
        """Takes the machine away: of a queued resource the node too, else it stays as PREEMPTED."""
        queue = self.read("queue.json")
        self.end_machine(state=None if queue else "PREEMPTED")
        if queue:
            self.write("queue.json", {**queue, "states": ["SUSPENDED"]})

    # --- the programs' side ---------------------------------------------------------------------------------

    def due(self, text: str) -> dict[str, Any]:
        """What is to happen to a command, taken out of the plan."""
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
        """gcloud."""
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
        if plain[0] == "storage":
            return self.storage(plain[1], plain[2:], flags)
        if plain[:2] == ["auth", "configure-docker"]:
            return 0
        kind, verb, *rest = plain[2:]
        return self.tpus(kind, verb, rest, flags, event)

    def tpus(
        self, kind: str, verb: str, rest: list[str], flags: dict[str, str], event: dict[str, Any]
    ) -> int:
        """gcloud compute tpus."""
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
        elif found is None:
            print(f"ERROR: (gcloud.compute.tpus.{kind}.{verb}) NOT_FOUND: Resource 'x'", file=sys.stderr)
            return 1
        elif verb == "describe" and kind == "tpu-vm":
            print(json.dumps(found))
        elif verb == "describe":
            state, *later = found["states"]
            self.write(name, {**found, "states": later or [state]})
            if state == "ACTIVE" and self.read("node.json") is None:
                self.create_node(found["type"])
            print(json.dumps({"state": {"state": state, **found.get("data", {})}}))
        elif verb == "start":
            self.create_node(found["acceleratorType"])
        elif verb == "delete":
            self.end_machine(state=None)
            (self.root / name).unlink(missing_ok=True)
        return 0

    def connect(self, verb: str, rest: list[str], flags: dict[str, str], event: dict[str, Any]) -> int:
        """Runs a shell command on the machine, or copies files there."""
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
        """What becomes of a connection."""
        if what == "preempt":
            self.preempt()
        if what == "terminate":  # as a machine that shuts down does
            os.kill(int((self.root / "container").read_text()), signal.SIGTERM)
            os.kill(int((self.root / "vm" / "view-distill" / "pid").read_text()), signal.SIGTERM)
        if what == "delete":
            self.end_machine(state=None)
        (self.root / "go").touch()
        if what == "interrupt":
            os.kill(os.getppid(), signal.SIGINT)
            return 130
        return 255

    def storage(self, verb: str, places: list[str], flags: dict[str, str]) -> int:
        """gcloud storage; gs:// is a directory."""
        paths = [self.bucket(p) if p.startswith("gs://") else Path(p) for p in places]
        if verb == "ls":
            if paths[0].is_file() or (paths[0].exists() and any(paths[0].iterdir())):
                return 0
            print("ERROR: (gcloud.storage.ls) One or more URLs matched no objects.", file=sys.stderr)
            return 1
        source, target = paths
        if not source.exists():
            print(f"ERROR: (gcloud.storage.{verb}) {places[0]} matched no objects", file=sys.stderr)
            return 1
        if verb == "cp":
            shutil.copy(source, target)
            return 0
        wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
        if "exclude" in flags:
            # From the beginning of the path, as gcloud's `storage/regex_util.py` does.
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
        """docker: an image is nothing, a container a process in the mounted directory."""
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
    """One of the programs."""
    cloud = Cloud(Path(os.environ[CLOUD]))
    if program == "sudo":
        os.execvp(argv[0], argv)
    return cloud.docker(argv) if program == "docker" else cloud.gcloud(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
