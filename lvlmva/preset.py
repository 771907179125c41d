"""Presets: the params of an experiment or a critic, laid over params.yaml with the change shown."""

import difflib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lvlmva.changes import WHOLE, apply_changes, lay_over
from lvlmva.params import EXECUTION, load_params
from lvlmva_core.errors import InputError

DEFAULT = "decoy_digits"


def preset(
    name: Annotated[str, typer.Argument(help="decoy_mnist, knee, critics/gpt-4o, ...: a file under presets/")],
    changes: Annotated[list[str] | None, typer.Option("--set", "-S", help="section.key=value, laid over it")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the change, write nothing")] = False,
    params: Annotated[Path, typer.Option(help="the file to change")] = Path("params.yaml"),
    presets: Annotated[Path, typer.Option(help="where presets lie")] = Path("presets"),
) -> None:
    """Write a preset into params.yaml and show what changes.

    A preset that names a data set starts from the default preset, whatever params.yaml holds but for `execution`; any
    other (critics/..., all_methods) is laid over params.yaml as it is. Its `methods`, `retrained` and endpoints replace
    those that are there.
    """
    before = params.read_text(encoding="utf-8") if params.exists() else ""
    layer = read_preset(presets, name)
    content = _load(presets / f"{DEFAULT}.yaml" if "prepare" in layer else params)
    current = _load(params) if params.exists() else None
    if isinstance(current, Mapping) and EXECUTION in current:
        content[EXECUTION] = current[EXECUTION]
    lay_preset_over(content, layer, name)
    apply_changes(content, changes or [])
    text = io.StringIO()
    _yaml().dump(content, text)
    after = text.getvalue()
    candidate = params.with_name(params.name + ".candidate")
    candidate.write_text(after, encoding="utf-8")
    try:
        load_params(candidate)
        difference = list(
            difflib.unified_diff(
                before.splitlines(), after.splitlines(), str(params), f"{params} ({name})", lineterm=""
            )
        )
        typer.echo("\n".join(difference) if difference else f"{params} holds '{name}' already")
        if not dry_run:
            candidate.replace(params)
    finally:
        candidate.unlink(missing_ok=True)


def lay_preset_over(content: Any, layer: Any, name: str) -> None:
    """Lay the sections of a preset over params, in place.

    What stands in an endpoint belongs to one model: no key of another's stays. Raises InputError as `lay_over` does.
    """
    for choice in (key for key in WHOLE if key in layer):
        content[choice] = layer[choice]
    for section, values in layer.items():
        if isinstance(values, Mapping) and "endpoint" in values and isinstance(content.get(section), Mapping):
            content[section]["endpoint"] = None
    lay_over(content, layer, name)


def read_preset(presets: Path, name: str) -> Any:
    """The sections of a preset. Raises InputError where there is none of that name, or it is not YAML."""
    return _load(_file(presets, name))


def _file(presets: Path, name: str) -> Path:
    file = presets / f"{name}.yaml"
    if not file.is_file() or not file.resolve().is_relative_to(presets.resolve()):
        known = sorted(str(path.relative_to(presets).with_suffix("")) for path in presets.rglob("*.yaml"))
        raise InputError(f"no preset '{name}' under {presets}/; known: {', '.join(known)}")
    return file


def _yaml() -> YAML:
    yaml = YAML(pure=True)  # keeps comments
    yaml.width = 1000  # and lines
    yaml.preserve_quotes = True
    yaml.representer.add_representer(type(None), _spell_null)
    return yaml


def _spell_null(representer: Any, _: None) -> Any:
    """A null is written as the word, as params.yaml has it, not as nothing."""
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def _load(file: Path) -> Any:
    try:
        return _yaml().load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    except YAMLError as error:
        raise InputError(f"{file}: not valid YAML: {error}") from error
