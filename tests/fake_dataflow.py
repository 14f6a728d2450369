"""The Dataflow service on loopback: tokens, jobs, messages and metrics. It runs a job in worker processes of this machine.

Google's machines get the staged pipeline and the worker image. Here, `python -m tests.fake_dataflow gs://.../pipeline.pb` runs the staged
pipeline with Beam's Python runner, whose workers are started as in the image, without anything else of the command.
"""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
_WORKER = f"exec {sys.executable} -m apache_beam.runners.worker.sdk_worker_main"
_ID = "2026-11-28_00_00_00-1"


class FakeDataflow:
    """The service.

    Args:
      directory: directory for the output of the job's process.
      runs: whether a job is run; otherwise it is in `state` until `end`, if there is one.
      refuses: HTTP status and message of the answer to a job; None to take it.

    Attributes:
      port: port of the service.
      job: the job that arrived, as JSON; None before.
      state: state of the job.
      end: last state of a job that is not run, a few requests later.
      error: message of a failed job.
      requests: (method, path, Authorization) of each request.
    """

    def __init__(self, directory: Path, *, runs: bool = True, refuses: tuple[int, str] | None = None) -> None:
        self._directory, self._runs, self._refuses = directory, runs, refuses
        self._process: subprocess.Popen[str] | None = None
        self.job: dict[str, Any] | None = None
        self.state, self.error = "JOB_STATE_RUNNING", ""
        self.end: str | None = None
        self.requests: list[tuple[str, str, str]] = []
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _respond(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(length)
                path = self.path.partition("?")[0]
                service.requests.append((self.command, path, self.headers.get("Authorization", "")))
                status, answer = service.answer(self.command, path, body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = _respond  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                """Logs nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def staged(self) -> str:
        """URL of the staged pipeline."""
        assert self.job is not None
        url: str = self.job["environment"]["sdkPipelineOptions"]["options"]["pipelineUrl"]
        return url

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and body of a response."""
        if path == "/token":
            return 200, {"access_token": "token", "expires_in": 3600, "token_type": "Bearer"}
        if method == "POST" and path.endswith("/jobs"):
            if self._refuses is not None:
                status, message = self._refuses
                return status, {"error": {"code": status, "message": message}}
            self.job = json.loads(body)
            if self._runs:
                self._start()
            return 200, self._described()
        if method == "PUT":
            self.state = "JOB_STATE_CANCELLED"
            return 200, self._described()
        if path.endswith("/messages"):
            message = {
                "id": "1",
                "time": "2026-11-28T00:00:00.000Z",
                "messageText": self.error,
                "messageImportance": "JOB_MESSAGE_ERROR",
            }
            return 200, {"jobMessages": [message] if self.error else []}
        if path.endswith("/metrics"):
            return 200, {"metrics": self._metrics()}
        return 200, self._described()

    def _start(self) -> None:
        with (self._directory / "job.out").open("w") as out, (self._directory / "job.err").open("w") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, self.staged],
                cwd=ROOT,
                env=os.environ | {"VIEW_DISTILL_CACHE": str(self._directory / "worker_cache")},
                stdout=out,
                stderr=err,
                text=True,
            )

    def _described(self) -> dict[str, Any]:
        if self._process is not None and (code := self._process.poll()) is not None:
            self.state = "JOB_STATE_DONE" if code == 0 else "JOB_STATE_FAILED"
            self.error = "" if code == 0 else (self._directory / "job.err").read_text()[-2000:]
        if self.end is not None and sum(method == "GET" for method, _, _ in self.requests) > 5:
            self.state = self.end
        return {**(self.job or {}), "id": _ID, "currentState": self.state}

    def _metrics(self) -> list[dict[str, Any]]:
        """Counters of the job as the service lists them: attempted and committed values."""
        if self._process is None:
            return []
        out = []
        for namespace, name, value in json.loads((self._directory / "job.out").read_text()):
            for tentative in ({"tentative": "true"}, {}):
                context = {"namespace": namespace, "step": "ComputeShard", **tentative}
                out.append(
                    {"name": {"origin": "user", "name": name, "context": context}, "scalar": float(value)}
                )
        return out


def load(url: str) -> Any:
    """The staged pipeline, a Beam proto."""
    from apache_beam.portability.api import beam_runner_api_pb2

    from pipeline.storage.bucket import BucketDirectory

    directory, _, name = url.rpartition("/")
    return beam_runner_api_pb2.Pipeline.FromString(BucketDirectory(directory).read(name, limit=1 << 24))


def main(url: str) -> None:
    """Runs the staged pipeline, and prints its counters."""
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.portability import python_urns
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    pipeline = load(url)
    for environment in pipeline.components.environments.values():
        environment.urn, environment.payload = python_urns.SUBPROCESS_SDK, _WORKER.encode()
    result = FnApiRunner().run_via_runner_api(pipeline, PipelineOptions(["--direct_num_workers=1"]))
    result.wait_until_finish()
    counters = result.metrics().query()["counters"]
    print(json.dumps([(c.key.metric.namespace, c.key.metric.name, c.committed) for c in counters]))


if __name__ == "__main__":
    main(sys.argv[1])
