"""How every stage is called: options from dvc.yaml, one line for a user's mistake."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lvlmva_core.errors import InputError


def run(stage: Callable[..., Any]) -> None:
    """Run `stage` as a command whose options are the function's parameters.

    A user's mistake (InputError) is one line on stderr, exit code 1; Ctrl-C exits with 130.
    """
    spec = sys.modules["__main__"].__spec__
    name = spec.name if spec else stage.__module__
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=stage.__doc__)(_with_options(stage))
    try:
        code = app(standalone_mode=False)  # typer returns the exit code of Ctrl-C instead of raising
    except InputError as error:
        typer.echo(f"error: {name.removeprefix('stages.')}: {' '.join(str(error).split())}", err=True)
        raise SystemExit(1) from None
    except typer.Abort:
        raise SystemExit(130) from None
    if code:
        raise SystemExit(code)


def _with_options(stage: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with every parameter an option: typer would make arguments of those without a default."""

    @functools.wraps(stage)
    def command(**options: Any) -> Any:
        return stage(**options)

    signature = inspect.signature(stage, eval_str=True)
    options = [
        each.replace(annotation=Annotated[each.annotation, typer.Option()], kind=inspect.Parameter.KEYWORD_ONLY)
        for each in signature.parameters.values()
    ]
    command.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    return command
