"""Commands as copies of a process that has the libraries in memory (`lvlmva.warm`).

To import them costs a command one to four seconds of processor time, most of what it does in a test. Tests of how a
command is killed start a process of their own.
"""

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lvlmva import warm

ROOT = Path(__file__).parents[2]
LIBRARIES = ("dvc.repo", "dvc.repo.reproduce", "dvc.commands.repro", "filelock", "httpx2", "jinja2", "openai", "rich")
LIBRARIES += ("rich.console", "rich.table", "ruamel.yaml", "safetensors.numpy")
PROGRAMS = {"dvc": "dvc", "lvlmva": "lvlmva.cli"}
TIMEOUT_S = 300


def run_program(
    command: Sequence[str], folder: Path, variables: dict[str, str], *, together: bool = False
) -> subprocess.CompletedProcess[str]:
    """A command to its end: DVC and the project's own as copies, any other as a process of its own."""
    name, *arguments = command
    if name in PROGRAMS:
        return run_module([PROGRAMS[name], *arguments], folder, variables, together=together)
    if name == "python" and arguments[0] == "-m" and arguments[1].startswith(("stages.", "lvlmva.")):
        return run_module(arguments[1:], folder, variables, together=together)
    errors = subprocess.STDOUT if together else subprocess.PIPE
    return subprocess.run(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=errors, text=True, check=False
    )


def run_module(
    arguments: Sequence[str], folder: Path, variables: dict[str, str], *, together: bool = False
) -> subprocess.CompletedProcess[str]:
    """`python -m` with these arguments in `folder`, to its end. together: what it prints as errors is in stdout too."""
    if arguments[0].startswith("stages."):  # it is a copy already, and need not become one
        variables = {key: value for key, value in variables.items() if key != warm.SOCKET}
    request = {
        "executable": sys.executable,
        "arguments": list(arguments),
        "folder": str(folder.resolve()),
        "environment": variables,
    }
    with (
        socket.socket(socket.AF_UNIX) as connection,
        open(os.devnull) as nothing,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as errors,
    ):
        files = [nothing.fileno(), out.fileno(), (out if together else errors).fileno()]
        connection.settimeout(TIMEOUT_S)
        connection.connect(address())
        socket.send_fds(connection, [json.dumps(request).encode() + b"\0"], files)
        ended = connection.recv(16)
        said = [_text(file.fileno()) for file in (out, errors)]
    assert ended, f"the process that ran {' '.join(arguments)} is gone: {''.join(said)}"
    return subprocess.CompletedProcess(list(arguments), int(ended), *said)


def _text(file: int) -> str:
    content = os.pread(file, os.fstat(file).st_size, 0)
    return content.decode().replace("\r\n", "\n").replace("\r", "\n")


@functools.cache
def address() -> str:
    """The socket of a process that is started at the first call, and ends with this one."""
    folder = tempfile.mkdtemp(prefix="lvlmva-")
    atexit.register(shutil.rmtree, folder)
    path = f"{folder}/socket"
    command = [sys.executable, "-m", __name__, path]
    server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    atexit.register(_end, server)
    while not Path(path).exists():
        assert server.poll() is None, "it ended at once"
        time.sleep(0.02)
    return path


def _end(server: subprocess.Popen[bytes]) -> None:
    if server.stdin:
        server.stdin.close()
    server.wait()


if __name__ == "__main__":
    warm.LIBRARIES += LIBRARIES
    warm.serve(sys.argv[1])
