"""Bucket servers on loopback in processes of their own, and proxies that simulate failing connections."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import boto3
import gcsfs
import pytest
import s3fs

BUCKET = "views"
_SECONDS = 60


def free_port() -> int:
    """A free port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(port: int) -> dict[str, str]:
    """Environment variables that direct the S3 library to a server on loopback."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def point_at(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directs this process and its children to a server, or a link, instead of S3."""
    for name, value in environment(port).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # of another port


def point_at_gcs(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directs this process and its children to a server, or a link, instead of Google Cloud Storage."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    gcsfs.GCSFileSystem.clear_instance_cache()  # of another port


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """Runs a server with one bucket, `BUCKET`; yields its port."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(1 << 30)},
    )
    try:
        end = time.monotonic() + _SECONDS
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("PUT", f"/{BUCKET}", headers={"Host": "localhost"})
                if connection.getresponse().status == 200:
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    raise
            time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def gcs_server() -> Iterator[int]:
    """Runs an emulator of Google Cloud Storage with one bucket, `BUCKET`; yields its port.

    The emulator ignores preconditions; a `GenerationLink` in front of it honors them.
    """
    port = free_port()
    command = Path(sys.executable).with_name("gcp-storage-emulator")
    process = subprocess.Popen(
        [command, "start", "--host=127.0.0.1", f"--port={port}", "--in-memory", f"--default-bucket={BUCKET}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + _SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the emulator did not start")
            time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


@dataclasses.dataclass
class Fault:
    """A fault that a link adds to a response.

    Attributes:
      latency: seconds before the first byte.
      rate: bytes of the body per second; 0 for no limit.
      drop: whether to close the connection after half of the body.
      truncate: whether to send half of the body as if it were complete.
      flip: whether to change one byte of the body.
      status: HTTP status to send instead, without a body; 0 for the server's.
    """

    latency: float = 0.0
    rate: float = 0.0
    drop: bool = False
    truncate: bool = False
    flip: bool = False
    status: int = 0


Faults = Callable[[str, str, int], Fault]
Answer = tuple[int, list[tuple[str, str]], bytes]  # status, headers, body


class FaultyLink:
    """A proxy between S3 clients and a server.

    Args:
      server: port of the server.
      faults: function from method, path and number of a request to the fault of its response.
      serial: whether requests are forwarded one at a time. The check of a precondition and the write are then one step, as in S3;
        in moto they are two.

    Attributes:
      port: port for clients.
      requests: (method, path) of each request, in order.
      bytes_sent: bytes of bodies sent to clients.
    """

    def __init__(self, server: int, faults: Faults, *, serial: bool = False) -> None:
        self._turn = threading.Lock() if serial else contextlib.nullcontext()
        self.server = server
        self.requests: list[tuple[str, str]] = []
        self.bytes_sent = 0
        self.faults = faults
        link, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _forward(self) -> None:
                with lock:
                    number = len(link.requests)
                    link.requests.append((self.command, self.path))
                fault = link.faults(self.command, self.path, number)
                time.sleep(fault.latency)
                sent = _sent(self)
                with link._turn:
                    status, headers, body = link.answer(self, sent)
                time.sleep(len(body) / fault.rate if fault.rate else 0.0)
                if fault.status:
                    status, body = fault.status, b""
                if fault.flip and body:
                    body = bytes([body[0] ^ 1]) + body[1:]
                if fault.truncate:
                    body = body[: len(body) // 2]
                self.send_response(status)
                for name, value in headers:
                    if name.lower() not in (
                        "content-length",
                        "transfer-encoding",
                        "connection",
                        "date",
                        "server",
                    ):
                        self.send_header(name, value)
                length = len(body)
                if self.command == "HEAD":
                    length = int({k.lower(): v for k, v in headers}.get("content-length", 0))
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if fault.drop:
                    self.wfile.write(body[: len(body) // 2])
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if self.command != "HEAD":
                    self.wfile.write(body)
                    with lock:
                        link.bytes_sent += len(body)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                """Logs nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def answer(self, handler: http.server.BaseHTTPRequestHandler, sent: bytes | None) -> Answer:
        """Forwards a request with an optional body and returns the response."""
        return _ask(self.server, handler, sent)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, method: str, part: str) -> int:
        """Number of requests with a method and a part of the path."""
        return sum(asked == method and part in path for asked, path in self.requests)


