"""Critique and judge where a sample gets more than one answer: several of one critic, several critics, a cascade."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from lvlmva.ask import criticise_by_model, judge_by_model
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.answers import alone, join_critiques, join_verdicts, tokens_of
from lvlmva_core.lvlm.budget import Spent, cost_usd, price_is_known
from lvlmva_core.lvlm.cases import Case
from lvlmva_core.lvlm.client import model_name
from lvlmva_core.lvlm.critic import criticise
from lvlmva_core.lvlm.judge import judge_by_stand_in
from lvlmva_core.lvlm.offline import CRITICS
from lvlmva_core.lvlm.records import CritiqueRow, VerdictRow
from lvlmva_core.lvlm.settings import ModelCritic, ModelJudge, Several, StandInJudge, is_detector
from lvlmva_core.lvlm.votes import CascadeCost, cascade_cost, largest_reliance, why_further

JudgeSettings = ModelJudge | StandInJudge
Rows = list[list[CritiqueRow]]  # of each case, the answers of one critic


def needs_truth(config: Several) -> bool:
    """Whether a critic knows true masks, or a cascade looks at attributions."""
    known = [CRITICS[each.critic].knows_truth for each in config.all_critics() if each.critic in CRITICS]
    return any(known) or (config.cascade is not None and config.cascade.reliance_above is not None)


def criticise_all(
    config: Several,
    judge: JudgeSettings,
    cases: Sequence[Case],
    class_names: list[str],
    prompts: Path,
    out: Path,
    *,
    dry_run: bool,
    batch: Path | None = None,
) -> list[CritiqueRow]:
    """A row a case, by all critics that params name; none after a dry run or an export.

    Args:
        judge: reads the first critics' answers where a cascade has to know whether they agree. prompts: all folders.
        out: where the rows will be written. batch: folder to export the missing calls to.

    Raises:
        InputError: an export of the calls to several critics, of which a cascade asks some only after others.
    """
    critics, bill = config.all_critics(), Spent()
    if batch is not None and len(critics) > 1:
        raise InputError("a batch holds the calls to one critic; export for each alone, with critique.critics empty")
    for line in warnings(config):
        typer.echo(line, err=True)

    def ask(place: int, about: Sequence[Case]) -> Rows:
        section = "critique" if place == 0 else f"critique.critics[{place - 1}]"
        found = _by_one(
            critics[place],
            about,
            class_names,
            prompts,
            out,
            dry_run=dry_run,
            section=section,
            bill=bill,
            batch=batch,
        )
        count = critics[place].answers()
        return [found[start : start + count] for start in range(0, len(found), count)]

    if config.one_answer():
        return [row for rows in ask(0, cases) for row in rows]
    typer.echo(_named(config), err=True)
    first = range(len(critics) if config.cascade is None else len(critics) - 1)
    given = [ask(place, cases) for place in first]
    if dry_run or batch is not None:
        if config.cascade is not None:
            typer.echo("critique: the cascade asks the last critic about all samples at most:", err=True)
            ask(len(critics) - 1, cases)
        return []
    answers = [
        [(place, index, row) for place in first for index, row in enumerate(given[place][number])]
        for number in range(len(cases))
    ]
    if config.cascade is None:
        return [join_critiques(of_case, least=config.least_answers) for of_case in answers]
    judged = _judge_each([[row for _, _, row in of_case] for of_case in answers], judge, prompts, out)
    reasons = [_why(config, case, rows) for case, rows in zip(cases, judged, strict=True)]
    asked = [number for number, why in enumerate(reasons) if why]
    last = dict(zip(asked, ask(len(critics) - 1, [cases[number] for number in asked]), strict=True))
    rows = [
        join_critiques(
            [*of_case, *((len(critics) - 1, index, row) for index, row in enumerate(last.get(number, [])))],
            least=config.least_answers,
            further=reasons[number],
            judged=[row.records for row in judged[number]],
        )
        for number, of_case in enumerate(answers)
    ]
    typer.echo(describe(cost_of(config, rows), critics[-1], _priced(config)), err=True)
    return rows


def judge_all(
    config: JudgeSettings,
    critiques: Sequence[CritiqueRow],
    prompts: Path,
    out: Path,
    *,
    dry_run: bool,
    batch: Path | None = None,
) -> list[VerdictRow]:
    """A row a critique: the Judge's verdicts, or the votes of several answers; none after a dry run or an export."""
    singles = [alone(row) for row in critiques]
    every = [single for of_row in singles for single in of_row]
    judged = _judge(config, every, prompts, out, dry_run=dry_run, batch=batch)
    if dry_run or batch is not None:
        return []
    found = iter(judged)
    return [
        join_verdicts(row, list(itertools.islice(found, len(of_row))), config.votes)
        for row, of_row in zip(critiques, singles, strict=True)
    ]


