"""The review page's server: what may be asked, and each verdict onto the disk before it is answered."""

from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lvlmva.page import FOLDER
from lvlmva.review_content import Content
from lvlmva.serving import HANDLERS, page_routes, read_body
from lvlmva.specification_server import SpecificationPage
from lvlmva_core.overrides import Event, Verdict, add_verdict, read_events, reviewer_file, standing, take_back
from lvlmva_core.pattern_names import give_name
from lvlmva_core.report.page import render_page


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
                *page_routes(FOLDER, index=self._index),
                *SpecificationPage(self._content.known).routes(),
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
            exception_handlers=HANDLERS,
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
        said = await read_body(request, Said)
        return await run_in_threadpool(self._write, said)

    async def _undo(self, request: Request) -> Response:
        undone = await read_body(request, TakenBack)
        event = await run_in_threadpool(take_back, self._overrides, undone.order, undone.reviewer)
        place = self._content.places.get((event.sample, event.segmentation))
        left = await run_in_threadpool(self._said_so_far, undone.reviewer)
        return JSONResponse({"place": place, "region": event.region, **left})

    async def _name(self, request: Request) -> Response:
        said = await read_body(request, Named)
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
