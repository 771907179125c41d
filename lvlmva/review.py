"""`lvlmva review`: a page on this machine on which an expert judges regions (an extension)."""

import contextlib
import secrets
import socket
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from lvlmva.pipeline import paths
from lvlmva_core.errors import InputError


def review(
    reviewer: Annotated[str | None, typer.Option(help="your name, and so your file's; the page asks otherwise")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 0,
    browser: Annotated[bool, typer.Option(help="open the page; its address is printed in any case")] = True,
) -> None:
    """Serve the page on which an expert says for each region whether it is relevant.

    Each verdict goes to overrides/<reviewer>.csv at once; `dvc repro` then masks by it. Only this machine is listened
    to, and the address works once.
    """
    try:
        import uvicorn

        from lvlmva.review_server import Guard, Review
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; run `pip install 'lvlmva[review]'`") from error
    from lvlmva.review_content import read_content
    from lvlmva_core.overrides import read_reviews, reviewer_file

    known = {name: Path(path) for name, path in paths().items()}
    if not known:
        raise InputError("no dvc.yaml here; run it in the project's folder")
    read_reviews(known["overrides"])  # a bad row is said before anybody reviews
    if reviewer is not None:
        reviewer_file(known["overrides"], reviewer)
    content = read_content(known)
    sockets = _listen(port)
    port = sockets[0].getsockname()[1]
    token = secrets.token_urlsafe(32)
    guarded = Guard(
        Review(content, known["overrides"], reviewer).app(),
        frozenset(f"{host}:{port}" for host in ("127.0.0.1", "localhost", "[::1]")),
        token,
        f"lvlmva_review_{port}",  # cookies know no ports, and two projects may be open
    )
    address = f"http://127.0.0.1:{port}/?token={token}"
    typer.echo(address)
    typer.echo(f"{len(content.ids)} samples; verdicts go to {known['overrides']}/; Ctrl-C ends")
    if browser:
        webbrowser.open(address)
    config = uvicorn.Config(
        guarded,
        log_level="error",  # what somebody sent that is no HTTP is no news
        access_log=False,  # the token stands in an address
        lifespan="off",
        ws="none",
        http="h11",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run(sockets=sockets)


def _listen(port: int) -> list[socket.socket]:
    """Sockets on 127.0.0.1 and, where there is one, on [::1], of the same port.

    Raises:
        InputError: the port is taken.
    """
    try:
        first = _bound(socket.AF_INET, "127.0.0.1", port)
    except OSError as error:
        raise InputError(f"--port {port}: {error.strerror}; take another, or 0 for any that is free") from error
    sockets = [first]
    with contextlib.suppress(OSError):  # a machine without IPv6
        sockets.append(_bound(socket.AF_INET6, "::1", first.getsockname()[1]))
    return sockets


def _bound(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind((host, port))
        listening.listen()
    except OSError:
        listening.close()
        raise
    return listening
