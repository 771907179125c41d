"""The study page's server: what a participant is asked, without a word about which side is which."""

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

from lvlmva.questionnaire import Questionnaire
from lvlmva.serving import HANDLERS, page_routes, read_body
from lvlmva_core.lvlm.offline import is_stand_in
from lvlmva_core.questionnaire import (
    Answer,
    Item,
    add_answer,
    answers_so_far,
    items_of,
    participant_file,
    standing_answers,
)

HERE = Path(__file__).parent


class Said(BaseModel):
    """An answer as the page sends it. item: place in the participant's order. answer: left, right, same, yes, ..."""

    model_config = ConfigDict(strict=True, extra="forbid")

    participant: str
    item: Annotated[int, Field(ge=0)]
    answer: str


class Study:
    """The routes of the page.

    Args:
        shown: the study. participant: who is suggested.
    """

    def __init__(self, shown: Questionnaire, participant: str | None) -> None:
        self._shown, self._participant = shown, participant

    def app(self) -> Starlette:
        """The application, to stand behind a Guard."""
        return Starlette(
            routes=[
                *page_routes(
                    HERE / "study_page", shared=[HERE / "review_page" / name for name in ("dom.js", "icon.svg")]
                ),
                Route("/api/study", self._study),
                Route("/api/items", self._items),
                Route("/api/items/{item:int}/{kind}.png", self._picture),
                Route("/api/answers", self._say, methods=["POST"]),
            ],
            exception_handlers=HANDLERS,
        )

    def _study(self, _: Request) -> Response:
        facts = self._shown.facts
        return JSONResponse(
            {
                "participant": self._participant,
                "samples": len(self._shown.samples),
                "critics": [{"name": name, "stand_in": is_stand_in(name)} for name in facts["critics"]],
                "judges": [{"name": name, "stand_in": is_stand_in(name)} for name in facts["judges"]],
            }
        )

    def _items(self, request: Request) -> Response:
        path = participant_file(self._shown.folder, request.query_params.get("participant", ""))
        answers = standing_answers(answers_so_far(path, self._shown.study))
        items = [
            {**self._asked(item), "answer": _seen(answers.get((item.sample, item.question)))}
            for item in self._items_of(path)
        ]
        return JSONResponse({"participant": path.stem, "items": items})

    def _asked(self, item: Item) -> dict[str, Any]:
        """A question without the sample's id, which may hold a name or a diagnosis."""
        facts = self._shown.facts_of(item.sample)
        asked = {"question": item.question, "class": facts["class"]}
        if item.question == "explanation":
            return asked
        asked |= {
            "rejected": [each["colour"] for each in facts["regions"] if each["verdict"] == "no"],
            "kept": [each["colour"] for each in facts["regions"] if each["verdict"] != "no"],
        }
        return {**asked, "critique": facts["critique"]} if item.question == "reasoning" else asked

    def _picture(self, request: Request) -> Response:
        path = participant_file(self._shown.folder, request.query_params.get("participant", ""))
        item = self._item(path, int(request.path_params["item"]))
        try:
            png = self._shown.picture(item, request.path_params["kind"])
        except ValueError as error:
            raise HTTPException(HTTPStatus.NOT_FOUND, str(error)) from None
        return Response(png, media_type="image/png")

    async def _say(self, request: Request) -> Response:
        said = await read_body(request, Said)
        return await run_in_threadpool(self._write, said)

    def _write(self, said: Said) -> Response:
        path = participant_file(self._shown.folder, said.participant)
        item = self._item(path, said.item)
        answer = said.answer
        if item.question == "explanation" and answer in ("left", "right"):
            answer = item.left if answer == "left" else {"before": "after", "after": "before"}[item.left]
        elif answer in ("before", "after"):
            raise HTTPException(HTTPStatus.BAD_REQUEST, "answer: expected left, right or same")
        kept = add_answer(self._shown.folder, self._shown.study, item, answer, path.stem)
        return JSONResponse({"item": said.item, "answer": _seen(kept)}, HTTPStatus.CREATED)

    def _item(self, path: Path, place: int) -> Item:
        items = self._items_of(path)
        if place >= len(items):
            raise HTTPException(HTTPStatus.NOT_FOUND, f"there are {len(items)} questions")
        return items[place]

    def _items_of(self, path: Path) -> list[Item]:
        return items_of(self._shown.samples, path.stem, self._shown.facts["seed"])


def _seen(answer: Answer | None) -> str | None:
    """An answer in the participant's own words: left or right, never before or after."""
    if answer is None or answer.answer not in ("before", "after"):
        return None if answer is None else answer.answer
    return "left" if answer.answer == answer.left else "right"
