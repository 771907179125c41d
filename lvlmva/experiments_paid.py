"""What many experiments ask of models that are paid for: one plan and one budget over all bases.

The limits of an endpoint (`max_calls`, `max_cost_usd`) hold for the study as a whole, whatever number of bases it has
and however often it was killed. Everything that needs no model is done for all bases before anything is bought.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from lvlmva.ask import hydrate, open_calls
from lvlmva.experiments_folder import CRITICS, Piece, Study, do, is_done, run
from lvlmva.ledger import Ledger, keeping
from lvlmva.params import Params, load_params
from lvlmva.pipeline import paths
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.budget import price_is_known
from lvlmva_core.lvlm.settings import Endpoint, ModelCritic, ModelJudge

LEDGER = "paid.jsonl"


def endpoints(params: Params) -> dict[str, list[Endpoint]]:
    """Stage -> the models that it asks and pays for, as far as params say."""
    critics = [each for each in params.critique.all_critics() if isinstance(each, ModelCritic)]
    judges = [params.judge] if isinstance(params.judge, ModelJudge) else []
    return {
        "critique": [each.endpoint for each in critics if each.critic == "model"],
        "judge": [each.endpoint for each in judges if each.judge == "model"],
    }


def limits_of(stage: str, those: Sequence[Endpoint]) -> str:
    """The limits that hold for a stage over all bases, in words; with several models the narrowest comes first."""
    cost, calls = min(each.max_cost_usd for each in those), min(each.max_calls for each in those)
    if not all(price_is_known(each) for each in those):
        return f"{stage}: prices are not known; {calls} calls at most, over all bases (max_calls)"
    return f"{stage}: {cost:g} USD and {calls} calls at most, over all bases (max_cost_usd, max_calls)"


def ask_models(study: Study, *, yes: bool) -> list[Piece]:
    """Have critique and judge done for every base whose regions are there, after the plan over all of them.

    Args:
        yes: go on until a limit is reached where the plan may go beyond it, without a question.

    Returns:
        Pieces that failed, for lack of a budget or else.

    Raises:
        InputError: the plan may go beyond a limit, and nobody agreed.
    """
    failed: list[Piece] = []
    ledger = Ledger(study.folder / LEDGER)
    ready = [base for base in study.bases if is_done(study.folder, study.before_critics(base)[-1])]
    taken_in = False
    for stage in CRITICS:
        pieces = [Piece(stage, base) for base in ready if not is_done(study.folder, Piece(stage, base))]
        if not pieces:
            continue
        those = endpoints(load_params(pieces[0].folder(study.folder) / "params.yaml"))[stage]
        if those:
            if not taken_in:
                _take_in(study, pieces[0])
                taken_in = True
            _agree(study, stage, pieces, those, yes)
        for piece in pieces:
            try:
                with keeping(ledger):
                    do(study.folder, piece)
            except InputError as error:
                typer.echo(f"{piece.name} failed: {' '.join(str(error).split())}", err=True)
                failed.append(piece)
        ready = [base for base in ready if is_done(study.folder, Piece(stage, base))]
    return failed


def plan(study: Study, stage: str, pieces: Sequence[Piece]) -> Ledger:
    """What a stage would buy for these bases, which each says in a line, and what was paid before."""
    ledger = Ledger(study.folder / LEDGER)
    for piece in pieces:
        typer.echo(f"{piece.name}:", err=True)
        with keeping(ledger):
            run(study.folder, piece.folder(study.folder), stage, {"dry_run": True})
    return ledger


def _agree(study: Study, stage: str, pieces: Sequence[Piece], those: Sequence[Endpoint], yes: bool) -> None:
    """Say what a stage buys for all bases, and ask where that may be more than a limit allows."""
    ledger = plan(study, stage, pieces)
    calls = sum(estimate.new_calls for _, estimate in ledger.planned)
    cost = sum(estimate.cost_usd_at_most for _, estimate in ledger.planned)
    spent = ledger.spent(stage)
    typer.echo(
        f"{stage} of {len(pieces)} bases: {calls} calls to buy, at most {cost:.4f} USD; paid before in this study: "
        f"{spent.calls} calls, {spent.cost_usd:.4f} USD; {limits_of(stage, those)}",
        err=True,
    )
    over = [
        f"{name} = {limit:g}"
        for name, limit, wanted in (
            ("max_calls", min(each.max_calls for each in those), spent.calls + calls),
            ("max_cost_usd", min(each.max_cost_usd for each in those), spent.cost_usd + cost),
        )
        if wanted > limit
    ]
    if not over or not calls or yes:
        return
    limit = " and ".join(over)
    if sys.stdin.isatty() and typer.confirm(f"This may go beyond {limit}. Buy until that is reached, and stop there?"):
        return
    raise InputError(
        f"{stage}: what is to be bought for all bases may go beyond {limit}; raise the limit for this study with --set "
        f"{stage}.endpoint.{over[-1].partition(' ')[0]}=..., or buy until it is reached with --yes; nothing was bought"
    )


def _take_in(study: Study, piece: Piece) -> None:
    """Take the answers that the project has committed into the store, before anything is bought again."""
    params = load_params(piece.folder(study.folder) / "params.yaml")
    for name, those in zip(("critiques", "verdicts"), endpoints(params).values(), strict=True):
        if those:
            out = Path(paths()[name])
            hydrate(open_calls(out), out, required=not all(each.allow_unhydrated for each in those))


def is_paid(params: Params) -> bool:
    """Whether a critic or judge is a model that answers are bought from."""
    return any(endpoints(params).values())


def most_calls(params: Params, bases: int) -> dict[str, int]:
    """Stage -> how many first calls there can be over all bases, known before any region is."""
    samples = params.rank.n_samples
    critics = params.critique.all_critics()
    bought = [each.answers() for each in critics if isinstance(each, ModelCritic) and each.critic == "model"]
    every = sum(each.answers() for each in critics)
    judged = every if endpoints(params)["judge"] else 0
    return {"critique": bases * samples * sum(bought), "judge": bases * samples * judged}
