"""The command `lvlmva`: a list of commands."""

import re
from itertools import pairwise
from typing import Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

from lvlmva.audit import audit
from lvlmva.batches import batches
from lvlmva.calibrate import calibrate
from lvlmva.calls import calls
from lvlmva.check import check
from lvlmva.check_model import check_model_command
from lvlmva.experiments import experiments
from lvlmva.explain_sample import explain_sample
from lvlmva.export import export as export_model
from lvlmva.gate import gate
from lvlmva.new import new
from lvlmva.pipeline import deps
from lvlmva.preset import preset
from lvlmva.repro import repro
from lvlmva.results import results
from lvlmva.review import review
from lvlmva.study import study
from lvlmva.sweep import sweep
from lvlmva.tables import tables
from lvlmva.work import work
from lvlmva_core.errors import InputError


class App(typer.Typer):
    """A command whose user mistakes are one line on stderr and exit code 1."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except InputError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise SystemExit(1) from None


class StudyOrExperiments(TyperCommand):
    """`lvlmva study` with words like bases=0..4 is `lvlmva experiments`; without, it is the user study."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        """The context of whichever of the two was meant."""
        values = ("-S", "--set", "--folder", "--participant")  # options after which a word is no word of its own
        if any(re.match(r"[a-z]+=", word) for before, word in pairwise(["", *args]) if before not in values):
            alone = typer.Typer()
            alone.command()(experiments)
            return get_command(alone).make_context(info_name, args, *rest, **extra)
        return super().make_context(info_name, args, *rest, **extra)


app = App(pretty_exceptions_enable=False, no_args_is_help=True)
calls.add_typer(batches)
app.add_typer(calls, name="calls")
app.command()(new)
app.command()(check)
app.command()(preset)
app.command()(repro)
app.command()(work)
app.command()(calibrate)
app.command()(results)
app.command("explain")(explain_sample)
app.command()(review)
app.command(cls=StudyOrExperiments)(study)
app.command()(experiments)
app.command()(sweep)
app.command()(tables)
app.command()(deps)
app.command("check-model")(check_model_command)
app.command("export")(export_model)
app.command()(gate)
app.command()(audit)

if __name__ == "__main__":
    app()