class GenerationLink(FaultyLink):
    """A link to the emulator of GCS that adds support for generations in preconditions and reads.

    Args:
      server: port of the emulator.
    """

    def __init__(self, server: int) -> None:
        super().__init__(server, lambda *_: Fault(), serial=True)

    def answer(self, handler: http.server.BaseHTTPRequestHandler, sent: bytes | None) -> Answer:
        """Responds with 412 or 404 if the object has another generation."""
        url = urllib.parse.urlsplit(handler.path)
        query = {name: values[0] for name, values in urllib.parse.parse_qs(url.query).items()}
        for parameter, status in (("ifGenerationMatch", 412), ("generation", 404)):
            if parameter in query and query[parameter] != self._generation(url.path, query, sent or b""):
                return status, [], b'{"error": {"message": "another generation"}}'
        return super().answer(handler, sent)

    def _generation(self, path: str, query: dict[str, str], sent: bytes) -> str:
        """Generation of the object of a request; 0 if there is none."""
        bucket, _, name = path.partition("/b/")[2].partition("/o")
        # The name is in the path, in the query, or in the first part of an upload in two.
        name = urllib.parse.unquote(name.strip("/")) or query.get("name", "")
        if not name and (found := re.search(rb'"name": "([^"]+)"', sent)):
            name = found[1].decode()
        place = f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}"
        connection = http.client.HTTPConnection("127.0.0.1", self.server, timeout=60)
        try:
            connection.request("GET", place)
            answer = connection.getresponse()
            body = answer.read()
            return str(json.loads(body)["generation"]) if answer.status == 200 else "0"
        finally:
            connection.close()


def _sent(handler: http.server.BaseHTTPRequestHandler) -> bytes | None:
    """Body of a request."""
    if handler.headers.get("Transfer-Encoding", "").lower() == "chunked":
        return _chunks(handler)
    length = int(handler.headers.get("Content-Length", 0))
    return handler.rfile.read(length) if length else None


def _ask(port: int, handler: http.server.BaseHTTPRequestHandler, body: bytes | None) -> Answer:
    """The server's response to a request."""
    headers = {
        k: v
        for k, v in handler.headers.items()
        if k.lower() not in ("transfer-encoding", "expect", "connection")
    }
    if body is not None:
        headers["Content-Length"] = str(len(body))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(handler.command, handler.path, body=body, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.getheaders(), answer.read()
    finally:
        connection.close()


def _chunks(handler: http.server.BaseHTTPRequestHandler) -> bytes:
    out = b""
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        out += handler.rfile.read(size)
        handler.rfile.readline()
    while handler.rfile.readline().strip():
        pass
    return out


def upload_tree(port: int, directory: Path, prefix: str) -> None:
    """Uploads the files of a directory, without code of this project."""
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        put_object(port, f"{prefix}/{path.relative_to(directory).as_posix()}", path.read_bytes())


def put_object(port: int, name: str, data: bytes) -> None:
    """Writes an object."""
    _client(port).put_object(Bucket=BUCKET, Key=name, Body=data)


def get_object(port: int, name: str) -> bytes:
    """Content of an object."""
    body: bytes = _client(port).get_object(Bucket=BUCKET, Key=name)["Body"].read()
    return body


def list_objects(port: int, prefix: str) -> list[str]:
    """Names of the objects in a directory, relative to it."""
    pages = _client(port).get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
    return [found["Key"].removeprefix(f"{prefix}/") for page in pages for found in page.get("Contents", ())]


def delete_object(port: int, name: str) -> None:
    """Removes an object."""
    _client(port).delete_object(Bucket=BUCKET, Key=name)


def _client(port: int) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
