"""An S3 server for tests: moto's, as a process on loopback, and a proxy before it that loses connections on demand.

moto looks whether an object is there and puts it in two steps. One thread serves all requests here, one after the
other, so that nothing comes between the two, as in S3 itself.

    python -m tests.s3                        prints the port of a server
    python -m tests.s3 --without-conditions   of one that ignores If-None-Match and If-Match, as some do
"""

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUCKET = "hospitals"
SECRET = "wJalrXUtnFEMI/K7MDENG/loopback"


class S3:
    """A running server."""

    def __init__(self, port: int) -> None:
        self.port = port

    def variables(self, prefix: str = "", port: int | None = None, **more: str) -> dict[str, str]:
        """Variables of a process that uses the shared store below a prefix; port: of a proxy, if it goes through one.

        more: other variables.
        """
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
            "AWS_ACCESS_KEY_ID": "AKIALOOPBACK",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "LVLMVA_SHARED_STORE": f"s3://{BUCKET}/{prefix}",
            **more,
        }

    def client(self) -> Any:
        """boto3's client of this server."""
        import boto3

        named = {name.lower(): value for name, value in self.variables().items() if "ACCESS_KEY" in name}
        return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.port}", region_name="us-east-1", **named)

    def keys(self, prefix: str = "") -> list[str]:
        """Names of all objects below a prefix, without it."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"].removeprefix(prefix).lstrip("/") for page in pages for entry in page.get("Contents", [])]


@contextmanager
def running_s3(*arguments: str) -> Iterator[S3]:
    """Start a server process with an empty bucket, and end it afterwards."""
    command = [sys.executable, "-m", "tests.s3", *arguments]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=variables, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        try:
            server = S3(int(process.stdout.readline()))
            server.client().create_bucket(Bucket=BUCKET)
            yield server
        finally:
            process.kill()


def _serve() -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    moto = DomainDispatcherApplication(create_backend_app)

    def serve(environ: dict[str, Any], start_response: Any) -> Any:
        if "--without-conditions" in sys.argv:
            for name in ("HTTP_IF_NONE_MATCH", "HTTP_IF_MATCH"):
                environ.pop(name, None)
        return moto(environ, start_response)

    server = make_server("127.0.0.1", 0, serve, threaded=False)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


class Proxy:
    """Hands bytes on between clients and a server; `cut` says how it fails.

    cut: "" (it does not), "refuse" (no new connection), "request" or "answer" (a connection is reset after `after`
    bytes of what the client or the server sends; where an answer is cut, the server has done what was asked).
    """

    def __init__(self, to: int) -> None:
        self.to = to
        self.cut, self.after, self.times = "", 0, 0
        self.lost = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def fail(self, cut: str, after: int = 0, times: int = -1) -> None:
        """Fail so from now on, `times` times or (-1) until told otherwise."""
        self.cut, self.after, self.times = cut, after, times

    def _accept(self) -> None:
        while True:
            client, _ = self._listening.accept()
            threading.Thread(target=self._hand_on, args=(client,), daemon=True).start()

    def _fails(self, cut: str) -> bool:
        if self.cut != cut or self.times == 0:
            return False
        self.times -= 1
        self.lost += 1
        return True

    def _hand_on(self, client: socket.socket) -> None:
        if self._fails("refuse"):
            _reset(client)
            return
        with client, socket.create_connection(("127.0.0.1", self.to)) as server:
            passed = {client: 0, server: 0}
            while True:
                for side in select.select([client, server], [], [])[0]:
                    try:
                        content = side.recv(65536)
                    except OSError:
                        content = b""
                    if not content:
                        return
                    other = server if side is client else client
                    cut = "request" if side is client else "answer"
                    passed[side] += len(content)
                    if passed[side] > self.after and self._fails(cut):
                        with_rest = content[: max(0, len(content) - (passed[side] - self.after))]
                        other.sendall(with_rest)
                        time.sleep(0.02)
                        _reset(client)
                        return
                    other.sendall(content)


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    connection.close()


if __name__ == "__main__":
    _serve()
