"""Rows of critiques.jsonl and verdicts.jsonl: JSON lines, sorted by sample, the same bytes for the same content."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.calls import Record

Text = Annotated[str, Field(min_length=1)]
# of failures that asking again can mend; what follows is the reason
NO_CRITIQUE, NO_VERDICT = "no critique: ", "no verdict: "


class Region(BaseModel):
    """A region and the name of its colour."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    region: Annotated[int, Field(ge=0, lt=255)]
    color: Text


class Verdict(Region):
    """yes: the region is relevant; no: it is spurious or irrelevant.

    certainty: where several answers voted, the share of votes for this verdict.
    """

    verdict: Literal["yes", "no"]
    certainty: Annotated[float, Field(ge=0.0, le=1.0)] | None = None


class Answer(BaseModel):
    """One of several answers about a sample.

    place: 0 for the critic of the section, then 1, 2, ... for the further ones. index: of the critic's answers.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    place: Annotated[int, Field(ge=0)]
    index: Annotated[int, Field(ge=0)]
    critic: Text
    settings: dict[str, Any]
    failure: Text | None


class CritiqueAnswer(Answer):
    """A critique. judged: calls to the Judge by which a cascade decided whether to ask further."""

    critique: Text | None
    record: Record | None
    judged: list[Record] = Field(default_factory=list)


class JudgedAnswer(Answer):
    """Verdicts of a critique, region -> "yes" | "no", none after a failure; records: the Judge's calls."""

    verdicts: dict[str, Literal["yes", "no"]]
    records: list[Record]

    def by_region(self) -> dict[int, str]:
        """Region -> "yes" | "no"."""
        return {int(region): verdict for region, verdict in self.verdicts.items()}


AnyAnswer = TypeVar("AnyAnswer", bound=Answer)


def deciding(answers: Sequence[AnyAnswer], further: Sequence[str]) -> list[AnyAnswer]:
    """The answers that vote: all, or where a cascade asked further (reasons), those of the last critic."""
    last = max((each.place for each in answers), default=0)
    return [each for each in answers if not further or each.place == last]


class NotAsked(BaseModel):
    """Regions that nobody was asked about, since the prediction does not depend on them: they are not rejected.

    at_most: the share of the logit's typical size that no exchange of them moved it by more than
    (critique.independent_at_most). calls_saved: calls to critics; 0 where the sample's other regions were asked about.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    regions: Annotated[list[Region], Field(min_length=1)]
    at_most: Annotated[float, Field(ge=0.0)]
    calls_saved: Annotated[int, Field(ge=0)]


class Row(BaseModel):
    """What both files say of a sample.

    segmentation: digest of the label map (`regions.segmentation_digest`). critic: a stand-in's name, or a model's with
    its revision. settings: what the critic was told beyond the pictures. failure: why the sample has no critique or no
    verdicts, or None.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    sample: Text
    segmentation: Text
    critic: Text
    settings: dict[str, Any]
    failure: Text | None
    further: list[Literal["disagreement", "failure", "reliance"]] = Field(default_factory=list)
    not_asked: NotAsked | None = None

    def all_answers(self) -> Sequence[Answer]:
        """Several answers, or none where one was asked for."""
        return ()

    def critics(self) -> set[str]:
        """The names of all who criticised the sample."""
        return {each.critic for each in self.all_answers()} or {self.critic}


class CritiqueRow(Row):
    """A critique. record: the call that it came from; None for stand-ins and failures.

    answers: where several were asked for, all of them; `critique` is the first usable one of those that decide, and
    `record` None. least_answers: how many of these must be usable.
    """

    regions: list[Region]
    class_name: str
    critique: Text | None
    record: Record | None
    answers: list[CritiqueAnswer] = Field(default_factory=list)
    least_answers: Annotated[int, Field(ge=1)] = 1

    def all_answers(self) -> Sequence[CritiqueAnswer]:
        """Several answers, or none where one was asked for."""
        return self.answers

    @model_validator(mode="after")
    def _a_critique_or_a_failure(self) -> "CritiqueRow":
        nothing_to_ask = self.not_asked is not None and not self.regions
        if (self.critique is None) != (self.failure is not None or nothing_to_ask):
            raise ValueError("a row has either a critique or a failure")
        return self


class VerdictRow(Row):
    """Verdicts of a critique's regions, each once. records: the calls that they came from, all attempts in order.

    answers: where several were asked for, what each was judged to say; `verdicts` are their votes by the rule `votes`,
    and `records` empty.
    """

    judge: Text
    verdicts: list[Verdict]
    records: list[Record]
    answers: list[JudgedAnswer] = Field(default_factory=list)
    votes: Literal["majority", "unanimous"] = "majority"

    def all_answers(self) -> Sequence[JudgedAnswer]:
        """Several answers, or none where one was asked for."""
        return self.answers

    @model_validator(mode="after")
    def _verdicts_or_a_failure(self) -> "VerdictRow":
        if (self.verdicts and self.failure is not None) or (self.failure is None and not self.by_region()):
            raise ValueError("a row has either verdicts or a failure")
        if len({each.region for each in self.verdicts}) < len(self.verdicts):
            raise ValueError("a region has two verdicts")
        return self

    def by_region(self) -> dict[int, str]:
        """Region -> "yes" | "no"; what nobody was asked about is not rejected. Empty after a failure."""
        needless = [] if self.not_asked is None or self.failure is not None else self.not_asked.regions
        return {**{each.region: "yes" for each in needless}, **{each.region: each.verdict for each in self.verdicts}}

    def shares_rejecting(self) -> dict[int, float]:
        """Region -> share of the votes that reject it, 0..1.

        Raises:
            InputError: there were no votes.
        """
        if self.failure is None and any(each.certainty is None for each in self.verdicts):
            raise InputError(f"'{self.sample}' has one answer, which casts no votes; run `dvc repro critique`")
        return {
            each.region: (each.certainty or 0.0) if each.verdict == "no" else 1.0 - (each.certainty or 0.0)
            for each in self.verdicts
        }


AnyRow = TypeVar("AnyRow", bound=Row)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines sorted by `sample`, keys sorted."""
    ordered = sorted(rows, key=lambda row: row.sample)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(
        json.dumps(row.model_dump(exclude_unset=True), sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        for row in ordered
    )
    path.write_text(text, encoding="utf-8")


def read_rows(path: Path, kind: type[AnyRow]) -> list[AnyRow]:
    """Read rows, and check what each must hold and that no sample comes twice.

    Raises:
        InputError: naming the file and line.
    """
    try:
        # not splitlines(): prose may hold other characters that it takes for the end of a line
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {_REPAIR}") from error
    rows: dict[str, AnyRow] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = kind.model_validate(json.loads(line))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the row"
            message = first["msg"].removeprefix("Value error, ").lower()
            raise InputError(f"{path}, line {number}: {place}: {message}; {_REPAIR}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({error}); {_REPAIR}") from None
        if row.sample in rows:
            raise InputError(f"{path}, line {number}: second row for sample '{row.sample}'; {_REPAIR}")
        rows[row.sample] = row
    return list(rows.values())


_REPAIR = "restore it with `dvc checkout`, or delete it and run `dvc repro`"