def name_of(critic: Any) -> str:
    """A critic's name as rows have it: a model's with its revision, or a stand-in's."""
    return model_name(critic.endpoint) if isinstance(critic, ModelCritic) else str(critic.critic)


def warnings(config: Several) -> list[str]:
    """What is worth saying of how several answers are asked for."""
    return [
        f"warning: {name}: {each.samples} answers at {why} may be copies of one; set a temperature above 0 and no seed"
        for place, each in enumerate(config.all_critics())
        if each.answers() > 1
        for name in ("critique" if place == 0 else f"critique.critics[{place - 1}]",)
        for why in ("temperature 0" if each.endpoint.temperature == 0 else "a fixed seed",)
        if each.endpoint.temperature == 0 or each.endpoint.seed is not None
    ]


def cost_of(config: Several, rows: Sequence[CritiqueRow]) -> CascadeCost:
    """What the answers of a cascade cost: USD at the prices in params where each model has one, else calls."""
    critics, priced = config.all_critics(), _priced(config)

    def cost(row: CritiqueRow, places: Sequence[int]) -> float:
        total = 0.0
        for each in row.answers:
            if each.place in places and each.record is not None:
                inputs, outputs = tokens_of(each.record)
                tier = each.record["response"].get("service_tier")
                tier = tier if isinstance(tier, str) else None
                total += cost_usd(critics[each.place].endpoint, inputs, outputs, tier=tier) if priced else 1.0
        return total

    final = len(critics) - 1
    asked = [row for row in rows if row.answers]
    return cascade_cost(
        [cost(row, range(final)) for row in asked], [cost(row, [final]) if row.further else None for row in asked]
    )


def describe(cost: CascadeCost, last: Any, priced: bool) -> str:
    """The cost of a cascade beside that of asking the last critic about everything, in one line."""

    def said(amount: float) -> str:
        return f"{amount:.4f} USD" if priced else f"{amount:.0f} calls"

    name = name_of(last)
    line = (
        f"critique: cascade: '{name}' was asked about {cost.asked_further} of {cost.samples} samples; all answers, "
        f"those in the store included, cost {said(cost.total)} ({said(cost.first)} first, {said(cost.last)} then)"
    )
    if cost.everything is None:
        return line
    return f"{line}; '{name}' about all samples: {said(cost.everything)} (from its mean)"


def _priced(config: Several) -> bool:
    return all(price_is_known(each.endpoint) for each in config.all_critics() if isinstance(each, ModelCritic))


def _named(config: Several) -> str:
    names = [f"{each.answers()} of '{name_of(each)}'" for each in config.all_critics()]
    if config.cascade is not None:
        names[-1] += " where the cascade asks further"
    return (
        f"critique: answers to each sample: {', '.join(names)}; each budget counts what critics before it bought in "
        "this run"
    )


def _by_one(
    config: Any,
    cases: Sequence[Case],
    class_names: list[str],
    prompts: Path,
    out: Path,
    *,
    dry_run: bool,
    section: str,
    bill: Spent,
    batch: Path | None,
) -> list[CritiqueRow]:
    if isinstance(config, ModelCritic):
        return criticise_by_model(
            config,
            cases,
            class_names,
            prompts / config.prompts,
            out,
            dry_run=dry_run,
            section=f"{section}.endpoint",
            bill=bill,
            batch=batch,
        )
    if dry_run or batch is not None:
        what = "detector" if is_detector(config.critic) else "stand-in"
        typer.echo(f"{section}: '{config.critic}' is a {what}; nothing to buy", err=True)
        return []
    return criticise(config, cases)


def _judge(
    config: JudgeSettings,
    rows: Sequence[CritiqueRow],
    prompts: Path,
    out: Path,
    *,
    dry_run: bool = False,
    batch: Path | None = None,
) -> list[VerdictRow]:
    if isinstance(config, ModelJudge):
        return judge_by_model(config, rows, prompts / config.prompts, out, dry_run=dry_run, batch=batch)
    if dry_run or batch is not None:
        typer.echo(f"judge: '{config.judge}' is a stand-in; nothing to buy", err=True)
        return []
    return judge_by_stand_in(config, rows)


def _judge_each(answers: Rows, config: JudgeSettings, prompts: Path, out: Path) -> list[list[VerdictRow]]:
    found = iter(_judge(config, [row for rows in answers for row in rows], prompts, out))
    return [list(itertools.islice(found, len(rows))) for rows in answers]


def _why(config: Several, case: Case, judged: Sequence[VerdictRow]) -> list[str]:
    if not case.regions():
        return []
    assert config.cascade is not None
    settings = config.cascade
    reliance = 0.0 if case.attribution is None else largest_reliance(case.attribution, case.segments)
    answers = [None if row.failure is not None else row.by_region() for row in judged]
    return why_further(answers, reliance, disagreement=settings.disagreement, reliance_above=settings.reliance_above)
