"""Pages on this machine: who may ask a server, what it serves, and how it listens."""

import contextlib
import hmac
import json
import secrets
import socket
import webbrowser
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import typer
import uvicorn
from pydantic import ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lvlmva_core.errors import InputError

KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
LARGEST_BODY = 1 << 16  # bytes
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",  # pictures may be patients'
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def serve(app: ASGIApp, command: str, port: int, said: str, *, browser: bool) -> None:
    """Listen on 127.0.0.1 and [::1] until Ctrl-C; prints the address with its token, and then what is `said`.

    Args:
        app: to stand behind a Guard. command: which serves it. port: 0 for any that is free. browser: open the page.

    Raises:
        InputError: the port is taken.
    """
    sockets = _listen(port)
    port = sockets[0].getsockname()[1]
    token = secrets.token_urlsafe(32)
    guarded = Guard(
        app,
        frozenset(f"{host}:{port}" for host in ("127.0.0.1", "localhost", "[::1]")),
        token,
        f"{command.replace(' ', '_')}_{port}",  # cookies know no ports, and two projects may be open
        command,
    )
    address = f"http://127.0.0.1:{port}/?token={token}"
    typer.echo(address)
    typer.echo(f"{said}; Ctrl-C ends")
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


class Guard:
    """Lets through who holds the cookie that the one-time token was exchanged for, and who asks for this very host.

    The host is compared so that a name which was bound anew to 127.0.0.1 reaches nothing; writes must come from the
    page itself, as the browser says. command: which serves it, for messages.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str], token: str, cookie: str, command: str) -> None:
        self._app, self._hosts, self._cookie, self._command = app, hosts, cookie, command
        self._token: str | None = token
        self._session = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._answer(Request(scope))
        await (refusal or self._app)(scope, receive, send_with_headers)

    def _answer(self, request: Request) -> Response | None:
        """What is answered here; None where the request may go on."""
        headers = request.headers
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            return PlainTextResponse("refused: this server is not called that", HTTPStatus.MISDIRECTED_REQUEST)
        given = request.query_params.get("token")
        known = _same(request.cookies.get(self._cookie), self._session)
        if request.method == "GET" and request.url.path == "/" and given is not None:
            if not known and not _same(given, self._token):
                return PlainTextResponse(
                    f"refused: this address was used already, or is of another run; start `{self._command}` anew",
                    HTTPStatus.FORBIDDEN,
                )
            answer = RedirectResponse("/", HTTPStatus.SEE_OTHER)
            if not known:
                self._token = None
                answer.set_cookie(self._cookie, self._session, httponly=True, samesite="strict", path="/")
            return answer
        if not known:
            return PlainTextResponse(
                f"refused: open the address that `{self._command}` printed, with its token", HTTPStatus.FORBIDDEN
            )
        if request.method not in ("GET", "HEAD") and not _from_the_page(headers, hosts[0]):
            return PlainTextResponse("refused: only the page itself may write", HTTPStatus.FORBIDDEN)
        return None


def _same(given: str | None, wanted: str | None) -> bool:
    return given is not None and wanted is not None and hmac.compare_digest(given.encode(), wanted.encode())


def _from_the_page(headers: Headers, host: str) -> bool:
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return site == "same-origin"
    return origin == f"http://{host}"


def page_routes(
    folder: Path, at: str = "/", shared: Sequence[Path] = (), index: Callable[[Request], Response] | None = None
) -> list[Route]:
    """A route for each file of a page's folder, and for those that it shares with others.

    Args:
        at: where the page is; gives index.html, or what `index` makes of a request.
    """
    files = [file for file in sorted(folder.iterdir()) if file.suffix in KINDS and file.name != "index.html"]
    return [
        Route(at, index or _file(folder / "index.html")),
        *(Route(f"{at}{file.name}", _file(file)) for file in (*files, *shared)),
    ]


def _file(path: Path) -> Callable[[Request], Response]:
    def send(_: Request) -> Response:
        return Response(path.read_bytes(), media_type=KINDS[path.suffix])

    return send


async def read_body(request: Request, kind: type[Any]) -> Any:
    """A pydantic model from a request's JSON. Raises HTTPException where it is none, or too large."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {LARGEST_BODY} bytes")
    try:
        return kind.model_validate(json.loads(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise HTTPException(HTTPStatus.BAD_REQUEST, f"{where}: {first['msg'].lower()}") from None
    except (ValueError, RecursionError):
        raise HTTPException(HTTPStatus.BAD_REQUEST, "not JSON") from None


def _mistake(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": " ".join(str(error).split())}, HTTPStatus.CONFLICT)


def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)


HANDLERS: Any = {InputError: _mistake, HTTPException: _refused}  # what an error is told as


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
