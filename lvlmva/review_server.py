"""The review page's server: who may ask, what may be asked, and each verdict onto the disk before it is answered."""

import hmac
import json
import secrets
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lvlmva.page import FOLDER
from lvlmva.review_content import Content
from lvlmva_core.errors import InputError
from lvlmva_core.overrides import Event, Verdict, add_verdict, read_events, reviewer_file, standing, take_back
from lvlmva_core.pattern_names import give_name
from lvlmva_core.report.page import render_page

KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
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


class Said(BaseModel):
    """A verdict as the page sends it. place: of the sample, 0..N-1."""

    model_config = ConfigDict(strict=True, extra="forbid")

    reviewer: str
    place: Annotated[int, Field(ge=0)]
    region: Annotated[int, Field(ge=0)]
    verdict: Verdict
    note: str = ""


class TakenBack(BaseModel):
    """A verdict that is undone, by its number."""

    model_config = ConfigDict(strict=True, extra="forbid")

    reviewer: str
    order: Annotated[int, Field(ge=1)]


class Named(BaseModel):
    """What a reviewer calls a pattern, by its place in the page."""

    model_config = ConfigDict(strict=True, extra="forbid")

    reviewer: str
    pattern: Annotated[int, Field(ge=0)]
    name: str


class Guard:
    """Lets through who holds the cookie that the one-time token was exchanged for, and who asks for this very host.

    The host is compared so that a name which was bound anew to 127.0.0.1 reaches nothing; writes must come from the
    page itself, as the browser says.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str], token: str, cookie: str) -> None:
        self._app, self._hosts, self._cookie = app, hosts, cookie
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
                    "refused: this address was used already, or is of another run; start `lvlmva review` anew",
                    HTTPStatus.FORBIDDEN,
                )
            answer = RedirectResponse("/", HTTPStatus.SEE_OTHER)
            if not known:
                self._token = None
                answer.set_cookie(self._cookie, self._session, httponly=True, samesite="strict", path="/")
            return answer
        if not known:
            return PlainTextResponse(
                "refused: open the address that `lvlmva review` printed, with its token", HTTPStatus.FORBIDDEN
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


class Review:
    """The routes of the page.

    Args:
        content: what is shown. overrides: the folder of reviewers' files. reviewer: who is suggested.
    """

    def __init__(self, content: Content, overrides: Path, reviewer: str | None) -> None:
        self._content, self._overrides, self._reviewer = content, overrides, reviewer

    def app(self) -> Starlette:
        """The application, to stand behind a Guard."""
        return Starlette(
            routes=[
                Route("/", self._index),
                *(Route(f"/{file.name}", _file(file)) for file in sorted(FOLDER.iterdir()) if file.suffix in KINDS),
                Route("/api/page", self._page),
                Route("/api/found", self._found),
                Route("/api/samples/{place:int}/critique", self._critique),
                Route("/api/samples/{place:int}/labels", self._labels),
                Route("/api/samples/{place:int}/{kind}.png", self._picture),
                Route("/api/verdicts", self._verdicts, methods=["GET"]),
                Route("/api/verdicts", self._say, methods=["POST"]),
                Route("/api/undo", self._undo, methods=["POST"]),
                Route("/api/names", self._name, methods=["POST"]),
            ],
            exception_handlers={InputError: _mistake, HTTPException: _refused},
        )

    def _index(self, _: Request) -> Response:
        return Response(render_page(self._content.report(), FOLDER), media_type="text/html")

    def _page(self, _: Request) -> Response:
        return JSONResponse({**self._content.data(), "reviewer": self._reviewer, "folder": str(self._overrides)})

    def _found(self, request: Request) -> Response:
        return JSONResponse(self._content.with_words(request.query_params.get("words", "")))

    def _critique(self, request: Request) -> Response:
        return JSONResponse({"critique": self._content.critique(self._place(request))})

    def _labels(self, request: Request) -> Response:
        labels = self._content.label_maps[self._place(request)]
        return Response(labels.tobytes(), media_type="application/octet-stream")

    def _picture(self, request: Request) -> Response:
        try:
            png = self._content.picture(self._place(request), request.path_params["kind"])
        except ValueError as error:
            raise HTTPException(HTTPStatus.NOT_FOUND, str(error)) from None
        return Response(png, media_type="image/png")

    def _verdicts(self, request: Request) -> Response:
        return JSONResponse(self._said_so_far(request.query_params.get("reviewer", "")))

    async def _say(self, request: Request) -> Response:
        said = await _body(request, Said)
        return await run_in_threadpool(self._write, said)

    async def _undo(self, request: Request) -> Response:
        undone = await _body(request, TakenBack)
        event = await run_in_threadpool(take_back, self._overrides, undone.order, undone.reviewer)
        place = self._content.places.get((event.sample, event.segmentation))
        left = await run_in_threadpool(self._said_so_far, undone.reviewer)
        return JSONResponse({"place": place, "region": event.region, **left})

    async def _name(self, request: Request) -> Response:
        said = await _body(request, Named)
        return await run_in_threadpool(self._call, said)

    def _call(self, said: Named) -> Response:
        content, patterns = self._content, self._content.found[0]
        if said.pattern >= len(patterns):
            raise HTTPException(HTTPStatus.NOT_FOUND, f"there are {len(patterns)} patterns")
        n, region = patterns[said.pattern].anchor
        key = (content.ids[n], content.digests[n], region)
        return JSONResponse({"name": give_name(self._overrides, key, said.name, said.reviewer)}, HTTPStatus.CREATED)

    def _write(self, said: Said) -> Response:
        content = self._content
        if said.place >= len(content.ids):
            raise HTTPException(HTTPStatus.NOT_FOUND, f"there are {len(content.ids)} samples")
        if said.region not in content.shares[said.place]:
            raise HTTPException(HTTPStatus.NOT_FOUND, f"the sample has no region {said.region}")
        content.check_unchanged()
        key = (content.ids[said.place], content.digests[said.place], said.region)
        event = add_verdict(self._overrides, key, said.verdict, said.note, said.reviewer)
        return JSONResponse(_shown(event, said.place), HTTPStatus.CREATED)

    def _said_so_far(self, reviewer: str) -> dict[str, Any]:
        path = reviewer_file(self._overrides, reviewer)
        now = standing(read_events(path).events).values() if path.exists() else ()
        fitting = [(self._content.places.get((event.sample, event.segmentation)), event) for event in now]
        return {
            "file": str(path),
            "verdicts": [_shown(event, place) for place, event in fitting if place is not None],
            "stale": sum(place is None for place, _ in fitting),
        }

    def _place(self, request: Request) -> int:
        place = int(request.path_params["place"])
        if place >= len(self._content.ids):
            raise HTTPException(HTTPStatus.NOT_FOUND, f"there are {len(self._content.ids)} samples")
        return place


def _shown(event: Event, place: int) -> Mapping[str, Any]:
    said = {"verdict": event.verdict, "note": event.note, "order": event.order}
    return {"place": place, "region": event.region, **said}


def _file(path: Path) -> Any:
    def send(_: Request) -> Response:
        return Response(path.read_bytes(), media_type=KINDS[path.suffix])

    return send


async def _body(request: Request, kind: type[Any]) -> Any:
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
