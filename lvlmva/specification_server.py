"""The page on which an expert edits the specification, beside the review page: what may be asked of it."""

from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lvlmva.serving import page_routes, read_body
from lvlmva.specification import Editor, as_json
from lvlmva_core.corrections import ENOUGH, as_dict, corrections_of, in_common
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.client import model_name
from lvlmva_core.lvlm.offline import is_stand_in
from lvlmva_core.lvlm.prompts import Specification

HERE = Path(__file__).parent
AT = "/specification/"


class Described(BaseModel):
    """A class and its description."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    description: str


class Edit(BaseModel):
    """An edit as the page sends it. digest: of the text that it began with. shown: of what was shown, to be saved."""

    model_config = ConfigDict(strict=True, extra="forbid")

    picture: str
    classes: list[Described]
    spurious_features: list[str]
    digest: str
    shown: str | None = None


class Asked(BaseModel):
    """A proposal is to be asked for. shown: the key of the question whose price was shown."""

    model_config = ConfigDict(strict=True, extra="forbid")

    shown: Annotated[str, Field(min_length=1)]


class SpecificationPage:
    """Its routes, which stand in the review page's application."""

    def __init__(self, known: dict[str, Path]) -> None:
        self._editor = Editor(known)

    def routes(self) -> list[Route]:
        """The page and what it asks for."""
        shared = [HERE / "review_page" / name for name in ("dom.js", "icon.svg")]
        return [
            *page_routes(HERE / "specification_page", at=AT, shared=shared),
            Route(f"{AT}api/specification", self._specification),
            Route(f"{AT}api/plan", self._plan, methods=["POST"]),
            Route(f"{AT}api/save", self._save, methods=["POST"]),
            Route(f"{AT}api/corrections", self._corrections),
            Route(f"{AT}api/question", self._question),
            Route(f"{AT}api/proposal", self._propose, methods=["POST"]),
        ]

    def _specification(self, _: Request) -> Response:
        editor = self._editor
        found, digest = editor.read()
        critique = editor.params().critique
        critics = [
            model_name(each.endpoint) if hasattr(each, "endpoint") else each.critic for each in critique.all_critics()
        ]
        return JSONResponse(
            {
                **as_json(found),
                "digest": digest,
                "file": str(editor.file()),
                "named": bool(getattr(critique, "name_spurious_feature", False)),
                "critics": [{"name": name, "stand_in": is_stand_in(name)} for name in critics],
            }
        )

    async def _plan(self, request: Request) -> Response:
        edit = await read_body(request, Edit)
        plan = await run_in_threadpool(self._editor.plan, _wanted(edit), edit.digest)
        return JSONResponse(vars(plan))

    async def _save(self, request: Request) -> Response:
        edit = await read_body(request, Edit)
        if edit.shown is None:
            raise InputError("nothing was shown yet; look at the change and its price first")
        digest = await run_in_threadpool(self._editor.save, _wanted(edit), edit.digest, edit.shown)
        return JSONResponse({"digest": digest}, HTTPStatus.CREATED)

    def _corrections(self, _: Request) -> Response:
        judged = self._editor.judged()
        asked = self._editor.model()
        return JSONResponse(
            {
                "corrections": len(corrections_of(judged)),
                "judged": len(judged),
                "enough": ENOUGH,
                "in_common": [as_dict(each) for each in in_common(judged)],
                "model": None if asked is None else model_name(asked[0].endpoint),
            }
        )

    def _question(self, _: Request) -> Response:
        return JSONResponse(self._editor.question())

    async def _propose(self, request: Request) -> Response:
        asked = await read_body(request, Asked)
        return JSONResponse(await run_in_threadpool(self._editor.propose, asked.shown))


def _wanted(edit: Edit) -> Specification:
    """What the page holds; a line break or a run of blanks is one blank, as in a folded text."""

    def plain(text: str, what: str) -> str:
        words = " ".join(text.split())
        if words in ("", "~", "null"):
            raise InputError(f"{what}: nothing is said here; write a description")
        return words

    names = [each.name for each in edit.classes]
    if len(set(names)) < len(names):
        raise InputError("a class comes twice")
    content: dict[str, Any] = {
        "picture": plain(edit.picture, "what the pictures are"),
        "classes": {each.name: plain(each.description, f"class '{each.name[:80]}'") for each in edit.classes},
        "spurious_features": [plain(each, "a spurious feature") for each in edit.spurious_features],
    }
    return Specification.model_validate(content)
