"""How every stage is called: paths from dvc.yaml, one line for a user's mistake."""

import errno
import functools
import gc
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lvlmva.pipeline import paths
from lvlmva_core.errors import InputError


def run(stage: Callable[..., Any], *, in_processes: bool = False) -> None:
    """Run `stage` as a command whose options are the function's parameters.

    A parameter that is a Path has the path of its name in dvc.yaml as default, so that the commands stay short. A
    user's mistake (InputError) and a full disk are one line on stderr, exit code 1; Ctrl-C exits with 130.

    in_processes: whether the stage runs in as many as `compute.processes` of params.yaml says (`lvlmva.torchrun`).
    """
    gc.freeze()
    gc.enable()
    spec = sys.modules["__main__"].__spec__
    name = spec.name if spec else stage.__module__
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    try:
        app.command(help=stage.__doc__)(_with_options(stage, name if in_processes else None))
        code = app(standalone_mode=False)  # typer returns the exit code of Ctrl-C instead of raising
    except InputError as error:
        typer.echo(f"error: {name.removeprefix('stages.')}: {' '.join(str(error).split())}", err=True)
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno not in _FULL:
            raise
        typer.echo(
            f"error: {name.removeprefix('stages.')}: {error.filename or 'an output'} cannot be written "
            f"({error.strerror}); make room and repeat the command; what was paid for is in the store",
            err=True,
        )
        raise SystemExit(1) from None
    except typer.Abort:
        raise SystemExit(130) from None
    if code:
        raise SystemExit(code)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _with_options(stage: Callable[..., Any], in_processes: str | None) -> Callable[..., Any]:
    """The same function with every parameter an option: typer would make arguments of those without a default.

    in_processes: the module's name, where the stage may run in several.
    """

    @functools.wraps(stage)
    def command(**options: Any) -> Any:
        if in_processes:
            from lvlmva import torchrun

            return torchrun.in_processes(stage, in_processes, options)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise InputError("torchrun is for the stages train and align; start this one by itself")
        return stage(**options)

    known = paths()
    signature = inspect.signature(stage, eval_str=True)
    options = []
    for each in signature.parameters.values():
        default = Path(known[each.name]) if each.annotation is Path and each.name in known else each.default
        kind: Any = each.annotation
        annotation = Annotated[kind, typer.Option()]
        options.append(each.replace(annotation=annotation, kind=inspect.Parameter.KEYWORD_ONLY, default=default))
    command.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    return command
