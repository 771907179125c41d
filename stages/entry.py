"""How every stage is called: options from dvc.yaml, one line for a user's mistake."""

import sys
from collections.abc import Callable
from typing import Any

import typer

from lvlmva_core.errors import InputError


def run(stage: Callable[..., Any]) -> None:
    """Run `stage` as a command whose options are the function's parameters.

    A user's mistake (InputError) is one line on stderr, exit code 1; Ctrl-C exits with 130.
    """
    spec = sys.modules["__main__"].__spec__
    name = spec.name if spec else stage.__module__
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=stage.__doc__)(stage)
    try:
        app(standalone_mode=False)
    except InputError as error:
        typer.echo(f"error: {name.removeprefix('stages.')}: {' '.join(str(error).split())}", err=True)
        raise SystemExit(1) from None
    except typer.Abort:
        raise SystemExit(130) from None
