"""A process that has the libraries in memory and runs stages as copies of itself: on Linux, for `lvlmva repro`.

To import PyTorch takes longer than most stages of a small experiment. `lvlmva repro` starts one such process and names
its socket in the environment; `python -m stages.<name>` then hands over its arguments, folder, environment and open
files, waits, and ends as the copy ended. Only libraries are in memory: a copy imports the project's own code, so that
what runs is what lies in the folder.
"""

import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

SOCKET = "LVLMVA_WARM"  # environment variable: the path of the socket
LIBRARIES = ("torch", "pandas", "pyarrow.parquet", "zarr", "scipy.stats", "pydantic", "typer", "PIL.Image")
LONGEST_REQUEST = 1 << 20
REFUSED = b"no"


@contextlib.contextmanager
def warm() -> Iterator[None]:
    """While it is open, stages that are started below this process run as copies of a warm one, of one for all."""
    if not hasattr(os, "pidfd_open") or SOCKET in os.environ:  # not Linux, or started below one
        yield
        return
    with tempfile.TemporaryDirectory(prefix="lvlmva-") as folder:  # nobody else may enter it
        address = Path(folder) / "socket"
        server = subprocess.Popen([sys.executable, "-m", __name__, str(address)], stdin=subprocess.PIPE)
        os.environ[SOCKET] = str(address)
        try:
            yield
        finally:
            del os.environ[SOCKET]
            if server.stdin:
                server.stdin.close()  # it ends when nothing runs
            server.wait()


def hand_over() -> None:
    """In a `python -m stages.<name>`: if a warm process is there, let it run the stage and end as its copy ended."""
    address = os.environ.get(SOCKET)
    if address is None or sys.orig_argv[1:2] != ["-m"]:
        return
    request = {
        "executable": sys.executable,
        "arguments": sys.orig_argv[2:],
        "folder": str(Path.cwd()),
        "environment": {name: value for name, value in os.environ.items() if name != SOCKET},
    }
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(address)
            socket.send_fds(connection, [json.dumps(request).encode() + b"\0"], [0, 1, 2])
        except OSError:  # it is gone, or not there yet: the stage runs here
            return
        mine = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the copy too, which says how it ended
        answer = connection.recv(16)
        signal.signal(signal.SIGINT, mine)
    if answer == REFUSED:
        return
    if not answer:
        sys.stderr.write("error: the process that ran this stage is gone; repeat the command\n")
    code = int(answer or b"1")
    if code < 0:  # as the copy was, this process is killed
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(address: str) -> None:
    """Run stages that are handed over at `address`, until standard input is closed and the last of them has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(address)
        listener.listen()
        for name in LIBRARIES:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()  # a look through these objects would copy their pages
        selector.register(listener, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        running: dict[int, tuple[int, socket.socket]] = {}  # descriptor of a process -> its number, who waits for it
        awaited = True
        while awaited or running:
            for key, _ in selector.select():
                if key.fileobj == 0:
                    awaited = False
                    selector.unregister(0)
                elif key.fileobj is listener:
                    connection = listener.accept()[0]
                    if (process := _copy(connection, listener)) is None:
                        with contextlib.suppress(OSError):
                            connection.sendall(REFUSED)
                        connection.close()
                        continue
                    descriptor = os.pidfd_open(process)
                    running[descriptor] = process, connection
                    selector.register(descriptor, selectors.EVENT_READ)
                    selector.register(connection, selectors.EVENT_READ, process)
                elif key.data:  # whoever waited is gone, and the copy with it
                    selector.unregister(key.fileobj)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(key.data, signal.SIGKILL)
                elif key.fd in running:
                    process, connection = running.pop(key.fd)
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                    with contextlib.suppress(KeyError):
                        selector.unregister(connection)
                    with contextlib.suppress(OSError):
                        connection.sendall(str(code).encode())
                    connection.close()


def _copy(connection: socket.socket, listener: socket.socket) -> int | None:
    """Start what is asked for; None where nothing was, or by another Python."""
    received = b""
    descriptors: list[int] = []
    while not received.endswith(b"\0"):
        part, found, _, _ = socket.recv_fds(connection, LONGEST_REQUEST, 3)
        if not part:
            return None
        received += part
        descriptors += found
    request = json.loads(received[:-1])
    process: int | None = None
    if request["executable"] == sys.executable:
        with warnings.catch_warnings():
            # libraries have threads of their own, which do nothing before they are asked to
            warnings.simplefilter("ignore", DeprecationWarning)
            process = os.fork()
        if process == 0:
            connection.close()
            listener.close()
            _run(request, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    return process


def _run(request: dict[str, Any], descriptors: list[int]) -> NoReturn:
    """In the copy: become what was handed over."""
    code = 1
    try:
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(os.fdopen(number, "wb", closefd=False), "utf-8", errors, line_buffering=True)
            for number, errors in ((1, "strict"), (2, "backslashreplace"))
        )
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        for name in [name for name in sys.modules if name.partition(".")[0] == __package__]:
            del sys.modules[name]
        sys.path[0] = request["folder"]
        module, *sys.argv[1:] = request["arguments"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:  # noqa: BLE001 - nothing may leave the copy but by its end
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
